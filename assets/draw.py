"""Draws schedule.png from fidelity.json, which tests/bench/bench_fidelity.py writes.

    python assets/draw.py [--json fidelity.json] [--out FOLDER]

compare.png is what the script itself writes:

    python teacache_generate.py --wan_repo tests/wan_nano --ckpt_dir assets/wan_nano --prompt \\
        "a white ball bounces over a black ground" --base_seed 42 --save_file x.mp4 \\
        --teacache_compare 0.06 0.15 0.8
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
WIDTH = 9  # inches: at 900 pixels, as a README shows it, a font of 12 points is 17 pixels high
COMPUTED, SKIPPED = "#0072b2", "#cccccc"
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


def schedule(found: dict[str, Any]) -> Figure:
    """Accumulated distance and threshold by step; a bar that reaches it is a computed step."""
    run = found["schedules"]["plain"]
    steps, thresh = run["steps"], run["thresh"]
    figure, axes = plt.subplots(figsize=(WIDTH, 3))
    heights = [step["accumulated"] or thresh for step in steps]  # forced steps have no sum
    axes.bar(
        range(len(steps)), heights, color=[COMPUTED if s["computed"] else SKIPPED for s in steps]
    )
    axes.axhline(thresh, color="#222222", linewidth=1.2)
    first = next(i for i, step in enumerate(steps) if step["computed"] and step["accumulated"])
    axes.annotate(
        "reaches the threshold: compute, reset",
        (first, heights[first]),
        (first + 5, 1.12 * max(heights)),
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlabel="step", ylabel="accumulated distance", ylim=(0, 1.2 * max(heights)))
    axes.set_title(f"threshold {thresh:.3g}; grey: skipped", loc="right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE / "fidelity.json")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    found = json.loads(args.json.read_text())
    plt.rcParams.update(STYLE)
    schedule(found).savefig(args.out / "schedule.png", dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
