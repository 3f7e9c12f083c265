"""How near videos come to stock's, and how much sooner, on the trained miniature of Wan2.1.

    python tests/bench_fidelity.py [--pairs 24] [--thresholds 12] [--ckpt_dir assets/wan_nano]

Each prompt and seed is sampled by stock and by every setting in turn, in one process with one
thread; prompts and seeds are not among those of the training or the calibration. Seconds are of the
sampling alone: no text encoder, no VAE. A speed-up is against stock's seconds of the same prompt
and seed. Of both the median over the pairs is told: one stalled run must not move them. PSNR is of
a whole video, SSIM the mean over its frames; then mean and standard deviation over the videos. A
video equal to stock's has an infinite PSNR, which counts as 100 dB.
"""

import argparse
import base64
import csv
import io
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "assets"
sys.path[:0] = [str(HERE.parent), str(HERE / "wan_nano")]

from clips import pick  # noqa: E402
from wan import WanT2V, pipeline  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402

from teacache_generate import (  # noqa: E402
    MODES,
    Schedule,
    TeaCacheConfig,
    distances_of,
    plan,
    plan_speedup,
    read_calibration,
    shadow,
    teacache,
    timesteps_of,
)

STEPS, SOLVER, SHIFT, GUIDE_SCALE = 50, "unipc", 5.0, 5.0
PSNR_CAP = 100.0  # dB
FIRST_SEED = 1000
MOST, FEWEST = 45, 13  # computed steps, 90 % and 25 %
STRIP_FRAMES = 6


@dataclass(frozen=True)
class Setting:
    """One way to sample: a line of the table."""

    method: str
    name: str
    config: TeaCacheConfig


@dataclass(frozen=True)
class Pair:
    prompt: str
    seed: int


@dataclass(frozen=True)
class Measured:
    """One video, held against stock's."""

    computed: int
    seconds: float
    speedup: float
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Scripted(TeaCacheConfig):
    """Computes the steps that are named, whatever the distances say."""

    script: Sequence[int] = ()

    def always_computes(self, step: int) -> bool:
        return step in self.script or step >= self.steps


STOCK = Setting("stock", "", TeaCacheConfig(STEPS, 0.0, ()))


def planned(ckpt: Path, mode: str, targets: Sequence[int]) -> tuple[Schedule, list[Schedule]]:
    """Of a mode: the default threshold's schedule, and those of other thresholds, none twice.

    targets: how many steps to compute; for each, the smallest threshold that computes no more.
    """
    fit, _ = read_calibration(ckpt / "teacache.json", mode)
    ret = mode == MODES[True]
    run = SimpleNamespace(sample_solver=SOLVER, sample_steps=STEPS, sample_shift=SHIFT)
    timesteps = timesteps_of(run, WAN_CONFIGS["t2v-nano"].num_train_timesteps)
    distances = distances_of(ckpt, timesteps, ret)
    config = TeaCacheConfig.from_fit(fit, STEPS, use_ret_steps=ret)
    found = [plan_speedup(config, timesteps, distances, STEPS / (n + 0.5)) for n in targets]
    return plan(config, timesteps, distances), list({u.marks(): u for u in found}.values())


def teacache_settings(mode: str, schedules: list[Schedule]) -> list[Setting]:
    """A mode's schedules, all at order 0 and then all at order 1."""
    return [
        Setting(f"TeaCache, {mode}", f"thresh {config.thresh:.5g}", replace(config, order=order))
        for order in (0, 1)
        for config in (schedule.config for schedule in schedules)
    ]


def other_settings(targets: Sequence[int]) -> list[Setting]:
    """What costs the same and needs no distances."""
    fewer = [
        Setting("fewer steps", f"{n} sampling steps", TeaCacheConfig(n, 0.0, ())) for n in targets
    ]
    scripts = [np.linspace(0, STEPS - 1, n).round().astype(int).tolist() for n in targets]
    even = [
        Setting(
            "evenly spaced",
            f"every {STEPS / len(script):.3g} steps",
            Scripted(STEPS, 1.0, (0.0,), order=order, script=script),
        )
        for order in (0, 1)
        for script in scripts
    ]
    return fewer + even


def pairs_of(count: int) -> list[Pair]:
    """Prompts that the miniature was not trained on, a seed each."""
    scenes = pick(count, torch.Generator().manual_seed(0), unseen=True)
    return [Pair(scene.prompt, FIRST_SEED + i) for i, scene in enumerate(scenes)]


def sample(wan: WanT2V, pair: Pair, config: TeaCacheConfig) -> tuple[np.ndarray, int, float]:
    """A video [3, F, H, W] in [-1, 1], how many steps it computed, and its sampling's seconds."""
    quiet = shadow(pipeline, tqdm=lambda timesteps: timesteps)
    with quiet, teacache(wan.model, config) as cache:
        video = wan.generate(
            pair.prompt,
            sampling_steps=config.steps,
            sample_solver=SOLVER,
            shift=SHIFT,
            guide_scale=GUIDE_SCALE,
            seed=pair.seed,
            offload_model=False,
        )
    return video.cpu().numpy(), len(cache.schedule.computed), cache.seconds


def fidelity(stock: np.ndarray, video: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of videos [3, F, H, W] in [-1, 1]."""
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(stock, video, data_range=2)
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=2)
        for a, b in zip(stock.swapaxes(0, 1), video.swapaxes(0, 1), strict=True)
    ]
    return min(float(psnr), PSNR_CAP), float(np.mean(ssim))


def measure(wan: WanT2V, pairs: list[Pair], settings: list[Setting]) -> list[list[Measured]]:
    """By setting, a measurement for each pair. The settings take turns; the first is stock."""
    sample(wan, pairs[0], settings[0].config)  # warms up, and is dropped
    measured: list[list[Measured]] = [[] for _ in settings]
    with tqdm(total=len(pairs) * len(settings), unit="video", smoothing=0.02) as bar:
        for pair in pairs:
            for setting, found in zip(settings, measured, strict=True):
                video, computed, seconds = sample(wan, pair, setting.config)
                if setting is settings[0]:
                    stock, stock_seconds = video, seconds
                speedup = stock_seconds / seconds
                found.append(Measured(computed, seconds, speedup, *fidelity(stock, video)))
                bar.update()
    return measured


def row(setting: Setting, measured: list[Measured]) -> dict[str, Any]:
    """A line of the table, over the pairs: medians of times, means and deviations of fidelity."""
    told = {u.name: np.array([getattr(v, u.name) for v in measured]) for u in fields(Measured)}
    return {
        "method": setting.method,
        "order": setting.config.order if setting.config.thresh else None,  # nothing is skipped
        "setting": setting.name,
        "computed": int(told["computed"][0]),
        "seconds": round(float(np.median(told["seconds"])), 4),
        "speedup": round(float(np.median(told["speedup"])), 3),
        "psnr": round(told["psnr"].mean(), 2),
        "psnr_std": round(told["psnr"].std(), 2),
        "ssim": round(told["ssim"].mean(), 4),
        "ssim_std": round(told["ssim"].std(), 4),
    }


def strip(wan: WanT2V, pair: Pair, settings: list[Setting]) -> dict[str, Any]:
    """Some frames of one pair by each setting, side by side as a PNG; the first is stock."""
    told: list[dict[str, Any]] = []
    for setting in settings:
        video, computed, _ = sample(wan, pair, setting.config)
        if setting is settings[0]:
            stock = video
        chosen = video[:, np.linspace(0, video.shape[1] - 1, STRIP_FRAMES).round().astype(int)]
        side_by_side = np.concatenate(chosen.transpose(1, 2, 3, 0), axis=1)
        pixels, file = (
            ((side_by_side + 1) * 127.5).round().clip(0, 255).astype(np.uint8),
            io.BytesIO(),
        )
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        told.append(
            {
                "method": setting.method,
                "setting": setting.name,
                "computed": computed,
                "psnr": fidelity(stock, video)[0],
                "png": base64.b64encode(file.getvalue()).decode(),
            }
        )
    return {**asdict(pair), "rows": told}


def machine(wan: WanT2V) -> dict[str, Any]:
    """What the seconds were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return {
        "platform": platform.platform(),
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if wan.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def bench(ckpt: Path, pair_count: int, targets: Sequence[int]) -> dict[str, Any]:
    """All that is measured. targets: how many steps are to be computed."""
    plans = {mode: planned(ckpt, mode, targets) for mode in MODES}
    cached = [u for mode, (_, found) in plans.items() for u in teacache_settings(mode, found)]
    settings = [STOCK, *cached, *other_settings(targets)]
    wan, pairs = WanT2V(WAN_CONFIGS["t2v-nano"], ckpt), pairs_of(pair_count)
    measured = measure(wan, pairs, settings)
    plain = cached[: len(plans[MODES[False]][1])]
    shown = sorted({round(u * (len(plain) - 1)) for u in (0.3, 0.65, 1)})
    return {
        "machine": machine(wan),
        "run": {"steps": STEPS, "solver": SOLVER, "shift": SHIFT, "guide_scale": GUIDE_SCALE},
        "psnr_cap": PSNR_CAP,
        "pairs": [asdict(pair) for pair in pairs],
        "rows": [row(*u) for u in zip(settings, measured, strict=True)],
        "schedules": {
            mode: {"thresh": u.config.thresh, "steps": [asdict(step) for step in u.steps]}
            for mode, (u, _) in plans.items()
        },
        "strip": strip(wan, pairs[0], [STOCK, *(plain[i] for i in shown)]),
    }


def print_table(told: dict[str, Any]) -> None:
    print(
        f"{'method':25} order  {'setting':17} computed  seconds  speed-up"
        f"{'PSNR in dB':>17}{'SSIM':>18}"
    )
    for u in told["rows"]:
        print(
            f"{u['method']:25} {'-' if u['order'] is None else u['order']:>5}  {u['setting']:17} "
            f"{u['computed']:8} {u['seconds']:8.3f} {u['speedup']:8.2f}x "
            f"{u['psnr']:8.2f} ± {u['psnr_std']:5.2f} {u['ssim']:8.4f} ± {u['ssim_std']:.4f}"
        )
    print(
        f"over {len(told['pairs'])} prompts and seeds: median of seconds and speed-up, mean ± "
        f"standard deviation of fidelity to stock's {STEPS} steps; equal videos count as "
        f"{PSNR_CAP:g} dB"
    )
    print(", ".join(f"{name}: {value}" for name, value in told["machine"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt_dir", type=Path, default=ASSETS / "wan_nano", help="with its teacache.json")
    add("--pairs", type=int, default=24, help="prompts, a seed each")
    add("--thresholds", type=int, default=12, help="of each mode of TeaCache, at most")
    add("--json", type=Path, default=ASSETS / "fidelity.json", help="for assets/draw.py")
    add("--csv", type=Path, default=ASSETS / "fidelity.csv", help="the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("teacache").setLevel(logging.ERROR)  # its warnings come with every video
    targets = np.linspace(MOST, FEWEST, args.thresholds).round().astype(int).tolist()
    told = bench(args.ckpt_dir, args.pairs, targets)
    args.json.write_text(json.dumps(told, indent=1) + "\n")
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, told["rows"][0])
        writer.writeheader()
        writer.writerows(told["rows"])
    print_table(told)


if __name__ == "__main__":
    main()
