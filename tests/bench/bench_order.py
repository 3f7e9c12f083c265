"""What --teacache_order 1 gives over order 0, over a grid of settings, on the trained miniature.

    python tests/bench/bench_order.py
    python tests/bench/bench_order.py --against-index

PSNR in dB against the stock video of the same prompt and seed, mean over the pairs, for solvers,
numbers of steps, shifts and guidance scales, over three families of schedules:
  TeaCache's   both modes, at 3/4, 1/2, 1/3 and 1/4 of the steps computed
  even         every 2nd, 3rd and 4th step, and the last
  early        a fifth of the steps, then every 3rd to 7th, and the last
Prints the table, the mean gain by schedule, and the worst cells. --against-index adds the rule that
order 1 was before, along the step index.
"""

import argparse
import importlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "wan_nano"), str(TESTS / "wan_nano_training")]

from clips import pick  # noqa: E402
from scripted import scripted  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.text2video import WanT2V  # noqa: E402

import teacache_generate  # noqa: E402
from teacache_generate import (  # noqa: E402
    PLAIN,
    RELEASES,
    RETENTION,
    Reach,
    Residuals,
    TeaCache,
    TeaCacheConfig,
    Wan,
    distances_of,
    plan_speedup,
    read_coefficients,
    shadow,
    teacache,
)

WAN = Wan(importlib.import_module("generate"), RELEASES[0])
SHARES = {"3/4": 0.75, "1/2": 0.5, "1/3": 1 / 3, "1/4": 0.25}
HALF = ("1/2", "every 2")  # schedules that compute half of the steps
# Wan2.1's defaults, then one or more of them changed
SETTINGS = (
    ("unipc", 50, 5.0, 5.0),
    ("dpm++", 50, 5.0, 5.0),
    ("unipc", 30, 5.0, 5.0),
    ("unipc", 80, 5.0, 5.0),
    ("unipc", 50, 3.0, 5.0),
    ("unipc", 50, 8.0, 5.0),
    ("unipc", 50, 5.0, 2.0),
    ("unipc", 50, 5.0, 8.0),
    ("dpm++", 40, 3.0, 6.0),
    ("dpm++", 60, 8.0, 4.0),
)


@dataclass(frozen=True)
class Setting:
    """What a pipeline is asked for."""

    solver: str
    steps: int
    shift: float
    guide_scale: float

    def args(self, folder: Path) -> SimpleNamespace:
        """The same as generate.py's flags."""
        return SimpleNamespace(
            task="t2v-nano",
            ckpt_dir=str(folder),
            sample_solver=self.solver,
            sample_steps=self.steps,
            sample_shift=self.shift,
        )


@dataclass(frozen=True)
class Cell:
    """One place of the grid, and the PSNR there: at order 0, at order 1, and by the old rule."""

    setting: Setting
    family: str
    schedule: str
    computed: int
    psnr: tuple[float, ...]

    @property
    def gain(self) -> float:
        return self.psnr[1] - self.psnr[0]

    @property
    def over_index(self) -> float:
        return self.psnr[1] - self.psnr[2]

    def __str__(self) -> str:
        s = self.setting
        figures = [f"{u:7.2f}" for u in self.psnr] + [f"{self.gain:+6.2f}"]
        figures += [f"{self.over_index:+6.2f}"] if len(self.psnr) > 2 else []
        return (
            f"{s.solver:6}  {s.steps:5}  {s.shift:5g}  {s.guide_scale:8g}  "
            f"{self.family:15}  {self.schedule:7}  {self.computed:8}  " + "  ".join(figures)
        )


class ByIndex(TeaCache):
    """Order 1 as it was: the historical baseline.

    Along the line through the last two computed residuals over the step index: not all the way,
    at most two gaps or 4 steps on, and nowhere from two that are more than 4 steps apart. All of
    these numbers were tuned on TeaCache's schedules.
    """

    def begin_call(self, *args: Any) -> None:
        super().begin_call(*args)
        if not isinstance(self.residuals, ResidualsByIndex):  # a model has begun
            self.residuals = ResidualsByIndex(self)

    @staticmethod
    def reach(since: int, gap: int) -> float:
        """since: steps since the last computed one; gap: steps between the last two."""
        return 0.75 * min(since, 2 * gap, 4) / gap if gap <= 4 else 0.0


class ResidualsByIndex(Residuals):
    def __init__(self, cache: ByIndex):
        super().__init__()
        self.cache = cache

    def guess(self, branch: int, order: int, reach: Reach) -> Tensor:
        if len(self.newest_first) < 2:
            return super().guess(branch, 0, reach)
        newest, older = (step.residuals[branch] for step in self.newest_first)
        before, last = self.cache.schedule.computed_steps[-2:]
        return newest + self.cache.reach(self.cache.step - last, last - before) * (newest - older)


class Batch:
    """Prompts and seeds, each sampled alone, as a video is, by the pipeline's parts."""

    def __init__(self, folder: Path, pairs: int, seed: int):
        self.pipeline = WanT2V(WAN_CONFIGS["t2v-nano"], folder)
        generator = torch.Generator().manual_seed(seed)
        prompts = [scene.prompt for scene in pick(pairs, generator, unseen=True)]
        encode = self.pipeline.text_encoder
        self.contexts = [encode(prompts, "cpu"), encode([""] * pairs, "cpu")]
        self.noise = torch.randn(pairs, 16, 5, 8, 8, generator=generator)

    @torch.no_grad()
    def videos(
        self,
        solver: str,
        shift: float,
        config: TeaCacheConfig,
        kind: type[TeaCache] = TeaCache,
        bfloat16: bool = False,
        guide_scale: float = 5.0,
    ) -> Tensor:
        """[pairs, 3, 17, 64, 64] in [-1, 1]; bfloat16: under autocast, as Wan2.1 on a GPU."""
        model, latents = self.pipeline.model, []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
        for x, *contexts in zip(self.noise, *self.contexts, strict=True):
            scheduler = self.pipeline.scheduler(solver, config.steps, shift)
            with autocast, shadow(teacache_generate, TeaCache=kind), teacache(model, config):
                for t in scheduler.timesteps:
                    cond, uncond = (
                        model([x], t=t[None], context=[context], seq_len=80)[0]
                        for context in contexts
                    )
                    flow = uncond + guide_scale * (cond - uncond)
                    x = scheduler.step(flow[None], t, x[None], return_dict=False)[0][0]
            latents.append(x)
        return torch.stack(self.pipeline.vae.decode(latents))


def psnr(videos: Tensor, stock: Tensor) -> float:
    """In dB, at most 100, mean over the pairs."""
    errors = (videos - stock).square().flatten(1).mean(1).clamp_min(4e-10)
    return float((10 * torch.log10(4 / errors)).mean())


def every(steps: int, stride: int, first: int = 0) -> list[int]:
    """The first so many steps, from there on one of every ``stride``, and the last."""
    return sorted({*range(first), *range(first, steps, stride), steps - 1})


def schedules(setting: Setting, folder: Path) -> Iterator[tuple[str, str, TeaCacheConfig, int]]:
    """Family, name, settings and number of computed steps of each schedule."""
    steps, args = setting.steps, setting.args(folder)
    row, timesteps = read_coefficients(folder / "teacache.json"), WAN.timesteps(args)
    for mode, (share, part) in itertools.product((PLAIN, RETENTION), SHARES.items()):
        base = TeaCacheConfig.from_row(row, steps, use_ret_steps=mode == RETENTION)
        plan = plan_speedup(base, timesteps, distances_of(WAN, args, timesteps, mode), 1 / part)
        yield mode, share, plan.config, len(plan.computed_steps)
    scripts = [("even", n, every(steps, n)) for n in (2, 3, 4)]
    scripts += [("early", n, every(steps, n, steps // 5)) for n in (3, 4, 5, 6, 7)]
    for family, n, script in scripts:
        yield family, f"every {n}", scripted(steps, script), len(script)


def cells(
    batch: Batch, folder: Path, settings: Sequence[Setting], against_index: bool
) -> Iterator[Cell]:
    """The grid, row by row."""
    rules = [(0, TeaCache), (1, TeaCache), (1, ByIndex)][: 2 + against_index]
    for setting in settings:

        def videos(
            config: TeaCacheConfig, kind: type[TeaCache] = TeaCache, setting: Setting = setting
        ) -> Tensor:
            return batch.videos(
                setting.solver, setting.shift, config, kind, guide_scale=setting.guide_scale
            )

        stock = videos(TeaCacheConfig(setting.steps, 0.0))
        for family, name, config, computed in schedules(setting, folder):
            found = [psnr(videos(replace(config, order=n), kind), stock) for n, kind in rules]
            yield Cell(setting, family, name, computed, tuple(found))


def report(found: Sequence[Cell]) -> Iterator[str]:
    """What the grid comes to, a line each."""
    yield "mean and least gain of order 1 over order 0"
    for family, name in dict.fromkeys((cell.family, cell.schedule) for cell in found):
        gains = [u.gain for u in found if (u.family, u.schedule) == (family, name)]
        yield f"  {family:15}  {name:7}  {np.mean(gains):+6.2f}  {min(gains):+6.2f}"
    gains = [cell.gain for cell in found]
    half = [cell.gain for cell in found if cell.schedule in HALF]
    yield f"half of the steps computed: {np.mean(half):+.2f} dB in the mean"
    yield f"all: {np.mean(gains):+.2f} dB in the mean; {sum(u < 0 for u in gains)} cells below 0"
    yield f"worst: {min(found, key=lambda u: u.gain)}"
    if len(found[0].psnr) > 2:
        over = [cell.over_index for cell in found]
        below = sum(u < 0 for u in over)
        yield f"over the old rule: {np.mean(over):+.2f} dB in the mean; {below} cells below 0"
        for family in dict.fromkeys(cell.family for cell in found):
            part = [cell.over_index for cell in found if cell.family == family]
            yield f"  {family:15}  {np.mean(part):+6.2f}  least {min(part):+6.2f}"
        yield f"worst: {min(found, key=lambda u: u.over_index)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", type=Path, default=TESTS.parent / "assets" / "wan_nano")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=2024, help="of prompts and noise")
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help="only the first so many"
    )
    parser.add_argument("--against-index", action="store_true", help="and the old rule of order 1")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    settings = [Setting(*setting) for setting in SETTINGS[: args.settings]]
    batch, found = Batch(args.ckpt_dir, args.pairs, args.seed), list[Cell]()
    print(f"PSNR in dB to stock, mean of {args.pairs} prompts and seeds")
    print(
        "solver  steps  shift  guidance  family           schedule  computed  order 0  order 1  "
        + ("  index    gain  over index" if args.against_index else "  gain")
    )
    grid = cells(batch, args.ckpt_dir, settings, args.against_index)
    for cell in tqdm(grid, total=16 * len(settings), disable=None):
        found.append(cell)
        tqdm.write(str(cell))
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
