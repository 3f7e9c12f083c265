"""How near videos come to stock's, and how much sooner, on the trained miniature of Wan2.1.

    python tests/bench/bench_fidelity.py [--pairs 8] [--computed 40 33 ...]

Each prompt and seed is sampled by stock and by every setting in turn, in one process with one
thread; two processes share the prompts, which are none of the training or of any choice. Seconds
are the thread's own, of the sampling without the VAE; a speed-up is over stock's of the same prompt
and seed; the table has medians. PSNR is of a whole video (equal ones count as 100 dB), SSIM the
mean over its frames: the table has mean and standard deviation over the videos.

The noise floor: how far stock is from itself with noise added to its first latents, in float32 and
under bfloat16 autocast, as Wan2.1 runs on a GPU; and how far bfloat16 is from float32.

Guidance on the first steps only is also compared with the prompts, by train.py's check of "shown":
how many of 100 videos show colour and motion as their prompts say.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampling import (
    ASSETS,
    Sampling,
    config_of,
    fidelity,
    load,
    preview_of,
    sample,
    scripted,
    spaced,
    unseen_scenes,
)
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from teacache_generate import Schedule, TeaCacheConfig, teacache

SAMPLING = Sampling()
STEPS, FRAMES, AREA, FIRST_SEED, CHECK_BATCH = SAMPLING.steps, 17, (8, 8), 1000, 25
COMPUTED, GUIDED_SHARES = (40, 33, 25, 17, 13), (0.8, 0.6, 0.4)
METHODS = {"plain": "TeaCache, plain", "retention": "TeaCache, retention steps", "sigma": "sigma"}
EVEN, FEWER = "evenly spaced", "fewer steps"
GUIDED, GUIDED_SIGMA, FLOOR = "guidance until", "sigma, guidance until", "noise floor"


@dataclass(frozen=True)
class Setting:
    """One way to sample: a line of the table."""

    method: str
    name: str
    config: TeaCacheConfig
    noise: float = 0.0  # standard deviation of the noise added to the first latents
    bfloat16: bool = False  # under autocast
    against: str = "stock"  # name of the setting whose videos are the reference


@dataclass(frozen=True)
class Pair:
    prompt: str
    seed: int


@dataclass(frozen=True)
class Measured:
    """One video, compared with another."""

    computed: int
    passes: int
    seconds: float
    speedup: float
    drift: float | None
    psnr: float
    ssim: float


STOCK = Setting("stock", "stock", TeaCacheConfig(STEPS, 0.0))


def planned(mode: str, targets: Sequence[int]) -> tuple[Schedule, list[Schedule]]:
    """A mode's default schedule, and the different ones that compute the targets' steps."""
    preview, config = preview_of(load(), mode, SAMPLING), config_of(mode, STEPS)
    default = preview.plan(config) if config.thresh else preview.plan_speedup(config, 2.0)
    found = [preview.plan_speedup(config, STEPS / n) for n in targets]
    return default, list({schedule.as_text(): schedule for schedule in found}.values())


def cached_settings(mode: str, schedules: Sequence[Schedule]) -> list[Setting]:
    """A mode's schedules, all with order 0 and then all with order 1."""
    return [
        Setting(METHODS[mode], f"thresh {config.thresh:.4g}", replace(config, order=order))
        for order in (0, 1)
        for config in (schedule.config for schedule in schedules)
    ]


def other_settings(targets: Sequence[int]) -> list[Setting]:
    """Settings of the same cost that need no distances."""
    even = [
        Setting(EVEN, f"every {STEPS / n:.3g} steps", scripted(STEPS, spaced(n, STEPS), order))
        for order in (0, 1)
        for n in targets
    ]
    return even + [Setting(FEWER, f"{n} sampling steps", TeaCacheConfig(n, 0.0)) for n in targets]


def guided_settings(half: TeaCacheConfig) -> list[Setting]:
    """Guidance on the first steps only, without a cache and with that of ``half``."""
    return [
        Setting(method, f"{share:g} of steps", replace(config, guided_steps=round(share * STEPS)))
        for method, config in ((GUIDED, STOCK.config), (GUIDED_SIGMA, half))
        for share in GUIDED_SHARES
    ]


def floor_settings() -> list[Setting]:
    """Stock with changes too small to see."""
    bfloat16 = Setting(FLOOR, "bf16", STOCK.config, bfloat16=True)
    noisy = [
        Setting(FLOOR, f"{text} of noise", STOCK.config, noise=float(text))
        for text in ("1e-4", "1e-2")
    ]
    under = [
        replace(one, name=f"bf16, {one.name}", bfloat16=True, against=bfloat16.name)
        for one in noisy
    ]
    return [*noisy, bfloat16, *under]


def pairs_of(count: int) -> list[Pair]:
    """Prompts that the miniature was not trained on, a seed each."""
    scenes = unseen_scenes(count, torch.Generator().manual_seed(0))
    return [Pair(scene.prompt, FIRST_SEED + i) for i, scene in enumerate(scenes)]


def first_latents(seed: int, noise: float = 0.0) -> Tensor:
    latents = load().noise(FRAMES, AREA, seed)
    return latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))


def warm_up() -> None:
    sample(load(), "", first_latents(0), STOCK.config)


def measure(settings: Sequence[Setting], pair: Pair) -> list[Measured]:
    """Sample one prompt and seed with each setting in turn; the first is stock."""
    measured, stock_seconds = [], 0.0
    videos = {setting.against: np.empty(0) for setting in settings}
    for setting in settings:
        config, latents = setting.config, first_latents(pair.seed, setting.noise)
        video, cache, seconds = sample(
            load(), pair.prompt, latents, config, bfloat16=setting.bfloat16
        )
        stock_seconds = stock_seconds or seconds
        if setting.name in videos:
            videos[setting.name] = video
        measured.append(
            Measured(
                len(cache.computed_steps),
                sum(1 + config.is_guided(step) for step in cache.computed_steps),
                seconds,
                stock_seconds / seconds,
                cache.drift(config.order),
                *fidelity(videos[setting.against], video),
            )
        )
    return measured


def shown(config: TeaCacheConfig, count: int) -> int:
    """How many of ``count`` videos show colour and motion as their prompts say.

    Prompts and seeds are those at the end of train.py. Sampled in batches, which with order 0
    changes nothing but the rounding.
    """
    from clips import seen
    from train import random

    wan, scenes, right = load(), unseen_scenes(count, random("check")), 0
    for first in range(0, count, CHECK_BATCH):
        part = scenes[first : first + CHECK_BATCH]
        x = torch.stack([first_latents(first + i) for i in range(len(part))])
        texts = [scene.prompt for scene in part], [wan.sample_neg_prompt] * len(part)
        contexts = [wan.text_encoder(prompts, wan.device) for prompts in texts]
        scheduler = wan.scheduler(SAMPLING.solver, config.steps, SAMPLING.shift)
        with torch.no_grad(), teacache(wan.model, config):
            for t in scheduler.timesteps:
                cond, uncond = (
                    torch.stack(wan.model(list(x), t[None], context, wan.seq_len(x[0])))
                    for context in contexts
                )
                flow = uncond + SAMPLING.guide_scale * (cond - uncond)
                x = scheduler.step(flow, t, x, return_dict=False)[0]
        says = [(scene.colour, scene.motion) for scene in part]
        shows = map(seen, wan.vae.decode(list(x)))
        right += sum(a == b for a, b in zip(says, shows, strict=True))
    return right


def row(setting: Setting, measured: Sequence[Measured], right: int | None) -> dict[str, Any]:
    """A line of the table, over the pairs: medians of times, means and deviations of fidelity."""
    found = {u.name: [getattr(v, u.name) for v in measured] for u in fields(Measured)}
    drifts = [drift for drift in found["drift"] if drift is not None]
    return {
        "method": setting.method,
        "order": setting.config.order if setting.config.thresh else None,  # nothing is skipped
        "setting": setting.name,
        "computed": found["computed"][0],
        "passes": found["passes"][0],
        "seconds": round(float(np.median(found["seconds"])), 4),
        "speedup": round(float(np.median(found["speedup"])), 3),
        "drift": round(float(np.mean(drifts)), 5) if drifts else None,
        "psnr": round(float(np.mean(found["psnr"])), 2),
        "psnr_std": round(float(np.std(found["psnr"])), 2),
        "ssim": round(float(np.mean(found["ssim"])), 4),
        "ssim_std": round(float(np.std(found["ssim"])), 4),
        "against": setting.against,
        "shown": right,
    }


def drift_against_psnr(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation over the settings that reuse residuals and change nothing else.

    -1: the larger the mean drift of a setting, the lower its PSNR, without an exception.
    """
    found = [u for u in rows if u["drift"] is not None and u["method"] != GUIDED_SIGMA]
    correlation = spearmanr([u["drift"] for u in found], [u["psnr"] for u in found]).statistic
    return {
        "settings": len(found),
        "spearman": None if math.isnan(correlation) else round(float(correlation), 3),
    }


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return {
        "platform": platform.machine(),
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def bench(pair_count: int, targets: Sequence[int], checked: int, processes: int) -> dict[str, Any]:
    """All measurements. targets: how many steps to compute. checked: videos of "shown"."""
    pairs, plans = pairs_of(pair_count), {mode: planned(mode, targets) for mode in METHODS}
    half = plans["sigma"][0].config
    cached = [u for mode, (_, found) in plans.items() for u in cached_settings(mode, found)]
    settings = [STOCK, *floor_settings(), *cached, *other_settings(targets)]
    settings += guided_settings(half)
    about_guidance = (STOCK.method, GUIDED, GUIDED_SIGMA)  # and its cache alone
    to_check = [
        i
        for i, u in enumerate(settings)
        if checked and (u.method in about_guidance or u.config == half)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=warm_up) as pool:
        of_pairs = [pool.submit(measure, settings, pair) for pair in pairs]
        checks = {i: pool.submit(shown, settings[i].config, checked) for i in to_check}
        waiting = as_completed([*of_pairs, *checks.values()])
        for _ in tqdm(waiting, total=len(pairs) + len(checks), unit="task", smoothing=0):
            pass
    by_setting = zip(*(future.result() for future in of_pairs), strict=True)
    right = [checks[i].result() if i in checks else None for i in range(len(settings))]
    rows = [row(*u) for u in zip(settings, by_setting, right, strict=True)]
    return {
        "machine": machine(),
        "run": asdict(SAMPLING),
        "checked": checked,
        "pairs": [asdict(pair) for pair in pairs],
        "rows": rows,
        "drift_against_psnr": drift_against_psnr(rows),
        "schedules": {
            mode: {"thresh": u.config.thresh, "steps": [asdict(step) for step in u.decisions]}
            for mode, (u, _) in plans.items()
        },
    }


def print_table(found: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    print(
        f"{'method':25} order  {'setting':19} computed passes seconds speed-up   drift"
        f"{'PSNR, dB':>14}{'SSIM':>16}  shown of {found['checked']}"
    )
    for u in found["rows"]:
        order, right = ("-" if u[name] is None else u[name] for name in ("order", "shown"))
        drift = "" if u["drift"] is None else f"{100 * u['drift']:.1f} %"
        print(
            f"{u['method']:25} {order:>5}  {u['setting']:19} {u['computed']:8} {u['passes']:6} "
            f"{u['seconds']:7.2f} {u['speedup']:7.2f}x {drift:>7}  "
            f"{u['psnr']:5.1f} ± {u['psnr_std']:4.1f}  {u['ssim']:.3f} ± {u['ssim_std']:.3f} "
            f"{right:>5}"
        )
    print(
        f"{len(found['pairs'])} prompts and seeds, compared with stock's {STEPS} steps; the noisy "
        f"bf16 rows with the bf16 row\ndrift against PSNR, rank correlation and number of settings:"
        f" {found['drift_against_psnr']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=8, help="prompts, a seed each")
    add("--computed", type=int, nargs="+", default=COMPUTED, help="steps that settings compute")
    add("--check", type=int, default=100, help="videos that are compared with their prompts")
    add("--processes", type=int, default=2, help="of one thread each")
    add("--json", type=Path, default=ASSETS / "fidelity.json", help="for assets/draw.py")
    add("--csv", type=Path, default=ASSETS / "fidelity.csv", help="the table")
    args = parser.parse_args()
    began = time.perf_counter()
    found = bench(args.pairs, args.computed, args.check, args.processes)
    print(f"took {(time.perf_counter() - began) / 60:.0f} min")
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, found["rows"][0])
        writer.writeheader()
        writer.writerows(found["rows"])
    print_table(found)


if __name__ == "__main__":
    main()
