"""Two processes on gloo, with a toy model. Its first block hangs unless both run it."""

from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from toys import Block, Toy, sample

import teacache_generate
from teacache_generate import Schedule, TeaCache, TeaCacheConfig, teacache

STEPS = 12
COMPUTED, COMPUTED_BY_1 = [0, 1, 4, 5, 8, 11], [0, 2, 3, 4, 9, 10, 11]


def run(computed: list[int]) -> Schedule:
    """Sample with an embedding that grows before ``computed`` steps."""
    growth = torch.tensor([1.6 if step in computed else 1.05 for step in range(STEPS)]).cumprod(0)
    model = Toy()
    model.embed = lambda t: growth[model.now[0]].expand(1, 2)

    def waiting(x, e):
        if dist.is_initialized():
            dist.barrier()
        return Block.forward(model.blocks[0], x, e)

    model.blocks[0].forward = waiting
    with teacache(model, TeaCacheConfig(STEPS, 0.5, (1.0, 0.0))) as cache:
        sample(model, STEPS)
    return cache.schedule


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, timeout=patience, rank=rank, world_size=2)
    torch.save(run([COMPUTED, COMPUTED_BY_1][rank]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_both_ranks_compute_the_steps_of_rank_0(tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert run(COMPUTED_BY_1).computed_steps == COMPUTED_BY_1
    assert ranks[0].computed_steps == COMPUTED
    assert ranks[1].decisions == ranks[0].decisions  # timesteps and distances too


def test_rank_0s_numbers_are_broadcast_on_the_models_device(monkeypatch):
    """NCCL refuses tensors on the CPU. A meta tensor has no value to read."""
    broadcast = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(teacache_generate, "is_distributed", lambda: True)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    cache = TeaCache(TeaCacheConfig(STEPS, 0.5, (1.0, 0.0)))
    cache.timestep = torch.tensor([999])
    with pytest.raises(InterruptedError):
        cache.decide(torch.zeros(2, device="meta"))
    assert broadcast.call_args[0][0].device == torch.device("meta")
    assert broadcast.call_args[1] == {"src": 0}
