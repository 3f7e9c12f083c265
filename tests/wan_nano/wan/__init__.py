"""Wan2.1's text-to-video in miniature: packages, names, signatures and arithmetic, for a CPU."""

from . import configs, distributed, modules
from .text2video import WanT2V

__all__ = ["WanT2V", "configs", "distributed", "modules"]
