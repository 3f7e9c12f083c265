"""The stand-in has what the script relies on in the real Wan2.1, and computes the same.

    python tests/real_wan/test_wan_nano.py WAN_REPO OUT.pt

writes these facts of a checkout.
"""

import argparse
import importlib
import inspect
import operator
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from cases import HERE, WAN21
from harness import attention, prepare

TRAINED = HERE.parents[1] / "assets" / "wan_nano"
SIZE = dict(dim=48, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=4, num_layers=2, text_len=512)
FUNCTIONS = """
wan.text2video WanT2V.__init__ WanT2V.generate
wan.modules.model WanModel.__init__ WanModel.forward flash_attention
wan.modules.vae WanVAE.encode WanVAE.decode
wan.modules.t5 T5EncoderModel.__init__ T5EncoderModel.__call__
wan.utils.utils cache_video cache_image
generate _init_logging generate
"""


def flags(generate: Any) -> dict[str, tuple]:
    """Of generate.py's parser: option to (takes a value, default, choices)."""
    parsers = []
    argparse.ArgumentParser.parse_args = lambda parser: parsers.append(parser)
    with suppress(AttributeError):  # it got no arguments
        generate._parse_args()
    return {
        action.option_strings[-1]: (action.nargs is None, action.default, action.choices)
        for action in parsers[0]._actions
        if action.dest not in ("task", "size")  # which have values of their own
    }


def signatures() -> dict[str, list[tuple[str, bool]]]:
    """(name, has a default) of each parameter."""
    found = {}
    for module, *names in map(str.split, FUNCTIONS.strip().splitlines()):
        for name in names:
            function = operator.attrgetter(name)(importlib.import_module(module))
            parameters = inspect.signature(function).parameters.values()
            found[name] = [(p.name, p.default is not p.empty) for p in parameters]
    return found


@torch.no_grad()
def outputs() -> dict[str, torch.Tensor]:
    """Outputs for fixed inputs: of a model with weights by name, and of the shipped model."""
    modules = importlib.import_module("wan.modules.model")
    modules.flash_attention = attention

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(1)
    model = modules.WanModel(**SIZE).eval()
    for _, weight in sorted(model.state_dict().items()):
        weight.copy_(random(*weight.shape) / 8)
    given = {"t": torch.tensor([321]), "context": [random(7, 24)], "seq_len": 21}  # 18 tokens
    named = model([random(16, 3, 6, 4)], **given)[0]
    model = modules.WanModel.from_pretrained(TRAINED, low_cpu_mem_usage=False).eval()
    given = {"t": torch.tensor([700]), "context": [random(6, 4096)], "seq_len": 80}
    return {"named": named, "trained": model([random(16, 5, 8, 8)], **given)[0]}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict[str, Any]]:
    """Of the real one and of the stand-in."""
    if not (WAN21 / "generate.py").is_file():
        pytest.skip(f"no real Wan2.1 at {WAN21} (or $WAN_REPO)")
    files = [tmp_path_factory.mktemp("facts") / "facts.pt" for _ in range(2)]
    for repo, file in zip((WAN21, HERE.parent / "wan_nano"), files, strict=True):
        subprocess.run([sys.executable, __file__, repo, file], timeout=300, check=True)
    return [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("kind", ["named", "trained"])
def test_stand_in_computes_what_the_real_model_does(facts, kind):
    real, nano = (fact["outputs"][kind] for fact in facts)
    assert real.std() > 0.1
    torch.testing.assert_close(nano, real, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("what", ["flags", "signatures", "config_keys"])
def test_stand_in_has_what_the_real_one_has(facts, what):
    real, nano = (fact[what] for fact in facts)
    assert nano == real


def main(repo: str, out: str) -> None:
    prepare(repo)
    torch.cuda.amp.autocast = lambda *_, **__: torch.autocast("cpu", enabled=False)
    generate = importlib.import_module("generate")
    facts = {"flags": flags(generate), "signatures": signatures(), "outputs": outputs()}
    task = next(task for task in generate.WAN_CONFIGS if task.startswith("t2v"))
    facts["config_keys"] = sorted(generate.WAN_CONFIGS[task])
    torch.save(facts, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
