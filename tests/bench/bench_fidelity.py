"""How near videos come to stock's, and how much sooner, on the trained miniature of Wan2.1.

    python tests/bench/bench_fidelity.py [--pairs 8] [--check 100] [--out assets]

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
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sampling
import torch
from common import machine, scripted, table
from sampling import ASSETS, Sampling, Scene, load, plan
from torch import Tensor
from tqdm import tqdm

from teacache_generate import TeaCacheConfig

STEPS, FRAMES, AREA, FIRST_SEED = Sampling().steps, 17, (8, 8), 1000
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


def cached_settings(mode: str, targets: Sequence[int] = COMPUTED) -> list[Setting]:
    """The different schedules of a mode that compute the targets' steps, with orders 0 and 1."""
    stock = plan(load(), sampling.config_of(mode, STEPS))
    plans = [stock.for_speedup(STEPS / n) for n in targets]
    configs = {plan.as_text(): plan.config for plan in plans}.values()
    return [
        Setting(METHODS[mode], f"thresh {config.thresh:.4g}", replace(config, order=order))
        for order in (0, 1)
        for config in configs
    ]


def other_settings() -> list[Setting]:
    """Settings of the same cost that need no distances."""
    settings = []
    for order in (0, 1):
        for n in COMPUTED:
            config = scripted(STEPS, sampling.spaced(n, STEPS), order)
            settings.append(Setting("evenly spaced", f"every {STEPS / n:.3g} steps", config))
    for n in COMPUTED:
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
    latents = load().noise(FRAMES, AREA, seed)
    return latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))


def measure(settings: Sequence[Setting], pair: tuple[Scene, int]) -> list[dict[str, Any]]:
    """Sample one scene and seed with each setting in turn; the first is stock."""
    (scene, seed), measured, videos, stock_seconds = pair, [], {}, 0.0
    for setting in settings:
        config, latents = setting.config, first_latents(seed, setting.noise)
        video, cache, seconds = sampling.sample(
            load(), scene.prompt, latents, config, bfloat16=setting.bfloat16
        )
        stock_seconds = stock_seconds or seconds
        videos[setting.name] = video
        psnr, ssim = sampling.fidelity(videos[setting.against], video)
        measured.append(
            {
                "computed": len(cache.schedule.computed_steps),
                "passes": cache.schedule.passes,
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

    def rounded(statistic: Callable, name: str) -> float:
        return round(float(statistic(found[name])), 4)

    return {
        "method": setting.method,
        "order": setting.config.order if setting.config.thresh else None,  # nothing is skipped
        "setting": setting.name,
        "computed": found["computed"][0],
        "passes": found["passes"][0],
        "seconds": rounded(np.median, "seconds"),
        "speedup": rounded(np.median, "speedup"),
        "drift": None if found["drift"][0] is None else rounded(np.mean, "drift"),
        "psnr": rounded(np.mean, "psnr"),
        "psnr_std": rounded(np.std, "psnr"),
        "ssim": rounded(np.mean, "ssim"),
        "ssim_std": rounded(np.std, "ssim"),
        "against": setting.against,
        "shown": sum(found["shown"]),
        "videos": len(measured),
    }


def bench(pair_count: int, checked: int) -> dict[str, Any]:
    """All measurements. checked: pairs for less guidance."""
    cached = [setting for mode in METHODS for setting in cached_settings(mode)]
    (half, _) = cached_settings("sigma", [STEPS // 2])
    rows = []
    for settings, count in (
        ([STOCK, *FLOOR, *cached, *other_settings()], pair_count),
        ([STOCK, *guided_settings(half.config)], checked),
    ):
        of_pairs = [measure(settings, pair) for pair in tqdm(pairs_of(count), unit="pair")]
        rows += map(row, settings, zip(*of_pairs, strict=True))
    plain = plan(load(), sampling.config_of("plain", STEPS))
    steps = [asdict(decision) for decision in plain.decisions]
    return {
        "machine": machine(),
        "rows": rows,
        "schedules": {"plain": {"thresh": plain.config.thresh, "steps": steps}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="prompts, a seed each")
    parser.add_argument("--check", type=int, default=100, help="prompts for less guidance")
    parser.add_argument("--out", type=Path, default=ASSETS, help="for fidelity.json, fidelity.csv")
    args = parser.parse_args()
    found = bench(args.pairs, args.check)
    (args.out / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")
    with (args.out / "fidelity.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found["rows"][0])
        writer.writeheader()
        writer.writerows(found["rows"])
    print(f"{found['machine']}\n{table(found['rows'])}")


if __name__ == "__main__":
    main()
