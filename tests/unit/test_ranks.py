"""Two processes on gloo, with a toy model whose blocks hang unless both ranks run them."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this is started on its own, too

from teacache_generate import TeaCacheConfig, teacache

STEPS, TOKENS = 12, 10
COMPUTED = [0, 1, 4, 5, 8, 11]
LINE = [0.0, 0.0, 0.0, 1.0, 0.0]  # the increment is the distance


class Toy(nn.Module):
    """Its tokens are split over the ranks, and its block waits for the other rank.

    growth: of the time embedding, from each step to the next.
    """

    def __init__(self, growth: list[float], rank: int = 0, ranks: int = 1):
        super().__init__()
        self.signals = torch.tensor([1.0, *growth]).cumprod(0)
        self.time_projection, self.blocks = nn.Identity(), nn.ModuleList([nn.Identity()])
        self.blocks[0].forward = self.block
        self.part, self.waits = (
            slice(rank * TOKENS // ranks, (rank + 1) * TOKENS // ranks),
            ranks > 1,
        )
        generator = torch.Generator().manual_seed(0)
        steps = torch.linspace(1, 2, STEPS)[:, None, None, None]
        self.residuals = steps.sqrt() + torch.randn(STEPS, 2, TOKENS, 3, generator=generator) / 50
        self.now = (0, 0)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        if self.waits:
            dist.barrier()
        return x + self.residuals[self.now][self.part]

    def forward(self, x, t):
        self.time_projection(self.signals[self.now[0]].expand(1, 2))
        h = x[0]
        for block in self.blocks:
            h = block(h)
        return [h]


def run(model: Toy, order: int = 1) -> dict:
    """What a rank decides and measures in a sampling."""
    config, bends, outputs = TeaCacheConfig(STEPS, 0.5, "plain", LINE, order=order), [], []
    with torch.no_grad(), teacache(model, config) as cache:
        for step in range(STEPS):
            t = torch.tensor([1000.0 - 80 * step])
            for branch in (0, 1):
                model.now = step, branch
                zeros = torch.zeros(1, model.part.stop - model.part.start, 3)
                outputs.append(model([zeros], t)[0])
            if cache.residuals.bends:  # two steps are computed
                bends.append([float(bend) for bend in cache.residuals.bends.values()])
    drifts = [(drift.step, *drift.by_order) for drift in cache.measurements.drifts]
    return {
        "computed": cache.schedule.computed_steps,
        "own": [step.accumulated for step in cache.schedule.decisions],
        "bends": bends,
        "drifts": drifts,
        "outputs": torch.stack(outputs)[:, 0],
    }


def growth_of(computed: list[int]) -> list[float]:
    """Of a time embedding by which these steps are computed: large before each of them."""
    return [1.6 if step in computed else 1.05 for step in range(1, STEPS)]


def process(rank: int, folder: str) -> None:
    """One of two: rank 0 would compute COMPUTED, rank 1 by itself other steps, more and fewer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    growth = growth_of(COMPUTED if rank == 0 else [2, 3, 4, 9, 10])
    torch.save(run(Toy(growth, rank, 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    both = [context.Process(target=process, args=(rank, str(folder))) for rank in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join(timeout=60)
    hang = [one.is_alive() for one in both]
    for one in both:
        one.kill()
    assert hang == [False, False]
    assert [one.exitcode for one in both] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict:
    return run(Toy(growth_of(COMPUTED)))


def test_alone_the_second_rank_would_decide_otherwise():
    assert run(Toy(growth_of([2, 3, 4, 9, 10])))["computed"] == [0, 2, 3, 4, 9, 10, 11]


def test_all_ranks_compute_the_steps_that_rank_0_decides_and_nobody_hangs(ranks, alone):
    assert alone["computed"] == COMPUTED
    assert [rank["computed"] for rank in ranks] == [COMPUTED, COMPUTED]


def test_the_other_rank_goes_on_from_rank_0s_decisions(ranks):
    """What it has accumulated begins anew where rank 0 computes, not where it would have."""
    assert ranks[0]["own"] != ranks[1]["own"]
    # by itself: .6 and .6 before 2 and 3, .05 before 1, .6 before 4
    assert ranks[1]["own"][1:5] == pytest.approx([0.05, 0.6, 1.2, 1.8], abs=1e-6)


def test_two_ranks_with_half_of_the_tokens_each_measure_what_one_process_does(ranks, alone):
    assert len({tuple(bends) for bends in alone["bends"]}) > 3
    assert sum(0 < bends[1] < 1 for bends in alone["bends"]) > 3
    for rank in ranks:
        assert torch.tensor(rank["bends"]).allclose(torch.tensor(alone["bends"]), rtol=1e-6)
        assert torch.tensor(rank["drifts"]).allclose(torch.tensor(alone["drifts"]), rtol=1e-6)


def test_two_ranks_with_half_of_the_tokens_each_guess_what_one_process_does(ranks, alone):
    whole = torch.cat([rank["outputs"] for rank in ranks], dim=1)
    torch.testing.assert_close(whole, alone["outputs"])
