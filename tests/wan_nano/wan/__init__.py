"""Wan2.1 in miniature: its packages, names, signatures and arithmetic, at a size for a CPU."""

from . import configs, distributed, modules
from .image2video import WanI2V
from .text2video import WanT2V

WanFLF2V = WanI2V  # exported as by the newer Wan2.1, whose WanI2V takes any number of frames

__all__ = ["WanFLF2V", "WanI2V", "WanT2V", "configs", "distributed", "modules"]
