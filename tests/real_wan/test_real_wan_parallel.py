"""The script on the real Wan2.1 in two processes, as test_real_wan.py has it in one."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import (
    LINES,
    Case,
    check_comparison,
    check_jobs_of_two_ranks,
    check_two_ranks,
    comparison,
    frames,
    jobs_file,
    jobs_of_all,
    left,
    run,
)
from test_real_wan import CASES, T2V, WAN

PARALLEL = {
    "ulysses": ["--ulysses_size", "2"],
    "ring": ["--ring_size", "2"],
    "fsdp": ["--dit_fsdp"],
    "all": ["--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp"],
}
ALIKE = ("20-steps", "vace-1.3B")
MANY = ("20-steps", "20-steps-ret", "vace-1.3B", "order-1-sigma", "guide-until")


def in_parallel(case: Case, parallel: str) -> Case:
    flags = [flag for flag in case.flags if flag != "--t5_cpu"]
    flags[flags.index("--offload_model") + 1] = "False"
    return Case([*flags, *PARALLEL[parallel]], case.ours, case.reference)


TWO = {f"{name}.{way}": in_parallel(CASES[name], way) for name in MANY for way in PARALLEL}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    jobs = jobs_of_all(TWO, TWO, out)
    together = {"name": "jobs", "mode": "teacache"}
    argv = [*in_parallel(CASES["20-steps"], "all").flags, "--teacache_jobs"]
    together["argv"] = [*argv, str(jobs_file(out, "jobs"))]
    three = {"name": "product", "mode": "teacache", "argv": [*T2V, "--ulysses_size", "3"]}
    flags = comparison(in_parallel(CASES["20-steps"], "all").flags, out, "two")
    compared = {"name": "compare", "mode": "teacache", "argv": flags}
    return out, run(WAN, [*jobs, together, compared, three], out, processes=2)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run(WAN, [CASES[name].jobs(name, out)[0] for name in ALIKE], out)
    return out


@pytest.mark.parametrize("name", TWO)
def test_two_processes_skip_alike_and_give_the_frames_of_the_reference(two_processes, name):
    check_two_ranks(two_processes[0], name, TWO)


@pytest.mark.parametrize("name", ALIKE)
def test_ulysses_gives_the_frames_of_one_process(one_process, two_processes, name):
    """Ring's blockwise softmax and FSDP's bfloat16 weights round otherwise, stock's too."""
    one = frames(one_process, f"{name}.teacache")
    assert np.array_equal(frames(two_processes[0], f"{name}.ulysses.teacache"), one)


def test_a_file_of_jobs_in_two_processes(two_processes):
    check_jobs_of_two_ranks(two_processes[0], "20-steps.all")


def test_two_processes_compare_with_one_load(two_processes):
    out, _ = two_processes
    check_comparison(out, "compare", "two")
    other = left(out, "compare", rank=1)
    assert (other["exit"], other["error"], other["constructed"]) == (0, None, 1)
    assert other["steps"] == left(out, "compare")["steps"]


def test_processes_that_do_not_fit_the_flags_are_refused_by_both_and_said_by_one(two_processes):
    out, log = two_processes
    assert [left(out, "product", rank)["exit"] for rank in (0, 1)] == [2, 2]
    assert log.count("--ulysses_size 3 --ring_size 1: their product must be the number of") == 1


def test_only_rank_0_speaks(two_processes):
    said = re.findall(r"TeaCache: computed \d", two_processes[1])
    assert len(said) == len(TWO) + len(LINES) + 1  # the one that is compared with stock
