"""What the tests of the command line share."""

import json
import shutil
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
def tasks(wan, monkeypatch):
    """The stand-in's generate.py has Wan's tasks and sizes, each with the one model."""
    generate, package = wan
    sizes = "832*480 480*832 1280*720 720*1280 960*544 1024*704"
    for size in sizes.split():
        monkeypatch.setitem(generate.SIZE_CONFIGS, size, tuple(map(int, size.split("*"))))
    for name in ["t2v-1.3B", "t2v-14B", "t2i-14B", "i2v-14B", "anime-1.3B"]:
        monkeypatch.setitem(generate.WAN_CONFIGS, name, generate.WAN_CONFIGS["t2v-nano"])
        monkeypatch.setitem(generate.EXAMPLE_PROMPT, name, {"prompt": "a ball"})
        monkeypatch.setitem(generate.SUPPORTED_SIZES, name, tuple(sizes.split()))
    # without it i2v has 81 frames, as in Wan2.1's first release
    monkeypatch.setattr(package, "WanFLF2V", package.WanT2V, raising=False)


@pytest.fixture
def i2v_ckpt(ckpt, tmp_path) -> Path:
    """A checkpoint that says that it is of i2v."""
    folder = Path(shutil.copytree(ckpt, tmp_path / "i2v-ckpt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "i2v"}))
    return folder


@pytest.fixture
def made(wan, monkeypatch):
    return Made(monkeypatch)


@pytest.fixture
def no_loading(wan, monkeypatch):
    """A run that is not refused ends with status 1, where its pipeline would be loaded."""

    def load(self, *args, **kwargs):
        raise KeyError("the pipeline is loaded")

    monkeypatch.setattr(wan[1].WanT2V, "__init__", load)
