"""What the script relies on in a Wan2.1 checkout, the real one or the stand-in, as a file.

    python tests/real_wan/wan_facts.py WAN_REPO OUT.pt WEIGHTS.pt

Flags and signatures, and what a WanModel of each kind gives for fixed inputs. Its weights are read
from WEIGHTS.pt, or made and written there if the file is missing.
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
from harness import prepare

TRAINED = Path(__file__).resolve().parents[2] / "assets" / "wan_nano"
SIZE = dict(dim=48, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=4, num_layers=2)


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
    generate.argparse = argparse
    return found


def parameters(function: Any) -> list[tuple[str, bool]]:
    """(name, has a default) of each."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default is not p.empty) for p in found]


def signatures(generate: Any) -> dict[str, list]:
    wan, model = generate.wan, importlib.import_module("wan.modules.model")
    utils, t5 = (
        importlib.import_module("wan.utils.utils"),
        importlib.import_module("wan.modules.t5"),
    )
    vae = importlib.import_module("wan.modules.vae").WanVAE
    functions = {
        "WanT2V": wan.WanT2V.__init__,
        "WanT2V.generate": wan.WanT2V.generate,
        "WanI2V": wan.WanI2V.__init__,
        "WanI2V.generate": wan.WanI2V.generate,
        "WanModel": model.WanModel.__init__,
        "WanModel.forward": model.WanModel.forward,
        "flash_attention": model.flash_attention,
        "WanVAE.encode": vae.encode,
        "WanVAE.decode": vae.decode,
        "T5EncoderModel": t5.T5EncoderModel.__init__,
        "T5EncoderModel()": t5.T5EncoderModel.__call__,
        "cache_video": utils.cache_video,
        "cache_image": utils.cache_image,
        "_init_logging": generate._init_logging,
        "generate": generate.generate,
    }
    return {name: parameters(function) for name, function in functions.items()}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens=None, **_: Any):
    """One sample, float32: nothing of what is compared."""
    keys = k.size(1) if k_lens is None else int(k_lens)
    heads_first = (u.transpose(1, 2) for u in (q, k[:, :keys], v[:, :keys]))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def outputs(weights: dict[str, dict]) -> dict[str, torch.Tensor]:
    """What the model gives, with a padded sequence; missing ``weights`` are made."""
    modules = importlib.import_module("wan.modules.model")
    modules.flash_attention = attention
    result = {}
    for kind, in_dim, text_len in (("t2v", 16, 512), ("i2v", 36, 512)):
        model = modules.WanModel(model_type=kind, in_dim=in_dim, text_len=text_len, **SIZE)
        generator = torch.Generator().manual_seed(1)
        if kind not in weights:
            state = model.state_dict().items()
            weights[kind] = {k: torch.randn(v.shape, generator=generator) / 8 for k, v in state}
        model.load_state_dict(weights[kind])
        generator.manual_seed(2)
        x, y = torch.randn(2, 20, 3, 6, 4, generator=generator).unbind()
        i2v = {"clip_fea": torch.randn(1, 257, 1280, generator=generator), "y": [y]}
        given = {"context": [torch.randn(7, 24, generator=generator)], "seq_len": 21}
        with torch.no_grad():
            out = model.eval()(
                [x[:16]], t=torch.tensor([321]), **given, **(i2v if in_dim > 16 else {})
            )
        result[kind] = out[0]
    return result


def trained() -> torch.Tensor:
    """What the miniature's shipped transformer gives, loaded as a pipeline loads it."""
    modules = importlib.import_module("wan.modules.model")
    modules.flash_attention = attention
    model = modules.WanModel.from_pretrained(TRAINED, low_cpu_mem_usage=False).eval()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 5, 8, 8, generator=generator)
    context = [torch.randn(6, 4096, generator=generator)]
    with torch.no_grad():
        return model([x], t=torch.tensor([700]), context=context, seq_len=80)[0]


def main(repo: str, out: str, weights_file: str) -> None:
    prepare(repo)
    torch.cuda.amp.autocast = lambda *_, **__: torch.autocast("cpu", enabled=False)
    generate = importlib.import_module("generate")
    path = Path(weights_file)
    weights = torch.load(path) if path.exists() else {}
    facts = {
        "flags": flags(generate),
        "signatures": signatures(generate),
        "outputs": {**outputs(weights), "trained": trained()},
        "config_keys": sorted(generate.WAN_CONFIGS[min(generate.WAN_CONFIGS)]),
    }
    torch.save(weights, path)
    torch.save(facts, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
