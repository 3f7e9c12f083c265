"""bench_fidelity.py on two prompts, its settings and figures, and the pictures of its data."""

import bench_fidelity as bench
import numpy as np
import pytest
from bench_fidelity import STOCK
from nano import python
from PIL import Image
from sampling import ASSETS, fidelity, spaced

# PSNR in dB by method and order at 25 of 50 steps, as bench_fidelity.py measured on assets/wan_nano
# for its first 2 pairs (2 cores of an x86-64 machine, torch 2.13). Rounding differs by CPU.
MEASURED = {
    ("TeaCache, plain", 0): 77.9,
    ("TeaCache, plain", 1): 81.1,
    ("TeaCache, retention steps", 0): 75.9,
    ("TeaCache, retention steps", 1): 79.6,
    ("sigma", 0): 74.3,
    ("sigma", 1): 75.9,
}
ALLOWED = 1.0  # dB below


@pytest.fixture(scope="module")
def measured() -> dict[tuple, tuple[dict, ...]]:
    """By method and order: two videos of stock, and of each mode at half of the steps."""
    settings = [STOCK]
    for mode in bench.METHODS:
        settings += bench.cached_settings(mode, [25])
    by_setting = zip(*(bench.measure(settings, pair) for pair in bench.pairs_of(2)), strict=True)
    names = [(setting.method, setting.config.order) for setting in settings]
    return dict(zip(names, by_setting, strict=True))


@pytest.mark.parametrize("name", MEASURED)
def test_half_of_the_steps_are_as_near_to_stock_as_measured(measured, name):
    assert {(video["computed"], video["passes"]) for video in measured[name]} == {(25, 50)}
    assert all(0 < video["drift"] < 1 for video in measured[name])
    assert MEASURED[name] - ALLOWED < np.mean([video["psnr"] for video in measured[name]]) < 100


def test_stock_equals_itself_without_drift(measured):
    for video in measured["stock", 0]:
        assert (video["computed"], video["passes"], video["speedup"]) == (50, 100, 1.0)
        assert (video["drift"], video["psnr"], video["ssim"]) == (None, 100.0, 1.0)


def test_a_known_error_has_its_psnr():
    grey = np.zeros((3, 2, 16, 16), dtype=np.float32)
    assert fidelity(grey, grey) == (100.0, 1.0)
    psnr, ssim = fidelity(grey, grey + 0.2)
    assert psnr == pytest.approx(20, abs=1e-4)
    assert ssim < 1


def test_even_spacing_has_first_and_last_step():
    assert spaced(5, 10) == [0, 2, 4, 6, 9]
    assert spaced(4, 10) == [0, 3, 6, 9]


def test_a_row_has_median_times_and_mean_fidelity():
    half = {"computed": 25, "passes": 50, "ssim": 0.9}
    videos = [
        half | {"seconds": 1.0, "speedup": 1.5, "drift": 0.1, "psnr": 40.0, "shown": True},
        half | {"seconds": 1.2, "speedup": 1.7, "drift": 0.2, "psnr": 44.0, "shown": False},
        half | {"seconds": 9.0, "speedup": 1.6, "drift": 0.3, "psnr": 42.0, "shown": True},
    ]
    found = bench.row(STOCK, videos)
    assert (found["seconds"], found["speedup"], found["drift"]) == (1.2, 1.6, 0.2)
    assert (found["psnr"], found["psnr_std"], found["ssim"]) == (42.0, 1.633, 0.9)
    assert (found["shown"], found["videos"]) == (2, 3)


def test_schedule_is_drawn_from_the_shipped_data(tmp_path):
    drawn = python(ASSETS / "draw.py", "--out", tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    pixels = np.asarray(Image.open(tmp_path / "schedule.png").convert("RGBA"))
    height, width = pixels.shape[:2]
    assert 1200 < width <= 1800 and 300 < height < 2000
    assert (pixels[0, 0] == 255).all()  # white, also on a dark page
    assert pixels[..., :3].std() > 10
