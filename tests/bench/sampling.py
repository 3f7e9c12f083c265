"""Samples the miniature with any settings and measures the videos: shared by the benchmarks."""

import functools
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
ASSETS = TESTS.parent / "assets"
NANO = ASSETS / "wan_nano"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "wan_nano"), str(TESTS / "wan_nano_training")]

from clips import Scene, pick, seen  # noqa: E402, F401  (imported from here)
from wan import WanT2V, text2video  # noqa: E402
from wan.configs import WAN_CONFIGS  # noqa: E402

from teacache_generate import (  # noqa: E402
    EMBEDDING,
    NOISE_LEVEL,
    PROJECTION,
    RULES,
    Schedule,
    TeaCacheConfig,
    patched,
    read_rule,
    teacache,
)

PSNR_CAP = 100.0  # dB
MEASURES = {"plain": EMBEDDING, "retention": PROJECTION, "sigma": NOISE_LEVEL}  # by mode


@dataclass(frozen=True)
class Sampling:
    """Arguments of ``generate``; the defaults are Wan2.1's."""

    steps: int = 50
    solver: str = "unipc"
    shift: float = 5.0
    guide_scale: float = 5.0


@functools.cache
def load(ckpt: Path = NANO) -> WanT2V:
    """The pipeline of this process, one thread."""
    torch.set_num_threads(1)
    logging.getLogger("teacache").setLevel(logging.ERROR)  # its warnings come with every video
    return WanT2V(WAN_CONFIGS["t2v-nano"], ckpt)


def sample(
    wan: WanT2V,
    prompt: str,
    noise: Tensor,
    config: TeaCacheConfig,
    sampling: Sampling = Sampling(),
    bfloat16: bool = False,
) -> tuple[np.ndarray, Any, float]:
    """A video [3, F, H, W] in [-1, 1], its TeaCache, and the thread's seconds of its sampling.

    noise: the first latents [16, 5, 8, 8]. bfloat16: under autocast, as Wan2.1 runs on a GPU.
    """
    decode, ended = wan.vae.decode, []

    def timed_decode(latents: list[Tensor]) -> list[Tensor]:
        ended.append(time.thread_time())
        return decode(latents)

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with (
        patched(text2video, tqdm=iter),
        patched(wan, noise=lambda *_: noise, param_dtype=dtype),
        patched(wan.vae, decode=timed_decode),
        teacache(wan.model, config) as cache,
    ):
        began = time.thread_time()
        video = wan.generate(
            prompt,
            sampling_steps=config.steps,
            sample_solver=sampling.solver,
            shift=sampling.shift,
            guide_scale=sampling.guide_scale,
            offload_model=False,
        )
    return video.cpu().numpy(), cache, ended[0] - began


def fidelity(stock: np.ndarray, video: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, at most 100, and SSIM of videos [3, F, H, W] in [-1, 1]."""
    ssim = [
        structural_similarity(a, b, channel_axis=0, data_range=2)
        for a, b in zip(stock.swapaxes(0, 1), video.swapaxes(0, 1), strict=True)
    ]
    return psnr(stock, video), float(np.mean(ssim))


def psnr(stock: np.ndarray, video: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return min(float(peak_signal_noise_ratio(stock, video, data_range=2)), PSNR_CAP)


def config_of(mode: str, steps: int, thresh: float | None = None) -> TeaCacheConfig:
    """Settings for a mode: the polynomials of the miniature's teacache.json, or "sigma"."""
    if mode == "sigma":
        return TeaCacheConfig.from_rule(RULES["sigma"], steps, thresh or 0.0)
    rule = read_rule(NANO / "teacache.json")
    return TeaCacheConfig.from_rule(rule, steps, thresh, mode == "retention")


def spaced(count: int, steps: int) -> list[int]:
    """``count`` of the steps, the first and the last among them; the gaps differ by 1 at most."""
    return [i * (steps - 1) // (count - 1) for i in range(count)]


@functools.cache
def run_of(wan: WanT2V, measure: str, sampling: Sampling) -> tuple[list[float], list[float | None]]:
    """Timesteps and distances of a run that computes every step."""
    every = range(sampling.steps)
    config = TeaCacheConfig(sampling.steps, 1.0, (0.0,), measure, forced_steps=every)
    _, cache, _ = sample(wan, "", torch.zeros(16, 5, 8, 8), config, sampling)
    decisions = cache.schedule.decisions
    return [d.timestep for d in decisions], [d.distance for d in decisions]


def plan(wan: WanT2V, config: TeaCacheConfig, sampling: Sampling = Sampling()) -> Schedule:
    return Schedule.planned(config, *run_of(wan, config.measure, sampling))
