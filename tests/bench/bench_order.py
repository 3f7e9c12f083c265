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
the first fifth is forced. Gains are over order 0.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import sampling
import torch
from common import machine, scripted, table
from sampling import Sampling, load
from torch import Tensor
from tqdm import tqdm

import teacache_generate
from teacache_generate import Decision, ResidualCache, Schedule, TeaCacheConfig, patched

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
FIGURES = ("order 0", "order 1", "D2Cache", "gain", "D2Cache's gain")


@dataclass(frozen=True)
class Case:
    """One schedule. accumulated: by step, what D2Cache extrapolates over."""

    name: str
    config: TeaCacheConfig
    computed: int
    accumulated: Sequence[float]


class D2Cache(ResidualCache):
    """D2Cache's payload: a line over the accumulated distance, without a measured gain."""

    def __init__(self, decisions: Sequence[Decision], accumulated: Sequence[float]):
        super().__init__(decisions)
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


def cases(setting: Sampling) -> Iterator[Case]:
    """The eight schedules at a setting."""
    steps = setting.steps
    for mode in ("plain", "retention"):
        for n in (2, 3):
            plan = sampling.plan(load(), sampling.config_of(mode, steps), setting).for_speedup(n)
            found, config = plan.computed_steps, plan.config
            sums = accumulate(plan, found, config.forced_steps)
            yield Case(f"{mode} 1/{n}", config, len(found), sums)
    # at a threshold that is never reached every step but the forced ones has an increment
    increments = sampling.plan(load(), sampling.config_of("plain", steps, 1e9), setting)
    for family, first, strides in (("even", 0, (2, 4)), ("early", steps // 5, (3, 6))):
        for stride in strides:
            script = every(steps, stride, first)
            config = scripted(steps, script)
            sums = accumulate(increments, script, range(first))
            yield Case(f"{family} every {stride}", config, len(script), sums)


def pairs_of(count: int, seed: int) -> list[tuple[str, Tensor]]:
    """Prompts and first latents."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [scene.prompt for scene in sampling.pick(count, generator, unseen=True)]
    noise = torch.randn(count, 16, 5, 8, 8, generator=generator)
    return list(zip(prompts, noise, strict=True))


def cells(pairs: Sequence[Any], settings: Sequence[Sampling]) -> Iterator[dict[str, Any]]:
    """The table, row by row: each schedule at each setting."""

    def videos(setting: Sampling, config: TeaCacheConfig) -> list[np.ndarray]:
        return [sampling.sample(load(), *pair, config, setting)[0] for pair in pairs]

    for setting in settings:
        stock = videos(setting, TeaCacheConfig(setting.steps, 0.0))
        for case in cases(setting):
            line = partial(D2Cache, accumulated=case.accumulated)
            means = []
            for order, residuals in ((0, ResidualCache), (1, ResidualCache), (1, line)):
                with patched(teacache_generate, ResidualCache=residuals):
                    found = videos(setting, replace(case.config, order=order))
                means.append(np.mean([*map(sampling.psnr, stock, found)]))
            order_0, order_1, d2cache = means
            psnr = [order_0, order_1, d2cache, order_1 - order_0, d2cache - order_0]
            row = asdict(setting) | {"schedule": case.name, "computed": case.computed}
            yield row | dict(zip(FIGURES, map(float, psnr), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=2024, help="of prompts and noise")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first ones")
    args = parser.parse_args()
    pairs, settings = pairs_of(args.pairs, args.seed), SETTINGS[: args.settings]
    rows = list(tqdm(cells(pairs, settings), total=8 * len(settings)))
    print(f"PSNR in dB to stock, mean of {args.pairs} prompts and seeds; {machine()}")
    print(table(rows))
    summary = []
    for name, statistic in (("mean", np.mean), ("least", np.min)):
        found = {figure: float(statistic([row[figure] for row in rows])) for figure in FIGURES}
        summary.append({"": name, **found})
    print("\n" + table(summary))


if __name__ == "__main__":
    main()
