"""How near videos come to stock's, and how much sooner, on the trained miniature of Wan2.1.

    python tests/bench/bench_fidelity.py [--pairs 8] [--computed 40 33 ...]

Each prompt and seed is sampled by stock and by every setting in turn, in one process with one
thread; the prompts are none of the training or of any choice. Seconds are the thread's own, of the
sampling without the VAE; a speed-up is over stock's of the same prompt and seed; the table has
medians. PSNR is of a whole video (equal ones count as 100 dB), SSIM the mean over its frames: the
table has mean and standard deviation over the videos. "shown" counts the videos that show colour
and motion as their prompts say.

The noise floor: how far stock is from itself with noise added to its first latents, in float32 and
under bfloat16 autocast, as Wan2.1 runs on a GPU; and how far bfloat16 is from float32.

Guidance on the first steps only is measured on more prompts and seeds, for the sake of "shown".
"""

import argparse
import csv
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import sampling
import torch
from sampling import ASSETS, Sampling, Scene
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from teacache_generate import Preview, TeaCacheConfig

SAMPLING = Sampling()
STEPS, FRAMES, AREA, FIRST_SEED = SAMPLING.steps, 17, (8, 8), 1000
COMPUTED, GUIDED_SHARES = (40, 33, 25, 17, 13), (0.8, 0.6, 0.4)
METHODS = {"plain": "TeaCache, plain", "retention": "TeaCache, retention steps", "sigma": "sigma"}
GUIDED_SIGMA = "sigma, guidance until"


@dataclass(frozen=True)
class Setting:
    """One way to sample: a line of the table."""

    method: str
    name: str
    config: TeaCacheConfig
    noise: float = 0.0  # standard deviation of the noise added to the first latents
    bfloat16: bool = False  # under autocast
    against: str = "stock"  # the setting that makes the reference videos


STOCK = Setting("stock", "stock", TeaCacheConfig(STEPS, 0.0))
FLOOR = [  # stock with changes too small to see
    Setting("noise floor", "1e-4 of noise", STOCK.config, 1e-4),
    Setting("noise floor", "1e-2 of noise", STOCK.config, 1e-2),
    Setting("noise floor", "bf16", STOCK.config, bfloat16=True),
    Setting("noise floor", "bf16, 1e-4 of noise", STOCK.config, 1e-4, True, against="bf16"),
    Setting("noise floor", "bf16, 1e-2 of noise", STOCK.config, 1e-2, True, against="bf16"),
]


@functools.cache
def preview_of(mode: str) -> Preview:
    return sampling.preview_of(sampling.load(), mode, SAMPLING)


def cached_settings(mode: str, targets: Sequence[int]) -> list[Setting]:
    """The different schedules of a mode that compute the targets' steps, with orders 0 and 1."""
    config = sampling.config_of(mode, STEPS)
    plans = [preview_of(mode).plan_speedup(config, STEPS / n) for n in targets]
    configs = {plan.as_text(): plan.config for plan in plans}.values()
    return [
        Setting(METHODS[mode], f"thresh {config.thresh:.4g}", replace(config, order=order))
        for order in (0, 1)
        for config in configs
    ]


def other_settings(targets: Sequence[int]) -> list[Setting]:
    """Settings of the same cost that need no distances."""
    settings = []
    for order in (0, 1):
        for n in targets:
            config = sampling.scripted(STEPS, sampling.spaced(n, STEPS), order)
            settings.append(Setting("evenly spaced", f"every {STEPS / n:.3g} steps", config))
    for n in targets:
        settings.append(Setting("fewer steps", f"{n} sampling steps", TeaCacheConfig(n, 0.0)))
    return settings


def guided_settings(half: TeaCacheConfig) -> list[Setting]:
    """Guidance on the first steps only, without a cache and with that of ``half``."""
    settings = [Setting(GUIDED_SIGMA, "1 of steps", half)]
    for method, config in (("guidance until", STOCK.config), (GUIDED_SIGMA, half)):
        for share in GUIDED_SHARES:
            guided = replace(config, guided_steps=round(share * STEPS))
            settings.append(Setting(method, f"{share} of steps", guided))
    return settings


def pairs_of(count: int) -> list[tuple[Scene, int]]:
    """Scenes that the miniature was not trained on, a seed each."""
    scenes = sampling.pick(count, torch.Generator().manual_seed(0), unseen=True)
    return [(scene, FIRST_SEED + i) for i, scene in enumerate(scenes)]


def first_latents(seed: int, noise: float = 0.0) -> Tensor:
    latents = sampling.load().noise(FRAMES, AREA, seed)
    return latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))


def warm_up() -> None:
    sampling.sample(sampling.load(), "", first_latents(0), STOCK.config)


def measure(settings: Sequence[Setting], pair: tuple[Scene, int]) -> list[dict[str, Any]]:
    """Sample one scene and seed with each setting in turn; the first is stock."""
    (scene, seed), measured, stock_seconds = pair, [], 0.0
    videos = {setting.against: np.empty(0) for setting in settings}
    for setting in settings:
        config, latents = setting.config, first_latents(seed, setting.noise)
        video, cache, seconds = sampling.sample(
            sampling.load(), scene.prompt, latents, config, bfloat16=setting.bfloat16
        )
        stock_seconds = stock_seconds or seconds
        if setting.name in videos:
            videos[setting.name] = video
        psnr, ssim = sampling.fidelity(videos[setting.against], video)
        measured.append(
            {
                "computed": len(cache.computed_steps),
                "passes": sum(1 + config.is_guided(step) for step in cache.computed_steps),
                "seconds": seconds,
                "speedup": stock_seconds / seconds,
                "drift": cache.drift(config.order),
                "psnr": psnr,
                "ssim": ssim,
                "shown": sampling.seen(torch.from_numpy(video)) == (scene.colour, scene.motion),
            }
        )
    return measured


def row(setting: Setting, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, over the pairs: medians of times, means and deviations of fidelity."""
    found = {name: [video[name] for video in measured] for name in measured[0]}
    drifts = [drift for drift in found["drift"] if drift is not None]

    def rounded(statistic: Callable, values: Sequence[float]) -> float:
        return round(float(statistic(values)), 4)

    return {
        "method": setting.method,
        "order": setting.config.order if setting.config.thresh else None,  # nothing is skipped
        "setting": setting.name,
        "computed": found["computed"][0],
        "passes": found["passes"][0],
        "seconds": rounded(np.median, found["seconds"]),
        "speedup": rounded(np.median, found["speedup"]),
        "drift": rounded(np.mean, drifts) if drifts else None,
        "psnr": rounded(np.mean, found["psnr"]),
        "psnr_std": rounded(np.std, found["psnr"]),
        "ssim": rounded(np.mean, found["ssim"]),
        "ssim_std": rounded(np.std, found["ssim"]),
        "against": setting.against,
        "shown": sum(found["shown"]),
        "videos": len(measured),
    }


def drift_against_psnr(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation over the settings that reuse residuals and change nothing else.

    -1: the larger the mean drift of a setting, the lower its PSNR, without an exception.
    """
    found = [u for u in rows if u["drift"] is not None and u["method"] != GUIDED_SIGMA]
    correlation = spearmanr([u["drift"] for u in found], [u["psnr"] for u in found]).statistic
    return {"settings": len(found), "spearman": round(float(correlation), 3)}


def bench(pair_count: int, targets: Sequence[int], checked: int, processes: int) -> dict[str, Any]:
    """All measurements. targets: how many steps to compute. checked: pairs for less guidance."""
    cached = [setting for mode in METHODS for setting in cached_settings(mode, targets)]
    half = preview_of("sigma").plan_speedup(sampling.config_of("sigma", STEPS), 2.0).config
    spawn, rows = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(processes, spawn, initializer=warm_up) as pool:
        for settings, count in (
            ([STOCK, *FLOOR, *cached, *other_settings(targets)], pair_count),
            ([STOCK, *guided_settings(half)], checked),
        ):
            of_pairs = pool.map(measure, repeat(settings), pairs_of(count))
            by_setting = zip(*tqdm(of_pairs, total=count, unit="pair"), strict=True)
            rows += map(row, settings, by_setting)
    plain = preview_of("plain").plan(sampling.config_of("plain", STEPS))
    steps = [asdict(decision) for decision in plain.decisions]
    return {
        "machine": sampling.machine(),
        "rows": rows,
        "drift_against_psnr": drift_against_psnr(rows),
        "schedules": {"plain": {"thresh": plain.config.thresh, "steps": steps}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=8, help="prompts, a seed each")
    add("--computed", type=int, nargs="+", default=COMPUTED, help="steps that settings compute")
    add("--check", type=int, default=100, help="prompts for less guidance")
    add("--processes", type=int, default=2, help="of one thread each")
    add("--json", type=Path, default=ASSETS / "fidelity.json", help="for assets/draw.py")
    add("--csv", type=Path, default=ASSETS / "fidelity.csv", help="the table")
    args = parser.parse_args()
    began = time.perf_counter()
    found = bench(args.pairs, args.computed, args.check, args.processes)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, found["rows"][0])
        writer.writeheader()
        writer.writerows(found["rows"])
    print(f"{found['machine']}, took {(time.perf_counter() - began) / 60:.0f} min")
    print(sampling.table(found["rows"]))
    print(f"drift against PSNR, rank correlation: {found['drift_against_psnr']}")


if __name__ == "__main__":
    main()
