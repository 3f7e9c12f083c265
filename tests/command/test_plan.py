"""What is told and refused before anything is loaded, and held against the run: on ``wan_nano``."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nano import PROMPT, ROW, SCRIPT, attempt
from safetensors.torch import load_file, save_file

import teacache_generate
from teacache_generate import (
    RELEASES,
    ROWS,
    Choice,
    Refused,
    TeaCacheConfig,
    Wan,
    check_plan,
    choose_row,
    count_guided_steps,
    job_of,
    look_ahead,
    own_parser,
    parse_and_check,
    plan,
    plan_speedup,
    read_coefficients,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINED = SCRIPT.parent / "assets" / "wan_nano"
PICTURE = ["--frame_num", "1", "--sample_guide_scale", "1"]  # the schedule knows nothing of these
SIGMA_50 = "##########.....#....#...#...#..#..#..#.#.#.#.#####"


def planned(said: str) -> tuple[float, str]:
    """The current threshold and its marks."""
    (line,) = [u for u in said.splitlines() if u.startswith(">")]
    return float(line.split()[1]), line.split()[-1]


def marks(report: Path) -> str:
    return "".join("#" if u["computed"] else "." for u in json.loads(report.read_text())["steps"])


def before_loading(log: str) -> list[str]:
    """TeaCache's lines, of a run that came as far as loading."""
    before, loads, _ = log.partition("Creating WanModel")
    assert loads
    return [line for line in before.splitlines() if "TeaCache: " in line]


@pytest.fixture
def make(capsys, caplog, ckpt, tmp_path):
    """A function of flags: exit status, all that was said, and the report if there is one."""
    caplog.set_level("INFO")

    def run(*flags, folder=ckpt):
        caplog.clear()
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        out = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
        code, said = attempt(capsys, "--ckpt_dir", folder, *PROMPT, *out, *flags)
        return code, caplog.text + said, report

    return run


def give_row(monkeypatch, name):
    """The stand-in's task runs by this row alone."""
    for other, row in teacache_generate.ROWS.items():
        tasks = ("t2v-nano",) if other == name else ()
        monkeypatch.setitem(teacache_generate.ROWS, other, replace(row, tasks=tasks))


@pytest.fixture
def fitted_for_14b(monkeypatch):
    """The stand-in's task has the published row of t2v-14B, and its checkpoint no other."""
    give_row(monkeypatch, "t2v-14B")


# ------------------------------------------------------------------------------ plan and run agree


@pytest.mark.parametrize(
    "flags",
    [
        [*ROW, "--sample_steps", "20", "--sample_solver", "dpm++"],
        [*ROW, "--sample_steps", "40", "--sample_shift", "3", "--use_ret_steps"],
        [*ROW, "--sample_steps", "75", "--sample_shift", "8", "--teacache_order", "1"],
        ["--sample_steps", "33", "--sample_shift", "16", "--sample_solver", "dpm++"],
        ["--sample_steps", "40", "--teacache_guide_until", "0.6", "--teacache_order", "1"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_the_generation_computes_the_planned_steps(capsys, ckpt, make, flags):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *flags, "--teacache_plan")
    assert code == 0
    code, log, report = make(*PICTURE, *flags)
    assert code == 0
    _, schedule = planned(said)
    assert schedule == marks(report)
    assert schedule.count(".") > 0
    assert "planned were" not in log


def test_a_difference_between_plan_and_run_is_said_after_the_run(make, monkeypatch):
    def wrong(folder, timesteps, mode):
        return [0.0] * (len(timesteps) - 1)

    monkeypatch.setattr(teacache_generate, "signal_distances", wrong)  # adds .138 a step
    flags = [*ROW, "--teacache_thresh", "0.2", "--sample_steps", "6"]
    code, log, report = make(*PICTURE, *flags)
    assert code == 0
    (line,) = [line for line in log.splitlines() if "planned were" in line]
    count = marks(report).count("#")
    assert f"planned were 4 steps, #.#.##, and computed {count}, {marks(report)}" in line
    assert marks(report) != "#.#.##"
    assert log.index("sampling ") < log.index("planned were")


def test_a_plan_needs_no_other_parts_of_the_checkpoint(capsys, ckpt, tmp_path):
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
    flags = [*ROW, "--teacache_plan", "--use_ret_steps"]
    (one, whole), (two, alone) = (attempt(capsys, "--ckpt_dir", f, *flags) for f in (ckpt, folder))
    assert (one, two) == (0, 0)
    assert planned(whole) == planned(alone)
    del index["weight_map"]["time_embedding.2.weight"]
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    code, said = attempt(capsys, "--ckpt_dir", folder, *flags)
    assert code == 2
    assert "its index names no file for time_embedding.2.weight" in said


def test_an_abbreviated_flag_names_the_checkpoint_too(capsys, ckpt):
    """As generate.py's parser takes it."""
    for flag in ("--ckpt", "--ckpt_d", "--ck"):
        code, said = attempt(capsys, flag, ckpt, *ROW, "--teacache_plan")
        assert code == 0, said


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


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ([*ROW], 9),  # six around the default, and three that are published
        ([*ROW, "--teacache_thresh", "0.04"], 9),  # half of the default, as it is
        ([*ROW, "--teacache_thresh", "0.0400001"], 9),
        ([*ROW, "--teacache_thresh", "0.041"], 10),
        (["--teacache_model", "sigma"], 7),
    ],
)
def test_a_plan_has_no_threshold_twice(capsys, ckpt, flags, count):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *flags, "--teacache_plan")
    rows = [line[1:].split()[0] for line in said.splitlines() if re.match(r"[ >] +[\d.]+ ", line)]
    assert code == 0
    assert len(rows) == len(set(rows)) == count
    assert len([line for line in said.splitlines() if line.startswith(">")]) == 1


def test_a_plan_warns_where_a_run_would_be_refused(capsys, ckpt):
    flags = ["--teacache_model", "i2v-14B-480P", "--teacache_plan"]
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *flags)
    assert code == 0
    assert "warning: at 0.26 its increments are negative at steps 1-48" in said


# ------------------------------------------------------------------------------ one line beforehand

ALL_OF_4 = "thresh 0, sigma: computes all 4 steps, as stock does: nothing is gained"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--sample_steps", "50"],
            "row sigma (nobody has fitted t2v-nano), thresh 0.06094 (default), sigma: "
            "will compute 25 of 50 steps (about 2.0x)",
        ),
        (
            ["--teacache_model", "sigma", "--sample_steps", "50", "--teacache_guide_until", "0.6"],
            "row sigma (as asked), thresh 0.06094 (default), sigma: will compute 25 of 50 steps, "
            "39 of 100 passes (about 2.6x)",
        ),
        (
            ["--sample_steps", "4", "--teacache_order", "1"],
            "(default), sigma, order 1: will compute 2 of 4 steps (about 2.0x)",
        ),
        (
            ["--sample_steps", "10", "--teacache_thresh", "0.001"],
            "thresh 0.001, sigma: computes all 10 steps, as stock does: nothing is gained",
        ),
        (["--sample_steps", "2"], "sigma: computes all 2 steps, as stock does: nothing is gained"),
        (["--sample_steps", "4", "--teacache_thresh", "0"], ALL_OF_4),
        (
            ["--sample_steps", "4", "--teacache_thresh", "0", "--sample_guide_scale", "1"],
            ALL_OF_4,  # as stock does, which runs both branches at 1 too
        ),
    ],
    ids=["default", "guided", "few", "low", "two", "off", "off at guidance 1"],
)
def test_what_will_be_computed_is_said_in_one_line_before_anything_is_loaded(make, flags, line):
    _, log, _ = make("--frame_num", "1", *flags)
    lines = [u for u in before_loading(log) if "thresh" in u]
    assert len(lines) == 1
    assert lines[0].endswith(line)


def test_the_last_line_tells_passes_and_drift_and_the_report_has_each_step(make):
    flags = ["--frame_num", "1", "--sample_steps", "10", "--teacache_guide_until", "0.5"]
    code, log, report = make(*flags)
    told = json.loads(report.read_text())
    (line,) = [u for u in log.splitlines() if "TeaCache: computed" in u]
    assert code == 0
    assert len(told["computed"]) == 5
    guided = sum(step < 5 for step in told["computed"])
    assert told["passes"] == 5 + guided
    assert told["config"]["guided_steps"] == 5
    assert f"; {5 + guided} of 20 passes; reused residuals were off by " in line
    after_skipped = [i for i in told["computed"] if i and i - 1 not in told["computed"]]
    drifts = {i: step["drift"] for i, step in enumerate(told["steps"]) if step["drift"]}
    assert list(drifts) == after_skipped
    for name, said in (("order 0", "off by"), ("order 1", "they would have been by")):
        mean = np.mean([drift[name] for drift in drifts.values()])
        assert told["drift"][name] == pytest.approx(mean)
        assert f"{said} {100 * mean:.1f} %" in line


# -------------------------------------------------------------------------------------------- sigma


def test_sigma_is_the_default_of_tasks_without_a_row(capsys, ckpt):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, "--teacache_plan")
    assert code == 0
    assert "TeaCache plan: row sigma (nobody has fitted t2v-nano), sigma, 50 steps" in said
    assert planned(said)[1].count("#") == 25


@pytest.mark.parametrize("task", ["vace-1.3B", "vace-14B", "flf2v-14B", "ti2v-5B", "a fork's"])
def test_no_row_is_borrowed(task, tmp_path):
    own = SimpleNamespace(teacache_model=None, teacache_coefficients=None)
    args = SimpleNamespace(task=task, ckpt_dir=tmp_path / "Wan2.1-14B-720P", size="832*480")
    choice = choose_row(own, args)
    assert (choice.row, choice.name, choice.insisted) == (None, "sigma", False)


def test_a_plan_of_sigma_needs_no_checkpoint(capsys, wan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--teacache_model", "sigma"]):
        code, said = attempt(capsys, *flags, "--teacache_plan")
        assert code == 0
        assert planned(said) == (0.06094, SIGMA_50)
    code, said = attempt(capsys, *ROW, "--teacache_plan")
    assert code == 2
    assert "--ckpt_dir: must be given for this plan" in said
    assert "--teacache_model sigma needs none" in said


def test_retention_steps_with_sigma_are_refused(capsys, ckpt):
    for flags in ([], ["--teacache_model", "sigma"]):
        code, said = attempt(capsys, "--ckpt_dir", ckpt, *flags, "--use_ret_steps")
        assert code == 2
        assert "--use_ret_steps: is not for row sigma (" in said


# ----------------------------------------------------------------------------- no schedule unseen


def test_t2v_14b_at_100_steps_is_refused_before_anything_is_loaded(make, fitted_for_14b):
    code, said, _ = make("--sample_steps", "100")
    (error,) = [line for line in said.splitlines() if "error" in line]
    assert code == 2
    assert "Creating WanModel" not in said
    assert re.search(
        r"row t2v-14B \(task t2v-nano\) would compute \d of 100 steps \(about \d+\.\dx\): its "
        r"increments are negative at steps 1-.* and it skips 9\d steps in a row; it was fitted at "
        "50 steps, shift 5, unipc: take --teacache_model sigma, another number of --sample_steps, "
        "--teacache_thresh 0, or insist by --teacache_model t2v-14B$",
        error,
    ), error


@pytest.mark.parametrize(
    "unusual",
    [["--sample_steps", "49"], ["--sample_shift", "8"], ["--sample_solver", "dpm++"]],
    ids=["steps", "shift", "solver"],
)
def test_any_other_setting_than_a_rows_own_is_unusual(make, fitted_for_14b, unusual):
    code, said, _ = make(*unusual)
    assert code == 2
    assert "its increments are negative at steps" in said


def test_a_rows_schedule_with_a_fault_is_refused_of_half_of_the_steps_too():
    """That half of the steps is no fault is said of sigma alone."""
    config = TeaCacheConfig(8, 0.5, "plain", [0.0, 0.0, 0.0, 1.0, 0.0])
    planned = plan(config, [0.0] * 8, [None, 0.6, 0.6, 0.6, -0.1, 0.6, 0.6, 0.6])
    assert planned.marks() == "####.###"
    args = SimpleNamespace(sample_steps=8, sample_shift=5.0, sample_solver="unipc")
    own = SimpleNamespace(teacache_thresh=None, teacache_speedup=None)
    choice = Choice(ROWS["t2v-1.3B"], "t2v-1.3B", "task t2v-1.3B", False)
    with pytest.raises(Refused, match="negative at steps 4; it was fitted at 50 steps"):
        check_plan(planned, own, args, choice)


def test_at_the_settings_of_its_fit_a_row_runs_as_published_with_a_warning(make, fitted_for_14b):
    code, log, report = make(*PICTURE)
    assert code == 0
    assert "row t2v-14B (task t2v-nano) would compute" in log
    config = json.loads(report.read_text())["config"]
    assert (config["thresh"], config["mode"], config["order"]) == (0.2, "plain", 0)
    assert config["coefficients"][-1] == -13.02252404


def test_a_row_that_is_insisted_on_is_only_warned_of(make):
    code, log, report = make(*PICTURE, "--teacache_model", "t2v-14B", "--sample_steps", "30")
    assert code == 0
    warning, line = (u for u in before_loading(log) if "compute" in u)
    assert "WARNING" in warning
    assert re.search(r"would compute \d+ of 30 steps.*its increments are negative", warning)
    assert "will compute" in line
    assert marks(report).count("#") < 8


def test_the_cures_cure(make, fitted_for_14b):
    for flags in (["--teacache_model", "sigma"], ["--teacache_thresh", "0"]):
        code, _, report = make(*PICTURE, "--sample_steps", "20", *flags)
        assert code == 0
        assert marks(report).count("#") >= 10


def test_a_long_run_of_skipped_steps_is_refused_too(make, fitted_for_14b, monkeypatch):
    give_row(monkeypatch, "t2v-1.3B")
    code, said, _ = make("--sample_steps", "20", "--teacache_thresh", "9")
    assert code == 2
    assert "--teacache_thresh 9: row t2v-1.3B (task t2v-nano) would compute 2 of 20 steps" in said
    assert ": it skips 18 steps in a row; it was fitted at 50 steps" in said


def test_a_threshold_with_which_sigma_skips_a_quarter_is_refused_by_default_too(make):
    code, said, _ = make("--sample_steps", "20", "--teacache_thresh", "9")
    assert code == 2
    assert "row sigma (nobody has fitted t2v-nano) would compute 5 of 20 steps" in said


def test_sigma_is_not_named_as_the_cure_of_sigma(make):
    code, said, _ = make("--sample_steps", "20", "--teacache_speedup", "4")
    assert code == 2
    assert "--teacache_speedup 4: row sigma (" in said
    assert (
        "steps in a row: take a lower one, another number of --sample_steps, --teacache_thresh 0, "
        "or insist by --teacache_model sigma"
    ) in said


@pytest.mark.parametrize("steps", [4, 10, 16])
def test_half_of_a_few_steps_by_sigma_are_run_asked_for_or_not(wan, ckpt, steps):
    """Of 10, ##....#.##: four in a row are more than a quarter, and not nearly everything."""
    jobs = []
    for flags in ([], ["--teacache_speedup", "2"]):
        own, rest = own_parser().parse_known_args(
            [*flags, "--ckpt_dir", str(ckpt), "--sample_steps", str(steps), *PROMPT]
        )
        held = Wan(wan[0], RELEASES[0])
        args = parse_and_check(held, own, rest)
        jobs.append(job_of(held, own, args, look_ahead(held, own, args)))
    assert jobs[0].planned.marks() == jobs[1].planned.marks()
    assert jobs[0].planned.marks().count("#") == steps // 2
    assert jobs[0].planned.longest_skip > steps / 4


@pytest.mark.parametrize("flags", [["--teacache_speedup", "2"], []])
def test_a_target_with_a_row_that_cannot_be_trusted_is_refused(make, fitted_for_14b, flags):
    code, said, _ = make("--sample_steps", "100", *flags)
    assert code == 2
    assert "negative at steps 1-" in said
    assert "take --teacache_model sigma" in said


@pytest.mark.parametrize(
    ("timesteps", "read"),
    [
        ((950, 900, 500, 100), [("high", 2), ("low", 2)]),
        ((950, 900), [("high", 2)]),
        ((500, 100), [("low", 2)]),  # below the boundary all are of the second
    ],
)
def test_the_distances_are_of_the_transformer_that_samples(monkeypatch, timesteps, read):
    asked = []

    def distances(folder, timesteps, mode):
        asked.append((folder.name, len(timesteps)))
        return [0.1] * (len(timesteps) - 1)

    monkeypatch.setattr(teacache_generate, "signal_distances", distances)
    config = {"boundary": 0.875, "high_noise_checkpoint": "high", "low_noise_checkpoint": "low"}
    wan = SimpleNamespace(task_config=lambda task: config, known_distances={})
    args = SimpleNamespace(task="t2v-A14B", ckpt_dir=".")
    found = teacache_generate.distances_of(wan, args, timesteps, "plain")
    assert asked == read
    assert found == [None, 0.1] * len(read)


# --------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(
    ("scale", "of_first", "until", "guided"),
    [
        (5.0, 40, 1.0, None),
        (5.0, 40, 0.6, 24),
        (5.0, 40, 0.0, 0),
        (1.0, 40, 1.0, 0),  # the unconditional output is multiplied by 0
        (1.0, 40, 0.5, 0),
        (None, 40, 1.0, None),  # off: as stock, whatever the scale
        ((3.0, 4.0), 26, 1.0, None),  # Wan2.2: of the low and of the high noise
        ((1.0, 4.0), 26, 1.0, 26),  # the second model runs unguided
        ((1.0, 4.0), 26, 0.5, 20),
        ((3.0, 1.0), 26, 1.0, None),
        ((1.0, 1.0), 26, 1.0, 0),
        ((1.0, 4.0), 40, 1.0, None),  # the model of high noise runs alone
        ((1.0, 4.0), 0, 1.0, 0),  # or the other
    ],
)
def test_so_many_of_40_steps_are_guided(scale, of_first, until, guided):
    assert count_guided_steps(scale, 40, of_first, until) == guided


# ------------------------------------------------------------------------------- target speed-up


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        (["--teacache_speedup", "1"], 100),
        (["--teacache_speedup", "1.5"], 68),  # 34 of 50 steps: 33 1/3 are asked for
        (["--teacache_speedup", "2.0"], 50),
        (["--teacache_speedup", "3"], 34),
        (["--teacache_speedup", "2.5", "--teacache_guide_until", "0.6"], 40),
        (["--teacache_speedup", "2.0", "--teacache_guide_until", "0.6"], 50),
    ],
)
def test_a_target_counts_passes_and_is_met_by_sigma(capsys, ckpt, tmp_path, flags, passes):
    file = tmp_path / "plan.json"
    run = ["--ckpt_dir", ckpt, *flags, "--teacache_plan", "--teacache_report", file]
    assert attempt(capsys, *run)[0] == 0
    told = json.loads(file.read_text())
    (row,) = [row for row in told["plan"] if row["thresh"] == told["config"]["thresh"]]
    assert row["passes"] == passes
    assert row["speedup"] == pytest.approx(100 / passes)


@pytest.mark.parametrize(
    ("mode", "speedup"),
    [([], "1.5"), (["--use_ret_steps"], "2.0"), ([], "3")],
    ids=["plain 1.5", "ret 2", "plain 3"],
)
def test_a_target_is_met_by_a_polynomial_and_run(make, mode, speedup):
    code, _, report = make("--frame_num", "1", "--teacache_speedup", speedup, *mode, folder=TRAINED)
    assert code == 0
    wanted = 50 / float(speedup)
    assert wanted <= marks(report).count("#") < wanted + 2.01


def test_a_speedup_that_cannot_be_had_is_refused_with_the_nearest(capsys, ckpt):
    run = ["--ckpt_dir", TRAINED, *PROMPT, "--teacache_speedup", "12", "--use_ret_steps"]
    code, said = attempt(capsys, *run)
    assert code == 2
    (error,) = [line for line in said.splitlines() if "error" in line]
    found = re.search(
        r"--teacache_speedup 12: no threshold reaches it; the nearest is ([\d.]+), at "
        r"--teacache_thresh ([\d.]+)$",
        error,
    )
    code, said = attempt(
        capsys, "--ckpt_dir", TRAINED, "--use_ret_steps", "--teacache_plan",
        "--teacache_thresh", found[2],
    )  # fmt: skip
    assert planned(said)[1].count("#") == round(50 / float(found[1])) == 5


def test_a_target_keeps_its_promise_where_the_time_embedding_is_rounded_to_bfloat16(
    wan, monkeypatch
):
    """As FSDP holds it: at Wan's numbers of steps, 96 plans, each as many passes as promised."""
    from wan.utils.fm_solvers import get_sampling_sigmas
    from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler

    read = teacache_generate.read_tensor
    row = read_coefficients(TRAINED / "teacache.json")
    broken_middle, broken_edge, plans = [], [], 0

    class Rounded:
        def __init__(self, folder, name):
            self.tensor = read(folder, name)

        def __getitem__(self, rows):
            return self.tensor[rows].bfloat16()

    def distances(timesteps, mode, reader):
        monkeypatch.setattr(teacache_generate, "read_tensor", reader)
        return [None, *teacache_generate.signal_distances(TRAINED, timesteps, mode)]

    for steps, shift, solver, mode in itertools.product(
        (40, 50), (3.0, 5.0, 8.0), ("unipc", "dpm++"), ("plain", "retention")
    ):
        timesteps = (1000 * get_sampling_sigmas(steps, shift)).astype(int).tolist()
        if solver == "unipc":
            scheduler = FlowUniPCMultistepScheduler()
            scheduler.set_timesteps(steps, shift=shift)
            timesteps = scheduler.timesteps.tolist()
        exact, rounded = (distances(timesteps, mode, reader) for reader in (read, Rounded))
        assert exact != rounded
        config = TeaCacheConfig.from_row(row, steps, use_ret_steps=mode == "retention")
        for speedup in (1.5, 2.0, 2.5, 3.0):
            plans += 1
            found = plan_speedup(config, timesteps, exact, speedup)
            promised = found.passes
            largest = min(
                step.accumulated for step in found.decisions if step.computed and step.increment
            )
            edge = replace(config, thresh=largest)
            assert plan(edge, timesteps, exact).passes == promised
            if plan(found.config, timesteps, rounded).passes != promised:
                broken_middle.append((steps, shift, solver, mode, speedup))
            if plan(edge, timesteps, rounded).passes != promised:
                broken_edge.append((steps, shift, solver, mode, speedup))
    assert plans == 96
    assert broken_middle == []
    assert len(broken_edge) > 20  # so that the middle is not what any threshold does


# ----------------------------------------------------------------------------- own coefficients


@pytest.fixture(scope="module")
def fitted(ckpt, tmp_path_factory) -> Path:
    """A checkpoint with a teacache.json for 12 steps."""
    folder = tmp_path_factory.mktemp("fitted") / "ckpt"
    shutil.copytree(ckpt, folder)
    told = json.loads((TRAINED / "teacache.json").read_text())
    (folder / "teacache.json").write_text(json.dumps({**told, "steps": 12}))
    return folder


def test_the_checkpoints_own_coefficients_are_the_default(capsys, fitted):
    run = ["--ckpt_dir", fitted, "--sample_steps", "12", "--teacache_plan"]
    for mode in ([], ["--use_ret_steps"]):
        code, said = attempt(capsys, *run, *mode)
        assert code == 0
        name = "retention" if mode else "plain"
        assert f"TeaCache plan: row teacache.json (of ckpt), {name}, 12 steps" in said
        (thresh,) = json.loads((fitted / "teacache.json").read_text())[name]["thresholds"]
        assert planned(said)[0] == pytest.approx(thresh, rel=1e-3)


def test_a_row_asked_for_is_taken_in_place_of_them(capsys, fitted):
    for name in ("t2v-1.3B", "sigma"):
        _, said = attempt(capsys, "--ckpt_dir", fitted, "--teacache_model", name, "--teacache_plan")
        assert f"row {name} (as asked)" in said


def test_a_file_asked_for_is_taken_in_place_of_them(capsys, fitted, tmp_path):
    file = tmp_path / "mine.json"
    told = json.loads((fitted / "teacache.json").read_text())
    told["plain"]["thresholds"] = [0.01, 0.02]
    file.write_text(json.dumps(told))
    argv = ["--ckpt_dir", fitted, "--teacache_coefficients", file, "--teacache_plan"]
    code, said = attempt(capsys, *argv)
    assert code == 0
    assert planned(said)[0] == 0.02
    assert "row mine.json" in said


def test_own_coefficients_at_other_settings_than_those_of_their_fit_are_no_more_trusted(
    make, fitted, tmp_path
):
    file = tmp_path / "mine.json"
    told = json.loads((fitted / "teacache.json").read_text())
    told["plain"]["coefficients"][-1] = -1.0
    file.write_text(json.dumps(told))
    flags = ["--teacache_coefficients", file]
    code, said, _ = make("--sample_steps", "13", *flags, folder=fitted)
    assert code == 2
    assert "it was fitted at 12 steps, shift 5, unipc" in said
    code, said, _ = make(*PICTURE, "--sample_steps", "12", *flags, folder=fitted)
    assert code == 0


def test_a_row_is_read_from_json_as_it_is_there():
    row = read_coefficients(TRAINED / "teacache.json")
    told = json.loads((TRAINED / "teacache.json").read_text())
    assert (row.steps, row.shift, row.solver) == (50, 5.0, "unipc")
    for mode in ("plain", "retention"):
        assert list(getattr(row, mode).coefficients) == told[mode]["coefficients"]
        assert list(getattr(row, mode).thresholds) == told[mode]["thresholds"]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(version=2),
        lambda told: told.pop("steps"),
        lambda told: told.pop("plain"),
        lambda told: told.pop("retention"),
        lambda told: told["plain"].update(coefficients=[1.0, 2.0]),
        lambda told: told["plain"].update(coefficients=[float("nan")] * 5),
        lambda told: told["plain"].update(coefficients="12345"),
        lambda told: told["retention"].update(thresholds=[-1.0]),
        lambda told: told["retention"].update(thresholds=[float("inf")]),
        lambda told: told["plain"].update(thresholds=[]),
        lambda told: told["plain"].update(thresholds=0.1),
        lambda told: told.update(plain=None),
        lambda told: told.update(steps="12"),
        lambda told: told.update(shift=None),
        lambda told: told.update(solver=3),
    ],
)
def test_damaged_coefficients_are_refused(capsys, fitted, tmp_path, change):
    told = json.loads((fitted / "teacache.json").read_text())
    change(told)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(told))
    argv = ["--ckpt_dir", fitted, "--teacache_coefficients", file, "--teacache_plan"]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert f"--teacache_coefficients {file}: cannot be used" in said
    assert "--teacache_model sigma" in said


# ------------------------------------------------------------------------------------ bad input


def without_time_embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if not k.startswith("time_embedding")}
    save_file(kept, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_time_embedding, "its time embedding cannot be read"),
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
    ("flags", "expected"),
    [
        (["--teacache_coefficients", "/none.json"], "--teacache_coefficients /none.json: cannot"),
        (["--teacache_speedup", "0.5"], "--teacache_speedup: 0.5 must be 1 or more"),
        (["--teacache_speedup", "nan"], "--teacache_speedup: nan must be 1 or more"),
        (["--teacache_speedup", "fast"], "--teacache_speedup: fast must be 1 or more"),
        (["--teacache_guide_until", "1.1"], "--teacache_guide_until: 1.1 must be from 0 to 1"),
        (["--teacache_guide_until", "-0.1"], "--teacache_guide_until: -0.1 must be from 0 to 1"),
        (["--teacache_order", "2"], "--teacache_order: invalid choice: 2"),
        (
            ["--teacache_speedup", "2", "--teacache_thresh", "0.1"],
            "--teacache_thresh: not allowed with argument --teacache_speedup",
        ),
        (
            ["--teacache_model", "sigma", "--teacache_coefficients", "x"],
            "--teacache_coefficients: not allowed with argument --teacache_model",
        ),
        (["--teacache_calibrate"], "--teacache_calibrate"),  # it is gone
    ],
)
def test_bad_flags_are_refused_in_one_line_with_status_2(capsys, ckpt, flags, expected):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT, *flags)
    lines = [line for line in said.splitlines() if "error" in line]
    assert code == 2
    assert len(lines) == 1
    assert expected in lines[0]


def test_published_rows_are_the_choices_and_sigma_comes_first(capsys):
    _, said = attempt(capsys, "--help")
    assert "{sigma,t2v-1.3B,t2v-14B,i2v-14B-480P,i2v-14B-720P}" in said
    assert set(ROWS) == {"t2v-1.3B", "t2v-14B", "i2v-14B-480P", "i2v-14B-720P"}
