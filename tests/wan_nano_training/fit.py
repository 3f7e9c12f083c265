"""Fits TeaCache's polynomials to the miniature: its teacache.json.

    python tests/wan_nano_training/fit.py [--ckpt_dir assets/wan_nano]

A polynomial is fitted with least squares to the change of all blocks' residual from step to step
(relative L1, both branches, all prompts) over the distance of the timestep embedding. Each default
threshold computes half of the steps. Takes 20 seconds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from sampling import MEASURES, NANO, Sampling, load, plan

from teacache_generate import Schedule, TeaCacheConfig, relative_l1

SAMPLING, FIRST_SEED = Sampling(), 1
MODES = ("plain", "retention")


class Changes(list[float]):
    """Hooks on a model's blocks: changes of their residual since the call two before it, which was
    the same branch's."""

    def __init__(self, blocks: nn.ModuleList):
        self.residuals = list[Tensor]()
        blocks[0].register_forward_pre_hook(lambda block, args: self.residuals.append(args[0]))
        blocks[-1].register_forward_hook(lambda block, args, out: self.leave(out))

    def leave(self, out: Tensor) -> None:
        self.residuals.append((out - self.residuals.pop()).float())
        if len(self.residuals) > 2:
            self.append(relative_l1(self.residuals[-1], self.residuals.pop(0)).item())


def fit(mode: str, stock: Schedule, changes: np.ndarray) -> dict[str, Any]:
    """A polynomial as in teacache.json. changes: [video, step, branch]."""
    distances = np.array([decision.distance for decision in stock.decisions[1:]])
    x = np.broadcast_to(distances[:, None], changes.shape).flatten()
    y = changes.flatten()
    coefficients = np.polyfit(x, y, 4).tolist()
    r_squared = 1 - np.square(y - np.polyval(coefficients, x)).mean() / y.var()
    half = stock.again(coefficients=coefficients).for_speedup(2.0)
    print(f"{mode}: R squared {r_squared:.2f}, {half.counts()} at {half.config.thresh:.4g}")
    return {"coefficients": coefficients, "thresholds": [half.config.thresh]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", type=Path, default=NANO)
    parser.add_argument("--prompts", type=Path, default=NANO / "prompts.txt")
    args = parser.parse_args()
    pipeline, found = load(args.ckpt_dir), []
    configs = {m: TeaCacheConfig(SAMPLING.steps, 0.0, (0.0,), MEASURES[m]) for m in MODES}
    stock = {mode: plan(pipeline, config, SAMPLING) for mode, config in configs.items()}
    seen = Changes(pipeline.model.blocks)
    for seed, prompt in enumerate(args.prompts.read_text().splitlines(), FIRST_SEED):
        pipeline.generate(prompt, seed=seed, sampling_steps=SAMPLING.steps)
        found.append(np.reshape(seen, (SAMPLING.steps - 1, 2)))
        seen.clear(), seen.residuals.clear()
    rule = {name: getattr(SAMPLING, name) for name in ("steps", "shift", "solver")}
    for mode in MODES:
        rule[mode] = fit(mode, stock[mode], np.array(found))
    (args.ckpt_dir / "teacache.json").write_text(json.dumps(rule, indent=1) + "\n")
    print(f"{len(found)} videos: {args.ckpt_dir / 'teacache.json'}")


if __name__ == "__main__":
    main()
