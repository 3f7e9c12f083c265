"""bench_gpu.py and gpu.sh: figures of made-up runs, limits of parts, and one part without CUDA."""

import json
import os
import subprocess
import sys
import time

import bench_gpu
import numpy as np
import pytest
from bench_gpu import WAN, Run, compare, rows_in, run_part
from nano import HERE


def test_figures_are_beside_stock():
    gib = 2**30
    stock = Run(np.array([1.0, 1.0, 1.0, 1.0]), [0, 1, 2, 3], 10 * gib, gib)
    half = Run(np.array([1.0, 0.02, 0.02, 0.96]), [0, 3], 10.25 * gib, gib)
    rows = dict(compare(half, stock, 0.3, 0.1))
    assert list(rows.values()) == pytest.approx([2.0, 100 * 0.02 / 0.98, 0.25, 0])
    assert rows["2 of 4 steps, speed-up"] == 2
    assert "peak above stock, GiB (simulated 0.3)" in rows


def test_rows_of_a_failing_part_are_kept(monkeypatch, capsys):
    def part(folder):
        print("[Wan] something else")
        yield "first", 1.5
        raise RuntimeError("the second fails")

    monkeypatch.setitem(bench_gpu.PARTS, 1, ("a part", part, 1))
    with pytest.raises(RuntimeError):
        bench_gpu.print_rows(1)
    assert rows_in(capsys.readouterr().out) == [["first", 1.5]]


def test_a_part_ends_at_its_limit():
    began = time.monotonic()
    assert run_part(1, 0.2)["status"] == "stopped after 0 s"
    assert time.monotonic() - began < 30


def test_one_part_runs_without_cuda(tmp_path):
    if not (WAN / "generate.py").is_file():
        pytest.skip(f"no real Wan2.1 at {WAN} (or $WAN_REPO): not tried")
    command = ["bash", str(HERE / "bench/gpu.sh"), "--only", "5", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"].values()
    assert part["status"] == "ended", part
    names = [name for name, _ in part["rows"]]
    assert len(names) == 11
    assert names[3] == "order 0: 2 of 4 steps, speed-up"
    assert "no GPU: small sizes" in done.stdout
