"""bench_gpu.py and gpu.sh: figures of made-up runs, limits of parts, and one part without CUDA."""

import json
import os
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import bench_gpu
import numpy as np
import pytest
from bench_gpu import lines, run_part, write_rows
from gpu_full_size import WAN, compare, host_syncs
from nano import HERE


def probe(seconds: list[float], peak: float, vae: float, syncs: list[int]) -> SimpleNamespace:
    memory = (int(peak * 2**30), int(vae * 2**30))
    return SimpleNamespace(seconds=lambda: np.array(seconds), memory=memory, syncs_at=syncs)


def test_figures_are_beside_stock():
    stock = probe([1.0, 1.0, 1.0, 1.0], 10, 1, [0, 3, 6, 9, 12])
    half = probe([1.0, 0.02, 0.02, 0.96], 10.25, 1, [0, 4, 8, 11, 15])
    rows = compare("order 0", half, stock, [0, 3], (0.3, 0.1))
    assert [value for _, value in rows] == pytest.approx([2.0, 100 * 0.02 / 0.98, 0.25, 0, 1])
    assert rows[0][0] == "order 0: 2 of 4 steps, speed-up"
    assert "simulated 0.3" in rows[2][0]


def test_only_warnings_of_a_synchronisation_count():
    with host_syncs() as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert len(found) == 3


def test_rows_of_a_failing_part_are_kept(monkeypatch, tmp_path):
    def part(folder):
        yield "first", 1.5
        raise RuntimeError("the second fails")

    monkeypatch.setitem(bench_gpu.PARTS, 1, ("a part", part, 1))
    with pytest.raises(RuntimeError):
        write_rows(1, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [["first", 1.5]]


def test_a_part_ends_at_its_limit():
    began = time.monotonic()
    assert run_part(1, 0.2)["status"] == "stopped after 0 s"
    assert time.monotonic() - began < 30


def test_the_table_has_every_part():
    rows = [["equal", True], ["off", False], ["seconds", 1.23456], ["kernel", "X"]]
    part = {"part": "the stand-in", "status": "ended", "seconds": 3.0, "rows": rows}
    head, title, *values = lines({"machine": {"gpu": "H200", "driver": None}, "parts": {1: part}})
    assert (head, title) == ("H200", "1. the stand-in: ended (3.0 s)")
    assert [line.split() for line in values] == [
        ["equal", "yes"],
        ["off", "NO"],
        ["seconds", "1.235"],
        ["kernel", "X"],
    ]


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
    assert len(names) == 13
    assert names[3] == "order 0: 2 of 4 steps, speed-up"
    assert "none: small sizes" in done.stdout
