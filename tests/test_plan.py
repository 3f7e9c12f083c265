"""Plan, target speed-up and calibration, on the stand-in ``wan_nano``."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano import NANO, PROMPT, ROW, SCRIPT, attempt, python
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICTURE = ["--frame_num", "1", "--sample_guide_scale", "1"]  # the schedule knows nothing of these


def planned(said: str) -> tuple[float, str]:
    """The current threshold and its marks."""
    (line,) = [u for u in said.splitlines() if u.startswith(">")]
    return float(line.split()[1]), line.split()[-1]


def marks(report: Path) -> str:
    return "".join("#" if u["computed"] else "." for u in json.loads(report.read_text())["steps"])


@pytest.mark.parametrize("mode", [[], ["--use_ret_steps"]], ids=["plain", "ret"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize(("steps", "shift"), [(20, 5), (40, 3), (50, 5), (75, 8), (100, 1)])
def test_the_generation_computes_the_planned_steps(
    capsys, ckpt, tmp_path, mode, solver, steps, shift
):
    report = tmp_path / "report.json"
    run = ["--ckpt_dir", ckpt, *ROW, *mode, "--sample_solver", solver]
    run += ["--sample_steps", steps, "--sample_shift", shift]
    code, said = attempt(capsys, *run, "--teacache_plan")
    assert code == 0
    out = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    assert attempt(capsys, *run, *PROMPT, *PICTURE, *out)[0] == 0
    _, plan = planned(said)
    assert plan == marks(report)
    assert len(plan) == steps
    assert plan.count(".") > 0


def test_a_plan_needs_neither_a_gpu_nor_the_other_parts_of_the_checkpoint(ckpt, tmp_path):
    """And shards do as well as one file."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = load_file(ckpt / WEIGHTS)
    parts = {
        "a.safetensors": {k: v for k, v in tensors.items() if not k.startswith("time_embedding")},
        "b.safetensors": {k: v for k, v in tensors.items() if k.startswith("time_embedding")},
    }
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    shutil.copy(ckpt / "config.json", folder)
    common = ["--wan_repo", NANO, *ROW, "--teacache_plan", "--use_ret_steps"]
    one = python(SCRIPT, *common, "--ckpt_dir", ckpt, CUDA_VISIBLE_DEVICES="")
    two = python(SCRIPT, *common, "--ckpt_dir", folder, CUDA_VISIBLE_DEVICES="")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert planned(one.stdout) == planned(two.stdout)


def test_a_plan_shows_the_published_thresholds_and_marks_the_current_one(capsys, ckpt):
    run = ["--ckpt_dir", ckpt, *ROW, "--teacache_plan", "--teacache_thresh", "0.11"]
    code, said = attempt(capsys, *run)
    rows = [line[1:].split() for line in said.splitlines() if re.match(r"[ >] +[\d.]+ ", line)]
    by_thresh = {float(row[0]): row for row in rows}
    assert code == 0
    assert {0.05, 0.07, 0.08, 0.11} <= by_thresh.keys()
    assert list(by_thresh) == sorted(by_thresh)
    assert planned(said)[0] == 0.11
    for row in rows:
        computed, skipped, speedup, longest, schedule = *row[1:5], row[5]
        assert int(computed) == schedule.count("#")
        assert int(skipped) == schedule.count(".")
        assert speedup == f"{50 / int(computed):.2f}x"
        assert int(longest) == max(map(len, schedule.split("#")))


def test_a_plan_warns_of_negative_increments_with_their_steps(capsys, ckpt):
    code, said = attempt(
        capsys, "--ckpt_dir", ckpt, "--teacache_model", "i2v-14B-480P", "--teacache_plan"
    )
    assert code == 0
    assert "warning: negative increments at steps 1 2 3" in said


@pytest.mark.parametrize("speedup", ["1", "1.5", "2.0", "3"])
def test_a_target_speedup_is_met_and_said(capsys, caplog, ckpt, tmp_path, speedup):
    report = tmp_path / "report.json"
    out = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    run = ["--ckpt_dir", ckpt, *ROW, *PROMPT, *PICTURE, "--teacache_speedup", speedup]
    caplog.set_level("INFO")
    assert attempt(capsys, *run, *out)[0] == 0
    schedule = marks(report)
    assert schedule.count("#") <= 50 / float(speedup)
    assert f"computes {schedule.count('#')} of 50 steps, {schedule}" in caplog.text


def test_a_speedup_that_cannot_be_had_is_refused_with_the_nearest(capsys, ckpt):
    run = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--teacache_speedup", "11", "--use_ret_steps"]
    code, said = attempt(capsys, *run)
    assert code == 2
    assert "--teacache_speedup 11.0: no threshold reaches it; the nearest is 10, at" in said


# ------------------------------------------------------------------------------ calibration


CALIBRATE = ["--teacache_calibrate", "--sample_steps", "12"]
RUN = ["--sample_steps", "12", *PICTURE]


@pytest.fixture(scope="module")
def calibrated(ckpt, tmp_path_factory) -> Path:
    """A checkpoint with a teacache.json of two prompts."""
    folder = tmp_path_factory.mktemp("calibrated") / "ckpt"
    shutil.copytree(ckpt, folder)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red ball\n\n  two blue boxes fall\n")
    argv = ["--wan_repo", NANO, "--ckpt_dir", folder, *CALIBRATE, "--teacache_prompts", prompts]
    done = python(SCRIPT, *argv, "--base_seed", "1")
    assert done.returncode == 0, done.stderr
    assert "R squared" in done.stdout
    assert done.stdout.count("Creating WanModel") == 1
    return folder


def test_a_calibration_keeps_points_fit_range_and_settings(calibrated):
    told = json.loads((calibrated / "teacache.json").read_text())
    assert [(run["prompt"], run["seed"]) for run in told["runs"]] == [
        ("a red ball", 1),
        ("two blue boxes fall", 2),
    ]
    for run in told["runs"]:
        assert [point[:2] for point in run["points"]] == [
            [i, b] for i in range(1, 12) for b in (0, 1)
        ]
    points = [point for run in told["runs"] for point in run["points"]]
    for column, mode in ((2, "plain"), (3, "retention steps")):
        fit = told["fits"][mode]
        assert len(fit["coefficients"]) == 5
        low, high = fit["fitted_range"]
        assert low == pytest.approx(min(point[column] for point in points), rel=0.002)
        assert high == pytest.approx(max(point[column] for point in points), rel=0.002)
        assert fit["r_squared"] <= 1
    assert {k: told["settings"][k] for k in ("task", "size", "sample_steps", "sample_shift")} == {
        "task": "t2v-nano",
        "size": "64*64",
        "sample_steps": 12,
        "sample_shift": 5.0,
    }
    assert not list(calibrated.glob("*.partial")) + list(calibrated.glob("*.tmp"))


@torch.no_grad()
def test_the_points_are_the_changes_of_the_residual(wan, calibrated):
    """Against residuals kept whole, by hooks."""
    from wan.configs import WAN_CONFIGS

    pipeline = wan[1].WanT2V(WAN_CONFIGS["t2v-nano"], str(calibrated))
    blocks, seen, entered = pipeline.model.blocks, [], []
    blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out - entered[-1]))
    pipeline.generate("a red ball", sampling_steps=12, seed=1)
    change = [
        ((now - then).abs().mean() / then.abs().mean()).item()
        for now, then in zip(seen[2:], seen, strict=False)
    ]
    told = json.loads((calibrated / "teacache.json").read_text())
    assert [point[4] for point in told["runs"][0]["points"]] == pytest.approx(change, rel=1e-4)


def test_calibrate_then_plan_then_generate(capsys, caplog, calibrated, tmp_path):
    caplog.set_level("INFO")
    code, said = attempt(capsys, "--ckpt_dir", calibrated, *RUN, "--teacache_plan")
    assert code == 0
    assert f"TeaCache plan: calibration {calibrated / 'teacache.json'}, plain, 12 steps" in said
    report = tmp_path / "report.json"
    out = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    assert attempt(capsys, "--ckpt_dir", calibrated, *RUN, *PROMPT, *out)[0] == 0
    assert marks(report) == planned(said)[1]
    assert marks(report).count("#") <= 6  # the default threshold halves the steps
    assert "made for" not in caplog.text


def test_other_settings_than_those_of_the_calibration_are_said(
    capsys, caplog, calibrated, tmp_path
):
    caplog.set_level("INFO")
    argv = ["--ckpt_dir", calibrated, *PROMPT, *PICTURE, "--sample_steps", "8"]
    argv += ["--sample_shift", "3", "--save_file", tmp_path / "x.mp4"]
    assert attempt(capsys, *argv)[0] == 0
    assert "made for sample_steps 12, now 8; sample_shift 5.0, now 3.0" in caplog.text


def test_a_distance_outside_the_fitted_range_computes_the_step(
    capsys, caplog, calibrated, tmp_path
):
    told = json.loads((calibrated / "teacache.json").read_text())
    told["fits"]["plain"] |= {"fitted_range": [5.0, 6.0], "thresholds": [100.0]}
    file, report = tmp_path / "mine.json", tmp_path / "report.json"
    file.write_text(json.dumps(told))
    argv = ["--ckpt_dir", calibrated, *RUN, *PROMPT, "--teacache_coefficients", file]
    argv += ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    assert attempt(capsys, *argv)[0] == 0
    assert marks(report) == "#" * 12
    assert "steps 1 2 3 4 5 6 7 8 9 10 are computed, since" in caplog.text


def test_a_row_asked_for_is_taken_in_place_of_the_calibration(capsys, calibrated):
    _, said = attempt(capsys, "--ckpt_dir", calibrated, *ROW, "--teacache_plan")
    assert "row t2v-1.3B (as asked)" in said


def test_an_interrupted_calibration_goes_on_where_it_was(ckpt, tmp_path):
    folder, prompts = tmp_path / "ckpt", tmp_path / "prompts.txt"
    shutil.copytree(ckpt, folder)
    prompts.write_text("one\ntwo\nthree\n")
    argv = ["--wan_repo", NANO, "--ckpt_dir", folder, "--base_seed", "1", "--teacache_calibrate"]
    argv += ["--teacache_prompts", prompts, "--sample_steps", "50"]
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if "on prompt 2" in line:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
    assert process.returncode == 130
    left = json.loads((folder / "teacache.json.partial").read_text())
    assert len(left["runs"][0]["points"]) == 98
    assert not (folder / "teacache.json").exists()
    done = python(SCRIPT, *argv)
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "teacache.json").read_text())
    assert [run["prompt"] for run in told["runs"]] == ["one", "two", "three"]
    assert told["runs"][0] == left["runs"][0]
    assert not (folder / "teacache.json.partial").exists()


# ------------------------------------------------------------------------------- bad input


def without_time_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if not k.startswith("time_embedding")}
    save_file(kept, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_time_embedding, "its time embedding cannot be read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"dim": 5120}'), "has dim 5120"),
    ],
)
def test_a_foreign_checkpoint_cannot_be_planned(capsys, ckpt, tmp_path, change, expected):
    folder = tmp_path / "ckpt"
    shutil.copytree(ckpt, folder)
    change(folder)
    code, said = attempt(capsys, "--ckpt_dir", folder, *ROW, "--teacache_plan")
    assert code == 2
    assert expected in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(version=2),
        lambda told: told.pop("version"),
        lambda told: told["fits"].pop("retention steps"),
        lambda told: told["fits"]["plain"].update(coefficients=[1.0, 2.0]),
        lambda told: told["fits"]["plain"].update(coefficients=[float("nan")] * 5),
        lambda told: told["fits"]["plain"].update(coefficients="12345"),
        lambda told: told["fits"]["plain"].update(fitted_range=[2.0, 1.0]),
        lambda told: told["fits"]["plain"].update(thresholds=[-1.0]),
        lambda told: told["fits"]["plain"].update(thresholds=[]),
        lambda told: told.update(settings=None),
    ],
)
def test_a_damaged_calibration_is_refused(capsys, calibrated, tmp_path, change):
    told = json.loads((calibrated / "teacache.json").read_text())
    change(told)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(told))
    argv = ["--ckpt_dir", calibrated, "--teacache_coefficients", file, "--teacache_plan"]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert f"--teacache_coefficients {file}: damaged or not a calibration" in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--teacache_coefficients", "/none.json"], "--teacache_coefficients /none.json: damaged"),
        (["--teacache_speedup", "0.5"], "--teacache_speedup: 0.5 must be 1 or more"),
        (["--teacache_speedup", "nan"], "--teacache_speedup: nan must be 1 or more"),
        (["--teacache_speedup", "fast"], "--teacache_speedup: fast must be 1 or more"),
        (
            ["--teacache_speedup", "2", "--teacache_thresh", "0.1"],
            "--teacache_thresh: not allowed with argument --teacache_speedup",
        ),
        (["--teacache_prompts", "x"], "--teacache_prompts x: is for --teacache_calibrate only"),
        (["--teacache_calibrate", "--teacache_prompts", "/none"], "/none: [Errno 2] No such file"),
        (["--teacache_calibrate", "--teacache_prompts", "/dev/null"], "must hold a prompt a line"),
        (["--teacache_calibrate", "--teacache_plan"], "not allowed with argument"),
        (["--teacache_calibrate", "--sample_steps", "5"], "--sample_steps 5: a calibration"),
        (["--teacache_calibrate", "--teacache_coefficients", "/none/x"], "/none/x: cannot be"),
    ],
)
def test_bad_flags_are_refused_in_one_line_with_status_2(capsys, ckpt, flags, expected):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT, *flags)
    lines = [line for line in said.splitlines() if "error" in line]
    assert code == 2
    assert len(lines) == 1
    assert expected in lines[0]


def test_a_calibration_of_other_settings_is_not_gone_on_with(capsys, ckpt, tmp_path):
    file = tmp_path / "mine.json"
    left = {"version": 1, "settings": {"task": "t2v-14B"}, "runs": []}
    (tmp_path / "mine.json.partial").write_text(json.dumps(left))
    argv = ["--ckpt_dir", ckpt, *PROMPT, *CALIBRATE, "--teacache_coefficients", file]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert "mine.json.partial is of other settings; go on with those, or rm it" in said
