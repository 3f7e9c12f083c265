"""The script on the real Wan2.1 and Wan2.2, small and on a CPU, against stock and a reference.

A run is one process, or two, on one checkout, with many jobs: the import takes longer than most of
them. The tests read the files and the output of the jobs.
"""

import functools
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from cases import CATS, HERE, IMAGE, SIGMA, T2V, TABLES, WAN21, WAN22, Case, Done, teacache
from nano import frames


def pairs(**names: str) -> list[tuple[str, str]]:
    """(run, case) from names by run."""
    return [(run, name) for run, of_run in names.items() for name in of_run.split()]


BATCHES = pairs(w21="20-steps", first="20-steps", two21="20-steps.all", w22="t2v", two22="t2v.all")
COMPARED = pairs(w21="20-steps t2i-14B", two21="20-steps.all", w22="ti2v-image")
DECODED = pairs(w21="20-steps t2i-14B", w22="t2v ti2v")
ULYSSES = pairs(w21="20-steps vace-1.3B", w22="t2v ti2v-image")
BALL = "A red ball moves right."
LINES = (  # of a jobs file: as in the case, another video, stock of the first
    ["--prompt", CATS],
    ["--prompt", BALL, "--base_seed", "7"],
    ["--prompt", CATS, "--teacache_thresh", "0"],
)
ON_FORK = {
    "scale-1": ["--sample_guide_scale", "1"],
    "scale-1.5": ["--sample_guide_scale", "1.5"],
    "ball": ["--prompt", BALL],
    "two": ["--prompt_file", "prompts.txt"],
}
OTHER = ["--size", "1280*720", "--ckpt_dir", ".", "--prompt", CATS, "--task"]
VACE = ["--task", "vace-1.3B", "--size", "832*480", "--ckpt_dir", "AUTO"]
REFUSED = [  # run, name, flags, parts of the line
    ("w21", "flf2v-61", [*cases.FLF2V, "--frame_num", "61"], ["--frame_num 61", "81"]),
    ("w21", "unipc", cases.UNIPC_FAILS, ["--sample_steps 80 --sample_shift 16.0"]),
    ("w21", "size", cases.command("t2v-1.3B", "1280*720"), ["Unsupport size 1280*720"]),
    ("w21", "mask-alone", [*VACE, "--src_mask", IMAGE], ["--src_mask", "needs --prompt"]),
    ("w21", "no-reference", [*VACE, "--prompt", "x", "--src_ref_images", "a.png"], ["a.png"]),
    ("w21", "no-example", cases.command("i2v-14B", "832*480"), ["--image examples/i2v_input.JPG"]),
    ("two21", "product", [*T2V, "--ulysses_size", "3"], ["--ulysses_size 3", "2 here"]),
    ("first", "61", [*cases.I2V_720P, "--frame_num", "61"], ["--frame_num 61", "81 for i2v-14B"]),
    ("w22", "s2v", [*OTHER, "s2v-14B"], ["--task s2v-14B"]),
    ("w22", "animate", [*OTHER, "animate-14B"], ["--task animate-14B"]),
    ("w22", "ring", [*cases.T2V_A14B, "--ring_size", "2"], ["--ring_size"]),
    ("w22", "too-fast", [*cases.T2V_A14B, "--teacache_speedup", "2"], ["--teacache_speedup 2"]),
]


def batch(name: str, case: Case, out: Path) -> list[dict[str, Any]]:
    """A job with a jobs file, which makes NAME.jobs.0.mp4 and so on, and its second line alone."""
    name, file = f"{name}.jobs", out / f"{name}.jobs.txt"
    lines = [shlex.join([*line, "--save_file", f"{name}.{i}.mp4"]) for i, line in enumerate(LINES)]
    file.write_text("\n".join(lines))
    alone = [*case.flags, *LINES[1], "--save_file", f"{name}.line.mp4"]
    together = teacache(name, [*case.flags, "--teacache_jobs", str(file)])
    return [together, teacache(f"{name}.line", alone)]


def comparison(name: str, case: Case, out: Path) -> list[dict[str, Any]]:
    two = ["--teacache_compare", "2x", "--save_file", f"{name}.compared{case.ending}"]
    return [teacache(f"{name}.compared", [*case.flags, *SIGMA, *two])]


def decode(name: str, case: Case, out: Path) -> list[dict[str, Any]]:
    """A job that cannot decode its latents, and one that decodes them."""
    argv = [*case.flags, "--save_file", f"{name}.undecoded{case.ending}"]
    fails = teacache(f"{name}.fails", argv, fails="decode")
    again = ["--teacache_decode", f"{name}.undecoded.latents.pt"]
    return [fails, teacache(f"{name}.decode", again)]


SCENARIOS = {batch: BATCHES, comparison: COMPARED, decode: DECODED}


def jobs_of(run: str, out: Path) -> list[dict[str, Any]]:
    """All jobs of a run; last, the two processes each take their own lines of a jobs file."""
    table = TABLES[run]
    jobs = cases.jobs_of_cases(table, out)
    for scenario, names in SCENARIOS.items():
        for name in [name for of_run, name in names if of_run == run]:
            jobs += scenario(name, table[name], out)
    jobs += [teacache(name, flags) for of_run, name, flags, _ in REFUSED if of_run == run]
    if run == "two21":
        jobs += batch("queue", Case(T2V, [], {}), out)[:1]
    if run == "fork":
        (out / "prompts.txt").write_text(f"{CATS}\n{BALL}\n")
        for name, flags in ON_FORK.items():
            jobs.append(teacache(name, [*T2V, *flags, "--save_file", f"{name}.mp4"]))
    return jobs


def checkout(run: str, folder: Path) -> Path:
    """The checkout of a run: Wan2.1, its first release, a fork, or Wan2.2."""
    repo = WAN22 if "22" in run else WAN21
    if not (repo / "generate.py").is_file():
        pytest.skip(f"no checkout at {repo} (or $WAN_REPO, $WAN22_REPO)")
    if run == "first":
        archive = f"git -C '{repo}' archive 65386b2 | tar -x -C '{folder}'"
        if subprocess.run(archive, shell=True, timeout=60).returncode:
            pytest.skip(f"{repo} lacks the commit of the first release")
        return folder
    if run == "fork":
        ignored = shutil.ignore_patterns(".git", "assets", "examples")
        shutil.copytree(repo, folder, ignore=ignored, dirs_exist_ok=True)
        subprocess.run(["git", "apply", HERE / "fork.patch"], cwd=folder, check=True)
        return folder
    return repo


@pytest.fixture(scope="module")
def done(request, tmp_path_factory) -> Iterator[Callable[[str], Done]]:
    """Does the runs that the selected tests name, two at a time; returns what one has left."""

    def do(run: str) -> Done:
        repo, out = checkout(run, tmp_path_factory.mktemp("repo")), tmp_path_factory.mktemp("out")
        return cases.run(repo, jobs_of(run, out), out, processes=2 if "two" in run else 1)

    tests = [test.callspec.params for test in request.session.items if hasattr(test, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        begin = functools.cache(lambda run: pool.submit(do, run))
        for parameters in tests:
            if "run" in parameters:
                begin(parameters["run"])
        yield lambda run: begin(run).result()


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
        seen = queue.seen("queue.jobs", rank)
        assert (seen["exit"], seen["restored"], seen["constructed"]) == (0, True, 1)
        made += [queue.frames("queue.jobs", i, rank) for i in range(seen["decoded"])]
    assert len(made) == 3
    for i, single in enumerate(["20-steps.teacache", "20-steps.jobs.line", "20-steps.stock"]):
        assert sum(np.array_equal(frames, alone.frames(single)) for frames in made) == 1
        assert queue.record(f"queue.jobs.{i}")["status"] == "finished"
        ours, expected = queue.out / f"queue.jobs.{i}.mp4", alone.out / f"{single}.mp4"
        assert ours.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("run", "name"), COMPARED)
def test_comparison_measures_its_videos_after_one_load(done, run, name):
    did, files = done(run), f"{name}.compared"
    seen, table = did.succeeded(files), json.loads((did.out / f"{files}.compare.json").read_text())
    assert (seen["constructed"], seen["patched"][0], seen["patched"][2]) == (1, False, True)
    assert [row["label"] for row in table] == ["stock", "noise 1e-4", "2x"]
    assert did.printed(files).count("The floor is the PSNR") == 1  # by rank 0
    assert [len(row["computed"]) for row in table] == [20, 20, 10]
    ending = ".png" if "t2i" in name else ".mp4"
    stock, *others = [
        frames(did.out / f"{files}.{x}{ending}") for x in ("stock", "noise-1e-4", "2x")
    ]
    for row, video in zip(table[1:], others, strict=True):
        error = ((video - stock) ** 2).mean()
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


def test_one_call_a_step_at_scale_one_skips_the_same_steps(done):
    """The distances do not depend on guidance."""
    seen, record = done("fork").succeeded("scale-1"), done("fork").record("scale-1")
    computed = done("fork").record("plain.teacache")["computed"]
    assert seen["ran"] == [step in computed for step in range(20)]
    assert record["computed"] == computed


def test_missing_unconditional_call_fails_and_names_the_step(done):
    assert done("fork").seen("scale-1.5")["exit"] == 1
    printed = done("fork").printed("scale-1.5")
    assert "step 17: the model was called once, not twice" in printed
    assert done("fork").record("scale-1.5")["status"].startswith("failed: ")


def test_several_videos_of_one_generate_have_names_and_records(done):
    did = done("fork")
    assert did.succeeded("two")["constructed"] == 1
    singles = [("two", "plain.teacache", CATS), ("two.2", "ball", BALL)]
    for i, (name, single, prompt) in enumerate(singles):
        assert np.array_equal(did.frames("two", i), did.frames(single))
        record, alone = did.record(name), did.record(single)
        assert (record["status"], record["prompt"]) == ("finished", prompt)
        assert (record["frames"], record["computed"]) == (17, alone["computed"])
        assert len({(did.out / f"{file}.mp4").read_bytes() for file in (name, single)}) == 1
