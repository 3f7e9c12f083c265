"""Tasks and sizes, under the names that Wan2.1 gives them."""

from .nano import t2v_nano

WAN_CONFIGS = {"t2v-nano": t2v_nano}

SIZE_CONFIGS = {"64*64": (64, 64), "96*64": (96, 64), "64*96": (64, 96)}  # (width, height)
SUPPORTED_SIZES = {task: tuple(SIZE_CONFIGS) for task in WAN_CONFIGS}

__all__ = ["SIZE_CONFIGS", "SUPPORTED_SIZES", "WAN_CONFIGS"]
