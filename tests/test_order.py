"""Order 1 on written-out numbers: how far it goes, and the published norms of the real models."""

import json
import math
from pathlib import Path

import pytest
import torch

from teacache_generate import Anchor, Residuals, damped, reach, residual_norm

NORMS = json.loads((Path(__file__).parent / "wan_residual_norms.json").read_text())["tables"]


def anchor(sigma, **residuals):
    """A computed step with residuals of one token: c of the conditional branch, u of the other."""
    tensors = {"cu".index(name): torch.tensor([[value]]) for name, value in residuals.items()}
    return Anchor(sigma, tensors, dict(tensors))


def test_the_reach_is_the_way_in_noise_levels_by_the_gap_before():
    assert reach(0.25, 0.5, 1.0) == 0.5
    assert reach(0.0, 0.5, 0.75) == 2.0
    for level in (0.0, 0.5, 1.0):  # two steps at one level: hold
        assert reach(0.3, level, level) == 0.0
        assert reach(level, level, level) == 0.0


@pytest.mark.parametrize(
    ("slowing", "gaps", "way"),
    [(0.0, 2.5, 2.5), (1.0, 1.0, 0.5), (1.0, 3.0, 0.75), (0.5, 2.0, 1.0), (math.inf, 3.0, 0.0)],
)
def test_the_way_along_a_line_is_the_shorter_the_more_it_slows(slowing, gaps, way):
    assert damped(torch.tensor(slowing, dtype=torch.float64), gaps).item() == pytest.approx(way)


def line(*points):
    """Residuals after computed steps of one token: (noise level, conditional values)."""
    residuals = Residuals()
    for sigma, *values in points:
        residuals.add(anchor(sigma, c=values))
    return residuals


def test_at_first_half_of_the_line_is_gone_and_then_what_was_right():
    residuals = line((1.0, 8.0, 0.0), (0.75, 4.0, 0.0))
    # a quarter further down the line says 0
    assert residuals.guess(0.5, 0, order=1).flatten().tolist() == [2.0, 0.0]
    assert residuals.guess(0.5, 0, order=0).flatten().tolist() == [4.0, 0.0]
    residuals.add(anchor(0.5, c=[3.0, 7.0]))  # a quarter of the line, and something beside it
    assert residuals.slowing[0].item() == 3.0
    # D is [-1, 7]: a quarter of it to go
    assert residuals.guess(0.25, 0, order=1).flatten().tolist() == [2.75, 8.75]


@pytest.mark.parametrize(("c", "way"), [(9.0, 0.0), (6.0, 0.0), (1.0, 1.0)])
def test_the_gain_is_at_least_0_and_at_most_1(c, way):
    residuals = line((1.0, 8.0), (0.75, 6.0), (0.5, c))
    assert residuals.guess(0.25, 0, order=1).item() == pytest.approx(c + way * (c - 6.0))


def test_at_the_reach_of_the_measurement_the_way_is_gain_times_reach_and_beyond_it_less():
    residuals = line((1.0, 8.0), (0.75, 6.0), (0.25, 4.0))  # two gaps on, one step down
    assert residuals.slowing[0].item() == 0.5  # a gain of 1/2 at a reach of 2
    assert residuals.guess(-0.75, 0, order=1).item() == 2.0  # two gaps on again
    assert residuals.guess(-1.75, 0, order=1).item() == pytest.approx(4 - 2 * 4 / 3)


def test_residuals_that_do_not_change_are_held():
    residuals = line((1.0, 8.0), (0.75, 8.0), (0.5, 8.0))
    assert residuals.guess(0.25, 0, order=1).item() == 8.0


def test_two_steps_at_one_level_leave_the_slowing():
    residuals = line((1.0, 8.0), (0.75, 6.0), (0.5, 5.0), (0.5, 4.0))
    assert residuals.slowing[0].item() == 1.0
    assert residuals.guess(0.25, 0, order=1).item() == 4.0


def test_the_conditional_residual_is_the_unconditional_one_and_their_difference():
    residuals = Residuals()
    for sigma, c, u in ((1.0, 9.0, 8.0), (0.75, 9.0, 6.0), (0.5, 5.0, 4.0)):
        residuals.add(anchor(sigma, c=[c], u=[u]))
    # u goes on evenly; the difference went from 1 to 3 and back to 1, so that it is held
    assert residuals.slowing[1].item() == 0.0
    assert residuals.guess(0.25, 1, order=1).item() == pytest.approx(2.0)
    assert residuals.guess(0.25, 0, order=1).item() == pytest.approx(3.0)


def test_errors_are_those_of_what_would_have_been_taken():
    residuals = line((1.0, 8.0, 8.0))
    second = anchor(0.75, c=[6.0, 8.0])
    assert residuals.errors(second).tolist() == [14.0, 2.0, 2.0]
    residuals.add(second)
    # held 6 and 8, the line, half way at first, 5 and 8; true 5 and -8
    assert residuals.errors(anchor(0.5, c=[5.0, -8.0])).tolist() == [13.0, 17.0, 16.0]


def sigmas(steps, shift):
    flat = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in flat]


def norms(table):
    values = [1.0]
    for ratio in table["ratios"]:
        values.append(values[-1] * ratio)
    return values


SCHEDULES = {  # the three kinds of the published comparison: of 50 steps, and of 40
    "a fifth first": {
        50: [*range(10), 14, 18, 22, 26, 30, 34, 38, 42, 46, 48, 49],
        40: [*range(8), 11, 14, 17, 20, 23, 26, 29, 32, 35, 37, 39],
    },
    "five first": {
        50: [*range(5), 9, 14, 19, 24, 29, 34, 39, 44, 49],
        40: [*range(5), 8, 12, 16, 20, 24, 28, 32, 36, 39],
    },
    "even": {
        50: [0, 3, 6, 9, 12, 15, 18, 21, 24, 28, 31, 34, 37, 40, 43, 46, 49],
        40: [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 24, 27, 29, 32, 34, 37, 39],
    },
}


def norm_errors(model: str, computed: list[int]) -> tuple[float, float]:
    """Mean error in per cent of held and of extrapolated norms, on the skipped steps."""
    table = NORMS[model]
    levels, true = sigmas(table["steps"], table["shift"]), norms(table)
    residuals, errors = Residuals(), []
    for step, (sigma, norm) in enumerate(zip(levels, true, strict=True)):
        if step in computed:
            residuals.add(anchor(sigma, c=[norm]))
        else:
            guesses = [residuals.guess(sigma, 0, order).item() for order in (0, 1)]
            errors.append([100 * abs(guess / norm - 1) for guess in guesses])
    held, line = torch.tensor(errors).mean(0).tolist()
    return held, line


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("model", NORMS)
def test_order_1_extrapolates_the_published_norms_of_real_models(model, kind):
    held, line = norm_errors(model, SCHEDULES[kind][NORMS[model]["steps"]])
    assert line < 0.8  # per cent
    assert held > 2.0


@pytest.mark.parametrize(
    ("computed", "count"),
    [
        ([*range(10), *range(10, 49, 4), 49], 21),
        ([*range(5), *range(9, 49, 5), 49], 14),
        ([*range(0, 50, 3)], 17),  # so that the last step is beyond all that are computed
    ],
    ids=["every fourth from 10", "every fifth from 9", "every third"],
)
def test_order_1_extrapolates_the_norms_on_schedules_of_equal_gaps(computed, count):
    held, line = norm_errors("t2v-1.3B", computed)
    assert len(computed) == count
    assert line < 0.8  # per cent
    assert held > 3.0


@pytest.mark.parametrize(("model", "off"), [("t2v-1.3B", 0.04), ("t2v-14B", 0.05)])
def test_the_published_norms_are_nearly_a_line_in_the_noise_level(model, off):
    table = NORMS[model]
    levels, true = sigmas(table["steps"], table["shift"]), norms(table)
    pairs = [(s, n) for s, n in zip(levels, true, strict=True) if 0.2 <= s <= 0.93]
    curve = [residual_norm(1000 * s) for s, _ in pairs]
    ratios = [n / c for (_, n), c in zip(pairs, curve, strict=True)]
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert max(abs(ratio / middle - 1) for ratio in ratios) < off
