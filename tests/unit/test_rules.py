"""Rules, schedules and plans on written-out numbers: no tensors, no models."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cases import published

from teacache_generate import (
    EMBEDDING,
    NOISE_LEVEL,
    PROJECTION,
    RULES,
    Schedule,
    TeaCacheConfig,
    count_guided_steps,
    residual_norm,
)

FITS = {  # the settings of the published fits: generate.py's defaults
    "t2v-1.3B": (50, 5, "unipc"),
    "t2v-14B": (50, 5, "unipc"),
    "i2v-14B-480P": (40, 3, "unipc"),
    "i2v-14B-720P": (40, 5, "unipc"),
}
NORMS = json.loads(Path(__file__).with_name("wan_residual_norms.json").read_text())["tables"]
LINE = (1.0, 0.0)  # the increment is the distance


def planned(distances, thresh=1.0, measure=EMBEDDING, **others) -> Schedule:
    """The plan for a first step and one more per distance, all at timestep 1."""
    config = TeaCacheConfig(len(distances) + 1, thresh, LINE, measure, **others)
    return Schedule.planned(config, [1.0] * config.steps, [None, *distances])


def noise_levels(first: float, steps: int, shift: float) -> np.ndarray:
    flat = np.linspace(first, 0.0, steps, endpoint=False)
    return shift * flat / (1 + (shift - 1) * flat)


def wan_timesteps(steps: int, shift: float) -> list[int]:
    """The timesteps of Wan's unipc scheduler, to within one."""
    return (1000 * noise_levels(0.999, steps, shift)).astype(int).tolist()


def sigma(timesteps, thresh=None, speedup=2.0, **others) -> Schedule:
    """The plan of "sigma" at a threshold, or else for a speed-up."""
    config = TeaCacheConfig(len(timesteps), thresh or 0.0, measure=NOISE_LEVEL, **others)
    plan = Schedule.planned(config, timesteps, [None, *[0.0] * (len(timesteps) - 1)])
    return plan if thresh else plan.for_speedup(speedup)


# Rules and settings


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("ret", [False, True])
def test_rules_have_the_published_coefficients(name, ret):
    rule = RULES[name]
    thresholds, values = map(tuple, published("ret" if ret else "plain", name))
    assert (rule.steps, rule.shift, rule.solver) == FITS[name]
    assert rule.polynomial(ret).coefficients == values
    assert rule.polynomial(ret).thresholds == thresholds
    config = TeaCacheConfig.from_rule(rule, 50, ret=ret)
    assert (config.coefficients, config.thresh) == (values, thresholds[-1])
    assert config.measure == (PROJECTION if ret else EMBEDDING)
    assert (config.order, config.guided_steps, config.max_skipped) == (0, None, 50)
    assert set(RULES) == {*FITS, "sigma"}


WRONG = [("steps", 0), ("guided_steps", -1), ("measure", "embeding"), ("order", 2)]
WRONG += [("thresh", value) for value in (None, -0.1, math.nan, math.inf)] + [("coefficients", ())]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_is_an_error_that_names_it(name, value):
    message = f"{name} {value!r}" if value != () else f"needs {name}"
    with pytest.raises(ValueError, match=message):
        TeaCacheConfig(**{"steps": 50, "thresh": 0.1, "coefficients": LINE, name: value})


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * inf
@pytest.mark.parametrize(
    ("distances", "settings", "schedule"),
    [
        ([0.25] * 5, {"thresh": 0.5}, "#.#.##"),  # as soon as the sum reaches it
        ([0.25, -0.25, 0.25, 0.25, 0.25], {"thresh": 0.5}, "#...##"),
        ([-1.0] * 5, {"thresh": 0.0}, "######"),
        ([math.nan, 0.0, 0.0], {}, "##.#"),
        ([math.inf, 0.0, 0.0], {}, "##.#"),
        ([0.0] * 9, {}, "#........#"),  # what each measure forces
        ([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.0], {"measure": PROJECTION}, "#####.#.."),
        ([0.0] * 7, {"forced_steps": (0, 2)}, "#.#....."),
        ([0.0] * 7, {"forced_steps": (0, 2), "max_skipped": 2}, "#.#..#.."),
        ([0.0] * 5, {"max_skipped": 1}, "#.#.##"),
    ],
)
def test_steps_are_computed_by_sum_force_and_limit(distances, settings, schedule):
    assert planned(distances, **settings).as_text() == schedule


@pytest.mark.parametrize(("guided", "passes"), [(None, 8), (6, 8), (4, 6), (2, 5), (0, 4)])
def test_a_step_counts_two_passes_only_while_guided(guided, passes):
    plan = planned([0.25] * 5, 0.5, guided_steps=guided)
    assert Schedule(plan.config).speedup == 1.0  # before its first step
    assert plan.computed_steps == [0, 2, 4, 5]
    assert (plan.passes, plan.speedup) == (passes, 12 / passes)
    shown = f", {passes} of 12 passes" if passes < 8 else ""
    assert plan.counts() == f"4 of 6 steps{shown}"


# The rule "sigma"


@pytest.mark.parametrize("model", NORMS)
def test_the_norm_is_near_the_published_ones(model):
    """After one factor a model; between the noise levels 0.2 and 0.93."""
    table = NORMS[model]
    levels = noise_levels(1.0, table["steps"], table["shift"])
    inside = (levels >= 0.2) & (levels <= 0.93)
    published = np.cumprod([1.0, *table["ratios"]])[inside]
    logs = np.log(published / [residual_norm(1000 * level) for level in levels[inside]])
    errors = np.abs(logs - logs.mean())
    mean, largest = (0.0225, 0.091) if model == "vace-1.3B" else (0.0095, 0.051)
    assert errors.mean() < mean
    assert errors.max() < largest


def test_sigma_adds_changes_since_the_last_computed_step():
    tenths = [1000 - 100 * step for step in range(10)]
    plan = sigma(tenths, 0.2, max_skipped=3)  # norms: .99 .924 .858 .792 .726 .66 .594 .528 .462
    sums = [0, 0, 1 / 14, 3 / 14, 1 / 12, 3 / 12, 0.1, 0.3, 0.125, 0]
    assert [d.accumulated for d in plan.decisions] == pytest.approx(sums)
    assert plan.as_text() == "##.#.#.#.#"
    grows = sigma([500, 600, 400, 500, 0], 9.0, max_skipped=3)  # norms: .66 .726 .594 .66
    assert [d.increment for d in grows.decisions[1:4]] == pytest.approx([0.1, 0.1, 0.0])


def test_guidance_at_scale_1_needs_no_second_branch():
    for scale, until, guided in ((5.0, 1.0, None), (5.0, 0.6, 24), (1.0, 1.0, 0)):
        assert count_guided_steps(scale, (40,), until) == guided
    for low_and_high, until, guided in (((1, 4), 1.0, 15), ((1, 4), 0.25, 10), ((3, 1), 1.0, None)):
        assert count_guided_steps(low_and_high, (15, 25), until) == guided


def test_sigma_reaches_every_count_its_limit_allows():
    timesteps, fewest = wan_timesteps(50, 5), 17
    for count in (9, 16, *range(fewest, 51)):  # 100 / (50 / 29) exceeds 58 by a rounding error
        plan = sigma(timesteps, speedup=50 / count)
        assert len(plan.computed_steps) == max(count, fewest)


# The threshold for a speed-up, compared with a search of all thresholds


def all_plans(stock: Schedule) -> dict[tuple[int, ...], list[float]]:
    """Each plan that some threshold gives, and the thresholds between which it does."""
    config, sums = stock.config, {0.0}
    timesteps, distances = zip(*((d.timestep, d.distance) for d in stock.decisions), strict=True)
    for last in range(config.steps):
        later = zip(timesteps[last + 1 :], distances[last + 1 :], strict=True)
        added = [config.increment(t, distance or 0.0, timesteps[last]) for t, distance in later]
        sums.update(np.cumsum(added).tolist())
    edges, found = [*sorted(sums), 2 * max(sums)], {}
    for below, above in pairwise(edges):
        plan = stock.again(thresh=(below + above) / 2)
        found.setdefault(tuple(plan.computed_steps), []).extend([below, above])
    return found


@pytest.mark.parametrize("second_model", [0, 9])
@pytest.mark.parametrize("guided", [None, 12, 0])
@pytest.mark.parametrize("measure", [EMBEDDING, PROJECTION, NOISE_LEVEL])
def test_a_speedup_gets_the_best_of_all_thresholds(measure, guided, second_model):
    steps, rng = 20, np.random.default_rng(7)
    distances = [None if i in (0, second_model) else rng.uniform(0.02, 0.1) for i in range(steps)]
    config = TeaCacheConfig(steps, 0.0, LINE, measure, guided_steps=guided)
    stock = Schedule.planned(config, wan_timesteps(steps, 5), distances)
    plans = all_plans(stock)
    largest = max(map(max, plans.values()))
    for speedup in (1.0, 1.3, 1.6, 2.0, 2.7, 3.5, 40.0):
        found = stock.for_speedup(speedup)
        counts = {sum(1 + config.is_guided(step) for step in plan) for plan in plans}
        enough = [count for count in counts if count >= 2 * steps / speedup - 1e-9]
        # where guidance ends early, even all steps may have too few passes
        assert found.passes == min(enough, default=stock.passes)
        same = plans[tuple(found.computed_steps)]
        if found.longest_skip and max(same) < largest:
            middle = (min(same) + max(same)) / 2
            assert found.config.thresh == float(f"{middle:.4g}")  # the same on every machine


def for_speedup(distances, speedup: float, **settings) -> Schedule:
    config = TeaCacheConfig(len(distances), 0.0, **{"coefficients": LINE, **settings})
    return Schedule.planned(config, [1.0] * len(distances), distances).for_speedup(speedup)


def test_a_speedup_where_nothing_changes_skips_all_or_none():
    assert for_speedup([None, *[0.0] * 9], 2.0).as_text() == "##########"
    found = for_speedup([None, *[0.0] * 9], 5.0)
    assert found.as_text() == "#........#"
    assert found.config.thresh > 0


def test_a_threshold_of_4_digits_keeps_its_plan_or_has_more():
    found = for_speedup([None, 0.40001, 0.40002, 0.4, 0.0], 1.25)
    assert (found.as_text(), found.config.thresh) == ("###.#", pytest.approx(0.400005))


@pytest.mark.filterwarnings("ignore:overflow")  # of 1e200 ** 4
@pytest.mark.parametrize("bad", [math.nan, 1e200])
def test_a_speedup_is_met_beside_a_distance_that_is_no_number(bad):
    found = for_speedup([None, bad, *[0.1] * 8], 2.0, coefficients=(1.0, 0.0, 0.0, 1.0, 0.0))
    assert 0 < found.config.thresh < 1
    assert (1 in found.computed_steps, found.passes) == (True, 10)


def test_a_speedup_is_refused_where_an_increment_is_negative():
    distances = [None, 0.1, 0.1, -0.01, 0.1, -0.01, -0.01, 0.1, 0.1, -0.3]
    with pytest.raises(ValueError, match=r"negative at steps 3 5-6$"):  # the last one is forced
        for_speedup(distances, 2.0)
    with pytest.raises(ValueError, match=r"negative at steps 5-6 9$"):
        for_speedup(distances, 1.5, measure=PROJECTION)
