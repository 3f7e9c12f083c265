"""The policy on written-out numbers: no model, no tensors."""

import json
import math
from pathlib import Path

import pytest

import teacache_generate
from teacache_generate import (
    PLAIN,
    RETENTION,
    ROWS,
    SIGMA,
    Schedule,
    TeaCacheConfig,
    plan,
    plan_speedup,
    ranges,
)

# The coefficients as they are published, highest power first: (plain, with retention steps).
PUBLISHED = {
    "t2v-1.3B": (
        "2.39676752e+03, -1.31110545e+03, 2.01331979e+02, -8.29855975e+00, 1.37887774e-01",
        "-5.21862437e+04, 9.23041404e+03, -5.28275948e+02, 1.36987616e+01, -4.99875664e-02",
    ),
    "t2v-14B": (
        "-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404",
        "-3.03318725e+05, 4.90537029e+04, -2.65530556e+03, 5.87365115e+01, -3.15583525e-01",
    ),
    "i2v-14B-480P": (
        "-3.02331670e+02, 2.23948934e+02, -5.25463970e+01, 5.87348440e+00, -2.01973289e-01",
        "2.57151496e+05, -3.54229917e+04, 1.40286849e+03, -1.35890334e+01, 1.32517977e-01",
    ),
    "i2v-14B-720P": (
        "-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683",
        "8.10705460e+03, 2.13393892e+03, -3.72934672e+02, 1.66203073e+01, -4.17769401e-02",
    ),
}
THRESHOLDS = {  # as published; the last is the default
    "t2v-1.3B": ((0.05, 0.07, 0.08), (0.05, 0.1)),
    "t2v-14B": ((0.14, 0.15, 0.2), (0.1, 0.2)),
    "i2v-14B-480P": ((0.13, 0.19, 0.26), (0.2, 0.3)),
    "i2v-14B-720P": ((0.18, 0.2, 0.3), (0.2, 0.3)),
}
LINE = [0.0, 0.0, 0.0, 1.0, 0.0]  # the increment is the distance


def decisions(distances, steps=None, mode=PLAIN, **settings) -> list[bool]:
    """The decisions for a first step and one more for every distance."""
    thresh = settings.pop("thresh")
    config = TeaCacheConfig(steps or len(distances) + 1, thresh, mode, LINE, **settings)
    schedule = Schedule(config)
    return [schedule.decide(0.0, d) for d in (None, *distances)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_coefficients_and_thresholds_are_the_published_ones(row, use_ret_steps):
    made = ROWS[row].retention if use_ret_steps else ROWS[row].plain
    assert made.coefficients == tuple(map(float, PUBLISHED[row][use_ret_steps].split(",")))
    assert made.thresholds == THRESHOLDS[row][use_ret_steps]
    config = TeaCacheConfig.from_row(ROWS[row], 50, use_ret_steps=use_ret_steps)
    assert (config.thresh, config.coefficients) == (made.thresholds[-1], made.coefficients)
    assert config.mode == (RETENTION if use_ret_steps else PLAIN)


def test_rows_were_fitted_at_the_defaults_of_generate_py():
    fitted = {name: (row.steps, row.shift, row.solver) for name, row in ROWS.items()}
    assert fitted == {
        "t2v-1.3B": (50, 5.0, "unipc"),
        "t2v-14B": (50, 5.0, "unipc"),
        "i2v-14B-480P": (40, 3.0, "unipc"),
        "i2v-14B-720P": (40, 5.0, "unipc"),
    }


def test_a_step_is_computed_when_the_accumulated_distance_reaches_the_threshold():
    # 0.25, 0.5 reaches; 0.25, 0.5 reaches; then the last step
    assert decisions([0.25] * 5, thresh=0.5) == [True, False, True, False, True, True]


def test_plain_mode_always_computes_the_first_and_the_last_step():
    assert decisions([0.0] * 9, thresh=1.0) == [True] + [False] * 8 + [True]


def test_retention_mode_always_computes_the_first_five_steps_and_not_the_last():
    assert decisions([0.0] * 9, thresh=1.0, mode=RETENTION) == [True] * 5 + [False] * 5


def test_nothing_is_accumulated_on_an_always_computed_step():
    # 0.9 comes before the fifth step each time; what counts begins after it
    got = decisions([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5], thresh=1.0, mode=RETENTION)
    assert got == [True] * 5 + [False, True, False]


def test_a_negative_increment_lowers_what_is_accumulated_and_is_reported():
    schedule = Schedule(TeaCacheConfig(6, 0.5, PLAIN, LINE))
    got = [schedule.decide(0.0, d) for d in (None, 0.25, -0.25, 0.25, 0.25, 0.25)]
    assert got == [True, False, False, False, True, True]
    assert [step.accumulated for step in schedule.steps] == [0.0, 0.25, 0.0, 0.25, 0.5, 0.0]
    assert schedule.negative == [2]
    assert schedule.faults()[0] == "its increments are negative at steps 2"
    assert schedule.computed == [0, 4, 5]


def test_the_polynomial_takes_its_highest_power_first():
    schedule = Schedule(TeaCacheConfig(3, 100.0, PLAIN, [1.0, 2.0, 3.0, 4.0, 5.0]))
    schedule.decide(1000.0, None)
    schedule.decide(990.0, 2.0)
    assert schedule.steps[1].increment == 1 * 16 + 2 * 8 + 3 * 4 + 4 * 2 + 5
    assert schedule.steps[1].timestep == 990.0


def test_threshold_zero_computes_every_step_even_where_increments_are_negative():
    assert decisions([-1.0] * 7, thresh=0.0) == [True] * 8
    assert decisions([-1.0] * 7, thresh=0.0, mode=RETENTION) == [True] * 8


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_the_step(odd):
    assert decisions([odd, 0.0, 0.0], thresh=0.5) == [True, True, False, True]


@pytest.mark.parametrize("mode", [PLAIN, RETENTION, SIGMA])
def test_one_step_is_computed(mode):
    assert decisions([], thresh=9.0, mode=mode) == [True]


def test_the_first_step_of_a_second_model_is_computed():
    assert decisions([0.0] * 7, thresh=1.0, switch=3) == [True] + [False] * 2 + [True] + [
        False
    ] * 3 + [True]


def planned(thresh, distances=(0.25,) * 5, **settings):
    config = TeaCacheConfig(len(distances) + 1, thresh, PLAIN, LINE, **settings)
    return plan(config, range(len(distances) + 1), [None, *distances])


def test_a_plan_is_the_same_decisions_at_once():
    config = TeaCacheConfig(6, 0.5, PLAIN, LINE)
    schedule = plan(config, [6, 5, 4, 3, 2, 1], [None, *[0.25] * 5])
    assert schedule.marks() == "#.#.##"
    assert schedule.longest_skip == 1
    assert [step.timestep for step in schedule.steps] == [6, 5, 4, 3, 2, 1]
    assert schedule.summary() == "4 of 6 steps (about 1.5x)"


def test_the_longest_run_of_skipped_steps_is_counted():
    assert planned(0.5, [0.1] * 6).longest_skip == 4
    assert planned(0.5, [0.1]).longest_skip == 0


def test_passes_are_two_on_a_guided_step_and_one_after():
    assert planned(0.5).passes == 8  # steps 0 2 4 5
    assert planned(0.5, guided_steps=3).passes == 6
    assert planned(0.5, guided_steps=0).passes == 4
    assert planned(0.5, guided_steps=3).speedup == 2.0
    assert planned(0.5, guided_steps=3).summary() == "4 of 6 steps, 6 of 12 passes (about 2.0x)"


def test_more_than_a_quarter_of_the_steps_skipped_in_a_row_is_a_fault():
    assert planned(1.0, [0.25] * 15).faults() == []  # 3 of 16 in a row
    assert planned(1.25, [0.25] * 15).faults() == []  # 4
    assert planned(1.5, [0.25] * 15).faults() == ["it skips 5 steps in a row"]


def test_numbers_that_follow_each_other_are_a_range():
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3 7 9-10"
    assert ranges([]) == ""


# ----------------------------------------------------------------------------- target speed-up


@pytest.mark.parametrize(
    ("speedup", "computed", "band"),
    [
        (1.0, 10, None),  # nothing to skip: off
        (1.6, 7, None),  # 6.25 asked for, and no threshold gives 7: all but the off
        (2.0, 6, (0.125, 0.25)),  # 4 and 6 can be had
        (2.5, 4, (0.25, 0.375)),
        (3.0, 4, (0.375, 0.5)),
        (5.0, 2, None),
    ],
)
def test_a_target_speedup_computes_as_many_steps_or_the_nearest_more(speedup, computed, band):
    config = TeaCacheConfig(10, 0.0, PLAIN, LINE)
    schedule = plan_speedup(config, range(10), [None, *[0.125] * 9], speedup)
    found = len(schedule.computed)
    assert found >= 10 / speedup
    every = {len(planned(t / 1000, [0.125] * 9).computed) for t in range(2000)}
    assert found == min(n for n in every if n >= 10 / speedup)
    if speedup == 2.0:
        assert (found, schedule.config.thresh) == (6, (0.125 + 0.25) / 2)


def test_the_threshold_is_the_middle_of_those_with_its_plan():
    config = TeaCacheConfig(10, 0.0, PLAIN, LINE)
    distances = [None, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    schedule = plan_speedup(config, range(10), distances, 2.0)
    thresh = schedule.config.thresh
    same = [
        t / 10000
        for t in range(1, 20000)
        if plan(TeaCacheConfig(10, t / 10000, PLAIN, LINE), range(10), distances).marks()
        == schedule.marks()
    ]
    assert thresh == pytest.approx((same[0] + same[-1]) / 2, abs=2e-4)


def test_rounding_of_the_distances_does_not_change_a_planned_number_of_steps():
    import torch

    config, generator = TeaCacheConfig(50, 0.0, PLAIN, LINE), torch.Generator().manual_seed(0)
    for _ in range(24):
        distances = (0.05 + 0.1 * torch.rand(49, generator=generator)).tolist()
        rounded = torch.tensor(distances) * (
            1 + 0.002 * (torch.rand(49, generator=generator) - 0.5)
        )  # of a mean over thousands of channels in bfloat16
        for speedup in (1.5, 2.0, 2.5, 3.0):
            wanted = plan_speedup(config, range(50), [None, *distances], speedup)
            found = plan(wanted.config, range(50), [None, *rounded.tolist()])
            assert abs(len(found.computed) - len(wanted.computed)) <= 1


def test_an_impossible_target_at_200_steps_takes_few_plans(monkeypatch):
    plans = []
    monkeypatch.setattr(teacache_generate, "plan", lambda *args: plans.append(args) or plan(*args))
    config = TeaCacheConfig(200, 0.0, RETENTION, LINE)
    schedule = plan_speedup(config, range(200), [None, *[0.1] * 199], 1000.0)
    assert schedule.computed == [0, 1, 2, 3, 4]
    assert len(plans) <= 20
    plans.clear()
    plan_speedup(config, range(200), [None, *[0.1 + i / 1e4 for i in range(199)]], 2.0)
    assert len(plans) <= 20


def test_a_target_counts_passes():
    config = TeaCacheConfig(10, 0.0, PLAIN, LINE, guided_steps=5)
    schedule = plan_speedup(config, range(10), [None, *[0.125] * 9], 2.0)
    assert schedule.passes >= 10
    assert schedule.computed == list(range(10)) or schedule.passes < 15


def test_with_a_negative_increment_no_threshold_counts():
    config = TeaCacheConfig(10, 0.0, PLAIN, LINE)
    with pytest.raises(ValueError, match="negative at steps 3"):
        plan_speedup(config, range(10), [None, 0.1, 0.1, -0.1, *[0.1] * 6], 2.0)


# --------------------------------------------------------------------------------------- sigma

NORMS = json.loads((Path(__file__).parent / "wan_residual_norms.json").read_text())["tables"]


def timesteps(steps, shift):
    flat = [1 - i / steps for i in range(steps)]
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in flat]


def by_sigma(steps, shift, speedup):
    config = TeaCacheConfig(steps, 1.0, SIGMA)
    return plan_speedup(config, timesteps(steps, shift), [None] * steps, speedup)


def test_sigma_computes_a_step_once_the_norm_will_have_changed_by_the_threshold():
    levels = [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
    schedule = plan(TeaCacheConfig(10, 0.3, SIGMA), levels, [None] * 10)
    # g = .99 .924 .858 .792 .726 .66 .594 .528 .462 .396; the first two and the last are computed.
    # From step 1: |1 - .858/.924| = .0714, + .1429 = .2143, + .2143 = .4286 >= .3 at step 4;
    # from step 4: .0909, + .1818 = .2727, + .2727 = .5455 at step 7; from there .125 at step 8
    assert schedule.computed == [0, 1, 4, 7, 9]
    accumulated = [round(step.accumulated, 4) for step in schedule.steps]
    assert accumulated == [0, 0, 0.0714, 0.2143, 0.4286, 0.0909, 0.2727, 0.5455, 0.125, 0]


def test_sigma_always_computes_the_first_fifth_and_the_last_step():
    for steps, first in ((50, 10), (40, 8), (51, 11), (4, 1)):
        schedule = plan(TeaCacheConfig(steps, 1e9, SIGMA), timesteps(steps, 5), [None] * steps)
        assert schedule.computed == [*range(first), steps - 1]


@pytest.mark.parametrize("steps", [20, 25, 30, 40, 50, 60, 80, 100])
@pytest.mark.parametrize("shift", [3, 5, 8, 12, 16])
@pytest.mark.parametrize("rounded", [False, True], ids=["dpm++", "unipc"])
def test_sigma_halves_the_steps_at_any_number_of_them_and_any_shift(steps, shift, rounded):
    levels = timesteps(steps, shift)
    if rounded:  # unipc's are whole numbers, and begin at 999
        levels = [min(int(level), 999) for level in levels]
    schedule = plan_speedup(TeaCacheConfig(steps, 1.0, SIGMA), levels, [None] * steps, 2.0)
    assert steps / 2 <= len(schedule.computed) <= steps / 2 + 1
    assert schedule.longest_skip <= MOST_SKIPPED.get((steps, shift), 6)


MOST_SKIPPED = {}  # none


def by_table(table, thresh):
    """MagCache's rule with its published norms."""
    norms = [1.0]
    for ratio in table["ratios"]:
        norms.append(norms[-1] * ratio)
    steps, computed, error = len(norms), [], 0.0
    for step, norm in enumerate(norms):
        if step >= math.ceil(steps / 5) and step < steps - 1:
            error += abs(1 - norm / norms[computed[-1]])
            if error < thresh:
                continue
        computed.append(step)
        error = 0.0
    return computed


@pytest.mark.parametrize("share", [1 / 2, 0.42, 1 / 3])
@pytest.mark.parametrize("model", NORMS)
def test_one_line_stands_for_magcaches_tables(model, share):
    table = NORMS[model]
    steps = table["steps"]
    wanted = round(share * steps)
    by_number = {len(by_table(table, t / 2000)): by_table(table, t / 2000) for t in range(1, 2000)}
    ours = by_sigma(steps, table["shift"], steps / wanted).computed
    theirs = by_number[len(ours)]
    assert len(ours) == wanted
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= (
        3 if "vace" in model else 1
    )
