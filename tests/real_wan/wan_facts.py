"""What the script relies on in a Wan2.1 checkout, the real one or the stand-in, as a file.

python tests/real_wan/wan_facts.py WAN_REPO OUT.pt
"""

import argparse
import importlib
import inspect
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import attention, prepare

TRAINED = Path(__file__).resolve().parents[2] / "assets" / "wan_nano"
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
    """Of generate.py's parser: option to (default, takes a value, choices)."""
    found = {}

    class Spy(argparse.ArgumentParser):
        def parse_args(self) -> None:
            for action in self._actions:
                choices = None if action.choices is None else sorted(action.choices)
                found[action.option_strings[-1]] = (action.default, action.nargs is None, choices)
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
