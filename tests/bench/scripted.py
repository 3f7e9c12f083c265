"""Schedules that are written down: what the benchmarks compare thresholds with."""

from collections.abc import Sequence
from dataclasses import dataclass

from teacache_generate import TeaCacheConfig


@dataclass(frozen=True)
class Scripted(TeaCacheConfig):
    """Computes the steps that are named, whatever the distances say; decides as any other."""

    script: Sequence[int] = ()

    def always_computes(self, step: int) -> bool:
        return step in self.script or step >= self.steps


def scripted(steps: int, script: Sequence[int], order: int = 0) -> Scripted:
    """Of the steps those of the script are computed; no distance adds up to the threshold."""
    return Scripted(steps, 1.0, coefficients=(0.0,), order=order, script=tuple(script))


def spaced(count: int, steps: int) -> list[int]:
    """``count`` of the steps, the first and the last among them; the gaps differ by 1 at most."""
    return [i * (steps - 1) // (count - 1) for i in range(count)]
