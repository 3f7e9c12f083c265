"""Rules, schedules and plans on written-out numbers: no tensors, no models."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from teacache_generate import (
    EMBEDDING,
    NOISE_LEVEL,
    PROJECTION,
    RULES,
    Preview,
    Schedule,
    TeaCacheConfig,
    count_guided_steps,
    first_steps,
    middle_threshold,
    ranges,
    residual_norm,
    split_by_model,
)

# Published by TeaCache's authors, highest power first: plain, then with --use_ret_steps; then their
# thresholds (the last is the default), and the settings of the fit: generate.py's defaults.
PUBLISHED = {
    "t2v-1.3B": (
        "2.39676752e+03, -1.31110545e+03, 2.01331979e+02, -8.29855975e+00, 1.37887774e-01",
        "-5.21862437e+04, 9.23041404e+03, -5.28275948e+02, 1.36987616e+01, -4.99875664e-02",
        ((0.05, 0.07, 0.08), (0.05, 0.1), (50, 5, "unipc")),
    ),
    "t2v-14B": (
        "-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404",
        "-3.03318725e+05, 4.90537029e+04, -2.65530556e+03, 5.87365115e+01, -3.15583525e-01",
        ((0.14, 0.15, 0.2), (0.1, 0.2), (50, 5, "unipc")),
    ),
    "i2v-14B-480P": (
        "-3.02331670e+02, 2.23948934e+02, -5.25463970e+01, 5.87348440e+00, -2.01973289e-01",
        "2.57151496e+05, -3.54229917e+04, 1.40286849e+03, -1.35890334e+01, 1.32517977e-01",
        ((0.13, 0.19, 0.26), (0.2, 0.3), (40, 3, "unipc")),
    ),
    "i2v-14B-720P": (
        "-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683",
        "8.10705460e+03, 2.13393892e+03, -3.72934672e+02, 1.66203073e+01, -4.17769401e-02",
        ((0.18, 0.2, 0.3), (0.2, 0.3), (40, 5, "unipc")),
    ),
}
NORMS = json.loads(Path(__file__).with_name("wan_residual_norms.json").read_text())["tables"]
LINE = (1.0, 0.0)  # the increment is the distance


def config_of(steps: int, thresh: float = 0.0, signal: str = EMBEDDING, **others) -> TeaCacheConfig:
    return TeaCacheConfig(steps, thresh, LINE, signal, **others)


def planned(distances, thresh=1.0, signal=EMBEDDING, **others) -> Schedule:
    """The plan for a first step and one more per distance, all at timestep 1."""
    config = config_of(len(distances) + 1, thresh, signal, **others)
    return Preview([1.0] * config.steps, [None, *distances]).plan(config)


def noise_levels(first: float, steps: int, shift: float) -> np.ndarray:
    flat = np.linspace(first, 0.0, steps, endpoint=False)
    return shift * flat / (1 + (shift - 1) * flat)


def wan_timesteps(steps: int, shift: float) -> list[int]:
    """Those of Wan's unipc scheduler, to within one."""
    return (1000 * noise_levels(0.999, steps, shift)).astype(int).tolist()


def sigma(timesteps, thresh=None, second_model=0, speedup=2.0, **others) -> Schedule:
    """The plan of "sigma" at a threshold, or else for a speed-up."""
    steps = len(timesteps)
    config = TeaCacheConfig(steps, thresh or 0.0, signal=NOISE_LEVEL, **others)
    preview = Preview(timesteps, [None if i in (0, second_model) else 0.0 for i in range(steps)])
    return preview.plan(config) if thresh else preview.plan_speedup(config, speedup)


# Rules and settings


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ret", [False, True])
def test_rules_have_the_published_coefficients(name, ret):
    rule, values = RULES[name], tuple(map(float, PUBLISHED[name][ret].split(",")))
    thresholds = PUBLISHED[name][2][ret]
    assert (rule.steps, rule.shift, rule.solver) == PUBLISHED[name][2][2]
    assert rule.polynomial(ret).coefficients == values
    assert rule.polynomial(ret).thresholds == thresholds
    config = TeaCacheConfig.from_rule(rule, 50, ret=ret)
    assert (config.coefficients, config.thresh) == (values, thresholds[-1])
    assert config.signal == (PROJECTION if ret else EMBEDDING)
    assert set(RULES) == {*PUBLISHED, "sigma"}


def test_defaults_are_those_of_the_published_teacache():
    config = TeaCacheConfig.from_rule(RULES["t2v-1.3B"], 50)
    assert (config.order, config.guided_steps, config.max_skipped) == (0, None, 50)
    sigma = TeaCacheConfig.from_rule(RULES["sigma"], 50, 0.1)
    assert (sigma.signal, sigma.thresh, sigma.max_skipped) == (NOISE_LEVEL, 0.1, 5)


WRONG = [("steps", 0), ("guided_steps", -1), ("signal", "embeding"), ("order", 2)]
WRONG += [("thresh", value) for value in (None, -0.1, math.nan, math.inf)] + [("coefficients", ())]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_setting_is_an_error_that_names_it(name, value):
    message = f"{name} {value!r}" if value != () else f"needs {name}"
    with pytest.raises(ValueError, match=message):
        TeaCacheConfig(**{"steps": 50, "thresh": 0.1, "coefficients": LINE, name: value})


def test_a_step_is_computed_once_the_sum_reaches_the_threshold():
    plan = planned([0.25] * 5, thresh=0.5)
    assert plan.as_text() == "#.#.##"
    assert planned([-1.0] * 5, thresh=0.0).as_text() == "######"
    assert [d.accumulated for d in plan.decisions] == [0, 0.25, 0.5, 0.25, 0.5, 0]


def test_forced_steps_are_computed_and_add_nothing():
    assert planned([0.0] * 9).as_text() == "#........#"
    plan = planned([0.9, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.0], signal=PROJECTION)
    assert plan.as_text() == "#####.#.."
    assert [d.increment for d in plan.decisions] == [None] * 5 + [0.5] * 3 + [0.0]


def test_forced_steps_and_the_limit_of_skips_can_be_set():
    assert planned([0.0] * 7, forced_steps=(0, 2)).as_text() == "#.#....."
    assert planned([0.0] * 7, forced_steps=(0, 2), max_skipped=2).as_text() == "#.#..#.."
    assert planned([0.0] * 5, max_skipped=1).as_text() == "#.#.##"


def test_a_negative_increment_lowers_the_sum_and_is_counted():
    plan = planned([0.25, -0.25, 0.25, 0.25, 0.25], thresh=0.5)
    assert plan.as_text() == "#...##"
    assert plan.negative_steps == [2]


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * inf
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_distance_that_is_no_number_computes_the_step(odd):
    assert planned([odd, 0.0, 0.0], thresh=0.5).as_text() == "##.#"


@pytest.mark.parametrize(("guided", "passes"), [(None, 8), (6, 8), (4, 6), (2, 5), (0, 4)])
def test_a_step_counts_two_passes_only_while_guided(guided, passes):
    plan = planned([0.25] * 5, 0.5, guided_steps=guided)
    assert plan.computed_steps == [0, 2, 4, 5]
    assert (plan.passes, plan.speedup) == (passes, 12 / passes)
    shown = f", {passes} of 12 passes" if passes < 8 else ""
    assert plan.summary() == f"4 of 6 steps{shown} (about {12 / passes:.1f}x)"


def test_the_longest_skip_and_ranges_of_steps_are_reported():
    assert planned([0.1] * 6, 0.5).longest_skip == 4
    assert planned([0.0] * 9, signal=PROJECTION).longest_skip == 5
    assert planned([0.1], 0.5).longest_skip == 0
    assert ranges([]) == ""
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3 7 9-10"


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
    plan = sigma(tenths, 0.2)  # norms: .99 .924 .858 .792 .726 .66 .594 .528 .462 .396
    assert plan.as_text() == "##.#.#.#.#"
    sums = [0, 0, 1 / 14, 0, 1 / 12, 0, 1 / 10, 0, 1 / 8, 0]  # after one skip: forced
    assert [d.accumulated for d in plan.decisions] == pytest.approx(sums)
    wider = sigma(tenths, 0.2, max_skipped=3)
    sums = [0, 0, 1 / 14, 3 / 14, 1 / 12, 3 / 12, 0.1, 0.3, 0.125, 0]
    assert [d.accumulated for d in wider.decisions] == pytest.approx(sums)
    grows = sigma([500, 600, 400, 500, 0], 9.0, max_skipped=3)  # norms: .66 .726 .594 .66
    assert [d.increment for d in grows.decisions[1:4]] == pytest.approx([0.1, 0.1, 0.0])


@pytest.mark.parametrize(
    ("steps", "first", "limit"),
    [(1, 1, 1), (5, 1, 1), (6, 2, 1), (10, 2, 1), (11, 3, 2), (30, 6, 3), (50, 10, 5), (51, 11, 6)],
)
def test_sigma_forces_a_fifth_and_limits_skips_to_a_tenth(steps, first, limit):
    plan = sigma(wan_timesteps(steps, 5), 1e6)
    computed = {*range(first), *range(first + limit, steps, limit + 1), steps - 1}
    assert plan.computed_steps == sorted(computed)


def test_first_steps_of_each_model_are_rounded_up():
    assert first_steps((10,), (0.2,)) == (0, 1, 9)
    assert first_steps((13, 27), (1.0, 0.1)) == (*range(16), 39)
    assert first_steps((14, 26), (0.4, 0.4)) == (*range(6), *range(14, 25), 39)
    assert first_steps((0, 5), (1.0, 0.1)) == (0, 4)
    assert first_steps((5, 0), (1.0, 0.1)) == (0, 1, 2, 3, 4)


def test_sigma_for_two_models_skips_at_most_2_in_a_row():
    """t2v-A14B as MagCache runs it: 15 steps of one model, 25 of the other."""
    forced = first_steps((15, 25), (0.4, 0.4))
    plan = sigma(wan_timesteps(40, 12), 1e6, second_model=15, forced_steps=forced, max_skipped=2)
    assert plan.as_text() == "######..#..#..#" + "##########..#..#..#..#..#"


def test_the_boundary_belongs_to_the_high_noise_model():
    """Wan2.2 takes the high-noise model where t >= boundary."""
    assert split_by_model([999, 876, 875, 874, 100], {"boundary": 0.875}) == (3, 2)
    assert split_by_model([999, 900, 899], {"boundary": 0.9}) == (2, 1)
    assert split_by_model([899, 500], {"boundary": 0.9}) == (0, 2)
    assert split_by_model([899, 500], {}) == (2,)


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


def test_sigma_with_less_guidance_has_39_of_100_passes():
    whole = sigma(wan_timesteps(50, 5))
    assert whole.as_text() == "##########.....#....#...#...#..#..#..#.#.#.#.#####"
    guided = sigma(wan_timesteps(50, 5), whole.config.thresh, guided_steps=30)
    assert guided.summary() == "25 of 50 steps, 39 of 100 passes (about 2.6x)"


# The threshold for a speed-up, compared with a search of all thresholds

CASES = {  # signal: forced steps, limit
    EMBEDDING: ((0, 19), 20),
    PROJECTION: (range(5), 20),
    NOISE_LEVEL: ((*range(4), 19), 2),
}


def sums_of(signal, timesteps, distances) -> dict[tuple[int, int], float]:
    """What is accumulated at each step, by (last computed step, step)."""
    norms = [0.33 + 0.66 * timestep / 1000 for timestep in timesteps]
    sums = {}
    for last in range(len(timesteps)):
        steps = range(last + 1, len(timesteps))
        changes = [abs(1 - norms[i] / norms[last]) for i in steps]
        added = changes if signal == NOISE_LEVEL else [distances[i] or 0.0 for i in steps]
        sums |= {(last, step): total for step, total in zip(steps, np.cumsum(added), strict=True)}
    return sums


def computed_by(sums, thresh, forced, limit, steps, second_model) -> list[int]:
    """The computed steps at a threshold, from the table of sums."""
    computed = [0]
    for step in range(1, steps):
        fixed = step in forced or step == second_model or step - computed[-1] > limit
        if fixed or sums[computed[-1], step] >= thresh:
            computed.append(step)
    return computed


@pytest.mark.parametrize("second_model", [0, 9])
@pytest.mark.parametrize("guided", [None, 12, 0])
@pytest.mark.parametrize("signal", CASES)
def test_a_speedup_gets_the_best_of_all_thresholds(signal, guided, second_model):
    steps, (forced, limit) = 20, CASES[signal]
    rng = np.random.default_rng(7)
    distances = [None if i in (0, second_model) else rng.uniform(0.02, 0.1) for i in range(steps)]
    timesteps = wan_timesteps(steps, 5)
    sums = sums_of(signal, timesteps, distances)
    edges = sorted({0.0, *sums.values(), 2 * max(sums.values())})
    all_plans: dict[tuple[int, ...], list[float]] = {}
    for below, above in pairwise(edges):
        found = computed_by(sums, (below + above) / 2, forced, limit, steps, second_model)
        all_plans.setdefault(tuple(found), []).extend([below, above])

    def passes(plan) -> int:
        return sum(1 + (guided is None or step < guided) for step in plan)

    for speedup in (1.0, 1.3, 1.6, 2.0, 2.7, 3.5, 40.0):
        config = config_of(steps, 0.0, signal, guided_steps=guided)
        found = Preview(timesteps, distances).plan_speedup(config, speedup)
        wanted = 2 * steps / speedup - 1e-9
        enough = [plan for plan in all_plans if passes(plan) >= wanted]
        # where guidance ends early, even all steps may have too few passes
        best = min(map(passes, enough)) if enough else passes(range(steps))
        assert found.passes == best
        same = all_plans[tuple(found.computed_steps)]
        if found.longest_skip and max(same) < edges[-1]:
            assert found.config.thresh == pytest.approx((min(same) + max(same)) / 2)


def for_speedup(distances, speedup: float, **settings) -> Schedule:
    config = TeaCacheConfig(len(distances), 0.0, **{"coefficients": LINE, **settings})
    return Preview([1.0] * len(distances), distances).plan_speedup(config, speedup)


def test_a_threshold_is_the_middle_of_those_with_its_plan():
    found = for_speedup([None, 0.3, 0.2, 0.4, 0.1, 0.5, 0.2, 0.2, 0.3, 0.4], 2.5)
    assert found.as_text() == "#...#...##"  # .3 .5 .9 1.0 computes; .5 .7 .9 1.2 computes
    assert found.config.thresh == middle_threshold(found) == pytest.approx(0.95)


def test_a_speedup_where_nothing_changes_skips_all_or_none():
    assert for_speedup([None, *[0.0] * 9], 2.0).as_text() == "##########"
    found = for_speedup([None, *[0.0] * 9], 5.0)
    assert found.as_text() == "#........#"
    assert found.config.thresh > 0


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
        for_speedup(distances, 1.5, signal=PROJECTION)
