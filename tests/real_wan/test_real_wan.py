"""The script on the real Wan2.1 and Wan2.2, small and on a CPU, against stock and a reference.

A run is one process, or two, on one checkout: its import takes longer than most jobs. The tests
look at what each job left.
"""

import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from cases import TABLES, WAN21, WAN22, Done


def pairs(**names: str) -> list[tuple[str, str]]:
    """(run, case) from names by run."""
    return [(run, name) for run, of_run in names.items() for name in of_run.split()]


OFF = pairs(w21="20-steps guidance-1 vace-1.3B flf2v t2i-14B", w22="t2v i2v ti2v ti2v-image")
PLANNED = pairs(
    w21="t2v-1.3B t2v-14B-ret sigma-dpm-speedup guide-until",
    w22="t2v i2v-40 ti2v-image-order-1 t2v-rule",
)
BATCHES = pairs(w21="20-steps", first="20-steps", two21="20-steps.all", w22="t2v", two22="t2v.all")
COMPARED = pairs(w21="20-steps t2i-14B", two21="20-steps.all", w22="ti2v-image")
DECODED = pairs(w21="20-steps t2i-14B", w22="t2v ti2v")
ULYSSES = pairs(w21="20-steps vace-1.3B", w22="t2v ti2v-image")
LINES = (  # of a jobs file: as in the case, another video, stock of the first
    ["--prompt", cases.CATS],
    ["--prompt", "A red ball moves right.", "--base_seed", "7"],
    ["--prompt", cases.CATS, "--teacache_thresh", "0"],
)


def other_task(task: str) -> list[str]:
    return ["--task", task, "--size", "832*480", "--ckpt_dir", ".", "--prompt", cases.CATS]


VACE = [*other_task("vace-1.3B")[:4], "--ckpt_dir", "AUTO"]
REFUSED = [  # run, name, flags, parts of the line
    ("w21", "flf2v-61", [*cases.FLF2V, "--frame_num", "61"], ["--frame_num 61", "81"]),
    ("w21", "unipc", cases.UNIPC_FAILS, ["--sample_steps 80 --sample_shift 16.0"]),
    ("w21", "size", cases.command("t2v-1.3B", "1280*720"), ["Unsupport size 1280*720"]),
    ("w21", "mask-alone", [*VACE, "--src_mask", "VIDEO"], ["--src_mask", "needs --prompt"]),
    ("w21", "no-reference", [*VACE, "--prompt", "x", "--src_ref_images", "a.png"], ["a.png"]),
    ("w21", "no-example", cases.command("i2v-14B", "832*480"), ["--image examples/i2v_input.JPG"]),
    ("two21", "product", [*cases.T2V, "--ulysses_size", "3"], ["--ulysses_size 3", "2 here"]),
    ("first", "61", [*cases.I2V_720P, "--frame_num", "61"], ["--frame_num 61", "81 for i2v-14B"]),
    ("w22", "s2v", other_task("s2v-14B"), ["--task s2v-14B"]),
    ("w22", "animate", other_task("animate-14B"), ["--task animate-14B"]),
    ("w22", "ring", [*cases.T2V_A14B, "--ring_size", "2"], ["--ring_size"]),
    ("w22", "too-fast", [*cases.T2V_A14B, "--teacache_speedup", "2"], ["--teacache_speedup 2"]),
]


# --------------------------------------------------------------------------------- the runs


def teacache(name: str, argv: list[str], **more: str) -> dict[str, Any]:
    return {"name": name, "mode": "teacache", "argv": argv, **more}


def batch(name: str, flags: list[str], out: Path) -> list[dict[str, Any]]:
    """A job with a jobs file, whose videos are NAME.0.mp4 and so on, and its second line alone."""
    lines = [[*line, "--save_file", str(out / f"{name}.{i}.mp4")] for i, line in enumerate(LINES)]
    file = out / f"{name}.txt"
    file.write_text("".join(f"{shlex.join(line)}\n" for line in lines))
    alone = [*flags, *LINES[1], "--save_file", str(out / f"{name}.line.mp4")]
    together = teacache(name, [*flags, "--teacache_jobs", str(file)])
    return [together, teacache(f"{name}.line", alone)]


def jobs_of(run: str, out: Path) -> list[dict[str, Any]]:
    """All jobs of a run; last, the two processes each take their own lines of a jobs file."""
    table, jobs = TABLES[run], cases.jobs_of_cases(TABLES[run], out)

    def target(name: str) -> str:
        return str(out / f"{name}.{'png' if 't2i' in name else 'mp4'}")

    def named(these: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
        return [(name, table[name].flags) for of_run, name in these if of_run == run]

    jobs += [cases.threshold_0(name, table, out) for name, _ in named(OFF)]
    for name, flags in named(PLANNED):
        jobs.append(teacache(f"{name}.plan", [*flags, *table[name].ours, "--teacache_plan"]))
    for name, flags in named(BATCHES):
        jobs += batch(f"{name}.jobs", flags, out)
    for name, flags in named(COMPARED):
        two = ["--teacache_compare", "2x", "--save_file", target(f"{name}.compared")]
        jobs.append(teacache(f"{name}.compared", [*flags, *cases.SIGMA, *two]))
    for name, flags in named(DECODED):
        video = target(f"{name}.undecoded")
        latents = str(Path(video).with_suffix(".latents.pt"))
        jobs.append(teacache(f"{name}.fails", [*flags, "--save_file", video], fails="decode"))
        jobs.append(teacache(f"{name}.decode", ["--teacache_decode", latents]))
    jobs += [teacache(name, flags) for of_run, name, flags, _ in REFUSED if of_run == run]
    if run == "two21":
        jobs += batch("queue", cases.T2V, out)[:1]
    source = str(out / "t2v-14B.teacache.mp4")
    return [{**u, "argv": [source if v == "VIDEO" else v for v in u["argv"]]} for u in jobs]


def first_release(folder: Path) -> Path:
    """Wan2.1's first release, out of the checkout at hand."""
    archive = ["git", "-C", str(WAN21), "archive", "65386b2"]
    packed = subprocess.run(archive, capture_output=True, timeout=60)
    if packed.returncode:
        pytest.skip(f"no first release in {WAN21}: {packed.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


@pytest.fixture(scope="module")
def done(request, tmp_path_factory) -> Iterator[Callable[[str], Done]]:
    """What a run has left; those that the tests at hand name are done two at a time."""

    def do(name: str) -> Done:
        repo = WAN22 if "22" in name else WAN21
        if not (repo / "generate.py").is_file():
            pytest.skip(f"no checkout at {repo} (or $WAN_REPO, $WAN22_REPO)")
        if name == "first":
            repo = first_release(tmp_path_factory.mktemp("first"))
        out = tmp_path_factory.mktemp("out")
        return cases.run(repo, jobs_of(name, out), out, processes=2 if "two" in name else 1)

    tests = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    named = {parameters.get("run") for parameters in tests}
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(do, name) for name in TABLES if name in named}
        yield lambda name: runs.setdefault(name, runs.get(name) or pool.submit(do, name)).result()


# -------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(
    ("run", "name"), [(run, name) for run, table in TABLES.items() for name in table]
)
def test_case_equals_the_reference(done, run, name):
    cases.check(done(run), name, TABLES[run])


@pytest.mark.parametrize(("run", "name"), ULYSSES)
def test_ulysses_gives_the_frames_of_one_process(done, run, name):
    """Ring's blockwise softmax and FSDP's bfloat16 weights round otherwise, stock's too."""
    two = done(run.replace("w", "two")).frames(f"{name}.ulysses.teacache")
    assert np.array_equal(two, done(run).frames(f"{name}.teacache"))


@pytest.mark.parametrize(("run", "name"), OFF)
def test_threshold_zero_patches_nothing_and_is_stock(done, run, name):
    cases.check_threshold_0(done(run), name, TABLES[run])


@pytest.mark.parametrize(
    ("run", "name", "computed"),
    [
        ("w21", "sigma", [0, 1, 2, 3, 6, 9, 12, 15, 18, 19]),
        ("w22", "t2v", [0, 1, 2, 3, 4, 5, 8, 11, 13, 14, 15, 18, 19]),  # 13 is low noise's first
        ("w22", "i2v", [*range(10), 12, 15, 18, 19]),  # 8 is
    ],
)
def test_sigma_skips_by_default_what_its_limits_allow(done, run, name, computed):
    assert done(run).record(f"{name}.teacache")["computed"] == computed


@pytest.mark.parametrize(
    ("name", "steps", "high"),
    [("i2v-40", 40, 15), ("t2v-shift", 20, 9), ("t2v-rule", 20, 13)],
)
def test_first_step_of_each_model_is_computed(done, name, steps, high):
    models = done("w22").seen(f"{name}.teacache")["which"]
    assert models == [0] * 2 * high + [1] * 2 * (steps - high)  # 0 is high_noise_model
    assert {0, high} <= set(done("w22").record(f"{name}.teacache")["computed"])


@pytest.mark.parametrize(("run", "name"), PLANNED)
def test_plan_marks_the_steps_of_the_run(done, run, name):
    lines = done(run).printed(f"{name}.plan").splitlines()
    (marks,) = [line.split()[-1] for line in lines if line.startswith(">")]
    computed = [step for step, mark in enumerate(marks) if mark == "#"]
    assert computed == done(run).record(f"{name}.teacache")["computed"]


@pytest.mark.parametrize(("run", "name"), BATCHES)
def test_batch_makes_the_videos_of_single_runs(done, run, name):
    """Wan2.2 destroys the process group after each video."""
    did = done(run)
    assert did.succeeded(f"{name}.jobs")["constructed"] == 1
    singles = [f"{name}.teacache", f"{name}.jobs.line", f"{name}.stock"]
    for i, single in enumerate(singles):
        assert np.array_equal(did.frames(f"{name}.jobs", i), did.frames(single))
        assert did.record(f"{name}.jobs.{i}")["status"] == "finished"
        assert (did.out / f"{name}.jobs.{i}.mp4").stat().st_size > 0


def test_queue_makes_each_line_once_on_either_process(done):
    alone, queue = done("w21"), done("two21")
    made = []
    for rank in (0, 1):
        seen = queue.seen("queue", rank)
        assert (seen["exit"], seen["restored"], seen["constructed"]) == (0, True, 1)
        made += [queue.frames("queue", i, rank) for i in range(seen["decoded"])]
    assert len(made) == 3
    for i, single in enumerate(["20-steps.teacache", "20-steps.jobs.line", "20-steps.stock"]):
        assert sum(np.array_equal(frames, alone.frames(single)) for frames in made) == 1
        assert queue.record(f"queue.{i}")["status"] == "finished"
        ours, expected = queue.out / f"queue.{i}.mp4", alone.out / f"{single}.mp4"
        assert ours.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("run", "name"), COMPARED)
def test_comparison_measures_its_videos_after_one_load(done, run, name):
    did, files = done(run), f"{name}.compared"
    seen, table = did.succeeded(files), json.loads((did.out / f"{files}.compare.json").read_text())
    assert (seen["constructed"], seen["patched"][0], seen["patched"][2]) == (1, False, True)
    assert [row["label"] for row in table] == ["stock", "noise 1e-4", "2x"]
    assert [len(row["computed"]) for row in table] == [20, 20, 10]
    videos = [((did.frames(files, i) + 1) / 2 * 255).astype(np.uint8) for i in range(3)]
    for row, video in zip(table[1:], videos[1:], strict=True):
        error = ((video.astype(float) - videos[0]) ** 2).mean()
        assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert (did.out / f"{files}.compare.png").stat().st_size > 0
    assert (did.out / f"{files}.compare.mp4").is_file() == ("t2i" not in name)


@pytest.mark.parametrize(("run", "name"), DECODED)
def test_kept_latents_are_decoded_without_a_model(done, run, name):
    did = done(run)
    assert did.seen(f"{name}.fails")["exit"] == 1
    assert did.succeeded(f"{name}.decode")["constructed"] == 0
    assert np.array_equal(did.frames(f"{name}.decode"), did.frames(f"{name}.teacache"))
    assert not (did.out / f"{name}.undecoded.latents.pt").exists()
    assert did.record(f"{name}.undecoded")["status"] == "finished"


@pytest.mark.parametrize(
    ("run", "name", "parts"), [(run, name, parts) for run, name, _, parts in REFUSED]
)
def test_bad_flags_are_refused_once_before_loading(done, run, name, parts):
    did = done(run)
    for rank in range(did.processes):
        assert (did.seen(name, rank)["exit"], did.seen(name, rank)["constructed"]) == (2, 0)
    (line,) = [line for line in did.printed(name).splitlines() if "error" in line]
    assert all(part in line for part in parts)
