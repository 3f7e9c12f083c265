"""The script on the real Wan2.1, small and on a CPU, against stock and an independent reference.

``real_wan.py`` runs all jobs of a module-wide list in one process, since importing Wan2.1 takes
longer than most of them; the tests then look at what each job left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import imageio
import numpy as np
import pytest

from teacache_generate import FITS

HERE = Path(__file__).resolve().parent
WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
FIRST_RELEASE = "65386b2"
CATS = "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage."

if not (WAN / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {WAN} (or $WAN_REPO): not tried", allow_module_level=True)


def command(task: str, size: str, *flags: str) -> list[str]:
    common = ["--task", task, "--size", size, "--ckpt_dir", "AUTO", "--prompt", CATS]
    return [*common, "--base_seed", "42", "--offload_model", "True", "--t5_cpu", *flags]


def example(name: str) -> str:
    return str(WAN / "examples" / name)


T2V = command("t2v-1.3B", "832*480")
I2V = ("--image", example("i2v_input.JPG"))
RET, ORDER_1 = "--use_ret_steps", "--teacache_order=1"
OURS = (RET, ORDER_1)
UNIPC_FAILS = [*T2V, "--sample_steps", "80", "--sample_shift", "16"]
SINGLE = {  # name: (row, threshold or None for the row's, flags); the first five are README's
    "t2v-1.3B": ("t2v-1.3B", 0.08, T2V),
    "t2v-14B": ("t2v-14B", 0.2, command("t2v-14B", "1280*720")),
    "i2v-480P": ("i2v-14B-480P", 0.26, command("i2v-14B", "832*480", *I2V)),
    "i2v-720P": ("i2v-14B-720P", 0.3, command("i2v-14B", "1280*720", *I2V, "--frame_num", "61")),
    "t2v-14B-ret": ("t2v-14B", 0.3, command("t2v-14B", "1280*720", RET)),
    "t2v-1.3B-ret": ("t2v-1.3B", None, [*T2V, RET]),
    "i2v-480P-ret": ("i2v-14B-480P", None, command("i2v-14B", "832*480", *I2V, RET)),
    "i2v-720P-ret": ("i2v-14B-720P", None, command("i2v-14B", "1280*720", *I2V, RET)),
    "t2i-14B": ("t2v-14B", None, command("t2i-14B", "1024*1024")),
    "dpm": ("t2v-1.3B", None, [*T2V, "--sample_solver", "dpm++"]),
    "dpm-ret": ("t2v-1.3B", None, [*T2V, "--sample_solver", "dpm++", RET]),
    "20-steps": ("t2v-1.3B", None, [*T2V, "--sample_steps", "20", "--sample_shift", "8"]),
    "80-steps": (  # timesteps repeat here, and stock's unipc stops at its last step
        "t2v-1.3B",
        None,
        [*T2V, "--sample_steps", "80", "--sample_shift", "16", "--sample_solver", "dpm++"],
    ),
    "1-step": ("t2v-1.3B", None, [*T2V, "--sample_steps", "1"]),
    "no-offload": ("t2v-1.3B", None, [*T2V, "--offload_model", "False"]),
    "guidance-1": ("t2v-1.3B", None, [*T2V, "--sample_guide_scale", "1"]),
    "guidance-1-ret": ("t2v-1.3B", None, [*T2V, "--sample_guide_scale", "1", RET]),
    "order-1": ("t2v-1.3B", 0.1, [*T2V, ORDER_1]),
    "order-1-ret": ("t2v-1.3B", None, [*T2V, RET, ORDER_1]),
}
LATER = {  # tasks that the first release does not have
    "flf2v": (
        "i2v-14B-720P",
        None,
        command(
            *("flf2v-14B", "832*480", "--first_frame", example("flf2v_input_first_frame.png")),
            *("--last_frame", example("flf2v_input_last_frame.png")),
        ),
    ),
    "vace-1.3B": (
        "t2v-1.3B",
        None,
        command(
            *("vace-1.3B", "832*480", "--src_ref_images"),
            f"{example('girl.png')},{example('snake.png')}",
        ),
    ),
    "vace-14B": (
        "t2v-14B",
        None,
        command("vace-14B", "832*480", "--src_video", "VIDEO", "--src_mask", "VIDEO"),
    ),
}
FIRST = ("t2v-1.3B", "t2v-1.3B-ret", "i2v-480P", "t2i-14B", "dpm", "guidance-1")
REFUSED = {  # name: (flags, what the one line says)
    "flf2v-61-frames": ([*LATER["flf2v"][2], "--frame_num", "61"], "--frame_num 61: must be 81"),
    "unipc-that-fails": (UNIPC_FAILS, "--sample_steps 80 --sample_shift 16.0: the first two"),
    "another-size": (command("t2v-1.3B", "1280*720"), "Unsupport size 1280*720"),
    "no-such-size": (command("t2v-1.3B", "640*480"), "--size: invalid choice: '640*480'"),
    "no-such-task": (
        ["--task", "t2v-5B", "--size", "832*480", "--ckpt_dir", "."],
        "--task: invalid choice: 't2v-5B'",
    ),
    "half-of-flf2v": (
        command("flf2v-14B", "832*480", "--first_frame", example("i2v_input.JPG")),
        "--first_frame, --last_frame: give both",
    ),
    "mask-without-prompt": (
        ["--task", "vace-1.3B", "--size", "832*480", "--ckpt_dir", "AUTO", "--src_mask", "VIDEO"],
        "needs --prompt",
    ),
    "no-such-reference": (
        command("vace-1.3B", "832*480", "--src_ref_images", f"{example('girl.png')},none.png"),
        "--src_ref_images none.png: cannot be read",
    ),
    "picture-as-video": (
        command("vace-1.3B", "832*480", "--src_video", str(HERE / "real_wan.py")),
        "cannot be read",
    ),
    "example-not-there": (command("i2v-14B", "832*480"), "--image examples/i2v_input.JPG"),
}


def jobs_of(name: str, case: tuple, out: Path) -> list[dict]:
    """The run with TeaCache, the reference and, where frames are compared with it, stock."""
    row, thresh, argv = case
    use_ret_steps = RET in argv
    made = FITS[use_ret_steps][row]
    stock = [flag for flag in argv if flag not in OURS]
    ours = argv if thresh is None else [*argv, "--teacache_thresh", str(thresh)]
    planned = {"name": f"{name}.plan", "mode": "teacache", "argv": [*ours, "--teacache_plan"]}
    ending = "png" if "t2i-14B" in argv else "mp4"

    def job(mode: str, argv: list[str], **more) -> dict:
        video = ["--save_file", str(out / f"{name}.{mode}.{ending}")]
        return {"name": f"{name}.{mode}", "mode": mode, "argv": [*argv, *video], **more}

    method = {"coefficients": made.coefficients, "thresh": thresh or made.thresholds[-1]}
    return [
        job("teacache", [*ours, "--teacache_report", str(out / f"{name}.report.json")]),
        job("reference", stock, use_ret_steps=use_ret_steps, order=ORDER_1 in argv, **method),
        job("stock", stock),
        planned,
    ]


def stock_of(name: str) -> str:
    """The case whose stock run serves: the first with the same flags of generate.py."""
    cases = {**SINGLE, **LATER}
    flags = {other: [flag for flag in case[2] if flag not in OURS] for other, case in cases.items()}
    return next(other for other in cases if flags[other] == flags[name])


def jobs_of_all(names: Iterable[str], out: Path) -> list[dict]:
    cases = {**SINGLE, **LATER}
    jobs = [job for name in names for job in jobs_of(name, cases[name], out)]
    needed = {f"{stock_of(name)}.stock" for name in names}
    return [job for job in jobs if job["mode"] != "stock" or job["name"] in needed]


def planned(log: str, name: str) -> list[bool]:
    """The schedule that the plan of a case marks as that of its threshold."""
    (line,) = [u for u in printed(log, f"{name}.plan").splitlines() if u.startswith(">")]
    return [mark == "#" for mark in line.split()[-1]]


def run(repo: Path, jobs: list[dict], out: Path, processes: int = 1) -> str:
    """Run the jobs; what they printed."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*python, str(HERE / "real_wan.py"), "--repo", str(repo), str(out / "jobs.json"), str(out)],
        capture_output=True,
        text=True,
        cwd=out,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def left(out: Path, name: str, rank: int = 0) -> dict:
    return json.loads((out / f"{name}.rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> tuple[Path, str]:
    """All jobs of one process on the checkout at hand: their folder, and what they printed."""
    out = tmp_path_factory.mktemp("head")
    source = str(out / "source.mp4")
    with imageio.get_writer(source, fps=16) as writer:
        for i in range(81):
            writer.append_data(np.full((64, 96, 3), 3 * i, np.uint8))
    jobs = jobs_of_all([*SINGLE, *LATER], out)
    off = ["--teacache_thresh", "0", "--save_file", str(out / "off.mp4")]
    for name in ("t2v-1.3B", "guidance-1", "vace-1.3B"):
        argv = [*{**SINGLE, **LATER}[name][2], *off]
        jobs.append({"name": f"{name}.off", "mode": "teacache", "argv": argv})
    made = ["--teacache_coefficients", str(out / "teacache.json")]
    video = str(out / "calibrated.mp4")
    report = ["--teacache_report", str(out / "calibrated.json"), "--save_file", video]
    for name, argv in {
        "calibrate": ["--teacache_calibrate"],
        "calibrated.plan": ["--teacache_plan"],
        "calibrated": report,
    }.items():
        jobs.append({"name": name, "mode": "teacache", "argv": [*T2V, *made, *argv]})
    for name, (argv, _) in REFUSED.items():
        jobs.append({"name": name, "mode": "teacache", "argv": argv})
    for job in jobs:
        job["argv"] = [source if flag == "VIDEO" else flag for flag in job["argv"]]
    return out, run(WAN, jobs, out)


@pytest.fixture(scope="module")
def first_release(tmp_path_factory) -> tuple[Path, str]:
    """The same on Wan2.1's first release, as far as it has the tasks."""
    repo, out = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("first_out")
    archive = subprocess.run(
        ["git", "-C", str(WAN), "archive", FIRST_RELEASE], capture_output=True, timeout=60
    )
    if archive.returncode:
        pytest.skip(f"{WAN} has no commit {FIRST_RELEASE}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(repo)], input=archive.stdout, check=True)
    jobs = jobs_of_all(FIRST, out)
    jobs.append({"name": "61-frames", "mode": "teacache", "argv": SINGLE["i2v-720P"][2]})
    return out, run(repo, jobs, out)


def check_case(left_by: tuple[Path, str], name: str) -> None:
    """TeaCache did what the reference did, to the bit, and something else than stock."""
    out, log = left_by
    ours, reference = left(out, f"{name}.teacache"), left(out, f"{name}.reference")
    assert (ours["exit"], ours["error"]) == (0, None)
    assert [conditional for conditional, _ in ours["steps"]] == reference["computed"]
    if "guidance-1" in name:
        assert not any(unconditional for _, unconditional in ours["steps"])
    else:
        assert all(both[0] == both[1] for both in ours["steps"])
    if ours["vace_steps"] is not None:
        assert ours["vace_steps"] == ours["steps"]
    assert ours["restored"]
    assert (out / f"{name}.teacache.{'png' if 't2i' in name else 'mp4'}").stat().st_size > 0

    frames = np.load(out / f"{name}.teacache.npy")
    assert np.array_equal(frames, np.load(out / f"{name}.reference.npy"))
    skipped = reference["computed"].count(False)
    assert np.array_equal(frames, np.load(out / f"{stock_of(name)}.stock.npy")) == (skipped == 0)
    assert skipped >= len(reference["computed"]) // 5 or name == "1-step"

    report = json.loads((out / f"{name}.report.json").read_text())
    assert report["status"] == "finished"
    assert [step["computed"] for step in report["steps"]] == reference["computed"]
    assert planned(log, name) == reference["computed"]


@pytest.mark.parametrize("name", [*SINGLE, *LATER])
def test_every_task_computes_the_steps_of_the_method_and_its_frames(head, name):
    check_case(head, name)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_release_does_the_same(first_release, name):
    check_case(first_release, name)


@pytest.mark.parametrize("name", ["t2v-1.3B", "guidance-1", "vace-1.3B"])
def test_threshold_zero_is_stock_to_the_bit(head, name):
    out, _ = head
    off = np.load(out / f"{name}.off.npy")
    assert np.array_equal(off, np.load(out / f"{name}.stock.npy"))
    assert all(map(all, left(out, f"{name}.off")["steps"]))


def test_calibrate_then_plan_then_generate(head):
    out, log = head
    for name in ("calibrate", "calibrated.plan", "calibrated"):
        assert left(out, name)["exit"] == 0
        assert left(out, name)["restored"]
    assert all(map(all, left(out, "calibrate")["steps"]))
    runs = json.loads((out / "teacache.json").read_text())["runs"]
    assert [len(run["points"]) for run in runs] == [2 * 49]
    report = json.loads((out / "calibrated.json").read_text())
    computed = [step["computed"] for step in report["steps"]]
    assert computed == planned(log, "calibrated")
    assert sum(computed) <= 25


def printed(log: str, name: str) -> str:
    """What a job printed, on stdout and on stderr."""
    return "\n".join(part.split("\n=== ")[0] for part in log.split(f"=== {name}\n")[1:])


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_in_one_line_before_anything_is_loaded(head, name):
    out, log = head
    assert left(out, name)["exit"] == 2
    said = [line for line in printed(log, name).splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith("teacache_generate.py: error: ")
    assert REFUSED[name][1] in said[0]
    assert "Creating" not in printed(log, name)


def test_older_image_to_video_that_hard_codes_81_frames_is_refused_others(first_release):
    out, log = first_release
    assert left(out, "61-frames")["exit"] == 2
    assert "--frame_num 61: must be 81 for i2v-14B" in printed(log, "61-frames")


def test_borrowed_coefficients_are_warned_about(head):
    for name in ("flf2v", "vace-1.3B", "vace-14B"):
        assert "borrowed: nobody has fitted" in printed(head[1], f"{name}.teacache")
    assert "borrowed" not in printed(head[1], "t2i-14B.teacache")


def test_attention_without_flash_attn_is_said_once(head):
    said = printed(head[1], "t2v-1.3B.teacache")
    assert said.count("scaled_dot_product_attention") == 1


PARALLEL = {
    "ulysses": ["--ulysses_size", "2"],
    "ring": ["--ring_size", "2"],
    "fsdp": ["--dit_fsdp"],
    "all": ["--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp"],
}
MANY = ("t2v-1.3B", "i2v-480P-ret", "vace-1.3B")


def no_t5_cpu(name: str) -> tuple:
    row, thresh, argv = {**SINGLE, **LATER}[name]
    return row, thresh, [flag for flag in argv if flag != "--t5_cpu"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    jobs = []
    for parallel, flags in PARALLEL.items():
        for name in MANY:
            job, *_ = jobs_of(name, no_t5_cpu(name), out)
            job["name"] = f"{name}.{parallel}"
            job["argv"] += ["--offload_model", "False", *flags]
            jobs.append(job)
    three = {"name": "product", "mode": "teacache", "argv": [*T2V, "--ulysses_size", "3"]}
    return out, run(WAN, [*jobs, three], out, processes=2)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_skip_alike_and_give_the_frames_of_one(head, two_processes, name, parallel):
    out, _ = two_processes
    ranks = [left(out, f"{name}.{parallel}", rank) for rank in (0, 1)]
    one = left(head[0], f"{name}.teacache")
    for rank in ranks:
        assert (rank["exit"], rank["error"], rank["restored"]) == (0, None, True)
        assert rank["steps"] == one["steps"]
        assert rank["vace_steps"] == one["vace_steps"]
    frames = np.load(out / f"{name}.{parallel}.npy")
    alone = np.load(head[0] / f"{name}.teacache.npy")
    assert np.array_equal(frames, alone)


def test_processes_that_do_not_fit_the_flags_are_refused_by_both_and_said_by_one(two_processes):
    out, log = two_processes
    assert [left(out, "product", rank)["exit"] for rank in (0, 1)] == [2, 2]
    assert log.count("--ulysses_size 3 --ring_size 1: their product must be the number of") == 1


def test_only_rank_0_speaks(two_processes):
    assert two_processes[1].count("TeaCache: computed") == len(PARALLEL) * len(MANY)
