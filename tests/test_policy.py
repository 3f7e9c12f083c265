"""The policy on written-out numbers: no model, no tensors."""

import math

import numpy as np
import pytest

from teacache_generate import FITS, ROWS, Schedule, TeaCacheConfig, fit, plan, plan_speedup

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


def decisions(distances, steps=None, **settings) -> list[bool]:
    """The decisions for a first step and one more for every distance."""
    config = TeaCacheConfig(steps or len(distances) + 1, **{"coefficients": LINE, **settings})
    schedule = Schedule(config)
    return [schedule.decide(0.0, d) for d in (None, *distances)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_coefficients_and_thresholds_are_the_published_ones(row, use_ret_steps):
    made = FITS[use_ret_steps][row]
    assert made.coefficients == tuple(map(float, PUBLISHED[row][use_ret_steps].split(",")))
    assert made.thresholds == THRESHOLDS[row][use_ret_steps]
    config = TeaCacheConfig.from_fit(made, 50, use_ret_steps=use_ret_steps)
    assert config.thresh == made.thresholds[-1]


def test_a_step_is_computed_when_the_accumulated_distance_reaches_the_threshold():
    # 0.25, 0.5 reaches; 0.25, 0.5 reaches; then the last step
    assert decisions([0.25] * 5, thresh=0.5) == [True, False, True, False, True, True]


def test_plain_mode_always_computes_the_first_and_the_last_step():
    assert decisions([0.0] * 9, thresh=1.0) == [True] + [False] * 8 + [True]


def test_retention_mode_always_computes_the_first_five_steps_and_not_the_last():
    assert decisions([0.0] * 9, thresh=1.0, use_ret_steps=True) == [True] * 5 + [False] * 5


def test_nothing_is_accumulated_on_an_always_computed_step():
    # 0.9 comes before the fifth step each time; what counts begins after it
    got = decisions([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5], thresh=1.0, use_ret_steps=True)
    assert got == [True] * 5 + [False, True, False]


def test_a_negative_increment_lowers_what_is_accumulated_and_is_reported():
    config = TeaCacheConfig(6, 0.5, LINE)
    schedule = Schedule(config)
    got = [schedule.decide(0.0, d) for d in (None, 0.25, -0.25, 0.25, 0.25, 0.25)]
    assert got == [True, False, False, False, True, True]
    assert [step.accumulated for step in schedule.steps] == [0.0, 0.25, 0.0, 0.25, 0.5, 0.0]
    (warning,) = schedule.warnings()
    assert warning.startswith("negative increments at steps 2: ")
    assert schedule.computed == [0, 4, 5]


def test_the_polynomial_takes_its_highest_power_first():
    config = TeaCacheConfig(3, 100.0, [1.0, 2.0, 3.0, 4.0, 5.0])
    schedule = Schedule(config)
    schedule.decide(1000.0, None)
    schedule.decide(990.0, 2.0)
    assert schedule.steps[1].increment == 1 * 16 + 2 * 8 + 3 * 4 + 4 * 2 + 5
    assert schedule.steps[1].timestep == 990.0


def test_threshold_zero_computes_every_step_even_where_increments_are_negative():
    assert decisions([-1.0] * 7, thresh=0.0) == [True] * 8
    assert decisions([-1.0] * 7, thresh=0.0, use_ret_steps=True) == [True] * 8


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_the_step(odd):
    assert decisions([odd, 0.0, 0.0], thresh=0.5) == [True, True, False, True]
    assert isinstance(plan(TeaCacheConfig(3, 0.5, LINE), range(3), [odd, odd]).warnings(), list)


@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_one_step_is_computed(use_ret_steps):
    assert decisions([], thresh=9.0, use_ret_steps=use_ret_steps) == [True]


def test_a_distance_outside_the_fitted_range_computes_the_step():
    config = TeaCacheConfig(6, 100.0, LINE, fitted_range=(0.1, 0.2))
    schedule = plan(config, range(6), [0.1, 0.05, 0.2, 0.3, 0.15])
    assert schedule.computed == [0, 2, 4, 5]
    (warning,) = schedule.warnings()
    assert warning.startswith("steps 2 4 are computed, since")


def test_a_plan_is_the_same_decisions_at_once():
    schedule = plan(TeaCacheConfig(6, 0.5, LINE), [6, 5, 4, 3, 2, 1], [0.25] * 5)
    assert schedule.marks() == "#.#.##"
    assert schedule.longest_skip == 1
    assert [step.timestep for step in schedule.steps] == [6, 5, 4, 3, 2, 1]


def test_the_longest_run_of_skipped_steps_is_counted():
    assert plan(TeaCacheConfig(7, 0.5, LINE), range(7), [0.1] * 6).longest_skip == 4
    assert plan(TeaCacheConfig(2, 0.5, LINE), range(2), [0.1]).longest_skip == 0


@pytest.mark.parametrize(
    ("speedup", "computed", "below"),
    [
        (1.0, 10, None),  # nothing to skip: off
        (1.6, 6, 0.125),  # every second of the eight in between
        (2.0, 4, 0.25),
        (5.0, 2, 1.0),  # the first and the last step only
    ],
)
def test_a_target_speedup_takes_the_smallest_threshold_that_reaches_it(speedup, computed, below):
    config = TeaCacheConfig(10, 0.0, LINE)
    schedule = plan_speedup(config, range(10), [0.125] * 9, speedup)
    assert len(schedule.computed) == computed
    if below is not None:  # the sum of increments just under it computes more
        assert below < schedule.config.thresh < 1.001 * below
        at = plan(TeaCacheConfig(10, below, LINE), range(10), [0.125] * 9)
        assert len(at.computed) > 10 / speedup


def test_a_speedup_that_no_threshold_reaches_gives_the_nearest():
    config = TeaCacheConfig(10, 0.0, LINE, use_ret_steps=True)
    assert plan_speedup(config, range(10), [0.1] * 9, 2.5).computed == [0, 1, 2, 3, 4]


def test_a_fit_gives_the_polynomial_that_made_the_points():
    coefficients = [3.0, -2.0, 1.5, 0.5, 0.1]
    points = [
        [step, branch, x, 2 * x, np.polyval(coefficients, x)]
        for step, x in enumerate(np.linspace(0.1, 0.9, 40), 1)
        for branch in (0, 1)
    ]
    made, r_squared = fit(points, use_ret_steps=False)
    np.testing.assert_allclose(made.coefficients, coefficients, rtol=1e-6)
    assert r_squared > 0.999999
    np.testing.assert_allclose(made.fitted_range, [0.0999, 0.9009])
    config = TeaCacheConfig.from_fit(made, 41)
    halved = plan(config, range(41), np.linspace(0.1, 0.9, 40).tolist())
    assert len(halved.computed) <= 20
    assert fit(points, use_ret_steps=True)[0].fitted_range == pytest.approx([0.1998, 1.8018])


def test_a_fit_to_noise_says_so_in_its_r_squared():
    rng = np.random.default_rng(0)
    points = [[i, 0, x, x, y] for i, (x, y) in enumerate(rng.random((200, 2)), 1)]
    assert fit(points, use_ret_steps=False)[1] < 0.2
