"""The policy on written-out numbers: no model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import teacache_generate
from teacache_generate import (
    ROWS,
    Schedule,
    TeaCacheConfig,
    distinct_thresholds,
    plan,
    plan_speedup,
    ranges,
    residual_norm,
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
FITTED_AT = {  # steps, shift, solver: generate.py's defaults
    "t2v-1.3B": (50, 5, "unipc"),
    "t2v-14B": (50, 5, "unipc"),
    "i2v-14B-480P": (40, 3, "unipc"),
    "i2v-14B-720P": (40, 5, "unipc"),
}
LINE = [0.0, 0.0, 0.0, 1.0, 0.0]  # the increment is the distance
NORMS = json.loads(Path(__file__).with_name("wan_residual_norms.json").read_text())["tables"]


def made(steps, thresh, mode="plain", **others) -> TeaCacheConfig:
    return TeaCacheConfig(steps, thresh, mode, LINE, **others)


def planned(distances, thresh=1.0, mode="plain", **others) -> Schedule:
    """The plan for a first step and one more for every distance, all at timestep 0."""
    config = made(len(distances) + 1, thresh, mode, **others)
    return plan(config, [0.0] * config.steps, [None, *distances])


def wan_timesteps(steps: int, shift: float, solver: str = "unipc") -> list[int]:
    """Those of Wan2.1's schedulers, to within one."""
    levels = np.linspace(0.999 if solver == "unipc" else 1.0, 0.0, steps + 1)[:-1]
    return (1000 * shift * levels / (1 + (shift - 1) * levels)).astype(int).tolist()


def unread(steps, switch=0) -> list[float | None]:
    """Distances for the row "sigma", which needs none."""
    return [None if step in (0, switch) else math.nan for step in range(steps)]


def sigma(steps, timesteps, thresh=None, switch=0, **others) -> Schedule:
    """At a threshold; None is the default, with half of the steps."""
    config = TeaCacheConfig(steps, thresh or 0.0, "sigma", **others)
    distances = unread(steps, switch)
    if thresh is None:
        return plan_speedup(config, timesteps, distances, 2.0)
    return plan(config, timesteps, distances)


# ------------------------------------------------------------------------------------ as published


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_coefficients_and_thresholds_are_the_published_ones(name, use_ret_steps):
    row = ROWS[name]
    polynomial = row.retention if use_ret_steps else row.plain
    assert polynomial.coefficients == tuple(map(float, PUBLISHED[name][use_ret_steps].split(",")))
    assert polynomial.thresholds == THRESHOLDS[name][use_ret_steps]
    config = TeaCacheConfig.from_row(row, 50, use_ret_steps=use_ret_steps)
    assert config.coefficients == polynomial.coefficients
    assert config.thresh == THRESHOLDS[name][use_ret_steps][-1]
    assert config.mode == ("retention" if use_ret_steps else "plain")


def test_rows_are_those_of_four_models_at_the_settings_of_generate_py():
    assert {n: (row.steps, row.shift, row.solver) for n, row in ROWS.items()} == FITTED_AT


def test_what_is_not_asked_for_is_as_published():
    config = TeaCacheConfig.from_row(ROWS["t2v-1.3B"], 50)
    assert (config.order, config.guided_steps) == (0, None)
    assert TeaCacheConfig.from_row(ROWS["t2v-1.3B"], 50, 0.05, order=1).thresh == 0.05


def test_a_step_is_computed_when_the_accumulated_distance_reaches_the_threshold():
    # 0.25, 0.5 reaches; 0.25, 0.5 reaches; then the last step
    assert planned([0.25] * 5, thresh=0.5).marks() == "#.#.##"


def test_plain_mode_always_computes_the_first_and_the_last_step():
    assert planned([0.0] * 9).marks() == "#........#"


def test_retention_mode_always_computes_the_first_five_steps_and_not_the_last():
    assert planned([0.0] * 9, mode="retention").marks() == "#####....."


def test_nothing_is_accumulated_on_an_always_computed_step():
    # 0.9 comes before the fifth step each time; what counts begins after it
    got = planned([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5], mode="retention")
    assert got.marks() == "#####.#."
    assert [step.increment for step in got.decisions] == [None] * 5 + [0.5] * 3


def test_a_negative_increment_lowers_what_is_accumulated():
    got = planned([0.25, -0.25, 0.25, 0.25, 0.25], thresh=0.5)
    assert got.marks() == "#...##"
    assert [step.accumulated for step in got.decisions] == [0.0, 0.25, 0.0, 0.25, 0.5, 0.0]
    assert got.negative_steps == [2]


def test_the_polynomial_takes_its_highest_power_first():
    schedule = Schedule(TeaCacheConfig(3, 100.0, "plain", [1.0, 2.0, 3.0, 4.0, 5.0]))
    schedule.decide(1000.0, None)
    schedule.decide(990.0, 2.0)
    assert schedule.decisions[1].increment == 1 * 16 + 2 * 8 + 3 * 4 + 4 * 2 + 5
    assert schedule.decisions[1].timestep == 990.0
    assert schedule.decisions[1].distance == 2.0


@pytest.mark.parametrize("mode", ["plain", "retention", "sigma"])
def test_threshold_zero_computes_every_step_even_where_increments_are_negative(mode):
    assert planned([-1.0] * 7, 0.0, mode).marks() == "########"


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_the_step(odd):
    assert planned([odd, 0.0, 0.0], thresh=0.5).marks() == "##.#"


@pytest.mark.parametrize("mode", ["plain", "retention", "sigma"])
def test_one_step_is_computed(mode):
    assert planned([], 9.0, mode).marks() == "#"


@pytest.mark.parametrize("thresh", [-0.1, math.nan, math.inf])
def test_a_threshold_that_means_nothing_is_an_error(thresh):
    with pytest.raises(ValueError, match="must be 0"):
        made(4, thresh)


def test_wan22s_second_model_begins_with_a_computed_step():
    got = plan(made(8, 9.0), [0.0] * 8, [None, 0, 0, None, 0, 0, 0, 0])
    assert got.marks() == "#..#...#"


def test_rank_0s_decision_takes_the_place_of_an_own_one():
    schedule = Schedule(made(5, 0.5))
    schedule.decide(9.0, None)
    schedule.decide(8.0, 0.25)
    schedule.overrule(True)
    schedule.decide(7.0, 0.25)  # from the computed step on: 0.25, not 0.5
    assert schedule.marks() == "##."
    assert [step.accumulated for step in schedule.decisions] == [0.0, 0.25, 0.25]


# ------------------------------------------------------------------------------------------- sigma


TENTHS = [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]
# g is .99, .924, .858, .792, .726, .66, .594, .528, .462, .396


def test_the_norm_is_a_line_in_the_noise_level():
    assert residual_norm(1000) == pytest.approx(0.99)
    assert residual_norm(500) == pytest.approx(0.66)
    assert residual_norm(0) == pytest.approx(0.33)


def test_sigma_adds_the_change_of_the_norm_since_the_last_computed_step():
    got = sigma(10, TENTHS, 0.2)
    assert got.marks() == "##.#.#.#.#"
    assert [step.accumulated for step in got.decisions] == pytest.approx(
        # since step 1: 1/14, 3/14; since 3: 1/12, 3/12; since 5: .1, .3; since 7: .125
        [0, 0, 1 / 14, 3 / 14, 1 / 12, 3 / 12, 0.1, 0.3, 0.125, 0]
    )
    # since step 1: 1/14, 3/14, 6/14; since 4: 1/11, 3/11; since 6: 1/9, 3/9; then the last
    assert sigma(10, TENTHS, 0.22).marks() == "##..#.#.##"
    assert sigma(10, TENTHS, 1e-9).marks() == "##########"


def test_sigma_counts_a_norm_that_grows_as_one_that_falls():
    got = sigma(5, [500, 600, 400, 500, 0], 9.0)  # g is .66, .726, .594, .66
    assert [step.increment for step in got.decisions[1:4]] == pytest.approx([0.1, 0.1, 0.0])


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (50, 10)])
def test_sigma_always_computes_the_first_fifth_and_the_last_step(steps, first):
    computed = sigma(steps, wan_timesteps(steps, 5), 1e6).computed_steps
    assert computed == [*range(first), *range(max(first, steps - 1), steps)]


def test_sigma_needs_no_distances_and_has_no_default_threshold():
    config = TeaCacheConfig.from_row(None, 50)
    assert (config.mode, config.thresh, config.coefficients) == ("sigma", 0.0, ())
    assert sigma(10, TENTHS, 0.2).negative_steps == []


def table_schedule(norms: list[float], count: int) -> list[int]:
    """By MagCache's rule: the largest threshold, of many, that computes so many steps."""
    steps, first = len(norms), math.ceil(len(norms) / 5)
    for thresh in np.arange(2.0, 0.0, -0.0005):
        computed, total = list(range(first)), 0.0
        for step in range(first, steps):
            total += abs(1 - norms[step] / norms[computed[-1]])
            if total >= thresh or step == steps - 1:
                computed.append(step)
                total = 0.0
        if len(computed) >= count:
            return computed
    raise AssertionError


@pytest.mark.parametrize("share", [1 / 2, 0.42, 1 / 3])
@pytest.mark.parametrize(
    ("model", "apart"),
    [("t2v-1.3B", 1), ("t2v-14B", 1), ("i2v-14B-480P", 1), ("i2v-14B-720P", 1), ("vace-1.3B", 3)],
)
def test_one_line_stands_for_the_published_tables(model, apart, share):
    """Of real models: the same rule with each table's products of ratios in place of the line."""
    table = NORMS[model]
    steps = table["steps"]
    config = TeaCacheConfig(steps, 0.0, "sigma")
    timesteps = wan_timesteps(steps, table["shift"])
    found = plan_speedup(config, timesteps, unread(steps), 1 / share).computed_steps
    assert len(found) == math.ceil(round(share * steps, 9))
    expected = table_schedule(np.cumprod([1.0, *table["ratios"]]).tolist(), len(found))
    assert len(expected) == len(found)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= apart


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("shift", [3, 5, 8, 12, 16])
def test_by_default_sigma_computes_half_of_the_steps_and_skips_at_most_6_in_a_row(solver, shift):
    for steps in [*range(20, 100, 7), 30, 40, 50, 99, 100]:
        found = sigma(steps, wan_timesteps(steps, shift, solver))
        assert len(found.computed_steps) == (steps + 1) // 2, steps
        assert 1 <= found.longest_skip <= 6, steps


def test_sigma_computes_any_number_of_steps_that_is_asked_for():
    """100 / (50 / 29) is a little more than 58 in floating point, and not one more step."""
    timesteps, config = wan_timesteps(50, 5), TeaCacheConfig(50, 0.0, "sigma")
    for count in range(11, 51):
        found = plan_speedup(config, timesteps, unread(50), 50 / count)
        assert len(found.computed_steps) == count


# --------------------------------------------------------------------------------- what is counted


def test_a_plan_is_the_same_decisions_at_once():
    schedule = plan(made(6, 0.5), [6, 5, 4, 3, 2, 1], [None, *[0.25] * 5])
    assert schedule.marks() == "#.#.##"
    assert schedule.computed_steps == [0, 2, 4, 5]
    assert schedule.longest_skip == 1
    assert [step.timestep for step in schedule.decisions] == [6, 5, 4, 3, 2, 1]


def test_the_longest_run_of_skipped_steps_is_counted():
    assert planned([0.1] * 6, 0.5).marks() == "#....##"
    assert planned([0.1] * 6, 0.5).longest_skip == 4
    assert planned([0.0] * 9, mode="retention").longest_skip == 5  # also at the end
    assert planned([0.1], 0.5).longest_skip == 0


@pytest.mark.parametrize(
    ("guided", "passes", "summary"),
    [
        (None, 8, "4 of 6 steps (about 1.5x)"),  # computed are 0, 2, 4 and 5
        (6, 8, "4 of 6 steps (about 1.5x)"),
        (4, 6, "4 of 6 steps, 6 of 12 passes (about 2.0x)"),
        (3, 6, "4 of 6 steps, 6 of 12 passes (about 2.0x)"),
        (2, 5, "4 of 6 steps, 5 of 12 passes (about 2.4x)"),
        (0, 4, "4 of 6 steps, 4 of 12 passes (about 3.0x)"),
    ],
)
def test_a_step_is_two_passes_while_it_is_guided_and_one_after(guided, passes, summary):
    found = planned([0.25] * 5, 0.5, guided_steps=guided)
    assert found.computed_steps == [0, 2, 4, 5]
    assert found.passes == passes
    assert found.summary() == summary
    assert found.speedup == 12 / passes


def test_sigma_with_guidance_to_60_per_cent_is_39_of_100_passes():
    found = sigma(50, wan_timesteps(50, 5))
    assert found.marks() == "##########.....#....#...#...#..#..#..#.#.#.#.#####"
    guided = sigma(50, wan_timesteps(50, 5), found.config.thresh, guided_steps=30)
    assert guided.computed_steps == found.computed_steps
    assert guided.summary() == "25 of 50 steps, 39 of 100 passes (about 2.6x)"


def test_a_schedule_at_fault_says_why():
    assert planned([0.25] * 11, 0.75).faults() == []  # 2 in a row, of 12
    assert planned([0.25] * 11, 1.0).faults() == []  # 3, a quarter
    assert planned([0.25] * 11, 1.25).faults() == ["it skips 4 steps in a row"]
    negative = planned([0.25, -0.1, -0.1, 0.5, 0.5, -0.1, 0.5], 0.5)
    assert negative.faults() == [
        "its increments are negative at steps 2-3 6",
        "it skips 3 steps in a row",
    ]


def test_steps_are_told_in_ranges():
    assert ranges([]) == ""
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3 7 9-10"


# ---------------------------------------------------------------------------------- target speed-up


@pytest.mark.parametrize(
    ("speedup", "computed", "thresh"),
    [
        (1.0, 10, 0.0),  # nothing to skip: off
        (1.6, 10, 0.0),  # 7 are asked for; thresholds give 6, or all of them
        (1.66, 10, 0.0),
        (5 / 3, 6, 0.1875),  # 0 2 4 6 8 9
        (2.0, 6, 0.1875),  # 5 are asked for
        (2.5, 4, 0.4375),  # 0 4 8 9, from .375 to .5; 0 3 6 9 has as many, at lower ones
        (3.0, 4, 0.4375),
        (3.4, 3, 0.9375),  # 0 8 9
        (5.0, 2, 2.0),  # 0 9, from 1 on
        (9.0, 2, 2.0),
    ],
)
def test_a_target_computes_as_many_steps_as_asked_for_or_the_nearest_more(
    speedup, computed, thresh
):
    """The increments are .125: thresholds between two of its multiples give the same plan."""
    found = plan_speedup(made(10, 0.0), [0.0] * 10, [None, *[0.125] * 9], speedup)
    assert (len(found.computed_steps), found.config.thresh) == (computed, thresh)


def test_a_speedup_that_no_threshold_reaches_gives_the_nearest():
    config = made(10, 0.0, "retention")
    found = plan_speedup(config, [0.0] * 10, [None, *[0.1] * 9], 2.5)
    assert found.computed_steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("speedup", "marks", "thresh"), [(1.0, "####", 0.0), (4 / 3, "#.##", 1.5), (2.0, "#..#", 4.0)]
)
def test_a_target_knows_what_is_accumulated_from_the_first_step_on(speedup, marks, thresh):
    """1 and 2 from the first step, and 1 from the second: a threshold above 2 skips both."""
    found = plan_speedup(made(4, 0.0), [0.0] * 4, [None, 1.0, 1.0, 0.0], speedup)
    assert (found.marks(), found.config.thresh) == (marks, thresh)


def test_a_target_counts_passes():
    """Half of 20 passes: 5 of 10 steps, or more of them if the last ones are not guided."""
    distances = [None, *[0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18]]
    whole = plan_speedup(made(10, 0.0), [0.0] * 10, distances, 2.0)
    assert (len(whole.computed_steps), whole.passes) == (5, 10)
    guided = plan_speedup(made(10, 0.0, guided_steps=4), [0.0] * 10, distances, 2.0)
    assert 10 <= guided.passes <= 11
    assert len(guided.computed_steps) > len(whole.computed_steps)


@pytest.mark.parametrize("mode", ["plain", "retention", "sigma"])
@pytest.mark.parametrize("guided", [None, 24, 0])
def test_no_other_threshold_is_nearer_to_a_target_from_above(mode, guided):
    distances = [None, *(0.02 + 0.001 * (7 * i % 11) for i in range(39))]
    config, timesteps = made(40, 0.0, mode, guided_steps=guided), wan_timesteps(40, 5)
    every = {
        plan(made(40, thresh, mode, guided_steps=guided), timesteps, distances).passes
        for thresh in [0.0, *np.geomspace(1e-4, 3, 1500)]
    }
    for speedup in (1.3, 1.6, 2.0, 2.7, 3.5):
        found = plan_speedup(config, timesteps, distances, speedup).passes
        wanted = math.ceil(80 / speedup - 1e-9)
        assert found == min((n for n in every if n >= wanted), default=max(every))


def test_a_threshold_is_the_middle_of_those_with_its_plan():
    distances = [None, 0.3, 0.2, 0.4, 0.1, 0.5, 0.2, 0.2, 0.3, 0.4]
    found = plan_speedup(made(10, 0.0), [0.0] * 10, distances, 2.5)
    # .3, .5, .9, 1.0 computes; .5, .7, .9, 1.2 computes; then the last step
    assert found.marks() == "#...#...##"
    assert found.config.thresh == pytest.approx(0.95)


def test_a_target_with_increments_of_0_skips_and_does_not_switch_off():
    config = TeaCacheConfig(10, 0.0, "plain", (0.0,) * 5)
    found = plan_speedup(config, wan_timesteps(10, 5), [None, *[0.1] * 9], 2.0)
    assert found.config.thresh == 0.0  # two computed steps of ten are more than was asked for
    found = plan_speedup(config, wan_timesteps(10, 5), [None, *[0.1] * 9], 5.0)
    assert found.config.thresh > 0
    assert found.computed_steps == [0, 9]


@pytest.mark.parametrize("bad", [math.nan, 1e100])  # to the fourth it is infinite
def test_a_target_is_met_beside_a_distance_that_is_no_number(bad):
    """Its step is computed, and the others give the threshold."""
    config = TeaCacheConfig(10, 0.0, "plain", (1.0, 0.0, 0.0, 1.0, 0.0))
    found = plan_speedup(config, wan_timesteps(10, 5), [None, bad, *[0.1] * 8], 2.0)
    assert 0 < found.config.thresh < math.inf
    assert 1 in found.computed_steps
    assert found.passes == 10


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 5, "guided_steps": -1}])
def test_a_config_without_steps_is_an_error(settings):
    with pytest.raises(ValueError, match="too few"):
        TeaCacheConfig(thresh=0.1, mode="sigma", **settings)


def test_a_target_tries_few_thresholds_where_it_cannot_be_met(monkeypatch):
    """200 steps have 20,000 thresholds, of which all were tried once."""
    tried = []

    def counting(*args):
        tried.append(args)
        return plan(*args)

    monkeypatch.setattr(teacache_generate, "plan", counting)
    rng = np.random.default_rng(0)
    for mode, impossible in (("plain", 150.0), ("retention", 90.0), ("sigma", 9.0)):
        distances = [None, *rng.uniform(0.01, 0.1, 199).tolist()]
        found = plan_speedup(made(200, 0.0, mode), wan_timesteps(200, 5), distances, impossible)
        assert found.speedup < impossible
        plan_speedup(made(200, 0.0, mode), wan_timesteps(200, 5), distances, 3.0)
    assert len(tried) < 6 * 20


def test_a_target_is_refused_where_an_increment_is_negative():
    distances = [None, 0.1, 0.1, -0.01, 0.1, -0.01, -0.01, 0.1, 0.1, -0.3]  # the last is not asked
    with pytest.raises(ValueError, match=r"negative at steps 3 5-6$"):
        plan_speedup(made(10, 0.0), [0.0] * 10, distances, 2.0)
    with pytest.raises(ValueError, match=r"negative at steps 5-6 9$"):
        plan_speedup(made(10, 0.0, "retention"), [0.0] * 10, distances, 1.5)


def test_a_target_where_nothing_changes_computes_all_steps():
    found = plan_speedup(made(10, 0.0), [0.0] * 10, [None, *[0.0] * 9], 2.0)
    assert found.marks() == "##########"


def test_a_target_reckons_with_wan22s_second_model():
    distances = [None, *[0.1] * 14, None, *[0.1] * 24]
    found = plan_speedup(made(40, 0.0), wan_timesteps(40, 5), distances, 2.0)
    assert 15 in found.computed_steps
    assert 20 <= len(found.computed_steps) <= 21
    timesteps = wan_timesteps(40, 12)
    without, found = (sigma(40, timesteps, switch=switch).computed_steps for switch in (0, 27))
    assert 27 in found and 27 not in without
    assert len(found) == 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "plane"}, "mode 'plane' must be plain, retention or sigma"),
        ({"order": 2}, "order 2 must be 0 or 1"),
        ({"coefficients": ()}, "mode plain needs coefficients"),
    ],
)
def test_settings_that_would_skip_nearly_everything_unseen_are_errors(settings, said):
    with pytest.raises(ValueError, match=said):
        TeaCacheConfig(**{"steps": 50, "thresh": 0.1, "coefficients": LINE, **settings})


def test_a_distance_that_is_no_number_gives_no_threshold_of_that_kind():
    config, timesteps = made(5, 0.0), [1000, 800, 600, 400, 200]
    found = distinct_thresholds(config, timesteps, [None, 0.25, math.nan, 0.25, 0.25])
    assert found and all(map(math.isfinite, found))
