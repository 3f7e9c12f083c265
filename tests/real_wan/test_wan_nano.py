"""The stand-in is held against the real Wan2.1, so that what holds on the one means something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()

if not (WAN / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {WAN} (or $WAN_REPO): not tried", allow_module_level=True)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> tuple[dict, dict]:
    """Of the real one and of the stand-in, with the same weights in both."""
    out, found = tmp_path_factory.mktemp("facts"), []
    for name, repo in (("real", WAN), ("nano", HERE.parent / "wan_nano")):
        file = out / f"{name}.pt"
        command = [sys.executable, HERE / "wan_facts.py", repo, file, out / "weights.pt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(file, weights_only=False))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_the_same_weights_and_inputs_give_the_same_output(facts, kind):
    real, nano = (fact["outputs"][kind] for fact in facts)
    assert real.abs().mean() > 0.1
    assert real.dtype == nano.dtype
    torch.testing.assert_close(nano, real, atol=1e-5, rtol=1e-5)


def test_the_shipped_checkpoint_gives_the_same_in_the_real_model(facts):
    real, nano = (fact["outputs"]["trained"] for fact in facts)
    assert real.std() > 0.5  # of a flow, which is noise less picture
    torch.testing.assert_close(nano, real, atol=1e-4, rtol=1e-4)


def test_it_has_the_same_flags(facts):
    real, nano = (fact["flags"] for fact in facts)
    assert nano.keys() == real.keys()
    for flag in real.keys() - {"--task", "--size"}:
        assert nano[flag] == real[flag], flag


def test_it_has_the_same_signatures(facts):
    real, nano = (fact["signatures"] for fact in facts)
    for name, parameters in real.items():
        assert nano[name] == parameters, name


def test_its_config_names_the_same_parts(facts):
    real, nano = (fact["config_keys"] for fact in facts)
    assert nano == real
