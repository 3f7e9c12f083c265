"""A quick start: half of the time of a command went into what diffusers imports and never uses."""

import importlib
import sys
from types import ModuleType

UNUSED = ("scipy.stats", "torch._dynamo")  # for other noise schedules, for compiled models


def import_diffusers() -> None:
    """With empty modules in place of those; whoever asks for them later gets the real ones."""
    absent = [name for name in UNUSED if name not in sys.modules]
    sys.modules |= {name: ModuleType(name) for name in absent}
    try:
        importlib.import_module("diffusers.models.modeling_utils")
        for solver in ("dpmsolver", "unipc"):
            importlib.import_module(f"diffusers.schedulers.scheduling_{solver}_multistep")
    finally:
        for name in absent:
            del sys.modules[name]
