"""Order 1 on written-out numbers: how far it goes, and the published norms of the real models."""

import json
import math
from pathlib import Path

import pytest
import torch

from teacache_generate import (
    ComputedStep,
    Decision,
    Reach,
    Residuals,
    Schedule,
    TeaCacheConfig,
    residual_norm,
)

NORMS = json.loads((Path(__file__).parent / "wan_residual_norms.json").read_text())["tables"]


def computed_step(step=0, **residuals):
    """A computed step with residuals of one token: c of the conditional branch, u of the other."""
    tensors = {"cu".index(name): torch.tensor([[value]]) for name, value in residuals.items()}
    return ComputedStep(step, tensors, dict(tensors))


def schedule(marks, noise):
    """As it stands after these steps (# computed, . skipped) at these noise levels."""
    found = Schedule(TeaCacheConfig(50, 1.0, "sigma"))
    for mark, level in zip(marks, noise, strict=True):
        found.decisions.append(Decision(1000 * level, 0.1, 0.1, 0.1, computed=mark == "#"))
    return found


@pytest.mark.parametrize(
    ("marks", "noise", "bounded", "reach"),
    [
        ("##.", (1.0, 0.75, 0.625), (0.5, 1), (0.5, 1)),
        ("##.", (1.0, 0.875, 0.625), (2.0, 1), (2.0, 1)),
        ("##..", (1.0, 0.75, 0.625, 0.25), (0.5, 1), (2.0, 2)),  # no farther than the third
        ("#.#....", (1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0), (1.0, 2), (3.0, 4)),
        ("##.#", (1.0, 0.75, 0.625, 0.25), (0.5, 1), (2.0, 2)),  # computed: not an end of its line
        ("##", (1.0, 0.75), (0.0, 0), (0.0, 0)),  # no line
        ("#.", (1.0, 0.75), (0.0, 0), (0.0, 0)),
        ("##.", (0.5, 0.5, 0.25), (0.0, 0), (0.0, 0)),  # its ends at one level: to hold
        ("##.", (1.0, 0.5, 0.5), (0.0, 1), (0.0, 1)),
    ],
)
def test_the_reach_is_the_way_beyond_the_last_two_computed_steps(marks, noise, bounded, reach):
    found = schedule(marks, noise)
    assert found.reach(bounded=True) == Reach(*bounded)
    assert found.reach(bounded=False) == Reach(*reach)


@pytest.mark.parametrize(
    ("bend", "reach", "gone"),
    [(0.0, (2.5, 2), 2.5), (1.0, (1.0, 1), 0.5), (1.0, (1.5, 2), 0.5), (0.5, (2.0, 2), 1.0)],
)
def test_of_a_line_that_bends_less_is_gone_the_farther(bend, reach, gone):
    residuals = Residuals()
    residuals.bends = {0: torch.tensor(bend)}
    assert residuals.way(0, Reach(*reach)).item() == pytest.approx(gone)


NEXT = Reach(1.0, 1)


def line(*values):
    """Residuals after computed steps of one token, each a step and a gap after the one before."""
    residuals = Residuals()
    for step, value in enumerate(values):
        residuals.add(computed_step(step, c=value), NEXT)
    return residuals


def test_at_first_half_of_the_line_is_gone_and_then_it_nears_what_was_right():
    residuals = line([8.0, 0.0], [4.0, 0.0])
    # the line says 0 at the next gap
    assert residuals.guess(0, 1, NEXT).flatten().tolist() == [2.0, 0.0]
    assert residuals.guess(0, 0, NEXT).flatten().tolist() == [4.0, 0.0]
    # a quarter of the line, and something beside it
    residuals.add(computed_step(2, c=[3.0, 7.0]), NEXT)
    # D is [-1, 7]: (1/2 + 1/4) / 2 of it to go
    assert residuals.guess(0, 1, NEXT).flatten().tolist() == pytest.approx([2.625, 9.625])


def test_the_first_line_is_half_gone_after_as_many_steps_as_it_has():
    residuals = line([8.0])
    residuals.add(computed_step(4, c=[4.0]), Reach(0.0, 0))
    assert residuals.guess(0, 1, Reach(1.0, 4)).item() == 4 - 4 / 2
    assert residuals.guess(0, 1, Reach(0.25, 1)).item() == pytest.approx(4 - 4 * 0.25 / 1.25)


@pytest.mark.parametrize(("c", "gain"), [(9.0, 0.0), (6.0, 0.0), (1.0, 1.0)])
def test_a_gain_is_at_least_0_and_at_most_1(c, gain):
    assert line([8.0], [6.0], [c]).way(0, NEXT) == pytest.approx((1 / 2 + gain) / 2)


def test_a_line_that_is_of_no_use_is_left_by_halves():
    assert line([8.0], [6.0], [6.0], [8.0], [7.0]).way(0, NEXT) == pytest.approx(1 / 2 / 8)


def test_a_gain_after_several_steps_says_how_the_line_bends():
    residuals = line([8.0], [6.0])
    residuals.add(computed_step(4, c=[2.0]), Reach(4.0, 3))  # four gaps on, two down: a gain of 1/2
    mean = (1 / 2 + 1 / 4) / 2  # of that and of what was expected after three steps
    assert residuals.bends[0].item() == pytest.approx((1 / mean - 1) / 3)
    assert residuals.way(0, Reach(4.0, 3)).item() == pytest.approx(4 * mean)


def test_residuals_that_do_not_change_are_held():
    assert line([8.0], [8.0], [8.0]).guess(0, 1, NEXT).item() == 8.0


def test_without_a_reach_nothing_is_measured():
    residuals = line([8.0], [6.0])
    residuals.add(computed_step(2, c=[5.0]), Reach(0.0, 1))
    assert residuals.bends[0].item() == 1.0
    assert residuals.guess(0, 1, Reach(0.0, 1)).item() == 5.0


def test_the_conditional_residual_is_the_unconditional_one_and_their_difference():
    residuals = Residuals()
    for step, (c, u) in enumerate(((9.0, 8.0), (9.0, 6.0), (5.0, 4.0))):
        residuals.add(computed_step(step, c=[c], u=[u]), NEXT)
    # u goes on evenly; the difference went from 1 to 3 and back to 1
    assert [residuals.way(name, NEXT).item() for name in (1, 2)] == pytest.approx([0.75, 0.25])
    assert residuals.guess(1, 1, NEXT).item() == pytest.approx(4 - 0.75 * 2)
    assert residuals.guess(0, 1, NEXT).item() == pytest.approx(5 - 0.75 * 2 - 0.25 * 2)


def test_errors_are_those_of_what_would_have_been_taken():
    residuals = line([8.0, 8.0])
    second = computed_step(1, c=[6.0, 8.0])
    assert residuals.errors(second, NEXT).tolist() == [14.0, 2.0, 2.0]
    residuals.add(second, NEXT)
    # held 6 and 8, the line, half way at first, 5 and 8; true 5 and -8
    assert residuals.errors(computed_step(2, c=[5.0, -8.0]), NEXT).tolist() == [13.0, 17.0, 16.0]


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
    residuals, errors, marks = Residuals(), [], ""
    for step, norm in enumerate(true):
        marks += "#" if step in computed else "."
        now = schedule(marks, levels[: step + 1])
        if step in computed:
            residuals.add(computed_step(step, c=[norm]), now.reach(bounded=False))
        else:
            reach = now.reach(bounded=True)
            guesses = [residuals.guess(0, order, reach).item() for order in (0, 1)]
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
