"""What the tests of the command line share."""

from pathlib import Path

import pytest
from nano import PROMPT, attempt
from stand_in import Made, record


@pytest.fixture
def script(wan, capsys, caplog, ckpt, tmp_path, monkeypatch):
    """A function of flags: exit status, and all that is logged and printed. In an empty folder."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")

    def start(*flags: object) -> tuple[int, str]:
        caplog.clear()
        if "--teacache_decode" not in flags:  # kept latents name their checkpoint
            flags = ("--ckpt_dir", ckpt, *flags)
        code, said = attempt(capsys, *flags)
        return code, caplog.text + said

    return start


@pytest.fixture
def run(script):
    """A function of flags that makes x.mp4: as above, and its record."""

    def start(*flags: object) -> tuple[int, str, dict]:
        code, said = script(*PROMPT, "--save_file", "x.mp4", *flags)
        return code, said, record() if Path("x.json").exists() else {}

    return start


@pytest.fixture
def refusal(capsys, ckpt):
    """A function of flags: the one line that refuses them."""

    def start(*flags: object) -> str:
        code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT, *flags)
        assert (code, len(said.splitlines())) == (2, 1), said
        return said.removeprefix("teacache_generate.py: error: ")

    return start


@pytest.fixture
def made(wan, monkeypatch):
    return Made(monkeypatch)


@pytest.fixture
def no_loading(wan, monkeypatch):
    """A run that is not refused ends with status 1, where its pipeline would be loaded."""

    def load(self, *args, **kwargs):
        raise KeyError("the pipeline is loaded")

    for pipeline in (wan[1].WanT2V, wan[1].WanI2V):
        monkeypatch.setattr(pipeline, "__init__", load)
