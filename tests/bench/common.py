"""What the benchmarks share: settings of a given schedule, the machine, and tables."""

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from teacache_generate import TeaCacheConfig


def scripted(steps: int, script: Sequence[int], order: int = 0) -> TeaCacheConfig:
    """Settings that compute the steps of the script: every increment is 0."""
    return TeaCacheConfig(steps, 1.0, coefficients=(0.0,), order=order, forced_steps=tuple(script))


def machine() -> str:
    """What seconds and rounding depend on."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    cores, date = os.cpu_count(), time.strftime("%Y-%m-%d")
    return f"{gpu}{platform.machine()}, {cores} cores, torch {torch.__version__}, {date}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text, with aligned columns and 4 digits."""
    lines = [list(rows[0]), *([text(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)
