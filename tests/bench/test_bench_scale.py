"""bench_scale.py: bounds on time, memory and waits at full size; fake_gpu.py on single ops."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scale import CASES, ORDERS, PUBLISHED
from fake_gpu import GPU, Meter
from torch._subclasses.fake_tensor import FakeTensorMode

BENCH = Path(__file__).with_name("bench_scale.py")
WAN22_CASES = ("A14B-720P", "5B-704P")
GIB_ABOVE_STOCK = [  # measured at full depth, rounded up
    *[("1.3B-480P", 0.4, 0.8), ("14B-480P", 1.1, 2.4), ("14B-720P", 2.3, 5.2)],
    *[("i2v-480P", 1.1, 2.4), ("i2v-720P", 2.3, 5.2)],
]


@functools.cache
def measured(variable: str, folder: str) -> dict[str, Any]:
    """The figures of all cases of a checkout, with two blocks at the cost of all."""
    repo = Path(os.getenv(variable, f"~/.cache/teacache4wan/{folder}")).expanduser()
    if not (repo / "wan").is_dir():
        pytest.skip(f"no {folder} at {repo} (or ${variable})")
    with tempfile.TemporaryDirectory() as out:
        file = Path(out, "scale.json")
        command = [sys.executable, BENCH, "--wan_repo", repo, "--layers", 2, "--json", file]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(file.read_text())


def figure(case: str, title: str) -> Any:
    checkout = ("WAN22_REPO", "Wan2.2") if case in WAN22_CASES else ("WAN_REPO", "Wan2.1")
    return measured(*checkout)["figures"][case][title]


def latency(case: str, thresh: float | str) -> list[Any]:
    rows = measured("WAN_REPO", "Wan2.1")["sampling"]
    return next(row for row in rows if row[:2] == [case, thresh])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_each_case_is_within_its_bounds(case, order):
    assert figure(case, f"{order}: computed steps") == [0, 1, 3]
    share = 1.3 if case in WAN22_CASES else 0.3
    assert figure(case, f"{order}: skipped/computed pass, %") <= share
    assert figure(case, f"{order}: input of the head") == ["torch.float32"]
    *waits, last_waits = figure(case, f"{order}: host syncs above stock")
    assert max(waits) <= 1
    assert last_waits <= 2  # reads the measured drift once sampling is over
    assert figure(case, f"{order}: above stock at the VAE, GiB") == 0


@pytest.mark.parametrize(("case", "order_0", "order_1"), GIB_ABOVE_STOCK)
def test_peak_above_stock_is_bounded(case, order_0, order_1):
    assert figure(case, "order 0: peak above stock, GiB") <= order_0
    assert figure(case, "order 1: peak above stock, GiB") <= order_1


@pytest.mark.parametrize("case", PUBLISHED)
def test_stock_latency_is_within_2_percent(case):
    *_, published, predicted, _ = latency(case, "stock")
    assert predicted == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("case", "thresh", "count"),
    [
        *[("1.3B-480P", 0.08, 25), ("14B-720P", 0.2, 25)],
        *[("i2v-480P", 0.26, 16), ("i2v-720P-61", 0.3, 17)],
    ],
)
def test_latency_tells_the_computed_steps(case, thresh, count):
    assert latency(case, thresh)[-1] == count


@pytest.fixture
def meter():
    meter = Meter()
    meter.in_pass = True
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        yield meter


def test_meter_refuses_an_op_on_two_devices(meter):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=GPU) + torch.ones(3)


def test_meter_prices_a_product_of_matrices(meter):
    a = torch.empty(512, 256, dtype=torch.bfloat16, device=GPU)
    a @ a.T
    (only,) = meter.passes
    assert (only.flops, only.launches) == (2 * 512 * 256 * 512, 1)
    assert only.bytes == 2 * (2 * 512 * 256 + 512 * 512)


def test_meter_counts_alive_bytes_and_their_peak(meter):
    a = torch.empty(1000, device=GPU)  # 4,000 bytes, in units of 512
    b = a + 1
    del a, b
    assert (meter.alive, meter.peak) == (0, 2 * 4096)


def test_meter_counts_waits_and_knows_host_numbers(meter):
    t = torch.full((), 7.0).to(GPU)  # a blocking copy
    assert (t.add_(1) * 2).item() == 16
    assert meter.passes[0].syncs == 2
