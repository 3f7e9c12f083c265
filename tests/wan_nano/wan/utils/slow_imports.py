"""A quick start: half of the time of a command went into imports of what is never used."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

UNUSED = ("scipy.stats", "torch._dynamo", "torch._dynamo.utils")  # other schedules, compiled models


@contextmanager
def without_unused() -> Iterator[None]:
    """With empty modules in place of those; whoever asks for them later gets the real ones."""
    absent = [name for name in UNUSED if name not in sys.modules]
    sys.modules |= {name: ModuleType(name) for name in absent}
    sys.modules["torch._dynamo.utils"].__dict__.setdefault("is_compile_supported", bool)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def import_diffusers() -> None:
    """What the package imports of it."""
    with without_unused():
        importlib.import_module("diffusers.models.modeling_utils")
        for solver in ("dpmsolver", "unipc"):
            importlib.import_module(f"diffusers.schedulers.scheduling_{solver}_multistep")
