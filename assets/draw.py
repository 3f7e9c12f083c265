"""Draws this folder's pictures from fidelity.json, which tests/bench/bench_fidelity.py writes.

    python assets/draw.py [--json fidelity.json] [--out FOLDER]

compare.png is what the script itself writes:

    python teacache_generate.py --wan_repo tests/wan_nano --ckpt_dir assets/wan_nano --prompt \\
        "a red ball moves right" --base_seed 42 --save_file x.mp4 --teacache_compare 0.08 0.15 0.5
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
WIDTH = 9  # inches: at 900 pixels, as a README shows it, a font of 12 points is 17 pixels high
COLOURS = {
    "TeaCache, plain": "#0072b2",
    "TeaCache, retention steps": "#d55e00",
    "sigma": "#cc79a7",
    "evenly spaced": "#009e73",
    "fewer steps": "#222222",
}
SKIPPED = "#cccccc"
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def drift(found: dict[str, Any]) -> Figure:
    """PSNR against drift, a point for each setting that reuses residuals."""
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 4.2))
    rows = [row for row in found["rows"] if row["drift"] is not None and row["method"] in COLOURS]
    for (method, order), group in groupby(rows, lambda row: (row["method"], row["order"])):
        points = list(group)
        axes.scatter(
            [100 * row["drift"] for row in points],
            [row["psnr"] for row in points],
            s=32,
            color=COLOURS[method],
            facecolor="white" if order else COLOURS[method],
            label=None if order else method,
        )
    axes.set(xlabel="mean drift, %", ylabel="PSNR against stock, dB", xscale="log")
    axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(plt.NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    correlation = found["drift_against_psnr"]["spearman"]
    axes.set_title(
        f"{len(rows)} settings, rank correlation {correlation:.2f} (open: order 1)".replace(
            "-", "\N{MINUS SIGN}"
        ),
        loc="left",
    )
    axes.legend(fontsize=11)
    return figure


def schedule(found: dict[str, Any]) -> Figure:
    """Accumulated distance and threshold by step; a bar that reaches it is a computed step."""
    run, colour = found["schedules"]["plain"], COLOURS["TeaCache, plain"]
    steps, thresh = run["steps"], run["thresh"]
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    heights = [step["accumulated"] or thresh for step in steps]  # forced steps have no sum
    axes.bar(
        range(len(steps)), heights, color=[colour if s["computed"] else SKIPPED for s in steps]
    )
    axes.axhline(thresh, color="#222222", linewidth=1.2)
    first = next(i for i, step in enumerate(steps) if step["computed"] and step["accumulated"])
    axes.annotate(
        "reaches the threshold: compute, reset",
        (first, heights[first]),
        (first + 3, 1.8 * thresh),
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlabel="step", ylabel="accumulated distance", ylim=(0, 2 * thresh))
    axes.set_title(f"threshold {thresh:.3g}; grey: skipped", loc="right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE / "fidelity.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    found = json.loads(args.json.read_text())
    plt.rcParams.update(STYLE)
    for draw in (drift, schedule):
        draw(found).savefig(args.out / f"{draw.__name__}.png", dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
