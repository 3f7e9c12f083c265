"""The script on the real Wan2.1, small and on a CPU, against stock and an independent reference.

All jobs of a fixture run in one process (or two), since importing Wan2.1 takes longer than most of
them; the tests then look at what each job left.
"""

import subprocess

import cases
import imageio
import numpy as np
import pytest
from cases import CASES21, FIRST_RELEASE, TWO21, Done

if not (cases.WAN21 / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {cases.WAN21} (or $WAN_REPO)", allow_module_level=True)

OFF = ("20-steps", "guidance-1", "vace-1.3B", "flf2v", "t2i-14B")
PLANNED = ("t2v-1.3B", "t2v-14B-ret", "sigma-dpm-speedup", "guide-until-order-1")
REFUSED = {  # name: flags, and parts of the line
    "flf2v-61-frames": ([*cases.FLF2V_FULL, "--frame_num", "61"], "--frame_num 61", "81"),
    "unipc-that-fails": (cases.UNIPC_FAILS, "--sample_steps 80 --sample_shift 16.0"),
    "another-size": (cases.command("t2v-1.3B", "1280*720"), "Unsupport size 1280*720"),
    "no-such-task": (
        ["--task", "t2v-5B", "--size", "832*480", "--ckpt_dir", "."],
        *("--task", "'t2v-5B'"),
    ),
    "half-of-flf2v": (
        cases.command("flf2v-14B", "832*480", "--first_frame", cases.example("i2v_input.JPG")),
        *("--first_frame", "--last_frame"),
    ),
    "mask-without-prompt": (
        ["--task", "vace-1.3B", "--size", "832*480", "--ckpt_dir", "AUTO", "--src_mask", "VIDEO"],
        *("--src_mask", "needs --prompt"),
    ),
    "no-such-reference": (
        cases.command("vace-1.3B", "832*480", "--src_ref_images", "none.png"),
        "--src_ref_images none.png",
    ),
    "script-as-video": (
        cases.command("vace-1.3B", "832*480", "--src_video", cases.__file__),
        "--src_video",
    ),
    "example-not-there": (cases.command("i2v-14B", "832*480"), "--image examples/i2v_input.JPG"),
}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Done:
    """Everything in one process."""
    out = tmp_path_factory.mktemp("head")
    source = str(out / "source.mp4")
    with imageio.get_writer(source, fps=16) as writer:
        for i in range(17):
            writer.append_data(np.full((64, 96, 3), 15 * i, np.uint8))
    jobs = [
        *cases.jobs_of_cases(CASES21, out),
        *(cases.threshold_0(name, CASES21, out) for name in OFF),
        cases.batch("jobs", cases.T2V, out),
        cases.second_line("line", cases.T2V, out),
        cases.comparison("compared", cases.T2V, out),
        cases.comparison("compared-t2i", cases.T2I, out),
        *cases.failing_then_decoding("undecoded", cases.T2V, out),
        *cases.failing_then_decoding("undecoded-t2i", cases.T2I, out),
    ]
    for name in PLANNED:
        argv = [*CASES21[name].flags, *CASES21[name].ours, "--teacache_plan"]
        jobs.append(cases.teacache(f"{name}.plan", argv))
    jobs += [cases.teacache(name, flags) for name, (flags, *_) in REFUSED.items()]
    for job in jobs:
        job["argv"] = [source if flag == "VIDEO" else flag for flag in job["argv"]]
    return cases.run(cases.WAN21, jobs, out)


@pytest.fixture(scope="module")
def first_release(tmp_path_factory) -> Done:
    repo, out = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("first_out")
    archive = subprocess.run(
        ["git", "-C", str(cases.WAN21), "archive", "65386b2"], capture_output=True, timeout=60
    )
    if archive.returncode:
        pytest.skip(f"no first release in {cases.WAN21}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(repo)], input=archive.stdout, check=True)
    jobs = [
        *cases.jobs_of_cases(FIRST_RELEASE, out),
        cases.batch("jobs", cases.T2V, out),
        cases.second_line("line", cases.T2V, out),
        cases.teacache("61-frames", [*cases.I2V_720P, "--frame_num", "61"]),
    ]
    return cases.run(repo, jobs, out)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Done:
    """Both ranks make one video together; last, each takes its own lines of a jobs file."""
    out = tmp_path_factory.mktemp("two")
    together = TWO21["20-steps.all"].flags
    jobs = [
        *cases.jobs_of_cases(TWO21, out),
        cases.batch("jobs", together, out),
        cases.second_line("line", together, out),
        cases.comparison("compared", together, out),
        cases.teacache("product", [*cases.T2V, "--ulysses_size", "3"]),
        cases.batch("queue", cases.T2V, out),
    ]
    return cases.run(cases.WAN21, jobs, out, processes=2)


@pytest.mark.parametrize("name", CASES21)
def test_task_equals_the_reference(head, name):
    cases.check(head, name, CASES21)


@pytest.mark.parametrize("name", FIRST_RELEASE)
def test_first_release_equals_the_reference(first_release, name):
    cases.check(first_release, name, FIRST_RELEASE)


@pytest.mark.parametrize("name", TWO21)
def test_two_processes_equal_the_reference(two_processes, name):
    cases.check_both_ranks(two_processes, name, TWO21)


@pytest.mark.parametrize("name", ["20-steps", "vace-1.3B"])
def test_ulysses_gives_the_frames_of_one_process(head, two_processes, name):
    """Ring's blockwise softmax and FSDP's bfloat16 weights round otherwise, stock's too."""
    two = two_processes.frames(f"{name}.ulysses.teacache")
    assert np.array_equal(two, head.frames(f"{name}.teacache"))


@pytest.mark.parametrize("name", OFF)
def test_threshold_zero_patches_nothing_and_is_stock(head, name):
    cases.check_threshold_0(head, name, CASES21)


def test_limit_on_skips_in_a_row_binds_in_a_case(head):
    """Else no case would show it."""
    computed = head.record("sigma-i2v.teacache")["computed"]
    assert computed == [0, 1, 2, 3, 6, 9, 12, 15, 18, 19]


@pytest.mark.parametrize("name", PLANNED)
def test_plan_marks_the_steps_of_the_run(head, name):
    lines = head.printed(f"{name}.plan").splitlines()
    (marks,) = [line.split()[-1] for line in lines if line.startswith(">")]
    computed = [step for step, mark in enumerate(marks) if mark == "#"]
    assert computed == head.record(f"{name}.teacache")["computed"]


@pytest.mark.parametrize("run", ["head", "first_release", "two_processes"])
def test_jobs_file_makes_the_videos_of_single_runs(request, run):
    done = request.getfixturevalue(run)
    way, ranks = (".all", 2) if run == "two_processes" else ("", 1)
    singles = [f"20-steps{way}.teacache", "line", f"20-steps{way}.stock"]
    cases.check_batch(done, "jobs", singles, ranks)


def test_queue_makes_each_line_once_on_either_process(head, two_processes):
    seen = [two_processes.succeeded("queue", rank) for rank in (0, 1)]
    made = [
        two_processes.frames("queue", i, rank)
        for rank in (0, 1)
        for i in range(len(seen[rank]["decoded"]))
    ]
    assert [run["constructed"] for run in seen] == [1, 1]
    assert len(made) == 3
    for i, single in enumerate(["20-steps.teacache", "line", "20-steps.stock"]):
        assert sum(np.array_equal(frames, head.frames(single)) for frames in made) == 1
        assert two_processes.record(f"queue.{i}")["status"] == "finished"
        alone = head.out / (f"{single}.mp4")
        assert (two_processes.out / f"queue.{i}.mp4").read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("run", "name"),
    [("head", "compared"), ("head", "compared-t2i"), ("two_processes", "compared")],
)
def test_comparison_measures_its_videos_after_one_load(request, run, name):
    done = request.getfixturevalue(run)
    cases.check_comparison(done, name)
    if run == "two_processes":
        assert done.succeeded(name, rank=1)["ran"] == done.seen(name)["ran"]


@pytest.mark.parametrize(
    ("name", "single"),
    [("undecoded", "20-steps.teacache"), ("undecoded-t2i", "t2i-14B.teacache")],
)
def test_kept_latents_are_decoded_without_a_model(head, name, single):
    cases.check_decoding(head, name, single)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_before_loading(head, name):
    cases.check_refused(head, name, *REFUSED[name][1:])


def test_first_release_refuses_other_than_81_frames(first_release):
    cases.check_refused(first_release, "61-frames", "--frame_num 61", "81 for i2v-14B")


def test_wrong_number_of_processes_is_refused_once(two_processes):
    cases.check_refused(two_processes, "product", "--ulysses_size 3", "2 here")
    assert two_processes.seen("product", rank=1)["exit"] == 2


def test_attention_that_runs_is_logged_once(head):
    lines = head.printed("t2v-1.3B.teacache").splitlines()
    assert sum("attention: PyTorch's" in line for line in lines) == 1
