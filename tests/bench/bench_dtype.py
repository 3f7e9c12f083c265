"""What a residual kept in bfloat16 instead of float32 costs, on the trained miniature.

    python tests/bench/bench_dtype.py

Under bfloat16 autocast, as Wan2.1 runs on a GPU: PSNR in dB against the stock video (under the same
autocast), mean over prompts and seeds, at half of the steps. What is kept is rounded; sums stay in
float32. bench_fidelity.py has how far bfloat16 itself is from float32.
"""

import argparse
import logging
from unittest.mock import patch

import numpy as np
import torch
from bench_fidelity import (
    ASSETS,
    METHODS,
    STEPS,
    STOCK,
    Setting,
    cached_settings,
    fidelity,
    load,
    pairs_of,
    planned,
    sample,
)
from torch import Tensor
from tqdm import tqdm

from teacache_generate import TeaCache


def learn_rounded(cache: TeaCache, *args: object, learn=TeaCache.learn) -> None:
    """In place of ``TeaCache.learn``: residuals lose what bfloat16 cannot hold."""
    learn(cache, *args)
    residuals: dict[int, Tensor] = cache.computing.residuals
    if cache.branch in residuals:
        residuals[cache.branch] = residuals[cache.branch].bfloat16().float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="prompts, a seed each")
    args = parser.parse_args()
    ckpt = ASSETS / "wan_nano"
    wan = load(ckpt)
    logging.disable(logging.WARNING)
    settings = [
        Setting(one.method, one.name, one.config, bfloat16=True)
        for mode in METHODS
        for one in cached_settings(mode, planned(wan, ckpt, mode, [STEPS // 2])[1])
    ]
    found = np.zeros((args.pairs, len(settings), 2))
    stock = Setting(STOCK.method, STOCK.name, STOCK.config, bfloat16=True)
    for i, pair in enumerate(tqdm(pairs_of(args.pairs), unit="pair")):
        reference = sample(wan, pair, stock)[0]
        for j, setting in enumerate(settings):
            found[i, j, 0] = fidelity(reference, sample(wan, pair, setting)[0])[0]
            with patch.object(TeaCache, "learn", learn_rounded):
                found[i, j, 1] = fidelity(reference, sample(wan, pair, setting)[0])[0]
    print(
        f"torch {torch.__version__}, {args.pairs} prompts and seeds, {STEPS // 2} of {STEPS} steps"
    )
    print(f"{'method':25}  order  float32  bfloat16    cost, dB")
    for setting, (whole, rounded) in zip(settings, found.mean(axis=0), strict=True):
        print(
            f"{setting.method:25}  {setting.config.order:5}  {whole:7.2f}  {rounded:8.2f}  "
            f"{whole - rounded:+10.2f}"
        )


if __name__ == "__main__":
    main()
