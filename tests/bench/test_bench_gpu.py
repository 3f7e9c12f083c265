"""The benchmark of bench_gpu.py: its schedules, its figures, and one small run without CUDA."""

import argparse
import itertools
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import bench_gpu
import pytest
import torch
from bench_gpu import (
    MODELS,
    NOTE,
    WAN,
    Probe,
    Run,
    counts,
    figures,
    forget,
    goals,
    host_syncs,
    table,
)
from nano import HERE, python
from scripted import spaced
from tqdm import tqdm

import teacache_generate
from teacache_generate import TeaCache, TeaCacheConfig

ROW_KEYS = {
    *("name", "computed_ms", "skipped_ms", "skipped_share", "sampling_seconds", "speedup"),
    *("of_ideal", "peak_gib", "reserved_gib", "vae_gib", "syncs", "last_syncs", "runs", "goals"),
}
MACHINE = {"gpu": "H200", "driver": "570.1", "torch": "2.13", "attention": "flash-attn 3"}
SETTINGS = {"dim": 1536, "layers": 30, "weights": "float32", "size": [832, 480], "frames": 81}
SETTINGS |= {
    "model": "1.3B",
    "tokens": 32760,
    "order": 0,
    "steps": 4,
    "rounds": 2,
    "date": "2026-01-02",
}


def test_25_20_and_17_of_50_steps_or_their_like():
    assert counts(50) == [25, 20, 17]
    assert counts(10) == [5, 4, 3]
    assert counts(4) == [2]


def test_a_script_is_evenly_spaced():
    assert spaced(5, 10) == [0, 2, 4, 6, 9]
    assert spaced(4, 10) == [0, 3, 6, 9]
    assert spaced(3, 10) == [0, 4, 9]
    assert spaced(2, 4) == [0, 3]
    assert spaced(17, 50) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45, 49]


@pytest.mark.parametrize(("count", "gaps"), [(25, {2, 3}), (20, {2, 3}), (17, {3, 4})])
def test_a_script_has_its_count_its_ends_and_gaps_that_differ_by_one(count, gaps):
    script = spaced(count, 50)
    assert len(script) == count
    assert (script[0], script[-1]) == (0, 49)
    assert {b - a for a, b in itertools.pairwise(script)} == gaps


def test_only_warnings_of_a_synchronisation_are_counted():
    with host_syncs() as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert len(found) == 3


@pytest.fixture
def report(monkeypatch) -> dict:
    """A report of two rounds as on CUDA, of runs made up."""
    monkeypatch.setattr(bench_gpu, "CUDA", True)
    gib, step = 2**30, [1.0, 1.0, 1.0, 1.0]
    stock = [
        Run([0, 1, 2, 3], step, 10 * gib, 12 * gib, gib, [5, 3, 3, 3]),
        Run([0, 1, 2, 3], step, 10 * gib, 12 * gib, gib, [3, 3, 3, 3]),
    ]
    step = [1.0, 0.02, 0.02, 0.96]
    half = [
        Run([0, 3], step, 10 * gib + gib // 4, 12 * gib + gib // 2, gib, [6, 2, 2, 5]),
        Run([0, 3], step, 10 * gib + gib // 4, 12 * gib, gib, [4, 2, 2, 4]),
    ]
    rows = [figures("stock", stock, stock), figures("2 of 4", half, stock)]
    for row in rows:
        row["goals"] = goals(row, MODELS["1.3B"], residual_gib=0.1875, order=0)
    return {"note": NOTE, **MACHINE, **SETTINGS, "rows": rows}


def test_figures_are_medians_and_what_is_above_stock(report):
    stock, half = report["rows"]
    assert (stock["computed_ms"], stock["sampling_seconds"]) == (1000.0, 4.0)
    assert half["computed_ms"] == pytest.approx(980)
    assert half["skipped_ms"] == pytest.approx(20)
    assert half["skipped_share"] == pytest.approx(0.02 / 0.98)
    assert half["sampling_seconds"] == pytest.approx(2.0)
    assert (half["speedup"], half["of_ideal"]) == (pytest.approx(2.0), pytest.approx(1.0))
    assert (half["peak_gib"], half["reserved_gib"], half["vae_gib"]) == (0.25, 0.5, 0.0)
    assert (half["syncs"], half["last_syncs"]) == (1, 2)


def test_the_table_has_goals_beside_what_was_measured(report):
    assert table(report).splitlines() == [
        "random weights: times, not pictures",
        "H200, driver 570.1, torch 2.13, flash-attn 3, 2026-01-02",
        "1.3B: dim 1536, 30 layers, float32, 832x480x81, 32760 tokens, order 0, 4 steps, rounds: 2",
        "computed                               stock   2 of 4",
        "computed step, ms                      1000.0  980.0",
        "skipped step, ms                               20.00",
        "skipped step/computed step                     2.04% (<= 1.00%)",
        "sampling, s                            4.0     2.0",
        "speed-up                                       2.00",
        "speed-up/(steps/computed)                      1.000 (>= 0.980)",
        "allocated above stock, GiB                     0.25 (<= 0.38)",
        "reserved above stock, GiB                      0.50 (<= 0.56)",
        "allocated above stock at the VAE, GiB          0.00 (<= 0.00)",
        "host syncs a step above stock                  1 (<= 1)",
        "... at the last step                           2 (<= 2)",
    ]


def test_goals_are_those_of_the_model_of_the_order_and_of_half_of_the_steps(report):
    half = report["rows"][1]
    assert goals(half, MODELS["14B-720P"], residual_gib=1.5, order=0) == {
        **{"peak_gib": 3.0, "reserved_gib": 4.5, "vae_gib": 0.0, "syncs": 1, "last_syncs": 2},
        **{"skipped_share": 0.005, "of_ideal": 0.98},
    }
    fewer = {"name": "1 of 3", "runs": [{"computed": [0], "step_seconds": [1.0, 0.1, 0.1]}]}
    assert goals(fewer, MODELS["14B-480P"], residual_gib=0.5, order=1) == {
        **{"peak_gib": 2.0, "reserved_gib": 2.5, "vae_gib": 0.0, "syncs": 1, "last_syncs": 2}
    }


class Cuda:
    """In place of torch.cuda: what is asked of it, in order, with answers that were made up.

    The n-th event is recorded at n seconds; from time to time the host waits, and is warned of it.
    """

    def __init__(self):
        self.asked: list[str] = []

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        number = sum(name.startswith("event") for name in self.asked)
        event = SimpleNamespace(number=number)
        event.record = lambda: self.asked.append(f"event {number}")
        event.elapsed_time = lambda end: self.elapsed(number, end.number)
        return event

    def elapsed(self, begin: int, end: int) -> float:
        self.asked.append(f"elapsed {begin} {end}")
        return 1000.0 * (end - begin)

    def __getattr__(self, name: str):
        answers = {"max_memory_allocated": 7, "max_memory_reserved": 8, "memory_allocated": 5}

        def ask(*args: object):
            self.asked.append(" ".join(map(str, [name, *args])))
            return answers.get(name)

        return ask


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(bench_gpu, "CUDA", True)
    monkeypatch.setattr(bench_gpu.torch, "cuda", cuda)
    return cuda


def test_the_last_mark_is_waited_for_before_memory_and_times_are_read(cuda):
    syncs: list = []
    probe = Probe(syncs, tqdm(disable=True))
    for call in range(4):  # two steps of two calls
        probe.called()
        syncs.append(f"of call {call}")
    syncs.append("of the end")
    probe.decode([])
    assert probe.result([0, 1]) == Run([0, 1], [1.0, 1.0], 7, 8, 5, [2, 3])
    assert cuda.asked == [
        "reset_peak_memory_stats",
        "event 0",
        "event 1",
        "event 2",
        "synchronize",
        "max_memory_allocated",
        "max_memory_reserved",
        "memory_allocated",
        "elapsed 0 1",
        "elapsed 1 2",
    ]


def test_a_run_begins_without_what_the_run_before_has_left(cuda):
    forget()
    assert cuda.asked == ["empty_cache"]


def test_synchronisations_are_warned_of_during_a_run_only_and_also_after_an_error(cuda):
    with pytest.raises(ZeroDivisionError), host_syncs():
        assert cuda.asked == ["set_sync_debug_mode warn"]
        _ = 1 / 0
    assert cuda.asked == ["set_sync_debug_mode warn", "set_sync_debug_mode default"]


def test_the_script_waits_for_the_gpu_before_it_takes_the_end_of_the_sampling(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(time, "perf_counter", lambda: asked.append("time") or 1.0)
    TeaCache(TeaCacheConfig(2, 0.0)).end_sampling()
    assert asked == ["synchronize", "time"]


def test_the_script_waits_for_the_gpu_before_it_takes_the_begin_of_the_sampling(monkeypatch):
    """What encodes the prompt may still be at work."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(time, "perf_counter", lambda: asked.append("time") or 1.0)
    cache = TeaCache(TeaCacheConfig(2, 0.0))
    for _ in range(3):  # the others do not wait
        cache.begin_call(None, torch.tensor([1.0]))
    assert asked == ["synchronize", "time"]


def test_the_seconds_of_decoding_begin_after_the_sampling_and_end_with_the_video(
    monkeypatch, tmp_path
):
    """Without the second wait the writer, which needs the video first, would pay for it."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(time, "perf_counter", lambda: asked.append("time") or 1.0)
    args = argparse.Namespace(
        task="t2v-nano", ckpt_dir=".", save_file=str(tmp_path / "x.mp4"), base_seed=1, prompt=""
    )
    wan = SimpleNamespace(task_config=lambda task: {"sample_fps": 16})
    run = teacache_generate.Run(wan, teacache_generate.Job(args, None, "", None))
    run.decode(lambda latents: asked.append("decode"), [torch.zeros(1)])
    assert asked == ["synchronize", "time", "decode", "synchronize", "time"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict, list[str]]:
    """The report of a run without CUDA, and the table that it printed."""
    if not (WAN / "generate.py").is_file():
        pytest.skip(f"no real Wan2.1 at {WAN} (or $WAN_REPO): not tried")
    file: Path = tmp_path_factory.mktemp("bench") / "bench_gpu.json"
    flags = ["--model", "14B-720P", "--steps", 10, "--rounds", 1, "--json", file]
    done = python(HERE / "bench/bench_gpu.py", "--wan_repo", WAN, *flags, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines()
    return json.loads(file.read_text()), printed[printed.index(NOTE) :]


def test_a_run_without_cuda_measures_stock_and_each_script(small):
    report, _ = small
    assert report["note"] == "random weights: times, not pictures"
    assert (report["model"], report["dim"], report["layers"]) == ("14B-720P", 48, 2)
    assert (report["size"], report["frames"], report["tokens"]) == ([160, 96], 81, 1260)
    assert (report["steps"], report["rounds"], report["weights"]) == (10, 1, "float32")
    assert [row["name"] for row in report["rows"]] == ["stock", "5 of 10", "4 of 10", "3 of 10"]
    assert [[run["computed"] for run in row["runs"]] for row in report["rows"]] == [
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
        [[0, 2, 4, 6, 9]],
        [[0, 3, 6, 9]],
        [[0, 4, 9]],
    ]


def test_a_run_without_cuda_has_all_times_and_nothing_of_a_gpu(small):
    report, printed = small
    assert (report["gpu"], report["driver"]) == (None, None)
    assert report["attention"].startswith("scaled_dot_product_attention (")
    for row in report["rows"]:
        assert set(row) == ROW_KEYS
        of_a_gpu = ("peak_gib", "reserved_gib", "vae_gib", "syncs", "last_syncs")
        assert ([row[name] for name in of_a_gpu], row["goals"]) == ([None] * 5, {})
        (run,) = row["runs"]
        of_a_gpu = ("peak_bytes", "reserved_bytes", "vae_bytes", "syncs")
        assert [run[name] for name in of_a_gpu] == [None] * 4
        assert len(run["step_seconds"]) == 10
        assert min(run["step_seconds"]) > 0
    for row in report["rows"][1:]:
        assert None not in (row["skipped_share"], row["speedup"], row["of_ideal"])
    assert printed[1].startswith("no GPU: small sizes, torch ")
    assert printed[-5:] == [
        "allocated above stock, GiB",
        "reserved above stock, GiB",
        "allocated above stock at the VAE, GiB",
        "host syncs a step above stock",
        "... at the last step",
    ]
