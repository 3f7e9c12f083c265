"""The stand-in is compared with the real Wan2.1, so that tests on it mean something."""

import subprocess
import sys

import pytest
import torch
from cases import HERE, WAN21

if not (WAN21 / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {WAN21} (or $WAN_REPO)", allow_module_level=True)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> tuple[dict, dict]:
    """Of the real one and of the stand-in."""
    found = []
    for repo in (WAN21, HERE.parent / "wan_nano"):
        file = tmp_path_factory.mktemp("facts") / "facts.pt"
        command = [sys.executable, HERE / "wan_facts.py", repo, file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(file, weights_only=False))
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["t2v", "i2v", "trained"])
def test_stand_in_computes_what_the_real_model_does(facts, kind):
    real, nano = (fact["outputs"][kind] for fact in facts)
    assert real.std() > 0.1
    torch.testing.assert_close(nano, real, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["flags", "signatures", "config_keys"])
def test_stand_in_has_what_the_real_one_has(facts, what):
    real, nano = (fact[what] for fact in facts)
    if what == "flags":  # their values are its own
        assert nano.pop("--task")[1:2] + nano.pop("--size")[1:2] == (True, True)
        assert real.pop("--task")[1:2] + real.pop("--size")[1:2] == (True, True)
    assert nano == real
