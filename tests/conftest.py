"""The script at the top of the project, importable as it is, and checkpoints of the stand-in."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# a shell's `&` has one ignored and nohup the other, and so would the runs that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["OMP_NUM_THREADS"] = "1"  # at these sizes two threads only wait for each other,
torch.set_num_threads(1)  # in the runs that tests start as in the tests

from nano import NANO, python  # noqa: E402  (it imports the script)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "t2v-nano"
    python(NANO / "make_checkpoint.py", folder).check_returncode()
    return folder


@pytest.fixture(scope="module", autouse=True)
def young_heap() -> Iterator[None]:
    """Leave objects from before a file's tests out of each garbage collection: this saves a quarter
    of a second for each run of the script."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def wan():
    """The stand-in's package and its generate.py, in this process."""
    if str(NANO) not in sys.path:
        sys.path.insert(0, str(NANO))
    import generate
    import wan

    return generate, wan
