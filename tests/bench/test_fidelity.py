"""The benchmark of fidelity on two prompts, its settings, and the pictures drawn from its data."""

import dataclasses
import importlib

import imageio
import numpy as np
import pytest
import torch
from bench_dtype import learn_rounded
from bench_fidelity import (
    ASSETS,
    METHODS,
    STOCK,
    Measured,
    cached_settings,
    drift_against_psnr,
    fidelity,
    floor_settings,
    guided_settings,
    load,
    measure,
    other_settings,
    pairs_of,
    planned,
    row,
)
from nano import python
from PIL import Image

from teacache_generate import CONDITIONAL, ComputedStep, TeaCache, TeaCacheConfig

# PSNR in dB by method and order at 25 of 50 steps: what bench_fidelity.py measured on
# assets/wan_nano for its first 2 pairs (2026-11-25, 2 cores of an x86-64 machine, torch 2.13). No
# less than 1 dB below: another CPU rounds otherwise.
MEASURED = {
    ("TeaCache, plain", 0): 39.4,
    ("TeaCache, plain", 1): 53.5,
    ("TeaCache, retention steps", 0): 37.7,
    ("TeaCache, retention steps", 1): 47.7,
    ("sigma", 0): 36.3,
    ("sigma", 1): 42.7,
}


@pytest.fixture(scope="module")
def measured() -> dict[tuple, list[Measured]]:
    """By method and order, two prompts and seeds by stock, and by each mode at half of the steps.

    On the shipped miniature.
    """
    ckpt = ASSETS / "wan_nano"
    plans = {mode: planned(load(ckpt), ckpt, mode, [25])[1] for mode in METHODS}
    cached = [setting for mode in METHODS for setting in cached_settings(mode, plans[mode])]
    settings = [STOCK, *cached]
    by_setting = zip(*(measure(ckpt, settings, pair) for pair in pairs_of(2)), strict=True)
    names = [(setting.method, setting.config.order) for setting in settings]
    return dict(zip(names, by_setting, strict=True))


def mean_psnr(videos: list[Measured]) -> float:
    return float(np.mean([video.psnr for video in videos]))


def test_the_shipped_miniature_stays_as_near_to_stock_as_it_was_measured(measured):
    found = {name: mean_psnr(measured[name]) for name in MEASURED}
    assert not {name: found[name] for name, psnr in MEASURED.items() if found[name] < psnr - 1}


def test_stock_is_equal_to_itself_and_has_no_drift(measured):
    for video in measured["stock", 0]:
        assert (video.computed, video.passes, video.speedup) == (50, 100, 1.0)
        assert (video.drift, video.psnr, video.ssim) == (None, 100.0, 1.0)


def test_half_of_the_steps_are_computed_in_every_mode_and_order(measured):
    cached = [video for name, videos in measured.items() if name[0] != "stock" for video in videos]
    assert len(cached) == 12
    assert {(video.computed, video.passes) for video in cached} == {(25, 50)}
    assert all(video.psnr < 100 and 0 < video.drift < 1 for video in cached)


def test_a_known_error_gives_its_psnr():
    grey = np.zeros((3, 2, 16, 16), dtype=np.float32)
    assert fidelity(grey, grey) == (100.0, 1.0)
    psnr, ssim = fidelity(grey, grey + 0.2)
    assert psnr == pytest.approx(20, abs=1e-4)
    assert ssim < 1


def test_evenly_spaced_skipping_computes_the_first_and_the_last_step():
    settings = [u for u in other_settings([5]) if u.method == "evenly spaced"]
    assert {u.config.order: u.config.script for u in settings} == {
        0: (0, 12, 24, 36, 49),
        1: (0, 12, 24, 36, 49),
    }


def test_guidance_ends_after_four_three_and_two_fifths_of_the_steps():
    settings = guided_settings(TeaCacheConfig(50, 0.06, "sigma"))
    assert [(u.method, u.config.thresh, u.config.guided_steps) for u in settings] == [
        ("guidance until", 0, 40),
        ("guidance until", 0, 30),
        ("guidance until", 0, 20),
        ("sigma, guidance until", 0.06, 40),
        ("sigma, guidance until", 0.06, 30),
        ("sigma, guidance until", 0.06, 20),
    ]


def test_noise_is_held_against_videos_of_the_same_rounding():
    settings = floor_settings()
    assert [(u.name, u.noise, u.bfloat16, u.against) for u in settings] == [
        ("1e-4 of noise", 1e-4, False, "stock"),
        ("1e-2 of noise", 1e-2, False, "stock"),
        ("bf16", 0.0, True, "stock"),
        ("bf16, 1e-4 of noise", 1e-4, True, "bf16"),
        ("bf16, 1e-2 of noise", 1e-2, True, "bf16"),
    ]


def test_a_row_has_medians_of_times_and_means_of_fidelity():
    videos = [
        Measured(25, 50, 1.0, 1.5, 0.1, 40.0, 0.9),
        Measured(25, 50, 1.2, 1.7, 0.2, 44.0, 1.0),
        Measured(25, 50, 9.0, 1.6, 0.3, 42.0, 0.95),
    ]
    found = row(dataclasses.replace(STOCK, name="x"), videos, 91)
    assert (found["seconds"], found["speedup"], found["drift"]) == (1.2, 1.6, 0.2)
    assert (found["psnr"], found["psnr_std"], found["ssim"]) == (42.0, 1.63, 0.95)
    assert (found["computed"], found["passes"], found["shown"]) == (25, 50, 91)


def test_the_rank_correlation_is_over_what_reuses_residuals_and_does_nothing_else():
    rows = [
        {"method": "stock", "drift": None, "psnr": 100},
        {"method": "sigma", "drift": 0.1, "psnr": 50},
        {"method": "evenly spaced", "drift": 0.2, "psnr": 41},
        {"method": "sigma", "drift": 0.4, "psnr": 40},
        {"method": "sigma, guidance until", "drift": 0.05, "psnr": 20},
    ]
    assert drift_against_psnr(rows) == {"settings": 3, "spearman": -1.0}


@pytest.mark.parametrize("name", ["bench_order", "bench_plan"])
def test_the_other_benchmarks_find_what_they_import(name):
    assert importlib.import_module(name).__doc__


def test_a_residual_kept_in_bfloat16_loses_what_that_cannot_hold():
    cache = TeaCache(TeaCacheConfig(2, 0.1, "sigma"))
    cache.computing = ComputedStep(0, {}, {CONDITIONAL: torch.tensor([1.0, 1.001])})
    learn_rounded(cache, learn=lambda cache: None)
    assert cache.computing.residuals[CONDITIONAL].tolist() == [1.0, 1.0]


def test_the_pictures_are_drawn_from_the_data_in_the_repository(tmp_path):
    video = tmp_path / "x.compare.mp4"
    with imageio.get_writer(video, fps=8) as writer:
        for level in (0, 100, 200):
            writer.append_data(np.full((64, 96, 3), level, dtype=np.uint8))
    drawn = python(ASSETS / "draw.py", "--compare", video, "--out", tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert [u.stem for u in pictures] == ["drift", "schedule"]
    for file in pictures:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGBA"))
        height, width = pixels.shape[:2]
        assert 1200 < width <= 1800, file
        assert 600 < height < 2000, file
        assert (pixels[0, 0] == 255).all(), file  # white, also on a dark page
        assert pixels[..., :3].std() > 10, file
    with Image.open(tmp_path / "compare.gif") as moving:
        assert (moving.n_frames, moving.size, moving.info["loop"]) == (3, (96, 64), 0)
        assert moving.info["duration"] == 120  # a GIF counts in 10 ms
