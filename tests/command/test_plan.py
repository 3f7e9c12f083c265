"""The rule, the schedule, and the refusal of a broken schedule before loading. Stand-in."""

import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nano import RULE, SCRIPT, attempt
from safetensors.torch import load_file, save_file
from stand_in import wrap
from torch import Tensor

from teacache_generate import RULES

SIGMA = ["--teacache_rule", "sigma"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINED = SCRIPT.parent / "assets" / "wan_nano"


@pytest.fixture
def plan(capsys, ckpt):
    """A function of flags: exit status and text of a plan."""
    return lambda *flags: attempt(capsys, "--ckpt_dir", ckpt, "--teacache_plan", *flags)


def lines_of(text: str) -> list[list[str]]:
    """thresh, computed, skipped, speed-up, longest skip, schedule; the current threshold last."""
    lines = [line for line in text.splitlines() if re.match(r"[ >] +[\d.e-]+ ", line)]
    return [line[1:].split() for line in sorted(lines, key=lambda line: line.startswith(">"))]


def schedule_of(text: str) -> str:
    return lines_of(text)[-1][-1]


# ------------------------------------------------------------------------------------- which rule


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("t2v-1.3B", "t2v-1.3B (task t2v-1.3B)"),
        ("t2v-14B", "t2v-14B (task t2v-14B)"),
        ("t2i-14B", "t2v-14B (task t2i-14B)"),
        ("anime-1.3B", "sigma (none is fitted to anime-1.3B)"),
    ],
)
def test_rule_follows_the_task(plan, tasks, ckpt, tmp_path, task, expected):
    """Whatever the checkpoint is called; none is borrowed."""
    folder = copied(ckpt, tmp_path / "Wan2.1-I2V-14B-480P")
    code, said = plan("--task", task, "--size", "832*480", "--ckpt_dir", folder)
    assert code == 0, said
    assert f"TeaCache plan: rule {expected}, 50 steps" in said


def copied(ckpt: Path, folder: Path) -> Path:
    """Link a checkpoint's transformer into a new folder."""
    folder.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        os.link(ckpt / name, folder / name)
    return folder


I2V = "Wan2.1-I2V-14B-480P"
BY_NAME, HUB = f"480P (checkpoint {I2V})", f"720P/hub/models--Wan-AI--{I2V}/snapshots/1b7d4f6b2d1a"


@pytest.mark.parametrize(
    ("folder", "links", "ckpt_dir", "size", "expected"),
    [
        (I2V, {}, I2V, "1280*720", BY_NAME),
        (I2V, {}, ".", "1280*720", BY_NAME),
        ("480P/Wan2___1-I2V-14B-720p", {}, None, "832*480", "720P (checkpoint Wan2___1-I2V"),
        (f"720P/{I2V}", {"x-720P": f"720P/{I2V}", "y": "x-720P"}, "y", "1280*720", BY_NAME),
        ("blobs/4d7a", {I2V: "blobs/4d7a", "current": I2V}, "current", "1280*720", BY_NAME),
        (f"disk/{I2V}", {"720P": "disk"}, f"720P/{I2V}", "1280*720", BY_NAME),
        (HUB, {"ckpt": HUB}, "ckpt", "1280*720", "480P (checkpoint models--Wan-AI--Wan2.1"),
        ("720P/mine", {}, None, "832*480", "480P (guessed from --size 832*480"),
        ("480p-and-720p", {}, None, "480*832", "480P (guessed from --size 480*832"),
        ("mine", {}, None, "960*544", "480P (guessed from --size 960*544"),  # the nearer area
        ("my1480px", {}, None, "1024*704", "720P (guessed from --size 1024*704"),
    ],
)
def test_rule_of_i2v_follows_the_downloaded_name_or_the_area(
    plan, tasks, i2v_ckpt, tmp_path, monkeypatch, folder, links, ckpt_dir, size, expected
):
    copied(i2v_ckpt, tmp_path / folder)
    for link, to in links.items():
        (tmp_path / link).symlink_to(to)
    monkeypatch.chdir(tmp_path / folder if ckpt_dir == "." else tmp_path)
    code, said = plan("--task", "i2v-14B", "--size", size, "--ckpt_dir", ckpt_dir or folder)
    assert code == 0, said
    assert f"TeaCache plan: rule i2v-14B-{expected}" in said
    assert ("--teacache_rule" in said.splitlines()[0]) == ("guessed" in expected)


# -------------------------------------------------------------------------------- own rule files


def own_rule(file: Path, **changes) -> Path:
    """The shipped teacache.json with changes, one level deep."""
    rule = json.loads((TRAINED / "teacache.json").read_text())
    for name, value in changes.items():
        rule[name] = rule[name] | value if value and isinstance(value, dict) else value
    file.write_text(json.dumps(rule))
    return file


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_rule_that_is_asked_for_comes_before_teacache_json(plan, tmp_path, mark):
    file = own_rule(tmp_path / "mine.json", plain={"thresholds": [0.01, 0.02]})
    file.write_bytes(mark + file.read_bytes())
    for flags, expected, thresh in (
        ([], "rule teacache.json (from wan_nano)", "0.0567"),
        (["--use_ret_steps"], "rule teacache.json (from wan_nano)", "0.06731"),
        (RULE, "rule t2v-1.3B (as asked)", "0.08"),
        (SIGMA, "rule sigma (as asked)", "0.06094"),
        (["--teacache_rule", file], f"rule mine.json (from {tmp_path.name})", "0.02"),
    ):
        code, said = plan("--ckpt_dir", TRAINED, *flags)
        assert code == 0
        assert f"TeaCache plan: {expected}, 50 steps" in said
        assert lines_of(said)[-1][0] == thresh


@pytest.mark.parametrize(
    "change",
    [
        *({"version": 2}, {"plain": None}, {"retention": {}}),
        *({"steps": "12"}, {"shift": None}, {"solver": 3}),
        *({"plain": {"coefficients": c}} for c in ([1.0, 2.0], [float("nan")] * 5, "12345")),
        *({"retention": {"thresholds": t}} for t in ([-1.0], [float("inf")], [], 0.1)),
    ],
    ids=str,
)
def test_damaged_rule_file_is_refused(refusal, tmp_path, change):
    file = own_rule(tmp_path / "mine.json", **change)
    line = refusal("--teacache_rule", file)
    assert f"--teacache_rule {file}: cannot be used" in line
    assert "give one of sigma, t2v-1.3B, t2v-14B, i2v-14B-480P, i2v-14B-720P, or a file" in line


# -------------------------------------------------------------------------------- printing a plan


@pytest.mark.parametrize(
    ("flags", "count", "current"),
    [
        (RULE, 9, "0.08"),  # six around the default, and three published
        ([*RULE, "--use_ret_steps"], 7, "0.1"),
        ([*RULE, "--teacache_thresh", "0.04"], 9, "0.04"),  # half of the default
        ([*RULE, "--teacache_thresh", "0.041"], 10, "0.041"),
        ([*RULE, "--teacache_thresh", "0"], 10, "0"),
        (SIGMA, 7, "0.06094"),
    ],
)
def test_plan_prints_each_threshold_once(plan, flags, count, current):
    code, said = plan(*flags)
    assert code == 0
    assert sum(line.startswith(">") for line in said.splitlines()) == 1
    lines = lines_of(said)
    assert len({line[0] for line in lines}) == len(lines) == count
    assert lines[-1][0] == current
    printed = [line[1:].split()[0] for line in said.splitlines() if line[-9:].strip("#.") == ""]
    assert printed == sorted(printed, key=float)
    for _, computed, skipped, speedup, longest, schedule in lines:
        assert (int(computed), int(skipped)) == (schedule.count("#"), schedule.count("."))
        assert speedup == f"{50 / int(computed):.2f}x"
        assert int(longest) == max(map(len, schedule.split("#")))


# -------------------------------------------------------------------- distances from a checkpoint


def change_tensors(folder: Path, prefix: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change the tensors of a checkpoint that begin with a prefix."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()  # a link
    changed = {name: change(u) if name.startswith(prefix) else u for name, u in tensors.items()}
    save_file(changed, folder / WEIGHTS)


def write_rule(folder: Path, coefficients, thresh, **fit) -> Path:
    polynomial = {"coefficients": coefficients, "thresholds": [thresh]}
    return own_rule(folder / "rule.json", plain=polynomial, **fit)


@pytest.mark.parametrize(
    ("high_steps", "constant_one", "schedule"),
    [
        (4, "high", "#...######"),
        (4, "low", "#####....#"),  # the first step of a model, and the last one, are forced
        (0, "low", "#........#"),  # below the boundary all steps are the second model's
        (10, "high", "#........#"),
    ],
)
def test_distances_are_of_the_model_that_samples(
    plan, wan, ckpt, tmp_path, monkeypatch, high_steps, constant_one, schedule
):
    """Two models, as Wan2.2's A14B has; the boundary belongs to the first one."""
    scheduler = importlib.import_module("wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler()
    scheduler.set_timesteps(10, shift=5.0)
    boundary = scheduler.timesteps[high_steps - 1].item() / 1000 if high_steps else 1.1
    config = {"boundary": boundary, "high_noise_checkpoint": "high", "low_noise_checkpoint": "low"}
    tasks = wan[0].WAN_CONFIGS
    monkeypatch.setitem(tasks, "t2v-nano", {**tasks["t2v-nano"], **config})
    for name in ("high", "low"):
        copied(ckpt, tmp_path / name)
    # the same embedding at each timestep: all distances are 0
    change_tensors(tmp_path / constant_one, "time_embedding.2.weight", torch.zeros_like)
    rule = write_rule(tmp_path, [0, 0, 0, 1, 0], 1e-9)
    argv = ["--ckpt_dir", tmp_path, "--teacache_rule", rule, "--sample_steps", "10"]
    assert schedule_of(plan(*argv)[1]) == schedule


def test_bfloat16_moves_a_plan_by_a_step_at_most(plan, tmp_path):
    """FSDP holds the time embedding in it; the threshold has the 4 digits that are printed."""
    rounded = copied(TRAINED, tmp_path / "rounded")
    change_tensors(rounded, "time_", Tensor.bfloat16)
    ret = "--use_ret_steps"
    dpm = ["--sample_solver", "dpm++"]
    for flags, speedup, more in (([], "1.5", -1), (dpm, "3", 0), ([ret], "2", 0)):
        flags = ["--teacache_rule", TRAINED / "teacache.json", *flags]
        _, said = plan("--ckpt_dir", TRAINED, *flags, "--teacache_speedup", speedup)
        thresh, computed = lines_of(said)[-1][:2]
        assert 50 / float(speedup) <= int(computed) < 50 / float(speedup) + 2.01
        _, said = plan("--ckpt_dir", rounded, *flags, "--teacache_thresh", thresh)
        again, in_bfloat16 = lines_of(said)[-1][:2]
        assert again == thresh
        assert int(in_bfloat16) == int(computed) + more


# ------------------------------------------------------------------------ the plan and the run


def marks(record) -> str:
    return "".join("#" if step in record["computed"] else "." for step in range(record["steps"]))


@pytest.mark.parametrize(
    "flags",
    [
        [*RULE, "--sample_steps", "40", "--sample_shift", "3", "--use_ret_steps"],
        ["--sample_steps", "33", "--sample_shift", "16", "--sample_solver", "dpm++"],
        ["--sample_steps", "20", "--teacache_guide_until", "0.6", "--teacache_order", "1"],
        [*RULE, "--sample_steps", "20", "--teacache_speedup", "1.5"],
    ],
    ids=" ".join,
)
def test_run_computes_the_planned_steps(plan, run, flags):
    code, log, record = run("--frame_num", "1", *flags)
    assert code == 0
    assert marks(record) == schedule_of(plan(*flags)[1])
    assert "." in marks(record)
    assert "than planned" not in log


def test_steps_other_than_planned_bring_a_warning(run, plan, wan, monkeypatch):
    """In a fork, the pipeline of which ignores the shift."""

    def shifted(stock, *args, **kwargs):
        return stock(*args, **kwargs | {"shift": 1.0})

    wrap(monkeypatch, "wan.text2video.WanT2V.generate", shifted)
    flags = ["--sample_steps", "20", "--teacache_thresh", "0.1"]
    planned = schedule_of(plan(*flags)[1])
    code, log, record = run("--frame_num", "1", *flags)
    (warning,) = [line for line in log.splitlines() if "than planned" in line]
    assert code == 0
    assert marks(record) != planned
    assert marks(record) in warning
    assert planned in warning


OFF = ["--teacache_thresh", "0", "--sample_guide_scale", "1"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "(none is fitted to t2v-nano), threshold 0.06094 (default): computes 25 of 50 steps"),
        ([*SIGMA, "--teacache_guide_until", "0.6"], "(as asked), threshold 0.06094 (default): "),
        (["--teacache_guide_until", "0.6"], "computes 25 of 50 steps, 39 of 100 passes (about 2.6"),
        (["--sample_steps", "20", "--teacache_order", "1"], "order 1: computes 10 of 20 steps"),
        (["--sample_steps", "4"], "limits allow): computes 3 of 4 steps (about 1.3x)"),
        (["--sample_steps", "10", "--teacache_thresh", "0.001"], "computes all 10 steps, as stock"),
        ([*OFF, "--sample_steps", "4"], "threshold 0: computes all 4 steps, as stock does"),
        (["--teacache_speedup", "1.5"], "computes 34 of 50 steps (about 1.5x)"),  # 33 1/3 or more
        (
            ["--teacache_speedup", "2.5", "--teacache_guide_until", "0.6"],
            "40 of 100 passes (about 2.5x)",
        ),
    ],
)
def test_one_line_before_loading_tells_what_is_computed(run, no_loading, flags, line):
    """At threshold 0 the unconditional branch runs at scale 1 too, as in stock."""
    code, log, _ = run(*flags)
    assert code == 1
    (found,) = [text for text in log.splitlines() if "threshold" in text]
    assert line in found
    assert log.index(found) < log.index("the pipeline is loaded")


# -------------------------------------------------------------------------------------- speed-ups


@pytest.mark.parametrize("rule", [["--use_ret_steps"], ["--teacache_rule", "sigma"]], ids=" ".join)
def test_speedup_out_of_reach_is_refused_with_the_most(plan, rule):
    code, said = plan("--ckpt_dir", TRAINED, *rule, "--teacache_speedup", "12")
    assert code == 2
    found = re.search(
        r"--teacache_speedup 12: no threshold reaches it; the most is ([\d.]+), at "
        r"--teacache_thresh ([\d.]+)$",
        said,
    )
    said = plan("--ckpt_dir", TRAINED, *rule, "--teacache_thresh", found[2])[1]
    assert lines_of(said)[-1][3] == f"{float(found[1]):.2f}x"
    assert plan("--ckpt_dir", TRAINED, *rule, "--teacache_speedup", found[1])[0] == 0


# ---------------------------------------------------------------------- what is broken is refused


@pytest.mark.parametrize(
    ("skipped", "flags", "runs", "parts"),
    [
        (3, [], True, []),
        (20, [], True, ["20 steps in a row are skipped"]),  # as published
        (10, ["--sample_steps", "40"], True, ["steps 40 (fitted at 50)"]),
        (11, ["--sample_steps", "40"], False, ["steps 40 (fitted at 50)", "11 steps in a row"]),
        (6, ["--sample_steps", "20"], True, ["steps 20 (fitted at 50)"]),
        (7, ["--sample_steps", "20"], False, ["steps 20 (fitted at 50)", "7 steps in a row"]),
        (2, ["--sample_steps", "6"], True, ["steps 6 (fitted at 50)"]),  # 3 of 6
        (12, ["--sample_shift", "8"], True, ["shift 8.0 (fitted at 5.0)"]),
        (13, ["--sample_shift", "8"], False, ["shift 8.0 (fitted at 5.0)", "13 steps in a row"]),
        (13, ["--sample_solver", "dpm++"], False, ["solver dpm++ (fitted at unipc)"]),
    ],
)
def test_only_long_skips_away_from_the_fit_are_refused(
    run, no_loading, tmp_path, skipped, flags, runs, parts
):
    """Each increment is 1, and the threshold is the count of steps to skip in a row."""
    rule = write_rule(tmp_path, [0, 0, 0, 0, 1], skipped + 0.5)
    code, said, _ = run("--teacache_rule", rule, *flags)
    assert code == (1 if runs else 2)
    told = [line for line in said.splitlines() if "WARNING" in line or "error: " in line]
    assert len(told) == bool(parts)
    assert said.count("(fitted at") == len(flags) / 2
    assert all(part in told[0] for part in parts)
    if not runs:
        assert f"--teacache_thresh {skipped + 0.5}: rule rule.json (from " in told[0]
        for cure in ("a lower --teacache_thresh", "--teacache_thresh 0", "--teacache_rule sigma"):
            assert cure in told[0]


def test_t2v_14b_at_100_steps_is_refused(run, plan, no_loading, monkeypatch):
    monkeypatch.setitem(RULES, "t2v-14B", replace(RULES["t2v-14B"], tasks=("t2v-nano",)))
    code, said, _ = run("--sample_steps", "100")
    (error,) = [line for line in said.splitlines() if "error" in line]
    assert (code, "rule t2v-14B (task t2v-nano) would compute 2 of 100" in error) == (2, True)
    assert "steps 100 (fitted at 50)" in error
    assert "increments are negative at steps 1-98" in error
    assert "98 steps in a row are skipped" in error
    assert "--teacache_rule sigma, or --teacache_rule t2v-14B to run it all the same" in error
    for cure in (SIGMA, ["--teacache_thresh", "0"], ["--teacache_rule", "t2v-14B"]):
        code, log, _ = run("--sample_steps", "100", *cure)
        assert code == 1
    assert "98 steps in a row are skipped" in log
    code, said = plan("--sample_steps", "100")
    assert (code, "a run would be refused: --teacache_thresh 0.2: " in said) == (0, True)


def test_negative_increments_are_named_by_step(run, no_loading, tmp_path):
    """The increment is the distance less .0131: the distances of two steps are smaller."""
    rule = write_rule(tmp_path, [0, 0, 0, 1, -0.0131], 1e-9, steps=20)
    flags = ["--teacache_rule", rule, "--sample_steps", "20"]
    code, log, _ = run(*flags)
    assert code == 1
    (warning,) = [line for line in log.splitlines() if "WARNING" in line]
    assert "increments are negative at steps 3-4: check the video" in warning
    code, said, _ = run(*flags, "--teacache_speedup", "1.1")
    assert code == 2
    assert "--teacache_speedup 1.1: with rule rule.json (from " in said
    assert "increments are negative at steps 3-4, and no threshold can be trusted" in said
    assert "use --teacache_rule sigma" in said
