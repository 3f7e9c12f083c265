"""Fit TeaCache's polynomials to the miniature: its teacache.json, and the picture of the fit.

    python tests/wan_nano_training/fit.py [--ckpt_dir assets/wan_nano] [--picture assets/fit.png]

A polynomial is fitted, by least squares, to how much the residual of all blocks changes from step
to step (relative L1, both branches, all prompts) over the distance of the timestep embedding. Each
default threshold computes half of the steps. It runs one process: of a model whose tokens are split
over several it would see only its own. Seconds: 20.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parents[1]
ASSETS = TESTS.parent / "assets"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "wan_nano")]

from wan import WanT2V  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402

from teacache_generate import (  # noqa: E402
    Schedule,
    TeaCacheConfig,
    plan_speedup,
    relative_l1,
    teacache,
)

STEPS, SHIFT, SOLVER, FIRST_SEED = 50, 5.0, "unipc", 1
SIGNALS = {"plain": ("time embedding", "#0072b2"), "retention": ("time projection", "#d55e00")}


class Changes(list[float]):
    """Hooks on a model's blocks: how much their residual changed since the call two before it,
    which was the same branch's."""

    def __init__(self, blocks: nn.ModuleList):
        self.residuals = list[Tensor]()
        blocks[0].register_forward_pre_hook(lambda block, args: self.residuals.append(args[0]))
        blocks[-1].register_forward_hook(lambda block, args, out: self.leave(out))

    def leave(self, out: Tensor) -> None:
        self.residuals.append((out - self.residuals.pop()).float())
        if len(self.residuals) > 2:
            self.append(relative_l1(self.residuals[-1], self.residuals.pop(0)).item())


def fit(schedule: Schedule, changes: np.ndarray, axes: Axes) -> dict[str, Any]:
    """A polynomial as teacache.json has it, and its picture. changes: [video, step, branch]."""
    mode = schedule.config.mode
    timesteps, distances = zip(*((u.timestep, u.distance) for u in schedule.decisions), strict=True)
    x = np.broadcast_to(np.array(distances[1:])[:, None], changes.shape).flatten()
    y, line = changes.flatten(), np.linspace(x.min(), x.max(), 400)
    coefficients = np.polyfit(x, y, 4).tolist()
    r_squared = 1 - np.square(y - np.polyval(coefficients, x)).mean() / y.var()
    config = TeaCacheConfig(STEPS, 0.0, mode, coefficients)
    half = plan_speedup(config, timesteps, distances, 2.0)
    print(f"{mode}: R squared {r_squared:.2f}, {half.summary()} at {half.config.thresh:.4g}")
    axes.scatter(x, y, s=10, color="#888888", lw=0)
    axes.plot(line, np.polyval(coefficients, line), color=SIGNALS[mode][1], linewidth=2)
    axes.set_title(f"{mode}: R² = {r_squared:.3f}", loc="left")
    axes.set(xlabel=f"distance of the {SIGNALS[mode][0]}", ylim=(0, 1.05 * y.max()))
    return {"coefficients": coefficients, "thresholds": [half.config.thresh]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", type=Path, default=ASSETS / "wan_nano")
    parser.add_argument("--prompts", type=Path, default=ASSETS / "wan_nano" / "prompts.txt")
    parser.add_argument("--picture", type=Path, default=ASSETS / "fit.png")
    args = parser.parse_args()
    if int(os.getenv("WORLD_SIZE", "1")) > 1:
        parser.error("WORLD_SIZE: it runs one process: start it without torchrun")
    torch.set_num_threads(1)
    pipeline = WanT2V(WAN_CONFIGS["t2v-nano"], args.ckpt_dir)
    seen, found, schedules = Changes(pipeline.model.blocks), [], {}
    sampling = {"sampling_steps": STEPS, "shift": SHIFT, "sample_solver": SOLVER}
    for seed, prompt in enumerate(args.prompts.read_text().splitlines(), FIRST_SEED):
        mode = list(SIGNALS)[seed % 2]  # its distances are those of every video
        with teacache(pipeline.model, TeaCacheConfig(STEPS, 0.0, mode)) as cache:
            pipeline.generate(prompt, seed=seed, **sampling)
        schedules[mode] = cache.schedule
        found.append(np.reshape(seen, (STEPS - 1, 2)))
        seen.clear()
        seen.residuals.clear()
    plt.rcParams.update({"font.size": 12, "figure.constrained_layout.use": True})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    row: dict[str, Any] = {"steps": STEPS, "shift": SHIFT, "solver": SOLVER}
    for mode, axes in zip(SIGNALS, grid, strict=True):
        row[mode] = fit(schedules[mode], np.array(found), axes)
    grid[0].set_ylabel("change of the residual")
    (args.ckpt_dir / "teacache.json").write_text(json.dumps(row, indent=1) + "\n")
    figure.savefig(args.picture, dpi=200, facecolor="white")
    print(f"one process, {len(found)} videos: {args.ckpt_dir / 'teacache.json'}, {args.picture}")


if __name__ == "__main__":
    main()
