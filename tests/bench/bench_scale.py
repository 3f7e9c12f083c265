"""Predict TeaCache's memory and time on full-size Wan models, without a GPU and without weights.

    python tests/bench/bench_scale.py [--wan_repo DIR] [--layers N] [--json FILE]

Runs a pipeline's own generate() on a fake GPU, see fake_gpu.py. ``COMPUTED`` says which steps are
computed. Stand-ins: T5, CLIP, VAE and flash-attn's kernel. Not measured: workspaces of cuDNN and
cuBLAS, fragmentation, time of the host, torch.cuda.synchronize, and transfers of offloaded models,
which stay on the GPU here.

A process can import either Wan2.1 or Wan2.2, since both are packages called ``wan``.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from fake_gpu import GPU, Meter, prepare_gpu
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "real_wan")]

from cases import WAN21  # noqa: E402
from common import scripted, table  # noqa: E402
from harness import Absent, model_config, new_model, prepare_imports  # noqa: E402

from teacache_generate import TeaCacheConfig, teacache  # noqa: E402

PIPELINES = {"t2v": "WanT2V", "i2v": "WanI2V", "vace": "WanVace", "ti2v": "WanTI2V"}
GIB = 2**30
ORDERS = ("order 0", "order 1")
STEPS, COMPUTED = 4, (0, 1, 3)  # at step 2 order 1 predicts from two residuals
SHIFT = 12.0  # A14B then changes its model at step 3, which is computed anyway

CASES = {  # task, size, frames
    "1.3B-480P": ("t2v-1.3B", (832, 480), 81),
    "14B-480P": ("t2v-14B", (832, 480), 81),
    "14B-720P": ("t2v-14B", (1280, 720), 81),
    "i2v-480P": ("i2v-14B", (832, 480), 81),
    "i2v-720P-61": ("i2v-14B", (1280, 720), 61),
    "i2v-720P": ("i2v-14B", (1280, 720), 81),
    "vace-480P": ("vace-1.3B", (832, 480), 81),
    "A14B-720P": ("t2v-A14B", (1280, 720), 81),
    "5B-704P": ("ti2v-5B", (1280, 704), 121),
}
# Steps, and seconds on an A800 by threshold, published with TeaCache4Wan2.1. The authors' command
# for 720P makes 61 frames.
PUBLISHED = {
    "1.3B-480P": (50, {"stock": 175, 0.05: 117, 0.07: 110, 0.08: 88}),
    "14B-720P": (50, {"stock": 3300, 0.14: 2280, 0.15: 1800, 0.2: 1620}),
    "i2v-480P": (40, {"stock": 735, 0.13: 464, 0.19: 372, 0.26: 300}),
    "i2v-720P-61": (40, {"stock": 1740, 0.18: 1020, 0.2: 900, 0.3: 720}),
}


def config_of(task: str) -> Any:
    return sys.modules["wan.configs"].WAN_CONFIGS[task]


def kind_of(task: str) -> str:
    return task.split("-")[0]


class StandIn:
    """T5, CLIP, VAE and VACE's video reader in one, and small enough to stay on the device."""

    def __init__(self, config: Any, z_dim: int, device: torch.device) -> None:
        self.model, self.config, self.z_dim, self.device = self, config, z_dim, device

    def __call__(self, texts: list[str], device: torch.device) -> list[Tensor]:
        return [torch.randn(126, 4096, device=device).to(self.config.t5_dtype)]

    def visual(self, images: list[Tensor]) -> Tensor:
        return torch.zeros(len(images), 257, 1280, dtype=torch.float16, device=self.device)

    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        frames, *sides = videos[0].shape[1:]
        height, width = (side // self.config.vae_stride[1] for side in sides)
        return [torch.zeros(self.z_dim, (frames - 1) // 4 + 1, height, width, device=self.device)]

    def to(self, *_: Any) -> StandIn:
        return self

    cpu = set_area = set_seq_len = to


def make_pipeline(task: str, device: torch.device, models: dict[str, nn.Module]) -> Any:
    """A pipeline as its constructor leaves it, with stand-ins for all but its models.

    models: by attribute. Callers set ``pipeline.vae.decode``.
    """
    config, kind = config_of(task), getattr(sys.modules["wan"], PIPELINES[kind_of(task)])
    sys.modules[kind.__module__].tqdm = iter  # no progress bar
    z_dim = next(iter(models.values())).out_dim
    pipeline, stand_in = object.__new__(kind), StandIn(config, z_dim, device)
    vars(pipeline).update(dict.fromkeys(("text_encoder", "clip", "vae", "vid_proc"), stand_in))
    vars(pipeline).update(config, config=config, device=device, rank=0, sp_size=1)
    vars(pipeline).update(models, t5_cpu=False, init_on_cpu=False)
    return pipeline


def make_model(task: str, device: torch.device, **sizes: int) -> nn.Module:
    """A new WanModel or VaceWanModel in float32. sizes: replace the task's."""
    with device:
        model = new_model(**model_config(task, config_of(task)) | sizes)
    return model.eval().requires_grad_(False)


def prepare(repo: Path) -> None:
    """Import ``wan`` from a checkout, as on a machine with a GPU and flash-attn."""
    prepare_imports(repo)
    for name in ("flash_attn", "wan.speech2video", "wan.animate"):
        sys.modules[name] = Absent(name)
    sys.modules["flash_attn"].flash_attn_varlen_func = flash_attention
    sys.modules["flash_attn_interface"] = None  # not installed
    torch.cuda.current_device = lambda: 0  # wan/modules/t5.py asks for it when imported
    importlib.import_module("wan")
    prepare_gpu()
    gc.freeze()  # generate() collects garbage often: leave out the imports


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """flash-attn's kernel for one sample, [tokens, heads, dim], by torch, which knows its FLOPs."""
    heads_first = (u.unsqueeze(0).transpose(1, 2) for u in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0]
    return out.transpose(1, 2).squeeze(0)


def generate(pipeline: Any, kind: str, size: tuple[int, int], frames: int) -> None:
    """Run the pipeline's own generate."""
    common = {"frame_num": frames, "sampling_steps": STEPS, "shift": SHIFT, "seed": 0}
    if kind == "i2v":
        pipeline.generate("", Image.new("RGB", size), max_area=math.prod(size), **common)
    elif kind == "vace":
        sources = pipeline.prepare_source([None], [None], [None], frames, size, GPU)
        pipeline.generate("", *sources, size=size, **common)
    else:
        pipeline.generate("", size=size, **common)


def simulate(name: str, layers: int | None, config: TeaCacheConfig) -> Meter:
    """Run one generation of a case, with ``layers`` blocks at the cost of all.

    Costs are within 1 %, memory is the same from two layers on, except that VACE has fewer hints.
    """
    task, size, frames = CASES[name]
    meter, depth = Meter(), config_of(task).num_layers
    attributes = ["high_noise_model", "low_noise_model"] if "A14B" in task else ["model"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = {u: make_model(task, GPU, num_layers=layers or depth) for u in attributes}
        for model in models.values():
            model.freqs = model.freqs.cpu()  # a loaded model has it there until its first call
            model.to = model.cpu = lambda *_: None  # it stays on the GPU
            stacks = [(model.blocks, depth)]
            if kind_of(task) == "vace":  # a block for every second one of the first stack
                stacks.append((model.vace_blocks, depth // 2))
            meter.watch(model, stacks)
        pipeline = make_pipeline(task, GPU, models)
        pipeline.vae.decode = meter.decode
        with meter, teacache([*models.values()], config):
            generate(pipeline, kind_of(task), size, frames)
    return meter


def figures(name: str, layers: int | None) -> dict[str, Any]:
    """Measurements of a case by their title, for stock and for both orders."""
    stock = simulate(name, layers, TeaCacheConfig(STEPS, 0.0))
    slowest = max(one.seconds for one in stock.passes)
    found = {
        "stock's peak, GiB": (stock.weights + stock.peak) / GIB,
        "computed pass, s": slowest,
    }
    for order, title in enumerate(ORDERS):
        run = simulate(name, layers, scripted(STEPS, COMPUTED, order))
        skipped = max(one.seconds for one in run.passes[5:7])  # of step 2
        of_order = {
            "peak above stock, GiB": (run.peak - stock.peak) / GIB,
            "above stock at the VAE, GiB": (run.alive_at_vae - stock.alive_at_vae) / GIB,
            "skipped pass, ms": 1000 * skipped,
            "skipped/computed pass, %": 100 * skipped / slowest,
            "host syncs above stock": [a - b for a, b in zip(run.syncs, stock.syncs, strict=True)],
        }
        found |= {f"{title}: {what}": value for what, value in of_order.items()}
    return found


def latencies(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """By threshold: the published seconds, the number of computed steps that explains them, and
    the seconds predicted for that number."""
    steps, published = PUBLISHED[name]
    computed = 2 * found["computed pass, s"]  # a step has two passes
    skipped = 2 * found["order 0: skipped pass, ms"] / 1000
    rows = []
    for thresh, seconds in published.items():
        on_this_machine = seconds / published["stock"] * steps * computed
        count = round((on_this_machine - steps * skipped) / (computed - skipped))
        predicted = count * computed + (steps - count) * skipped
        row = {"model": name, "threshold": thresh, "published": seconds, "predicted": predicted}
        rows.append({**row, "steps computed": count})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, default=WAN21, help="Wan2.1 or Wan2.2 checkout")
    parser.add_argument("--layers", type=int, help="run only N blocks, at the cost of all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(args.wan_repo.resolve())
    tasks = sys.modules["wan.configs"].WAN_CONFIGS
    names = [name for name, (task, *_) in CASES.items() if task in tasks]
    found = {name: figures(name, args.layers) for name in names}
    sampling = [row for name in names if name in PUBLISHED for row in latencies(name, found[name])]
    titles = found[names[0]]
    print(table([{"": title} | {name: found[name][title] for name in names} for title in titles]))
    if sampling:
        print(f"\nSampling on an A800, in seconds\n{table(sampling)}")
    if args.json:
        args.json.write_text(json.dumps({"figures": found, "sampling": sampling}, indent=1))


if __name__ == "__main__":
    main()
