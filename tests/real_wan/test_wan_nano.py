"""The stand-in is compared with the real Wan2.1, so that tests on it mean something.

    python tests/real_wan/test_wan_nano.py WAN_REPO OUT.pt

writes what the script relies on in a checkout: flags, signatures, and what the models compute.
"""

import argparse
import importlib
import inspect
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import HERE, WAN21
from harness import attention, prepare

TRAINED = HERE.parents[1] / "assets" / "wan_nano"
SIZE = dict(dim=48, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=4, num_layers=2, text_len=512)
FUNCTIONS = {  # by module
    "wan.text2video": ("WanT2V.__init__", "WanT2V.generate"),
    "wan.image2video": ("WanI2V.__init__", "WanI2V.generate"),
    "wan.modules.model": ("WanModel.__init__", "WanModel.forward", "flash_attention"),
    "wan.modules.vae": ("WanVAE.encode", "WanVAE.decode"),
    "wan.modules.t5": ("T5EncoderModel.__init__", "T5EncoderModel.__call__"),
    "wan.utils.utils": ("cache_video", "cache_image"),
    "generate": ("_init_logging", "generate"),
}


def flags(generate: Any) -> dict[str, tuple]:
    """Of generate.py's parser: option to (takes a value, (default, choices))."""
    found = {}

    class Spy(argparse.ArgumentParser):
        def parse_args(self) -> None:
            for action in self._actions:
                name, values = action.option_strings[-1], None
                if name not in ("--task", "--size"):  # which have values of their own
                    values = (action.default, sorted(action.choices or []))
                found[name] = (action.nargs is None, values)
            raise InterruptedError

    generate.argparse = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Spy})
    with suppress(InterruptedError):
        generate._parse_args()
    return found


def signature(module: str, name: str) -> list[tuple[str, bool]]:
    """(name, has a default) of each parameter."""
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default is not p.empty) for p in found]


@torch.no_grad()
def outputs() -> dict[str, torch.Tensor]:
    """What models give for fixed inputs: two with weights by name, and the shipped one."""
    modules = importlib.import_module("wan.modules.model")
    modules.flash_attention = attention
    generator, result = torch.Generator().manual_seed(1), {}
    for kind, in_dim in (("t2v", 16), ("i2v", 36)):
        model = modules.WanModel(model_type=kind, in_dim=in_dim, **SIZE).eval()
        for _, weight in sorted(model.state_dict().items()):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
        x, y = torch.randn(2, 20, 3, 6, 4, generator=generator).unbind()
        image = {"clip_fea": torch.randn(1, 257, 1280, generator=generator), "y": [y]}
        context = [torch.randn(7, 24, generator=generator)]
        given = {"context": context, "seq_len": 21, **(image if kind == "i2v" else {})}  # 18 tokens
        result[kind] = model([x[:16]], t=torch.tensor([321]), **given)[0]
    model = modules.WanModel.from_pretrained(TRAINED, low_cpu_mem_usage=False).eval()
    x, context = (torch.randn(s, generator=generator) for s in ((16, 5, 8, 8), (6, 4096)))
    result["trained"] = model([x], t=torch.tensor([700]), context=[context], seq_len=80)[0]
    return result


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict[str, Any]]:
    """Of the real one and of the stand-in."""
    if not (WAN21 / "generate.py").is_file():
        pytest.skip(f"no real Wan2.1 at {WAN21} (or $WAN_REPO)")
    files = [tmp_path_factory.mktemp("facts") / "facts.pt" for _ in range(2)]
    for repo, file in zip((WAN21, HERE.parent / "wan_nano"), files, strict=True):
        subprocess.run([sys.executable, __file__, repo, file], timeout=300, check=True)
    return [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("kind", ["t2v", "i2v", "trained"])
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
    facts = {
        "flags": flags(generate),
        "signatures": {(m, n): signature(m, n) for m, names in FUNCTIONS.items() for n in names},
        "outputs": outputs(),
        "config_keys": sorted(generate.WAN_CONFIGS[min(generate.WAN_CONFIGS)]),
    }
    torch.save(facts, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
