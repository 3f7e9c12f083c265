"""What --teacache_order 1 gives over order 0 and over D2Cache's line, on the trained miniature.

    python tests/bench/bench_order.py [--pairs 8] [--seed 808] [--settings 2]

PSNR in dB against the stock video of the same prompt and seed, mean over the pairs, for solvers,
numbers of steps, shifts and guidance scales, and eight schedules:
  plain, retention  TeaCache's polynomials, at 1/2 and 1/3 of the steps
  even              every 2nd and 4th step, and the last
  early             a fifth of the steps, then every 3rd and 6th, and the last
D2Cache predicts new + (new - old) * accumulated / accumulated at the last trigger, the quotient
capped at 1. After a forced step the divisor is 0: here the last residual is then held, as at order
0 (published: divided by 1e-8). In schedules of no threshold the plain polynomial accumulates, and
the first fifth is forced. Prints the table, means by schedule, and the worst cells.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sampling import (
    NANO,
    Sampling,
    config_of,
    load,
    preview_of,
    psnr,
    sample,
    scripted,
    unseen_scenes,
)
from torch import Tensor
from tqdm import tqdm

import teacache_generate
from teacache_generate import ResidualCache, Schedule, TeaCacheConfig, patched

# Wan2.1's defaults, then one or more of them changed
SETTINGS = (
    Sampling(),
    Sampling(solver="dpm++"),
    Sampling(steps=30),
    Sampling(steps=80),
    Sampling(shift=3.0),
    Sampling(shift=8.0),
    Sampling(guide_scale=2.0),
    Sampling(guide_scale=8.0),
    Sampling(40, "dpm++", 3.0, 6.0),
    Sampling(60, "dpm++", 8.0, 4.0),
)
COLUMNS = ("order 0", "order 1", "D2Cache")


@dataclass(frozen=True)
class Case:
    """One schedule. accumulated: by step, what D2Cache extrapolates over."""

    name: str
    config: TeaCacheConfig
    computed: int
    accumulated: Sequence[float]


@dataclass(frozen=True)
class Cell:
    """One schedule at one setting: mean PSNR of each column."""

    sampling: Sampling
    case: Case
    psnr: np.ndarray

    @property
    def gain(self) -> float:
        return float(self.psnr[1] - self.psnr[0])

    @property
    def over_d2cache(self) -> float:
        return float(self.psnr[1] - self.psnr[2])

    def __str__(self) -> str:
        s, figures = self.sampling, "  ".join(f"{u:7.2f}" for u in self.psnr)
        return (
            f"{s.solver:6}  {s.steps:5}  {s.shift:5g}  {s.guide_scale:8g}  {self.case.name:17}  "
            f"{self.case.computed:8}  {figures}  {self.gain:+5.2f}  {self.over_d2cache:+12.2f}"
        )


class D2Cache(ResidualCache):
    """D2Cache's payload: a line over the accumulated distance, without a measured gain."""

    def __init__(self, levels: Sequence[float], accumulated: Sequence[float]):
        super().__init__(levels)
        self.accumulated = accumulated

    def predict(self, order: int, branch: int, step: int, of: str = "residual") -> Tensor:
        if len(self.history) < 2:
            return super().predict(0, branch, step, of)
        old, new = (getattr(computed, of)[branch] for computed in self.history)
        at_trigger = self.accumulated[self.history[-1].step]
        share = min(self.accumulated[step] / at_trigger, 1.0) if at_trigger else 0.0
        return new + (new - old) * share


def accumulate(increments: Schedule, computed: Sequence[int], forced: Sequence[int]) -> list[float]:
    """Sum of the increments since the last computed step; 0 on a forced one."""
    total, sums = 0.0, []
    for step, decision in enumerate(increments.decisions):
        total = 0.0 if step in forced or decision.increment is None else total + decision.increment
        sums.append(total)
        total = 0.0 if step in computed else total
    return sums


def every(steps: int, stride: int, first: int = 0) -> list[int]:
    """The ``first`` steps, every ``stride``-th from there, and the last."""
    return sorted({*range(first), *range(first, steps, stride), steps - 1})


def cases(sampling: Sampling, ckpt: Path) -> Iterator[Case]:
    """The eight schedules at a setting."""
    steps, wan = sampling.steps, load(ckpt)
    previews = {mode: preview_of(wan, mode, sampling) for mode in ("plain", "retention")}
    for mode, preview in previews.items():
        for n in (2, 3):
            plan = preview.plan_speedup(config_of(mode, steps, 1.0, ckpt), n)
            found, config = plan.computed_steps, plan.config
            sums = accumulate(plan, found, config.forced_steps)
            yield Case(f"{mode} 1/{n}", config, len(found), sums)
    # at a threshold that is never reached every step but the forced ones has an increment
    increments = previews["plain"].plan(config_of("plain", steps, 1e9, ckpt))
    for family, first, stride in (("even", 0, 2), ("even", 0, 4), ("early", 5, 3), ("early", 5, 6)):
        script = every(steps, stride, first and steps // first)
        sums = accumulate(increments, script, range(first and steps // first))
        name = f"{family} every {stride}"
        yield Case(name, scripted(steps, script), len(script), sums)


class Pairs:
    """Prompts and first latents."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.prompts = [scene.prompt for scene in unseen_scenes(count, generator)]
        self.noise = torch.randn(count, 16, 5, 8, 8, generator=generator)

    def videos(self, sampling: Sampling, config: TeaCacheConfig, ckpt: Path) -> list[np.ndarray]:
        pairs = zip(self.prompts, self.noise, strict=True)
        return [sample(load(ckpt), *pair, config, sampling)[0] for pair in pairs]


def cells(pairs: Pairs, settings: Sequence[Sampling], ckpt: Path) -> Iterator[Cell]:
    """The grid, row by row."""
    for sampling in settings:
        stock = pairs.videos(sampling, TeaCacheConfig(sampling.steps, 0.0), ckpt)
        for case in cases(sampling, ckpt):
            line = partial(D2Cache, accumulated=case.accumulated)
            columns = [(0, ResidualCache), (1, ResidualCache), (1, line)]
            means = []
            for order, residuals in columns:
                with patched(teacache_generate, ResidualCache=residuals):
                    found = pairs.videos(sampling, replace(case.config, order=order), ckpt)
                means.append(np.mean([psnr(*both) for both in zip(stock, found, strict=True)]))
            yield Cell(sampling, case, np.array(means))


def report(found: Sequence[Cell]) -> Iterator[str]:
    """Means by schedule and over all, and the worst cells."""
    yield f"mean over the settings  {'  '.join(COLUMNS)}   gain  over D2Cache"
    for name in [*dict.fromkeys(cell.case.name for cell in found), "all"]:
        part = [cell for cell in found if name in (cell.case.name, "all")]
        means = np.mean([cell.psnr for cell in part], axis=0)
        figures = "  ".join(f"{u:7.2f}" for u in means)
        yield f"  {name:20}  {figures}  {means[1] - means[0]:+5.2f}  {means[1] - means[2]:+12.2f}"
    for what, column in (("gain", "gain"), ("over D2Cache", "over_d2cache")):
        yield f"least {what}: {min(found, key=lambda cell: getattr(cell, column))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt_dir", type=Path, default=NANO)
    add("--pairs", type=int, default=8)
    add("--seed", type=int, default=2024, help="of prompts and noise")
    add("--settings", type=int, default=len(SETTINGS), help="only the first ones")
    args = parser.parse_args()
    pairs, found = Pairs(args.pairs, args.seed), list[Cell]()
    print(f"PSNR in dB to stock, mean of {args.pairs} prompts and seeds, torch {torch.__version__}")
    print(
        f"solver  steps  shift  guidance  schedule           computed  {'  '.join(COLUMNS)}   gain"
        "  over D2Cache"
    )
    settings = SETTINGS[: args.settings]
    for cell in tqdm(cells(pairs, settings, args.ckpt_dir), total=8 * len(settings), disable=None):
        found.append(cell)
        tqdm.write(str(cell))
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
