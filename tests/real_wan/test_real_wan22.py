"""The script on the real Wan2.2, small and on a CPU, against stock and an independent reference.

As test_real_wan.py, by the same ``harness.py``, in processes of their own.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from cases import (
    CATS,
    LINES,
    Case,
    check,
    check_comparison,
    check_jobs_of_two_ranks,
    check_two_ranks,
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

WAN = Path(os.getenv("WAN22_REPO", "~/.cache/teacache4wan/Wan2.2")).expanduser()

if not (WAN / "generate.py").is_file():
    pytest.skip(f"no real Wan2.2 at {WAN} (or $WAN22_REPO): not tried", allow_module_level=True)


def command(task: str, size: str, *flags: str) -> list[str]:
    common = ["--task", task, "--size", size, "--ckpt_dir", "AUTO", "--prompt", CATS]
    return [*common, "--base_seed", "42", *flags]


IMAGE = ("--image", str(WAN / "examples" / "i2v_input.JPG"))
FEW = ("--sample_steps", "20")  # a case of each task has the 40 or 50 that are its default
T2V_40 = command("t2v-A14B", "832*480")
I2V_40 = command("i2v-A14B", "832*480", *IMAGE)
SHORT = (*FEW, "--frame_num", "33")
T2V, I2V = [*T2V_40, *SHORT], [*I2V_40, *SHORT]
TI2V_50 = command("ti2v-5B", "1280*704", "--frame_num", "33")  # 9 x 15 tokens: two ranks pad it
TI2V, TI2V_IMAGE = [*TI2V_50, *FEW], [*TI2V_50, *FEW, *IMAGE]
TASKS = {"t2v": T2V, "i2v": I2V, "ti2v": TI2V, "ti2v-image": TI2V_IMAGE}
DPM = ("--sample_solver", "dpm++")
CASES = {
    **{name: with_sigma(flags) for name, flags in TASKS.items()},
    **{f"{name}-dpm": with_sigma([*flags, *DPM]) for name, flags in TASKS.items()},
    **{f"{name}-order-1": order_1(with_sigma(flags, thresh=0.1)) for name, flags in TASKS.items()},
    "t2v-low-thresh": with_sigma(T2V_40, thresh=0.05),
    "t2v-shift": with_sigma([*T2V, "--sample_shift", "5"], thresh=0.1),
    "t2v-bfloat16": with_sigma([*T2V, "--convert_model_dtype"], thresh=0.1),
    "t2v-no-offload": with_sigma([*T2V, "--offload_model", "False"], thresh=0.1),
    "ti2v-121": with_sigma(command("ti2v-5B", "1280*704", *FEW), thresh=0.1),
    "ti2v-guide-until": guided_until(with_sigma(TI2V_50, thresh=0.1), 0.5, 25),
    "t2v-guide-until": guided_until(with_sigma(T2V, thresh=0.1), 0.75, 15),
    "t2v-speedup": with_sigma(T2V, "--teacache_speedup", "2"),
    # Borrowed rows, which look at the last token's e: of ti2v's first frame it does not move.
    "t2v-row": with_row("t2v-14B", T2V, "--teacache_model", "t2v-14B"),
    "i2v-row-ret": with_row(
        "i2v-14B-480P", I2V_40, "--teacache_model", "i2v-14B-480P", "--use_ret_steps"
    ),
    "ti2v-image-row": with_row("t2v-14B", TI2V_IMAGE, "--teacache_model", "t2v-14B"),
}


def other_task(task: str) -> list[str]:
    return ["--task", task, "--ckpt_dir", ".", "--prompt", CATS]


COMPARED = ("t2v", "ti2v-image")
PLANNED = ("t2v", "i2v-dpm", "ti2v-image-order-1", "t2v-row", "i2v-row-ret")
REFUSED = {  # name: (flags, what the one line says)
    "s2v": (other_task("s2v-14B"), "--task s2v-14B: it samples clip after clip"),
    "animate": (other_task("animate-14B"), "--task animate-14B: it samples clip after clip"),
    "no ring": ([*T2V, "--ring_size", "2"], "--ring_size"),
}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> tuple[Path, str]:
    """All jobs of one process: their folder, and what they printed."""
    out = tmp_path_factory.mktemp("head")
    jobs = jobs_of_all(CASES, CASES, out)

    def teacache(name: str, argv: list[str], **more: str) -> None:
        jobs.append({"name": name, "mode": "teacache", "argv": argv, **more})

    for name, flags in TASKS.items():
        video = ["--save_file", str(out / "off.mp4")]
        teacache(f"{name}.off", [*flags, "--teacache_thresh", "0", *video])
    teacache("jobs", [*T2V, "--teacache_jobs", str(jobs_file(out, "jobs"))])
    jobs += [single_of(line, T2V, out, f"line.{i}") for i, line in enumerate(LINES)]
    for name in COMPARED:
        teacache(f"{name}.compare", comparison(TASKS[name], out, name))
    for name in PLANNED:
        teacache(f"{name}.plan", [*CASES[name].flags, *CASES[name].ours, "--teacache_plan"])
    for name, (argv, _) in REFUSED.items():
        teacache(name, argv)
    for name in ("t2v", "ti2v"):
        folder = out / f"decode-{name}"
        folder.mkdir()
        argv = [*TASKS[name], "--save_file", str(folder / "video.mp4")]
        teacache(f"{name}.fails", argv, fails="decode")
        teacache(f"{name}.decode", ["--teacache_decode", f"LEFT:{folder}"])
    return out, run(WAN, jobs, out)


@pytest.mark.parametrize("name", CASES)
def test_every_task_computes_the_steps_of_the_method_and_its_frames(head, name):
    check(head[0], name, CASES)


@pytest.mark.parametrize("name", TASKS)
def test_threshold_zero_is_stock_to_the_bit(head, name):
    out, _ = head
    assert np.array_equal(frames(out, f"{name}.off"), frames(out, f"{name}.stock"))
    assert all(map(all, left(out, f"{name}.off")["steps"]))


@pytest.mark.parametrize("name", ["t2v", "i2v", "t2v-dpm", "i2v-order-1", "t2v-row"])
def test_both_experts_skip_and_each_begins_with_a_computed_step(head, name):
    seen = left(head[0], f"{name}.teacache")
    computed = [conditional for conditional, _ in seen["steps"]]
    switch = seen["models"].index(1)  # high_noise_model is 0, low_noise_model is 1
    assert seen["models"] == [0] * switch + [1] * (len(computed) - switch)
    assert computed[0] and computed[switch]
    assert not all(computed[:switch])
    assert not all(computed[switch:])


def test_a_file_of_jobs_loads_once_and_makes_the_videos_of_single_runs(head):
    out, _ = head
    seen = left(out, "jobs")
    assert (seen["exit"], seen["error"]) == (0, None)
    assert (seen["constructed"], seen["restored"]) == (1, True)
    assert seen["decoded"] == [20, 40, 60]
    for i in range(len(LINES)):
        together = frames(out, "jobs" if i == 0 else f"jobs.{i}")
        assert np.array_equal(together, frames(out, f"line.{i}"))


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_loads_once_and_tells_the_psnr_of_its_videos(head, name):
    check_comparison(head[0], f"{name}.compare", name)


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_marks_the_schedule_of_the_run(head, name):
    out, log = head
    (line,) = [u for u in printed(log, f"{name}.plan").splitlines() if u.startswith(">")]
    computed = left(out, f"{name}.reference")["computed"]
    assert [mark == "#" for mark in line.split()[-1]] == computed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_loaded(head, name):
    out, log = head
    assert (left(out, name)["exit"], left(out, name)["constructed"]) == (2, 0)
    said = [line for line in printed(log, name).splitlines() if "error" in line]
    assert len(said) == 1
    assert REFUSED[name][1] in said[0]


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
def test_latents_that_could_not_be_decoded_are_decoded_later_without_a_model(head, name):
    out, _ = head
    assert left(out, f"{name}.fails")["exit"] != 0
    assert left(out, f"{name}.decode")["exit"] == 0
    assert left(out, f"{name}.decode")["steps"] == []
    assert np.array_equal(frames(out, f"{name}.decode"), frames(out, f"{name}.teacache"))
    (video,) = (out / f"decode-{name}").iterdir()  # the latents are gone
    assert video.stat().st_size > 0


PARALLEL = {
    "ulysses": ["--ulysses_size", "2"],
    "fsdp": ["--dit_fsdp"],
    "all": ["--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp"],
}
MANY = ("t2v", "i2v-order-1", "ti2v", "ti2v-image", "t2v-row", "t2v-guide-until")


def in_parallel(case: Case, parallel: str) -> Case:
    return Case([*case.flags, *PARALLEL[parallel]], case.ours, case.reference)


TWO = {f"{name}.{way}": in_parallel(CASES[name], way) for name in MANY for way in PARALLEL}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    argv = [*in_parallel(CASES["t2v"], "all").flags, "--teacache_jobs"]
    together = {"name": "jobs", "mode": "teacache", "argv": [*argv, str(jobs_file(out, "jobs"))]}
    return out, run(WAN, [*jobs_of_all(TWO, TWO, out), together], out, processes=2)


@pytest.mark.parametrize("name", TWO)
def test_two_processes_skip_alike_and_give_the_frames_of_the_reference(two_processes, name):
    check_two_ranks(two_processes[0], name, TWO)


@pytest.mark.parametrize("name", ["t2v", "ti2v-image"])
def test_ulysses_gives_the_frames_of_one_process(head, two_processes, name):
    """FSDP's bfloat16 weights round otherwise, stock's too."""
    one = frames(head[0], f"{name}.teacache")
    assert np.array_equal(frames(two_processes[0], f"{name}.ulysses.teacache"), one)


def test_a_file_of_jobs_in_two_processes(two_processes):
    """Wan2.2 destroys the process group after each video."""
    check_jobs_of_two_ranks(two_processes[0], "t2v.all")
