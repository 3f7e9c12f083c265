"""The script on the real Wan2.1, small and on a CPU, against stock and an independent reference.

``harness.py`` runs all jobs of a module-wide list in one process, since importing Wan2.1 takes
longer than most of them; the tests then look at what each job left.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import pytest
from cases import (
    CATS,
    HERE,
    LINES,
    Case,
    check,
    check_comparison,
    comparison,
    frames,
    guided_until,
    jobs_file,
    jobs_of_all,
    left,
    order_1,
    printed,
    run,
    single_of,
    with_row,
    with_sigma,
)

WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
FIRST_RELEASE = "65386b2"

if not (WAN / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {WAN} (or $WAN_REPO): not tried", allow_module_level=True)


def command(task: str, size: str, *flags: str) -> list[str]:
    common = ["--task", task, "--size", size, "--ckpt_dir", "AUTO", "--prompt", CATS]
    return [*common, "--base_seed", "42", "--offload_model", "True", "--t5_cpu", *flags]


def example(name: str) -> str:
    return str(WAN / "examples" / name)


FEW = ("--sample_steps", "20")  # where it need not be the number that a published row is for
SHORT = (*FEW, "--frame_num", "33")  # of 81 are the first five cases, and FLF2V
T2V = command("t2v-1.3B", "832*480")
T2V_FEW = [*T2V, *SHORT]
T2V_14B = command("t2v-14B", "1280*720")
I2V = ("--image", example("i2v_input.JPG"))
I2V_480P = command("i2v-14B", "832*480", *I2V)
I2V_720P = command("i2v-14B", "1280*720", *I2V)
RET = "--use_ret_steps"
UNIPC_FAILS = [*T2V, "--sample_steps", "80", "--sample_shift", "16"]
FLF2V = command(
    *("flf2v-14B", "832*480", "--first_frame", example("flf2v_input_first_frame.png")),
    *("--last_frame", example("flf2v_input_last_frame.png")),
)
FLF2V_FEW = [*FLF2V, *FEW]
REFERENCES = f"{example('girl.png')},{example('snake.png')}"
VACE_FEW = command("vace-1.3B", "832*480", "--src_ref_images", REFERENCES, *SHORT)
DPM = [*T2V_FEW, "--sample_solver", "dpm++"]
SINGLE = {  # the first five are README's
    "t2v-1.3B": with_row("t2v-1.3B", T2V, thresh=0.08),
    "t2v-14B": with_row("t2v-14B", T2V_14B, thresh=0.2),
    "i2v-480P": with_row("i2v-14B-480P", I2V_480P, thresh=0.26),
    "i2v-720P": with_row("i2v-14B-720P", [*I2V_720P, "--frame_num", "61"], thresh=0.3),
    "t2v-14B-ret": with_row("t2v-14B", T2V_14B, RET, thresh=0.3),
    "t2v-1.3B-ret": with_row("t2v-1.3B", T2V, RET),
    "i2v-480P-ret": with_row("i2v-14B-480P", I2V_480P, RET),
    "i2v-720P-ret": with_row("i2v-14B-720P", [*I2V_720P, "--frame_num", "41"], RET),
    "t2i-14B": with_row("t2v-14B", command("t2i-14B", "1024*1024", *FEW)),
    "dpm": with_row("t2v-1.3B", DPM),
    "dpm-ret": with_row("t2v-1.3B", DPM, RET),
    "20-steps": with_row("t2v-1.3B", T2V_FEW),
    "20-steps-ret": with_row("i2v-14B-480P", [*I2V_480P, *SHORT], RET),
    "20-steps-shift": with_row("t2v-1.3B", [*T2V_FEW, "--sample_shift", "8"]),
    # timesteps repeat here, and stock's unipc stops at its last step
    "80-steps": with_row("t2v-1.3B", [*UNIPC_FAILS, "--sample_solver", "dpm++"]),
    "1-step": with_row("t2v-1.3B", [*T2V, "--sample_steps", "1"]),
    "no-offload": with_row("t2v-1.3B", [*T2V_FEW, "--offload_model", "False"]),
    "sigma": with_sigma(T2V_FEW, "--teacache_model", "sigma"),
    "sigma-0.1": with_sigma([*I2V_720P, *SHORT], "--teacache_model", "sigma", thresh=0.1),
    "sigma-dpm": with_sigma(DPM, "--teacache_model", "sigma", thresh=0.1),
    "sigma-speedup": with_sigma(T2V_FEW, "--teacache_model", "sigma", "--teacache_speedup", "2.5"),
    "order-1": order_1(with_row("t2v-1.3B", T2V, thresh=0.1)),
    "order-1-ret": order_1(with_row("t2v-1.3B", T2V_FEW, RET)),
    "order-1-sigma": order_1(with_sigma(T2V_FEW, "--teacache_model", "sigma")),
    "order-1-dpm": order_1(with_sigma(DPM, "--teacache_model", "sigma")),  # its first t is 1000
    "order-1-many-tokens": order_1(  # of 1065 tokens every second one is measured
        with_sigma(
            [*T2V_14B, "--frame_num", "281", "--sample_steps", "15"],
            *("--teacache_model", "sigma"),
            thresh=0.2,
        )
    ),
    "guide-until": guided_until(with_row("t2v-1.3B", T2V_FEW), 0.5, 10),
    "guide-until-order-1": guided_until(
        order_1(with_sigma(T2V_FEW, "--teacache_model", "sigma", thresh=0.2)), 0.6, 12
    ),
}
for name, ours in {"guidance-1": [], "guidance-1-ret": [RET]}.items():  # no step is guided
    case = with_row("t2v-1.3B", [*T2V_FEW, "--sample_guide_scale", "1"], *ours)
    SINGLE[name] = Case(case.flags, case.ours, {**case.reference, "guided_steps": 0})
LATER = {  # tasks that the first release does not have; nobody has published a row for them
    "flf2v": with_sigma(FLF2V_FEW),
    "vace-1.3B": with_sigma(VACE_FEW),
    "vace-14B": with_sigma(
        command("vace-14B", "832*480", "--src_video", "VIDEO", "--src_mask", "VIDEO", *SHORT)
    ),
    "vace-borrowed": with_row("t2v-1.3B", VACE_FEW, "--teacache_model", "t2v-1.3B"),
    "flf2v-order-1": order_1(with_sigma(FLF2V_FEW, thresh=0.05)),
    "vace-guide-until": guided_until(with_sigma(VACE_FEW), 0.5, 10),
}
CASES = {**SINGLE, **LATER}
FIRST = ("t2v-1.3B", "t2v-1.3B-ret", "i2v-480P", "t2i-14B", "dpm", "sigma", "guide-until")
OFF = ("20-steps", "guidance-1", "vace-1.3B", "flf2v")
REFUSED = {  # name: (flags, what the one line says)
    "flf2v-61-frames": ([*FLF2V, "--frame_num", "61"], "--frame_num 61: must be 81"),
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
        command("vace-1.3B", "832*480", "--src_video", str(HERE / "harness.py")),
        "cannot be read",
    ),
    "example-not-there": (command("i2v-14B", "832*480"), "--image examples/i2v_input.JPG"),
}


SERVED = {
    "t2v": T2V_FEW,
    "i2v": [*I2V_480P, *SHORT],
    "t2i": command("t2i-14B", "1024*1024", *FEW),
}


def file_and_lines(out: Path, task: str) -> list[dict[str, Any]]:
    """A file of jobs, and each of its lines as a run of its own."""
    ending, flags = "png" if task == "t2i" else "mp4", SERVED[task]
    argv = [*flags, "--teacache_jobs", str(jobs_file(out, f"{task}.jobs", ending))]
    together = {"name": f"{task}.jobs", "mode": "teacache", "argv": argv}
    names = [f"{task}.line.{i}" for i in range(len(LINES))]
    singles = zip(LINES, names, strict=True)
    return [together, *(single_of(line, flags, out, name, ending) for line, name in singles)]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> tuple[Path, str]:
    """All jobs of one process on the checkout at hand: their folder, and what they printed."""
    out = tmp_path_factory.mktemp("head")
    source = str(out / "source.mp4")
    with imageio.get_writer(source, fps=16) as writer:
        for i in range(81):
            writer.append_data(np.full((64, 96, 3), 3 * i, np.uint8))
    jobs = jobs_of_all(CASES, CASES, out)

    def teacache(name: str, argv: list[str], **more: str) -> None:
        jobs.append({"name": name, "mode": "teacache", "argv": argv, **more})

    for name in OFF:
        video = ["--save_file", str(out / "off.mp4")]
        teacache(f"{name}.off", [*CASES[name].flags, "--teacache_thresh", "0", *video])
    for name, case in CASES.items():
        teacache(f"{name}.plan", [*case.flags, *case.ours, "--teacache_plan"])
    for name, (argv, _) in REFUSED.items():
        teacache(name, argv)
    for name, flags in SERVED.items():
        jobs += file_and_lines(out, name)
        teacache(f"{name}.compare", comparison(flags, out, name))
    for name in ("20-steps", "t2i-14B"):
        folder = out / f"decode-{name}"
        folder.mkdir()
        video = ["--save_file", str(folder / f"video.{'png' if 't2i' in name else 'mp4'}")]
        argv = [*CASES[name].flags, *CASES[name].ours, *video]
        teacache(f"{name}.fails", argv, fails="decode")
        teacache(f"{name}.decode", ["--teacache_decode", f"LEFT:{folder}"])
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
    jobs = jobs_of_all(FIRST, {name: CASES[name] for name in FIRST}, out)
    flags = CASES["i2v-720P"].flags
    jobs += [{"name": "61-frames", "mode": "teacache", "argv": flags}, *file_and_lines(out, "t2v")]
    return out, run(repo, jobs, out)


@pytest.mark.parametrize("name", CASES)
def test_every_task_computes_the_steps_of_the_method_and_its_frames(head, name):
    check(head[0], name, CASES)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_release_does_the_same(first_release, name):
    check(first_release[0], name, {name: CASES[name] for name in FIRST})


@pytest.mark.parametrize("name", CASES)
def test_the_plan_marks_the_schedule_of_the_run(head, name):
    out, log = head
    (line,) = [u for u in printed(log, f"{name}.plan").splitlines() if u.startswith(">")]
    computed = left(out, f"{name}.reference")["computed"]
    assert [mark == "#" for mark in line.split()[-1]] == computed


@pytest.mark.parametrize("name", OFF)
def test_threshold_zero_is_stock_to_the_bit(head, name):
    out, _ = head
    assert np.array_equal(frames(out, f"{name}.off"), frames(out, f"{name}.stock"))
    assert all(map(all, left(out, f"{name}.off")["steps"]))


@pytest.mark.parametrize(
    ("release", "task"), [*(("head", task) for task in SERVED), ("first_release", "t2v")]
)
def test_a_file_of_jobs_loads_once_and_makes_the_videos_of_single_runs(request, release, task):
    out, _ = request.getfixturevalue(release)
    seen = left(out, f"{task}.jobs")
    assert (seen["exit"], seen["error"]) == (0, None)
    assert (seen["constructed"], seen["restored"]) == (1, True)
    assert seen["decoded"] == [20, 40, 60]
    for i in range(len(LINES)):
        alone = left(out, f"{task}.line.{i}")
        assert seen["steps"][20 * i : 20 * (i + 1)] == alone["steps"]
        together = frames(out, f"{task}.jobs" if i == 0 else f"{task}.jobs.{i}")
        assert np.array_equal(together, frames(out, f"{task}.line.{i}"))
        (file,) = (file for file in out.glob(f"{task}.jobs.{i}.*") if file.suffix != ".npy")
        assert file.stat().st_size > 0


@pytest.mark.parametrize("name", SERVED)
def test_a_comparison_loads_once_and_tells_the_psnr_of_its_videos(head, name):
    check_comparison(head[0], f"{name}.compare", name)


@pytest.mark.parametrize("name", ["20-steps", "t2i-14B"])
def test_latents_that_could_not_be_decoded_are_decoded_later_without_a_model(head, name):
    out, _ = head
    assert left(out, f"{name}.fails")["exit"] != 0
    assert left(out, f"{name}.decode")["exit"] == 0
    assert left(out, f"{name}.decode")["steps"] == []
    assert np.array_equal(frames(out, f"{name}.decode"), frames(out, f"{name}.teacache"))
    (video,) = (out / f"decode-{name}").iterdir()  # the latents are gone
    assert video.stat().st_size > 0


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_in_one_line_before_anything_is_loaded(head, name):
    out, log = head
    assert left(out, name)["exit"] == 2
    assert left(out, name)["constructed"] == 0
    said = [line for line in printed(log, name).splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith("teacache_generate.py: error: ")
    assert REFUSED[name][1] in said[0]


def test_older_image_to_video_that_hard_codes_81_frames_is_refused_others(first_release):
    out, log = first_release
    assert left(out, "61-frames")["exit"] == 2
    assert "--frame_num 61: must be 81 for i2v-14B" in printed(log, "61-frames")


def test_attention_without_flash_attn_is_said_once(head):
    said = printed(head[1], "t2v-1.3B.teacache")
    assert said.count("scaled_dot_product_attention") == 1
