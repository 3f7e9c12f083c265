"""The rule "sigma" beside MagCache's, on the published tables of real models (pytest -s prints)."""

import json
from pathlib import Path

import numpy as np
import pytest

from teacache_generate import RULES, Schedule, TeaCacheConfig

NORMS = Path(__file__).resolve().parents[1] / "unit" / "wan_residual_norms.json"
TABLES = json.loads(NORMS.read_text())["tables"]
FARTHEST = 7  # steps between the two schedules' n-th computed steps
# The settings of MagCache's README, the count of steps that its own script computes (df81cb1; 720P
# with 4 was not run), and the largest distance of a step of "sigma".
SETTINGS = [  # model, threshold, limit of steps skipped in a row, computed, apart
    ("t2v-1.3B", 0.12, 4, 21, 3),
    ("t2v-1.3B", 0.12, 2, 25, 7),
    ("t2v-14B", 0.24, 6, 18, 3),
    ("i2v-14B-480P", 0.24, 6, 15, 3),
    ("i2v-14B-720P", 0.24, 6, 14, 5),
    ("i2v-14B-720P", 0.12, 4, 17, 1),
    ("vace-1.3B", 0.02, 3, 29, 1),
]


def magcache(ratios: list[float], thresh: float, limit: int) -> list[int]:
    """MagCache's rule: add |1 - norm / norm at the last computed step|; skip below the threshold,
    at most ``limit`` steps in a row; always compute the first fifth."""
    norms, computed, total = np.cumprod([1.0, *ratios]), [], 0.0
    for step, norm in enumerate(norms):
        if step >= len(norms) // 5:
            total += abs(1 - norm / norms[computed[-1]])
            if total < thresh and step - computed[-1] <= limit:
                continue
        computed.append(step)
        total = 0.0
    return computed


def sigma(steps: int, shift: float, count: int) -> list[int]:
    """The plan of "sigma" that computes ``count`` steps, or as few as its limit allows."""
    levels = np.linspace(1, 0.001, steps + 1)[:-1]
    timesteps = (1000 * shift * levels / (1 + (shift - 1) * levels)).astype(int).tolist()
    config = TeaCacheConfig.from_rule(RULES["sigma"], steps, 0.1)
    plan = Schedule.planned(config, timesteps, [None, *[0.0] * (steps - 1)])
    return plan.for_speedup(steps / count).computed_steps


def test_magcache_computes_what_its_own_script_does():
    wide, tall = (TABLES[name]["ratios"] for name in ("t2v-14B", "i2v-14B-720P"))
    assert magcache(wide, 0.24, 6) == [*range(10), 16, 23, 30, 36, 41, 44, 47, 49]
    assert magcache(tall, 0.24, 6) == [*range(8), 14, 21, 27, 32, 35, 38]


@pytest.mark.parametrize(("model", "thresh", "limit", "count", "apart"), SETTINGS)
def test_sigma_is_as_far_from_magcache_as_noted(model, thresh, limit, count, apart):
    """At equal counts. The last step, which "sigma" forces, is added where MagCache skips it."""
    table = TABLES[model]
    theirs = magcache(table["ratios"], thresh, limit)
    assert len(theirs) == count
    theirs = sorted({*theirs, table["steps"] - 1})
    ours = sigma(table["steps"], table["shift"], len(theirs))
    found = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"\n{model}, {thresh}, {limit} in a row: {count}, {found} apart\n  {theirs}\n  {ours}")
    assert found == apart <= FARTHEST
