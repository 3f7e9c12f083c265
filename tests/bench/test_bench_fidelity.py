"""bench_fidelity.py on two prompts, its settings and figures, and the pictures of its data."""

import dataclasses

import numpy as np
import pytest
from bench_fidelity import (
    METHODS,
    STOCK,
    Measured,
    cached_settings,
    drift_against_psnr,
    floor_settings,
    guided_settings,
    measure,
    other_settings,
    pairs_of,
    planned,
    row,
)
from nano import python
from PIL import Image
from sampling import ASSETS, fidelity, spaced

from teacache_generate import TeaCacheConfig

# PSNR in dB by method and order at 25 of 50 steps, as bench_fidelity.py measured on assets/wan_nano
# for its first 2 pairs (2 cores of an x86-64 machine, torch 2.13). Rounding differs by CPU.
MEASURED = {
    ("TeaCache, plain", 0): 39.4,
    ("TeaCache, plain", 1): 51.7,
    ("TeaCache, retention steps", 0): 37.7,
    ("TeaCache, retention steps", 1): 47.5,
    ("sigma", 0): 36.3,
    ("sigma", 1): 43.5,
}
ALLOWED = 1.0  # dB below


@pytest.fixture(scope="module")
def measured() -> dict[tuple, list[Measured]]:
    """By method and order: two videos of stock, and of each mode at half of the steps."""
    settings = [STOCK]
    for mode in METHODS:
        settings += cached_settings(mode, planned(mode, [25])[1])
    by_setting = zip(*(measure(settings, pair) for pair in pairs_of(2)), strict=True)
    names = [(setting.method, setting.config.order) for setting in settings]
    return dict(zip(names, by_setting, strict=True))


def test_the_miniature_is_as_near_to_stock_as_measured(measured):
    found = {name: float(np.mean([video.psnr for video in measured[name]])) for name in MEASURED}
    below = {name: found[name] for name in MEASURED if found[name] < MEASURED[name] - ALLOWED}
    assert not below, found


def test_stock_equals_itself_without_drift(measured):
    for video in measured["stock", 0]:
        assert (video.computed, video.passes, video.speedup) == (50, 100, 1.0)
        assert (video.drift, video.psnr, video.ssim) == (None, 100.0, 1.0)


def test_every_mode_and_order_computes_half(measured):
    cached = [video for name, videos in measured.items() if name[0] != "stock" for video in videos]
    assert len(cached) == 12
    assert {(video.computed, video.passes) for video in cached} == {(25, 50)}
    assert all(video.psnr < 100 and 0 < video.drift < 1 for video in cached)


def test_a_known_error_has_its_psnr():
    grey = np.zeros((3, 2, 16, 16), dtype=np.float32)
    assert fidelity(grey, grey) == (100.0, 1.0)
    psnr, ssim = fidelity(grey, grey + 0.2)
    assert psnr == pytest.approx(20, abs=1e-4)
    assert ssim < 1


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(5, 10, [0, 2, 4, 6, 9]), (4, 10, [0, 3, 6, 9]), (5, 50, [0, 12, 24, 36, 49])],
)
def test_even_spacing_has_first_and_last_step(count, steps, expected):
    assert spaced(count, steps) == expected


def test_settings_are_as_listed():
    even = [u.config for u in other_settings([5]) if u.method == "evenly spaced"]
    assert [(u.order, u.forced_steps) for u in even] == [(n, (0, 12, 24, 36, 49)) for n in (0, 1)]
    guided = guided_settings(TeaCacheConfig(50, 0.06, signal="noise level"))
    assert [(u.method, u.config.thresh, u.config.guided_steps) for u in guided] == [
        *(("guidance until", 0, steps) for steps in (40, 30, 20)),
        *(("sigma, guidance until", 0.06, steps) for steps in (40, 30, 20)),
    ]
    assert [(u.name, u.noise, u.bfloat16, u.against) for u in floor_settings()] == [
        ("1e-4 of noise", 1e-4, False, "stock"),
        ("1e-2 of noise", 1e-2, False, "stock"),
        ("bf16", 0.0, True, "stock"),
        ("bf16, 1e-4 of noise", 1e-4, True, "bf16"),
        ("bf16, 1e-2 of noise", 1e-2, True, "bf16"),
    ]


def test_a_row_has_median_times_and_mean_fidelity():
    videos = [
        Measured(25, 50, 1.0, 1.5, 0.1, 40.0, 0.9),
        Measured(25, 50, 1.2, 1.7, 0.2, 44.0, 1.0),
        Measured(25, 50, 9.0, 1.6, 0.3, 42.0, 0.95),
    ]
    found = row(dataclasses.replace(STOCK, name="x"), videos, 91)
    assert (found["seconds"], found["speedup"], found["drift"]) == (1.2, 1.6, 0.2)
    assert (found["psnr"], found["psnr_std"], found["ssim"]) == (42.0, 1.63, 0.95)
    assert (found["computed"], found["passes"], found["shown"]) == (25, 50, 91)


def test_the_rank_correlation_leaves_out_less_guidance():
    rows = [
        {"method": "stock", "drift": None, "psnr": 100},
        {"method": "sigma", "drift": 0.1, "psnr": 50},
        {"method": "evenly spaced", "drift": 0.2, "psnr": 41},
        {"method": "sigma", "drift": 0.4, "psnr": 40},
        {"method": "sigma, guidance until", "drift": 0.05, "psnr": 20},
    ]
    assert drift_against_psnr(rows) == {"settings": 3, "spearman": -1.0}


def test_the_pictures_are_drawn_from_the_shipped_data(tmp_path):
    drawn = python(ASSETS / "draw.py", "--out", tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert [u.stem for u in pictures] == ["drift", "schedule"]
    for file in pictures:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGBA"))
        height, width = pixels.shape[:2]
        assert 1200 < width <= 1800 and 300 < height < 2000, file
        assert (pixels[0, 0] == 255).all(), file  # white, also on a dark page
        assert pixels[..., :3].std() > 10, file
