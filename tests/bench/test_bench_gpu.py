"""bench_gpu.py and gpu.sh: figures of made-up runs, limits of parts, and one part without CUDA."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from bench_gpu import WAN21, Run, compare, run_part
from nano import HERE


def test_figures_are_beside_stock():
    gib = 2**30
    stock = Run(np.array([1.0, 1.0, 1.0, 1.0]), [0, 1, 2, 3], 10 * gib, gib)
    half = Run(np.array([1.0, 0.02, 0.02, 0.96]), [0, 3], 10.25 * gib, gib)
    rows = dict(compare(half, stock))
    assert list(rows.values()) == pytest.approx([2.0, 100 * 0.02 / 0.98, 0.25, 0])
    assert rows["2 of 4 steps, speed-up"] == 2


def test_a_part_ends_at_its_limit(tmp_path):
    began = time.monotonic()
    run_part(1, 0.2, tmp_path)
    assert "timed out" in (tmp_path / "gpu.txt").read_text()
    assert time.monotonic() - began < 30


def test_one_part_runs_without_cuda(tmp_path):
    if not (WAN21 / "generate.py").is_file():
        pytest.skip(f"no real Wan2.1 at {WAN21} (or $WAN_REPO): not tried")
    command = ["bash", str(HERE / "bench/gpu.sh"), "--only", "5", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    head, part, *rows = done.stdout.splitlines()
    assert "no GPU: small sizes" in head
    assert part == "5. t2v-14B at 480P"
    assert len(rows) == 11
    assert rows[3].startswith("   order 0: 2 of 4 steps, speed-up  ")
