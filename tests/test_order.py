"""Order 1 on written-out numbers: the gains, and the published norms of the real models."""

import json
import math
from pathlib import Path

import pytest
import torch

from teacache_generate import Anchor, Residuals, along, reach, residual_norm

NORMS = json.loads((Path(__file__).parent / "wan_residual_norms.json").read_text())["tables"]


def anchor(sigma, **residuals):
    """A computed step with residuals of one token: c of the conditional branch, u of the other."""
    tensors = {"cu".index(name): torch.tensor([[value]]) for name, value in residuals.items()}
    return Anchor(sigma, tensors, dict(tensors))


def test_the_reach_is_the_way_in_noise_levels_by_the_gap_before():
    assert reach(0.25, 0.5, 1.0) == 0.5
    assert reach(0.0, 0.5, 0.75) == 2.0
    assert reach(0.3, 0.5, 0.5) == 0.0  # two steps at one level: hold


@pytest.mark.parametrize(
    ("gain", "gaps", "way"),
    [(1.0, 2.5, 2.5), (0.0, 3.0, 0.0), (0.5, 1.0, 0.5), (0.5, 2.0, 0.75), (0.5, 3.0, 0.875)],
)
def test_each_gap_of_a_line_is_the_gain_times_the_one_before(gain, gaps, way):
    assert along(torch.tensor(gain, dtype=torch.float64), gaps).item() == pytest.approx(way)


def test_at_first_the_gain_is_1_and_then_what_was_right():
    residuals = Residuals()
    for sigma, c in ((1.0, [8.0, 0.0]), (0.75, [6.0, 0.0])):
        residuals.add(anchor(sigma, c=c))
    # a quarter further down the line says 4
    assert residuals.guess(0.5, 0, order=1).flatten().tolist() == [4.0, 0.0]
    assert residuals.guess(0.5, 0, order=0).flatten().tolist() == [6.0, 0.0]
    residuals.add(anchor(0.5, c=[5.0, 7.0]))  # half as far along the line, and something beside it
    assert residuals.gains[0].item() == 0.5
    # D is [-1, 7]: half of it to go
    assert residuals.guess(0.25, 0, order=1).flatten().tolist() == [4.5, 10.5]


@pytest.mark.parametrize(("c", "gain"), [(9.0, 0.0), (6.0, 0.0), (1.0, 1.0)])
def test_the_gain_is_at_least_0_and_at_most_1(c, gain):
    residuals = Residuals()
    for sigma, value in ((1.0, 8.0), (0.75, 6.0), (0.5, c)):
        residuals.add(anchor(sigma, c=[value]))
    assert residuals.gains[0].item() == gain


def test_a_gain_is_measured_by_the_reach_that_was_taken():
    residuals = Residuals()
    for sigma, value in ((1.0, 8.0), (0.75, 6.0), (0.25, 4.0)):  # two gaps on, one step down
        residuals.add(anchor(sigma, c=[value]))
    assert residuals.gains[0].item() == 0.5


def test_residuals_that_do_not_change_are_held():
    residuals = Residuals()
    for sigma in (1.0, 0.75, 0.5):
        residuals.add(anchor(sigma, c=[8.0]))
    assert residuals.gains[0].item() == 0.0
    assert residuals.guess(0.25, 0, order=1).flatten().tolist() == [8.0]


def test_two_steps_at_one_level_leave_the_gain():
    residuals = Residuals()
    for sigma, value in ((1.0, 8.0), (0.75, 6.0), (0.5, 5.0), (0.5, 4.0)):
        residuals.add(anchor(sigma, c=[value]))
    assert residuals.gains[0].item() == 0.5


def test_the_conditional_residual_is_the_unconditional_one_and_their_difference():
    residuals = Residuals()
    for sigma, c, u in ((1.0, 9.0, 8.0), (0.75, 9.0, 6.0), (0.5, 5.0, 4.0)):
        residuals.add(anchor(sigma, c=[c], u=[u]))
    # u goes on evenly; the difference went from 1 to 3 and back to 1, so that it is held
    assert [gain.item() for gain in residuals.gains[1:]] == [1.0, 0.0]
    assert residuals.guess(0.25, 1, order=1).flatten().tolist() == [2.0]
    assert residuals.guess(0.25, 0, order=1).flatten().tolist() == [3.0]


def test_errors_are_those_of_what_would_have_been_taken():
    residuals = Residuals()
    assert residuals.add(anchor(1.0, c=[8.0, 8.0])) is None
    assert residuals.add(anchor(0.75, c=[6.0, 8.0])).tolist() == [14.0, 2.0, 2.0]
    # held 6 and 8, the line 4 and 8; true 5 and -8
    assert residuals.add(anchor(0.5, c=[5.0, -8.0])).tolist() == [13.0, 17.0, 17.0]


def sigmas(steps, shift):
    flat = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in flat]


def norms(table):
    values = [1.0]
    for ratio in table["ratios"]:
        values.append(values[-1] * ratio)
    return values


SCHEDULES = {
    "21 of 50, a fifth first": {*range(10), *range(10, 50, 4), 49},
    "14 of 50, five first": {*range(5), *range(9, 50, 5), 49},
    "17 of 50, even": {*range(0, 50, 3)},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("model", ["t2v-1.3B", "t2v-14B"])
def test_the_norm_of_the_guess_is_within_0_8_percent_on_the_real_models(model, name):
    table = NORMS[model]
    levels, true = sigmas(table["steps"], table["shift"]), norms(table)
    residuals, errors = Residuals(), []
    for step, (sigma, norm) in enumerate(zip(levels, true, strict=True)):
        if step in SCHEDULES[name]:
            residuals.add(anchor(sigma, c=[norm]))
        else:
            errors.append(abs(residuals.guess(sigma, 0, order=1).item() / norm - 1))
    assert len(SCHEDULES[name]) == int(name.split()[0])
    assert sum(errors) / len(errors) < 0.008


@pytest.mark.parametrize(("model", "off"), [("t2v-1.3B", 0.04), ("t2v-14B", 0.05)])
def test_the_published_norms_are_nearly_a_line_in_the_noise_level(model, off):
    table = NORMS[model]
    levels, true = sigmas(table["steps"], table["shift"]), norms(table)
    pairs = [(s, n) for s, n in zip(levels, true, strict=True) if 0.2 <= s <= 0.93]
    curve = [residual_norm(1000 * s) for s, _ in pairs]
    ratios = [n / c for (_, n), c in zip(pairs, curve, strict=True)]
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    assert max(abs(ratio / middle - 1) for ratio in ratios) < off
