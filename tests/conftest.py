"""The script at the top of the project, importable as it is, and checkpoints of the stand-in."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored, and so
# would the runs that tests interrupt
torch.set_num_threads(1)  # at these sizes two only wait for each other

from nano import NANO, python  # noqa: E402  (it imports the script)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "t2v-nano"
    python(NANO / "make_checkpoint.py", folder).check_returncode()
    return folder


@pytest.fixture(scope="session")
def i2v_ckpt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ckpt") / "i2v-nano"
    python(NANO / "make_checkpoint.py", folder, "--task", "i2v-nano").check_returncode()
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(file)
    return file


@pytest.fixture
def wan():
    """The stand-in's package and its generate.py, in this process."""
    if str(NANO) not in sys.path:
        sys.path.insert(0, str(NANO))
    import generate
    import wan

    return generate, wan
