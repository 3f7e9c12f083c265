"""What --teacache_order 1 gives over order 0, over a grid of settings, on the trained miniature.

    python tests/bench_order.py

PSNR in dB against the stock video of the same prompts and seeds, mean over the pairs, for each
solver, number of steps, shift, guidance scale and mode, at 3/4, 1/2, 1/3 and 1/4 of the steps
computed. All pairs of a cell are one batch. Prints the table and its worst and mean cells.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "wan_nano")]

from clips import pick  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402
from wan.text2video import WanT2V  # noqa: E402

from teacache_generate import (  # noqa: E402
    MODES,
    TeaCache,
    TeaCacheConfig,
    distances_of,
    plan_speedup,
    read_calibration,
    teacache,
    timesteps_of,
)

SHARES = {0.75: "3/4", 0.5: "1/2", 1 / 3: "1/3", 0.25: "1/4"}
# solver, steps, shift, guidance scale: Wan2.1's defaults, then one or more of them changed
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
class Cell:
    """One place of the grid, and the PSNR that each order has there."""

    solver: str
    steps: int
    shift: float
    guide_scale: float
    mode: str
    share: str
    computed: int
    psnr: tuple[float, float]

    @property
    def gain(self) -> float:
        return self.psnr[1] - self.psnr[0]


class Batch:
    """Prompts and seeds that are sampled together, by the pipeline's model and schedulers."""

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
    ) -> Tensor:
        """[pairs, 3, 17, 64, 64] in [-1, 1]; bfloat16: under autocast, as Wan2.1 on a GPU."""
        scheduler = self.pipeline.scheduler(solver, config.steps, shift)
        model, x = self.pipeline.model, self.noise
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
        with autocast, teacache(model, config, kind):
            for t in scheduler.timesteps:
                cond, uncond = (
                    torch.stack(model(list(x), t=t[None], context=context, seq_len=80))
                    for context in self.contexts
                )
                flow = uncond + config.guide_scale * (cond - uncond)
                x = scheduler.step(flow, t, x, return_dict=False)[0]
        return torch.stack(self.pipeline.vae.decode(list(x)))


def psnr(videos: Tensor, stock: Tensor) -> float:
    """In dB, at most 100, mean over the pairs."""
    errors = (videos - stock).square().flatten(1).mean(1).clamp_min(4e-10)
    return float((10 * torch.log10(4 / errors)).mean())


def cells(batch: Batch, folder: Path) -> Iterator[Cell]:
    """The grid, row by row."""
    for solver, steps, shift, guide_scale in SETTINGS:
        asked = SimpleNamespace(sample_solver=solver, sample_steps=steps, sample_shift=shift)
        timesteps = timesteps_of(asked, 1000)
        off = TeaCacheConfig(steps, 0.0, (), guide_scale=guide_scale)
        stock = batch.videos(solver, shift, off)
        for ret, share in itertools.product((False, True), SHARES):
            made = replace(
                read_calibration(folder / "teacache.json", MODES[ret])[0], fitted_range=None
            )
            base = TeaCacheConfig.from_fit(made, steps, use_ret_steps=ret, guide_scale=guide_scale)
            schedule = plan_speedup(
                base, timesteps, distances_of(folder, timesteps, ret), 1 / share
            )
            yield Cell(
                *(solver, steps, shift, guide_scale, MODES[ret], SHARES[share]),
                len(schedule.computed),
                tuple(
                    psnr(batch.videos(solver, shift, replace(schedule.config, order=order)), stock)
                    for order in (0, 1)
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", type=Path, default=HERE.parent / "assets" / "wan_nano")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=2024, help="of prompts and noise")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    total = len(SETTINGS) * len(MODES) * len(SHARES)
    batch, found = Batch(args.ckpt_dir, args.pairs, args.seed), list[Cell]()
    print(f"PSNR in dB to stock, mean of {args.pairs} prompts and seeds")
    print("solver  steps  shift  guidance  mode             computed  order 0  order 1    gain")
    for cell in tqdm(cells(batch, args.ckpt_dir), total=total, disable=None):
        found.append(cell)
        tqdm.write(
            f"{cell.solver:6}  {cell.steps:5}  {cell.shift:5g}  {cell.guide_scale:8g}  "
            f"{cell.mode:15}  {cell.computed:8}  {cell.psnr[0]:7.2f}  {cell.psnr[1]:7.2f}  "
            f"{cell.gain:+6.2f}"
        )
    print(f"worst gain {min(cell.gain for cell in found):+.2f} dB; mean gain by share of the steps")
    for share in SHARES.values():
        gains = [cell.gain for cell in found if cell.share == share]
        print(f"  {share} computed: {np.mean(gains):+.2f} dB (least {min(gains):+.2f})")


if __name__ == "__main__":
    main()
