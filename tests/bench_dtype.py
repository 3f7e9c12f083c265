"""What a residual kept in bfloat16 instead of float32 costs, on the trained miniature.

    python tests/bench_dtype.py

Under bfloat16 autocast, as Wan2.1 runs on a GPU: PSNR in dB against the stock video (under the same
autocast), mean over prompts and seeds, for both modes and orders at 1/2 and 1/3 of the steps.
"""

import argparse
import itertools
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from bench_order import HERE, Batch, psnr
from torch import Tensor

from teacache_generate import (
    MODES,
    TeaCache,
    TeaCacheConfig,
    distances_of,
    plan_speedup,
    read_calibration,
    timesteps_of,
)

STEPS, SHIFT = 50, 5.0


class Rounded(TeaCache):
    """Residuals that have lost what bfloat16 cannot hold; the sum stays in float32."""

    def residual(self, kept: list[tuple[int, Tensor]]) -> Tensor:
        return super().residual([(step, r.bfloat16().float()) for step, r in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_dir", type=Path, default=HERE.parent / "assets" / "wan_nano")
    parser.add_argument("--pairs", type=int, default=16)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    batch = Batch(args.ckpt_dir, args.pairs, seed=2024)
    asked = SimpleNamespace(sample_solver="unipc", sample_steps=STEPS, sample_shift=SHIFT)
    timesteps = timesteps_of(asked, 1000)
    stock = batch.videos("unipc", SHIFT, TeaCacheConfig(STEPS, 0.0, ()), bfloat16=True)
    print(f"PSNR in dB to stock under bfloat16 autocast, mean of {args.pairs} prompts and seeds")
    print("mode             order  computed  float32  bfloat16    cost")
    for ret, order, speedup in itertools.product((False, True), (0, 1), (2, 3)):
        fit, _ = read_calibration(args.ckpt_dir / "teacache.json", MODES[ret])
        base = TeaCacheConfig.from_fit(fit, STEPS, use_ret_steps=ret, order=order)
        schedule = plan_speedup(
            base, timesteps, distances_of(args.ckpt_dir, timesteps, ret), speedup
        )
        config = replace(schedule.config, order=order)
        whole, rounded = (
            psnr(batch.videos("unipc", SHIFT, config, kind, bfloat16=True), stock)
            for kind in (TeaCache, Rounded)
        )
        print(
            f"{MODES[ret]:15}  {order:5}  {len(schedule.computed):8}  {whole:7.2f}  "
            f"{rounded:8.2f}  {whole - rounded:+6.2f}"
        )


if __name__ == "__main__":
    main()
