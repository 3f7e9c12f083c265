"""Draws this folder's pictures from fidelity.json, which tests/bench/bench_fidelity.py writes.

    python assets/draw.py [--json fidelity.json] [--compare x.compare.mp4] [--out FOLDER]

With --compare also compare.gif, from the video of a comparison. The shipped one is of

    python teacache_generate.py --wan_repo tests/wan_nano --ckpt_dir assets/wan_nano --prompt \\
        "a red ball moves right" --base_seed 42 --save_file x.mp4 --teacache_compare 0.08 0.15
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import imageio
import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
WIDTH = 9  # inches: at 900 pixels, as a README shows it, a font of 12 points is 17 pixels high
COLOURS = {
    "TeaCache, plain": "#0072b2",
    "TeaCache, retention steps": "#d55e00",
    "sigma": "#cc79a7",
    "evenly spaced": "#009e73",
    "fewer steps": "#222222",
}
MODES = {"plain": "#0072b2", "retention": "#d55e00", "sigma": "#cc79a7"}
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
    """Computed steps, distance and accumulated value of each mode at its default threshold."""
    figure, grid = plt.subplots(
        3, 3, figsize=(WIDTH, 6), sharex=True, sharey="row", height_ratios=(0.4, 2, 2)
    )
    for column, (mode, run) in zip(grid.T, found["schedules"].items(), strict=True):
        steps, colour = run["steps"], MODES[mode]
        computed = [i for i, step in enumerate(steps) if step["computed"]]
        draw_marks(column[0], computed, len(steps), colour)
        column[0].set_title(f"{mode}: {len(computed)} of {len(steps)}", loc="left")
        if mode == "sigma":
            draw_noise_level(column[1], [step["timestep"] / 1000 for step in steps], colour)
        else:
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
    """Draw a box a step, in colour where it is computed."""
    filled = [colour if i in computed else SKIPPED for i in range(steps)]
    axes.bar(range(steps), 1, color=filled)
    axes.set(yticks=[], ylim=(0, 1))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)


def draw_noise_level(axes: Axes, sigmas: list[float], colour: str) -> None:
    """Draw the signal of "sigma" on an axis of its own."""
    axes.grid(False)
    axes.tick_params(left=False)
    own = axes.twinx()
    own.plot(range(len(sigmas)), sigmas, color=colour, marker="o", markersize=3)
    own.set_ylabel("noise level")
    own.spines["right"].set_visible(True)
    own.grid(False)
    own.set_ylim(0, 1.05)


def moving_picture(video: Path, file: Path) -> None:
    """Write a video as a GIF that repeats, 800 pixels wide, with 64 colours for all frames."""
    with imageio.get_reader(video) as reader:
        frames = [Image.fromarray(frame) for frame in reader]
        milliseconds = 1000 / reader.get_meta_data()["fps"]
    for frame in frames:
        frame.thumbnail((800, 800))
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, i * height))
    palette = strip.quantize(64)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(file, save_all=True, append_images=others, duration=milliseconds, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE / "fidelity.json")
    parser.add_argument("--compare", type=Path, help="the video for compare.gif")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    found = json.loads(args.json.read_text())
    plt.rcParams.update(STYLE)
    for draw in (drift, schedule):
        draw(found).savefig(args.out / f"{draw.__name__}.png", dpi=200, facecolor="white")
    if args.compare:
        moving_picture(args.compare, args.out / "compare.gif")


if __name__ == "__main__":
    main()
