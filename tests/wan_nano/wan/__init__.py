"""Wan2.1 in miniature: its packages, names, signatures and arithmetic, at a size for a CPU."""

from .utils.slow_imports import import_diffusers

import_diffusers()

from . import configs, distributed, modules  # noqa: E402
from .image2video import WanI2V  # noqa: E402
from .text2video import WanT2V  # noqa: E402

__all__ = ["WanI2V", "WanT2V", "configs", "distributed", "modules"]
