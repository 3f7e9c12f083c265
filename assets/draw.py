"""Draw the pictures in this folder from the data in it, which tests/bench_fidelity.py measured.

python assets/draw.py [--json fidelity.json] [--fit wan_nano/teacache.json] [--out FOLDER]
"""

import argparse
import base64
import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
WIDTH = 9  # inches: at 900 pixels, as a README shows it, a font of 12 points is 17 pixels high
COLOURS = {
    "TeaCache, plain": "#0072b2",
    "TeaCache, retention steps": "#d55e00",
    "evenly spaced": "#009e73",
    "fewer steps": "#222222",
}
MODES = {"plain": "#0072b2", "retention steps": "#d55e00"}
DISTANCES = {  # where a point of teacache.json has a mode's distance, and of what it is
    "plain": (2, "time embedding"),
    "retention steps": (3, "time projection"),
}
SKIPPED = "#cccccc"
LINES = {0: "-", 1: "--", None: "-"}  # by order
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


def fidelity(told: dict[str, Any]) -> Figure:
    """PSNR and SSIM against speed-up, a line for each method and order."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 8.5), sharex=True)
    rows = [row for row in told["rows"] if row["method"] in COLOURS]
    for (method, order), group in groupby(rows, lambda row: (row["method"], row["order"])):
        points = list(group)
        label = method if order is None else f"{method}, order {order}"
        for axes, name in ((above, "psnr"), (below, "ssim")):
            axes.plot(
                [row["speedup"] for row in points],
                [row[name] for row in points],
                LINES[order],
                marker="o" if order != 1 else "s",
                markersize=4.5,
                markerfacecolor=COLOURS[method] if order != 1 else "white",
                color=COLOURS[method],
                label=label,
            )
    above.set(ylabel="PSNR against stock, dB")
    below.set(ylabel="SSIM against stock", xlabel="speed-up of the sampling, measured")
    below.xaxis.set_major_formatter("{x:g}x")
    above.set_title(
        f"{len(told['pairs'])} prompts and seeds; stock: {told['run']['steps']} steps",
        loc="left",
    )
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def schedule(told: dict[str, Any]) -> Figure:
    """Of both modes at the default threshold: computed steps, distance, accumulated value."""
    figure, grid = plt.subplots(
        3, 2, figsize=(WIDTH, 6.2), sharex=True, sharey="row", height_ratios=(0.5, 2, 2)
    )
    for column, (mode, run) in zip(grid.T, told["schedules"].items(), strict=True):
        steps, colour = run["steps"], MODES[mode]
        computed = [i for i, step in enumerate(steps) if step["computed"]]
        draw_marks(column[0], computed, len(steps), colour)
        column[0].set_title(f"{mode}: computes {len(computed)} of {len(steps)} steps", loc="left")
        distances = [step["distance"] for step in steps[1:]]
        column[1].plot(range(1, len(steps)), distances, color=colour, marker="o", markersize=3)
        heights = [step["accumulated"] for step in steps]
        filled = [colour if step["computed"] else SKIPPED for step in steps]
        column[2].bar(range(len(steps)), heights, color=filled)
        column[2].axhline(run["thresh"], color="#222222", linewidth=1.2)
        column[2].set_title(f"\N{HORIZONTAL BAR} threshold {run['thresh']:.3g}", loc="right")
        column[2].set_xlabel("step")
    for axes, name in zip(grid[:, 0], ("", "distance", "accumulated"), strict=True):
        axes.set_ylabel(name)
    return figure


def draw_marks(axes: Axes, computed: list[int], steps: int, colour: str) -> None:
    """A row of boxes, in colour where a step is computed."""
    filled = [colour if i in computed else SKIPPED for i in range(steps)]
    axes.bar(range(steps), 1, color=filled)
    axes.set(yticks=[], ylim=(0, 1))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)


def strip(told: dict[str, Any]) -> Figure:
    """Frames of one video: stock above, TeaCache at its thresholds below; seconds are medians."""
    rows = told["strip"]["rows"]
    seconds = {(u["method"], u["setting"]): u["seconds"] for u in told["rows"] if u["order"] != 1}
    shape = {"figsize": (WIDTH, 1.13 * len(rows) + 0.45), "width_ratios": (4.5, 1)}
    figure, grid = plt.subplots(len(rows), 2, **shape)
    for (frames, beside), row in zip(grid, rows, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(row["png"])))
        frames.imshow(image)
        for edge in range(image.height, image.width, image.height):  # the frames are square
            frames.axvline(edge - 0.5, color="white", linewidth=4)
        name, psnr = "stock", ""
        if row["setting"]:
            name, psnr = row["setting"], f", {row['psnr']:.1f} dB"
        computed = f"{row['computed']} of {rows[0]['computed']} steps"
        text = f"{name}\n{computed}\n{seconds[row['method'], row['setting']]:.2f} s{psnr}"
        beside.text(0, 0.5, text, transform=beside.transAxes, va="center", linespacing=1.4)
        frames.axis("off")
        beside.axis("off")
    figure.suptitle(f"{rows[-1]['method']}: “{told['strip']['prompt']}”")
    return figure


def fit(calibration: dict[str, Any]) -> Figure:
    """Both modes: how the residual changed at a distance, and the polynomial through it."""
    points = np.array([point for run in calibration["runs"] for point in run["points"]])
    figure, grid = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    for axes, (mode, colour) in zip(grid, MODES.items(), strict=True):
        made = calibration["fits"][mode]
        distances = np.linspace(*made["fitted_range"], 400)
        axes.scatter(points[:, DISTANCES[mode][0]], points[:, 4], s=10, color="#888888", lw=0)
        axes.plot(distances, np.polyval(made["coefficients"], distances), color=colour, linewidth=2)
        axes.set_title(f"{mode}: R² = {made['r_squared']:.3f}", loc="left")
        axes.set_xlabel(f"distance of the {DISTANCES[mode][1]}")
        axes.set_ylim(0, 1.05 * points[:, 4].max())
    grid[0].set_ylabel("change of the residual")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE / "fidelity.json")
    parser.add_argument("--fit", type=Path, default=HERE / "wan_nano" / "teacache.json")
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures go")
    args = parser.parse_args()
    told, calibration = json.loads(args.json.read_text()), json.loads(args.fit.read_text())
    plt.rcParams.update(STYLE)
    pictures = {
        "fidelity": fidelity(told),
        "schedule": schedule(told),
        "strip": strip(told),
        "fit": fit(calibration),
    }
    for name, figure in pictures.items():
        figure.savefig(args.out / f"{name}.png", dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
