"""How near videos come to stock's, and how much sooner, on the trained miniature of Wan2.1.

    python tests/bench/bench_fidelity.py [--pairs 8] [--computed 40 33 ...]
        [--ckpt_dir assets/wan_nano]

Each prompt and seed is sampled by stock and by every setting in turn, in one process with one
thread, others beside it in another process; prompts and seeds are not among those of the training
or of any choice. Seconds are the thread's own, so that what else runs counts for little, of the
sampling without the VAE. A speed-up is against stock's seconds of the same prompt and seed. Of both
the median over the pairs is told. PSNR is of a whole video, SSIM the mean over its frames; then
mean and standard deviation over the videos. A video equal to stock's has an infinite PSNR, which
counts as 100 dB. Drift is what the script measures in every run, without stock.

The noise floor: how far stock is from itself with a little noise added to the latents that the
sampling begins with, in float32 and under bfloat16 autocast, as Wan2.1 runs on a GPU; and how far
bfloat16 is from float32. What is above the row bf16 is nearer to stock than rounding is.

Guidance on the first steps only is also held against the prompts, by train.py's check of "shown":
how many of 100 videos show what they say. That colour and motion of one shape stay when guidance
ends early says nothing of what a real model has to draw.
"""

import argparse
import csv
import functools
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1]
ASSETS = TESTS.parent / "assets"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "wan_nano"), str(TESTS / "wan_nano_training")]

from clips import FRAMES, SIZE, pick, seen  # noqa: E402
from scripted import scripted, spaced  # noqa: E402
from train import random  # noqa: E402
from wan import WanT2V, pipeline  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402

from teacache_generate import (  # noqa: E402
    PLAIN,
    RETENTION,
    SIGMA,
    Decision,
    Schedule,
    TeaCacheConfig,
    plan,
    plan_speedup,
    read_coefficients,
    shadow,
    signal_distances,
    teacache,
)

STEPS, SOLVER, SHIFT, GUIDE_SCALE = 50, "unipc", 5.0, 5.0
PSNR_CAP = 100.0  # dB
FIRST_SEED = 1000
COMPUTED = (40, 33, 25, 17, 13)
GUIDED_SHARES = (0.8, 0.6, 0.4)
METHODS = {PLAIN: "TeaCache, plain", RETENTION: "TeaCache, retention steps", SIGMA: "sigma"}
EVEN, FEWER = "evenly spaced", "fewer steps"
GUIDED, GUIDED_SIGMA, FLOOR = "guidance until", "sigma, guidance until", "noise floor"
CHECK_BATCH = 25


@dataclass(frozen=True)
class Setting:
    """One way to sample: a line of the table."""

    method: str
    name: str
    config: TeaCacheConfig
    noise: float = 0.0  # standard deviation of what is added to the first latents
    bfloat16: bool = False  # under autocast
    against: str = "stock"  # the name of the setting whose videos these are held against


@dataclass(frozen=True)
class Pair:
    prompt: str
    seed: int


@dataclass(frozen=True)
class Measured:
    """One video, held against another."""

    computed: int
    passes: int
    seconds: float
    speedup: float
    drift: float | None
    psnr: float
    ssim: float


STOCK = Setting("stock", "stock", TeaCacheConfig(STEPS, 0.0))


def planned(
    wan: WanT2V, ckpt: Path, mode: str, targets: Sequence[int]
) -> tuple[Schedule, list[Schedule]]:
    """Of a mode: the default schedule, and those that compute so many steps, none twice."""
    row = None if mode == SIGMA else read_coefficients(ckpt / "teacache.json")
    timesteps = wan.scheduler(SOLVER, STEPS, SHIFT).timesteps.tolist()
    distances: list[float | None] = [None, *[math.nan] * (STEPS - 1)]
    if mode != SIGMA:
        distances[1:] = signal_distances(ckpt, timesteps, mode)
    config = TeaCacheConfig.from_row(row, STEPS, use_ret_steps=mode == RETENTION)
    found = [plan_speedup(config, timesteps, distances, STEPS / n) for n in targets]
    default = plan_speedup(config, timesteps, distances, 2.0) if row is None else None
    return (
        default or plan(config, timesteps, distances),
        list({schedule.marks(): schedule for schedule in found}.values()),
    )


def cached_settings(mode: str, schedules: Sequence[Schedule]) -> list[Setting]:
    """A mode's schedules, all at order 0 and then all at order 1."""
    return [
        Setting(METHODS[mode], f"thresh {config.thresh:.4g}", replace(config, order=order))
        for order in (0, 1)
        for config in (schedule.config for schedule in schedules)
    ]


def other_settings(targets: Sequence[int]) -> list[Setting]:
    """What costs the same and needs neither distances nor noise levels."""
    fewer = [Setting(FEWER, f"{n} sampling steps", TeaCacheConfig(n, 0.0)) for n in targets]
    even = [
        Setting(EVEN, f"every {STEPS / n:.3g} steps", scripted(STEPS, spaced(n, STEPS), order))
        for order in (0, 1)
        for n in targets
    ]
    return even + fewer


def guided_settings(half: TeaCacheConfig) -> list[Setting]:
    """Guidance on the first steps only, without a cache and with that of ``half``."""
    return [
        Setting(method, f"{share:g} of steps", replace(config, guided_steps=round(share * STEPS)))
        for method, config in ((GUIDED, STOCK.config), (GUIDED_SIGMA, half))
        for share in GUIDED_SHARES
    ]


def floor_settings() -> list[Setting]:
    """Stock, with what nobody would see."""
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
    scenes = pick(count, torch.Generator().manual_seed(0), unseen=True)
    return [Pair(scene.prompt, FIRST_SEED + i) for i, scene in enumerate(scenes)]


def sample(wan: WanT2V, pair: Pair, setting: Setting) -> tuple[np.ndarray, Any, float]:
    """A video [3, F, H, W] in [-1, 1], the TeaCache that made it, and its sampling's seconds."""
    make_noise, decode, marks = wan.noise, wan.vae.decode, []

    def noise(*args: Any) -> Tensor:
        latents = make_noise(*args)
        generator = torch.Generator().manual_seed(0)
        return latents + setting.noise * torch.randn(latents.shape, generator=generator)

    def timed_decode(latents: list[Tensor]) -> list[Tensor]:
        marks.append(time.thread_time())
        return decode(latents)

    dtype = torch.bfloat16 if setting.bfloat16 else torch.float32
    with ExitStack() as stack:
        stack.enter_context(shadow(pipeline, tqdm=lambda timesteps: timesteps))
        stack.enter_context(shadow(wan, noise=noise, param_dtype=dtype))
        stack.enter_context(shadow(wan.vae, decode=timed_decode))
        cache = stack.enter_context(teacache(wan.model, setting.config))
        began = time.thread_time()
        video = wan.generate(
            pair.prompt,
            sampling_steps=setting.config.steps,
            sample_solver=SOLVER,
            shift=SHIFT,
            guide_scale=GUIDE_SCALE,
            seed=pair.seed,
            offload_model=False,
        )
    return video.cpu().numpy(), cache, marks[0] - began


def fidelity(stock: np.ndarray, video: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of videos [3, F, H, W] in [-1, 1]."""
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(stock, video, data_range=2)
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=2)
        for a, b in zip(stock.swapaxes(0, 1), video.swapaxes(0, 1), strict=True)
    ]
    return min(float(psnr), PSNR_CAP), float(np.mean(ssim))


@functools.cache
def load(ckpt: Path) -> WanT2V:
    """The pipeline of this process, warmed up."""
    torch.set_num_threads(1)
    logging.getLogger("teacache").setLevel(logging.ERROR)  # its warnings come with every video
    wan = WanT2V(WAN_CONFIGS["t2v-nano"], ckpt)
    sample(wan, Pair("", 0), STOCK)
    return wan


def measure(ckpt: Path, settings: Sequence[Setting], pair: Pair) -> list[Measured]:
    """One prompt and seed by each setting in turn; the first is stock."""
    wan, measured, stock_seconds = load(ckpt), [], 0.0
    videos = {setting.against: np.empty(0) for setting in settings}
    for setting in settings:
        video, cache, seconds = sample(wan, pair, setting)
        stock_seconds = stock_seconds or seconds
        if setting.name in videos:
            videos[setting.name] = video
        measured.append(
            Measured(
                len(cache.schedule.computed_steps),
                cache.schedule.passes,
                seconds,
                stock_seconds / seconds,
                cache.measurements.drift(setting.config.order),
                *fidelity(videos[setting.against], video),
            )
        )
    return measured


def shown(ckpt: Path, config: TeaCacheConfig, count: int) -> int:
    """How many of ``count`` videos show colour and motion that their prompts say.

    Prompts and seeds are those that train.py ends with. Many are sampled together, which for order
    0 changes nothing but the rounding.
    """
    wan, scenes, right = load(ckpt), pick(count, random("check"), unseen=True), 0
    for first in range(0, count, CHECK_BATCH):
        part = scenes[first : first + CHECK_BATCH]
        area = (SIZE // wan.vae_stride[1], SIZE // wan.vae_stride[2])
        x = torch.stack([wan.noise(FRAMES, area, first + i) for i in range(len(part))])
        texts = [scene.prompt for scene in part], [wan.sample_neg_prompt] * len(part)
        contexts = [wan.text_encoder(prompts, wan.device) for prompts in texts]
        scheduler = wan.scheduler(SOLVER, config.steps, SHIFT)
        with torch.no_grad(), teacache(wan.model, config):
            for t in scheduler.timesteps:
                cond, uncond = (
                    torch.stack(wan.model(list(x), t[None], context, wan.seq_len(x[0])))
                    for context in contexts
                )
                flow = uncond + GUIDE_SCALE * (cond - uncond)
                x = scheduler.step(flow, t, x, return_dict=False)[0]
        videos = wan.vae.decode(list(x))
        says = [(scene.colour, scene.motion) for scene in part]
        right += sum(seen(video) == said for video, said in zip(videos, says, strict=True))
    return right


def is_checked(setting: Setting, half: TeaCacheConfig) -> bool:
    """Whether it is about guidance: also on all of the steps, without a cache and with."""
    return setting.method in (STOCK.method, GUIDED, GUIDED_SIGMA) or setting.config == half


def row(setting: Setting, measured: Sequence[Measured], right: int | None) -> dict[str, Any]:
    """A line of the table, over the pairs: medians of times, means and deviations of fidelity."""
    told = {u.name: [getattr(v, u.name) for v in measured] for u in fields(Measured)}
    drifts = [drift for drift in told["drift"] if drift is not None]
    return {
        "method": setting.method,
        "order": setting.config.order if setting.config.thresh else None,  # nothing is skipped
        "setting": setting.name,
        "computed": told["computed"][0],
        "passes": told["passes"][0],
        "seconds": round(float(np.median(told["seconds"])), 4),
        "speedup": round(float(np.median(told["speedup"])), 3),
        "drift": round(float(np.mean(drifts)), 5) if drifts else None,
        "psnr": round(float(np.mean(told["psnr"])), 2),
        "psnr_std": round(float(np.std(told["psnr"])), 2),
        "ssim": round(float(np.mean(told["ssim"])), 4),
        "ssim_std": round(float(np.std(told["ssim"])), 4),
        "against": setting.against,
        "shown": right,
    }


def drift_against_psnr(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation over all settings that reuse residuals and change nothing else.

    -1: the larger the mean drift of a setting, the lower its PSNR, without an exception.
    """
    found = [u for u in rows if u["drift"] is not None and u["method"] != GUIDED_SIGMA]
    correlation = spearmanr([u["drift"] for u in found], [u["psnr"] for u in found]).statistic
    return {"settings": len(found), "spearman": round(float(correlation), 3)}


def plain(step: Decision) -> dict[str, Any]:
    """For JSON, which has no not-a-number: a distance that "sigma" never read."""
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(step).items()
    }


def machine(wan: WanT2V) -> dict[str, Any]:
    """What the seconds were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return {
        "platform": platform.machine(),
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if wan.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def all_settings(plans: dict[str, tuple[Schedule, list[Schedule]]], targets: Sequence[int]):
    """The lines of the table."""
    cached = [u for mode, (_, found) in plans.items() for u in cached_settings(mode, found)]
    guided = guided_settings(plans[SIGMA][0].config)
    return [STOCK, *floor_settings(), *cached, *other_settings(targets), *guided]


def bench(
    ckpt: Path, pair_count: int, targets: Sequence[int], checked: int, processes: int
) -> dict[str, Any]:
    """All that is measured. targets: how many steps are to be computed. checked: videos."""
    wan, pairs = load(ckpt), pairs_of(pair_count)
    plans = {mode: planned(wan, ckpt, mode, targets) for mode in METHODS}
    settings, half = all_settings(plans, targets), plans[SIGMA][0].config
    to_check = [i for i, u in enumerate(settings) if checked and is_checked(u, half)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        of_pairs = [pool.submit(measure, ckpt, settings, pair) for pair in pairs]
        checks = {i: pool.submit(shown, ckpt, settings[i].config, checked) for i in to_check}
        waiting = as_completed([*of_pairs, *checks.values()])
        for _ in tqdm(waiting, total=len(pairs) + len(checks), unit="task", smoothing=0):
            pass
    by_setting = zip(*(future.result() for future in of_pairs), strict=True)
    right = [checks[i].result() if i in checks else None for i in range(len(settings))]
    rows = [row(*u) for u in zip(settings, by_setting, right, strict=True)]
    return {
        "machine": machine(wan),
        "run": {"steps": STEPS, "solver": SOLVER, "shift": SHIFT, "guide_scale": GUIDE_SCALE},
        "psnr_cap": PSNR_CAP,
        "checked": checked,
        "pairs": [asdict(pair) for pair in pairs],
        "rows": rows,
        "drift_against_psnr": drift_against_psnr(rows),
        "schedules": {
            mode: {"thresh": u.config.thresh, "steps": [plain(step) for step in u.decisions]}
            for mode, (u, _) in plans.items()
        },
    }


def print_table(told: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in told["machine"].items()))
    print(
        f"{'method':25} order  {'setting':19} computed passes seconds speed-up   drift"
        f"{'PSNR, dB':>14}{'SSIM':>16}  shown of {told['checked']}"
    )
    for u in told["rows"]:
        order, right = ("-" if u[name] is None else u[name] for name in ("order", "shown"))
        drift = "" if u["drift"] is None else f"{100 * u['drift']:.1f} %"
        print(
            f"{u['method']:25} {order:>5}  {u['setting']:19} {u['computed']:8} {u['passes']:6} "
            f"{u['seconds']:7.2f} {u['speedup']:7.2f}x {drift:>7}  "
            f"{u['psnr']:5.1f} ± {u['psnr_std']:4.1f}  {u['ssim']:.3f} ± {u['ssim_std']:.3f} "
            f"{right:>5}"
        )
    found = told["drift_against_psnr"]
    print(
        f"{len(told['pairs'])} prompts and seeds: medians of seconds and speed-up, mean ± standard "
        f"deviation of fidelity; to stock's {STEPS} steps, the noisy bf16 rows to the bf16 row"
    )
    print(
        f"drift against PSNR: Spearman's rank correlation {found['spearman']:.2f} over "
        f"{found['settings']} settings"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt_dir", type=Path, default=ASSETS / "wan_nano", help="with its teacache.json")
    add("--pairs", type=int, default=8, help="prompts, a seed each")
    add("--computed", type=int, nargs="+", default=COMPUTED, help="steps that settings compute")
    add("--check", type=int, default=100, help="videos that are held against their prompts")
    add("--processes", type=int, default=2, help="of one thread each")
    add("--json", type=Path, default=ASSETS / "fidelity.json", help="for assets/draw.py")
    add("--csv", type=Path, default=ASSETS / "fidelity.csv", help="the table")
    args = parser.parse_args()
    began = time.perf_counter()
    told = bench(args.ckpt_dir, args.pairs, args.computed, args.check, args.processes)
    print(f"took {(time.perf_counter() - began) / 60:.0f} min")
    args.json.write_text(json.dumps(told, indent=1) + "\n")
    with open(args.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, told["rows"][0])
        writer.writeheader()
        writer.writerows(told["rows"])
    print_table(told)


if __name__ == "__main__":
    main()
