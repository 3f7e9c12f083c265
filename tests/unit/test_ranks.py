"""Two processes on gloo, with a toy model. Its first block hangs unless both run it."""

from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from toys import Block, Toy, sample

import teacache_generate
from teacache_generate import TeaCacheConfig, as_rank_0, teacache

STEPS, TOKENS = 12, 10
COMPUTED, COMPUTED_BY_1 = [0, 1, 4, 5, 8, 11], [0, 2, 3, 4, 9, 10, 11]


def run(computed: list[int], rank: int = 0, ranks: int = 1) -> dict:
    """Sample a rank's share of the tokens; its embedding grows before ``computed`` steps."""
    tokens = slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks)
    noise = torch.randn(STEPS, 2, 1, TOKENS, 3, generator=torch.Generator().manual_seed(0))
    residuals = torch.linspace(1, 2, STEPS)[:, None, None, None, None].sqrt() + noise / 50
    growth = torch.tensor([1.6 if step in computed else 1.05 for step in range(STEPS)]).cumprod(0)
    model = Toy(lambda step, branch: residuals[step, branch][:, tokens])
    model.embed = lambda t: growth[model.now[0]].expand(1, 2)

    def waiting(x, e):
        dist.barrier()
        return Block.forward(model.blocks[0], x, e)

    if ranks > 1:
        model.blocks[0].forward = waiting
    config = TeaCacheConfig(STEPS, 0.5, (1.0, 0.0), order=1)
    with torch.no_grad(), teacache(model, config) as cache:
        timesteps = [1000.0 - 80 * step for step in range(STEPS)]
        outputs = sample(model, timesteps, (1, TOKENS // ranks, 3))
    return {
        "computed": cache.computed_steps,
        "accumulated": [decision.accumulated for decision in cache.schedule.decisions],
        "drift": [cache.drift(0), cache.drift(1)],
        "outputs": torch.cat(outputs),
    }


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, timeout=patience, rank=rank, world_size=2)
    torch.save(run([COMPUTED, COMPUTED_BY_1][rank], rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_ranks_compute_the_steps_of_rank_0(ranks):
    assert run(COMPUTED_BY_1)["computed"] == COMPUTED_BY_1
    assert [rank["computed"] for rank in ranks] == [COMPUTED, COMPUTED]
    # 0.05, then twice 0.6, after step 1, which rank 0 computes; 0.6 before step 4
    assert ranks[1]["accumulated"][1:5] == pytest.approx([0.05, 0.6, 1.2, 1.8], abs=1e-6)


def test_gain_and_drift_are_those_of_all_tokens(ranks):
    alone = run(COMPUTED)
    both = torch.cat([rank["outputs"] for rank in ranks], dim=1)
    torch.testing.assert_close(both, alone["outputs"])
    for rank in ranks:
        assert rank["drift"] == pytest.approx(alone["drift"], rel=1e-6)


def test_the_decision_is_broadcast_on_the_models_device(monkeypatch):
    """NCCL refuses tensors on the CPU. A meta tensor has no value to read."""
    broadcast = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(teacache_generate, "across_ranks", lambda: True)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    with pytest.raises(InterruptedError):
        as_rank_0(True, torch.device("meta"))
    assert broadcast.call_args[0][0].device == torch.device("meta")
    assert broadcast.call_args[1] == {"src": 0}
