"""bench_order.py: D2Cache's payload on written-out numbers, and the eight schedules."""

import pytest
import torch
from bench_order import D2Cache, accumulate, cases, every
from sampling import Sampling

from teacache_generate import ComputedStep, Schedule, TeaCacheConfig


def residuals(accumulated: list[float]) -> D2Cache:
    """Computed on steps 2 and 5, with residuals 1 and 3."""
    cache = D2Cache([900.0] * 9, accumulated)
    for step, value in ((2, 1.0), (5, 3.0)):
        cache.history.append(ComputedStep(step, {0: torch.tensor([value])}, {}))
    return cache


@pytest.mark.parametrize(
    ("at_trigger", "now", "expected"),
    [(0.4, 0.1, 3.5), (0.4, 0.4, 5.0), (0.4, 0.9, 5.0), (0.0, 0.1, 3.0)],
)
def test_d2cache_predicts_what_its_formula_says(at_trigger, now, expected):
    cache = residuals([0.0, 0.0, 0.0, 0.1, 0.2, at_trigger, now])
    assert cache.predict(1, 0, 6).tolist() == pytest.approx([expected])


def test_increments_accumulate_since_the_last_computed_step():
    config = TeaCacheConfig(6, 1e9, (1.0, 0.0), forced_steps=(0,))
    plan = Schedule.planned(config, [6, 5, 4, 3, 2, 1], [None, 0.1, 0.2, 0.3, 0.4, 0.5])
    found = accumulate(plan, computed=[0, 3, 5], forced=[0, 1])
    assert found == pytest.approx([0, 0, 0.2, 0.5, 0.4, 0.9])


def test_eight_schedules_at_a_setting():
    found = list(cases(Sampling(steps=20)))
    assert [(case.name, case.computed) for case in found] == [
        ("plain 1/2", 10),
        ("plain 1/3", 7),
        ("retention 1/2", 10),
        ("retention 1/3", 7),
        ("even every 2", 11),
        ("even every 4", 6),
        ("early every 3", 10),
        ("early every 6", 8),
    ]
    assert every(20, 6, 4) == [0, 1, 2, 3, 4, 10, 16, 19]
    for case in found:
        assert min(case.accumulated) == 0 < max(case.accumulated)
