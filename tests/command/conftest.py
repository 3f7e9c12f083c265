"""What the tests of the command line share."""

import json

import pytest
from nano import PROMPT, attempt


@pytest.fixture
def run(capsys, caplog, ckpt, tmp_path):
    """A function of flags that makes x.mp4: exit status, log and output, and its record."""
    caplog.set_level("INFO")
    target, record = tmp_path / "x.mp4", tmp_path / "x.json"

    def start(*flags):
        caplog.clear()
        code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT, "--save_file", target, *flags)
        return code, caplog.text + said, json.loads(record.read_text()) if record.exists() else {}

    return start


@pytest.fixture
def no_loading(wan, monkeypatch):
    """A run that is not refused ends with status 1, where its pipeline would be loaded."""

    def load(self, *args, **kwargs):
        raise KeyError("the pipeline is loaded")

    for pipeline in (wan[1].WanT2V, wan[1].WanI2V):
        monkeypatch.setattr(pipeline, "__init__", load)
