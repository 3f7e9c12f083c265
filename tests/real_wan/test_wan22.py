"""The script on the real Wan2.2, small and on a CPU, as test_wan21.py has it on Wan2.1."""

import cases
import numpy as np
import pytest
from cases import CASES22, TWO22, Done

if not (cases.WAN22 / "generate.py").is_file():
    pytest.skip(f"no real Wan2.2 at {cases.WAN22} (or $WAN22_REPO)", allow_module_level=True)

OFF = ("t2v", "i2v", "ti2v", "ti2v-image")
PLANNED = ("t2v", "i2v-40", "ti2v-image-order-1", "t2v-rule", "i2v-rule-ret")


def other_task(task: str) -> list[str]:
    return ["--task", task, "--ckpt_dir", ".", "--prompt", cases.CATS]


REFUSED = {
    "s2v": (other_task("s2v-14B"), "--task s2v-14B", "clip after clip"),
    "animate": (other_task("animate-14B"), "--task animate-14B", "clip after clip"),
    "no ring": ([*cases.T2V_A14B, "--ring_size", "2"], "--ring_size"),
    "too-fast": ([*cases.T2V_A14B, "--teacache_speedup", "2"], "--teacache_speedup 2", "1.54"),
}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Done:
    """Everything in one process."""
    out = tmp_path_factory.mktemp("head")
    jobs = [
        *cases.jobs_of_cases(CASES22, out),
        *(cases.threshold_0(name, CASES22, out) for name in OFF),
        cases.batch("jobs", cases.T2V_A14B, out),
        cases.second_line("line", cases.T2V_A14B, out),
        cases.comparison("compared", cases.TI2V_17, out),
        *cases.failing_then_decoding("undecoded", cases.T2V_A14B, out),
        *cases.failing_then_decoding("undecoded-ti2v", cases.TI2V, out),
    ]
    for name in PLANNED:
        argv = [*CASES22[name].flags, *CASES22[name].ours, "--teacache_plan"]
        jobs.append(cases.teacache(f"{name}.plan", argv))
    jobs += [cases.teacache(name, flags) for name, (flags, *_) in REFUSED.items()]
    return cases.run(cases.WAN22, jobs, out)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Done:
    out = tmp_path_factory.mktemp("two")
    together = TWO22["t2v.all"].flags
    jobs = [
        *cases.jobs_of_cases(TWO22, out),
        cases.batch("jobs", together, out),
        cases.second_line("line", together, out),
    ]
    return cases.run(cases.WAN22, jobs, out, processes=2)


@pytest.mark.parametrize("name", CASES22)
def test_task_equals_the_reference(head, name):
    cases.check(head, name, CASES22)


@pytest.mark.parametrize("name", TWO22)
def test_two_processes_equal_the_reference(two_processes, name):
    cases.check_both_ranks(two_processes, name, TWO22)


@pytest.mark.parametrize("name", ["t2v", "ti2v-image"])
def test_ulysses_gives_the_frames_of_one_process(head, two_processes, name):
    """FSDP's bfloat16 weights round otherwise, stock's too."""
    two = two_processes.frames(f"{name}.ulysses.teacache")
    assert np.array_equal(two, head.frames(f"{name}.teacache"))


@pytest.mark.parametrize("name", OFF)
def test_threshold_zero_patches_nothing_and_is_stock(head, name):
    cases.check_threshold_0(head, name, CASES22)


@pytest.mark.parametrize("name", cases.HIGH)
def test_first_step_of_each_model_is_computed(head, name):
    models = head.seen(f"{name}.teacache")["models"]
    steps, high = len(models) // 2, cases.HIGH[name]
    assert models == [0] * 2 * high + [1] * 2 * (steps - high)  # 0 is high_noise_model
    assert {0, high} <= set(head.record(f"{name}.teacache")["computed"])


def test_sigma_skips_what_it_may_of_a_pair_by_default(head):
    computed = {name: head.record(f"{name}.teacache")["computed"] for name in ("t2v", "i2v")}
    assert computed["t2v"] == [0, 1, 2, 3, 4, 5, 8, 11, 13, 14, 15, 18, 19]
    assert computed["i2v"] == [*range(10), 12, 15, 18, 19]


@pytest.mark.parametrize("name", PLANNED)
def test_plan_marks_the_steps_of_the_run(head, name):
    lines = head.printed(f"{name}.plan").splitlines()
    (marks,) = [line.split()[-1] for line in lines if line.startswith(">")]
    computed = [step for step, mark in enumerate(marks) if mark == "#"]
    assert computed == head.record(f"{name}.teacache")["computed"]


@pytest.mark.parametrize("run", ["head", "two_processes"])
def test_jobs_file_makes_the_videos_of_single_runs(request, run):
    """Wan2.2 destroys the process group after each video."""
    way, ranks = (".all", 2) if run == "two_processes" else ("", 1)
    singles = [f"t2v{way}.teacache", "line", f"t2v{way}.stock"]
    cases.check_batch(request.getfixturevalue(run), "jobs", singles, ranks)


def test_comparison_measures_its_videos_after_one_load(head):
    cases.check_comparison(head, "compared")


@pytest.mark.parametrize(
    ("name", "single"), [("undecoded", "t2v.teacache"), ("undecoded-ti2v", "ti2v.teacache")]
)
def test_kept_latents_are_decoded_without_a_model(head, name, single):
    cases.check_decoding(head, name, single)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_before_loading(head, name):
    cases.check_refused(head, name, *REFUSED[name][1:])
