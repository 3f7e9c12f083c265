"""Predict TeaCache's memory and time on full-size Wan models, without a GPU and without weights.

    python tests/bench/bench_scale.py [--wan_repo DIR] [--model NAME ...] [--layers N] [--json FILE]

Runs a pipeline's own generate() under torch's FakeTensorMode, on "cuda": tensors have shape, dtype,
device and lifetime, but no numbers. ``Meter`` prices each op on the GPU, counts the bytes alive and
notes when the host waits for the GPU.

Stand-ins: T5, CLIP, VAE and flash-attn's kernel. ``COMPUTED`` says which steps are computed. Not
measured: workspaces of cuDNN and cuBLAS, fragmentation, time of the host, torch.cuda.synchronize,
and transfers of offloaded models, which stay on the GPU here.

A process can import either Wan2.1 or Wan2.2, since both are packages called ``wan``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "real_wan")]

from harness import Absent, prepare_torchvision  # noqa: E402

from teacache_generate import TeaCacheConfig, teacache  # noqa: E402

WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
ORDERS = ("order 0", "order 1")
STEPS, COMPUTED = 4, (0, 1, 3)  # at step 2 order 1 predicts from two residuals
SHIFT = 12.0  # A14B then changes its model at step 3, which is computed anyway
GPU, GIB, aten = torch.device("cuda:0"), 2**30, torch.ops.aten

# An A800: peaks of its data sheet times the achieved share, the same for all models. The share of
# the tensor cores is fitted to the stock latencies of PUBLISHED; no other number is fitted.
FLOPS_PER_SECOND = {torch.bfloat16: 312e12 * 0.72, torch.float64: 9.7e12 * 0.85}
OTHER_FLOPS_PER_SECOND = 19.5e12 * 0.85  # float32 without TF32, as torch has it by default
BYTES_PER_SECOND, LAUNCH_SECONDS = 2.0e12 * 0.80, 5e-6


@dataclass(frozen=True)
class Case:
    """A task at a video size, and Wan's default number of steps."""

    task: str
    size: tuple[int, int]
    frames: int = 81
    steps: int = 50

    @property
    def kind(self) -> str:
        return self.task.split("-")[0]

    @property
    def channels(self) -> int:
        return 48 if self.kind == "ti2v" else 16


CASES = {
    "1.3B-480P": Case("t2v-1.3B", (832, 480)),
    "14B-480P": Case("t2v-14B", (832, 480)),
    "14B-720P": Case("t2v-14B", (1280, 720)),
    "i2v-480P": Case("i2v-14B", (832, 480), steps=40),
    "i2v-720P-61": Case("i2v-14B", (1280, 720), frames=61, steps=40),
    "i2v-720P": Case("i2v-14B", (1280, 720), steps=40),
    "vace-480P": Case("vace-1.3B", (832, 480)),
    "A14B-720P": Case("t2v-A14B", (1280, 720), steps=40),
    "5B-704P": Case("ti2v-5B", (1280, 704), frames=121),
}
# Seconds on an A800, stock and by threshold, published with TeaCache4Wan2.1. The authors' command
# for 720P makes 61 frames.
PUBLISHED = {
    "1.3B-480P": (175, {0.05: 117, 0.07: 110, 0.08: 88}),
    "14B-720P": (3300, {0.14: 2280, 0.15: 1800, 0.2: 1620}),
    "i2v-480P": (735, {0.13: 464, 0.19: 372, 0.26: 300}),
    "i2v-720P-61": (1740, {0.18: 1020, 0.2: 900, 0.3: 720}),
}


# ------------------------------------------------------------------------------------- the meter


@dataclass
class Pass:
    """One call of a model. ``syncs`` counts the host's waits until the next call."""

    computed: bool = False  # whether the first block ran
    head_dtype: str = ""
    flops: int = 0
    bytes: int = 0
    launches: int = 0
    seconds: float = 0.0
    peak: int = 0  # bytes alive
    syncs: int = 0

    def add(self, times: int, flops: int, moved: int, dtype: torch.dtype) -> None:
        """Add an op that runs ``times`` times and takes as long as the slowest resource needs."""
        rate = FLOPS_PER_SECOND.get(dtype, OTHER_FLOPS_PER_SECOND)
        self.seconds += times * max(flops / rate, moved / BYTES_PER_SECOND, LAUNCH_SECONDS)
        self.flops += times * flops
        self.bytes += times * moved
        self.launches += times


class Op:
    """A call of an operator on fake tensors.

    ``host_value`` holds a fake tensor's numbers if they come from the host, as timesteps do. The
    host reads all other numbers as 1.
    """

    READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
    COPIES = (aten._to_copy.default, aten.copy_.default)

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        if "generator" in kwargs:
            self.kwargs = {**kwargs, "generator": None}  # it is one of the host: see prepare()
        self.inputs = tensors((args, *kwargs.values()))
        from_gpu = self.on_gpu = any(map(on_gpu, self.inputs))
        if kwargs.get("device") is not None:
            self.on_gpu = kwargs["device"].type == "cuda"
        elif func is aten.copy_.default:
            from_gpu, self.on_gpu = on_gpu(args[1]), on_gpu(args[0])
        self.reads = func in self.READS
        is_blocking = not (kwargs.get("non_blocking") or any(arg is True for arg in args[2:]))
        crosses = from_gpu != self.on_gpu and (from_gpu or is_blocking)
        self.waits = (self.reads and from_gpu) or (func in self.COPIES and crosses)

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def run_on_host(self) -> Any:
        with unset_fake_temporarily():
            return self.func(*tree_map(on_host, self.args), **tree_map(on_host, self.kwargs))

    def is_cheap_on_host(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the numbers of the inputs are known, and those of the outputs are few."""
        if not all(host_value(u) is not None or u.numel() <= 64 for u in self.inputs):
            return False
        if torch.Tag.nondeterministic_seeded in self.func.tags or "empty" in self.func.name():
            return False
        limit = 2**15 if self.inputs else 2**23  # ti2v multiplies a mask of ones by the timestep
        return self.func.is_view or sum(u.numel() for u in outputs) <= limit

    def is_kernel(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the GPU has work: not to allocate, and not to view its inputs."""
        inputs = {u.untyped_storage()._cdata for u in self.inputs}
        is_view = all(u.untyped_storage()._cdata in inputs for u in outputs)
        return "empty" not in self.func.name() and (self.func._schema.is_mutable or not is_view)

    def cost(self, out: Any) -> tuple[int, int, torch.dtype]:
        """FLOPs, bytes read and written, and the dtype of the arithmetic."""
        formula = flop_registry.get(self.func.overloadpacket, lambda *_, **__: 0)
        touched = [*self.inputs, *tensors(out)]
        flops = formula(*self.args, **self.kwargs, out_val=out)
        return flops, sum(map(nbytes, touched)), (self.inputs or touched)[-1].dtype


class Meter(TorchDispatchMode):
    """Sees each op of a generation, and the calls of its models."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = [Pass()]  # the first one stands for everything before sampling
        self.in_pass = False
        self.times = 1  # how many blocks the running block stands for
        self.alive = 0  # bytes, in the 512-byte units of CUDA's caching allocator
        self.storages: set[int] = set()
        self.weights = 0  # bytes of a model at full depth
        self.alive_at_start = self.alive_at_vae = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        op = Op(func, args, kwargs or {})
        self.passes[-1].syncs += op.waits
        if op.reads:
            out = op.run_on_host()
            return with_value(out, args[0].fake_device) if isinstance(out, Tensor) else out
        out = op.run()
        outputs = tensors(out)
        values = tensors(op.run_on_host()) if op.is_cheap_on_host(outputs) else []
        for output, value in zip_longest(outputs, values):
            vars(output)["host_value"] = value  # None if an in-place op makes it unknown
            if on_gpu(output):
                self.hold(output.untyped_storage())
        if self.in_pass and op.on_gpu and op.is_kernel(outputs):
            self.passes[-1].add(self.times, *op.cost(out))
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as alive until it is freed."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.storages:
            return
        self.storages.add(key)
        weakref.finalize(storage, self.free, key, size)
        self.alive += size
        if self.in_pass:
            self.passes[-1].peak = max(self.passes[-1].peak, self.alive)

    def free(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.alive -= size

    def watch(self, model: nn.Module, stacks: Iterable[tuple[nn.ModuleList, int]]) -> None:
        """Hook a model, below all that TeaCache patches.

        stacks: block lists with their full depth; the last block of a list counts as all that are
            missing.
        """
        for parameter in model.parameters():
            self.hold(parameter.untyped_storage())
        self.weights = sum(map(nbytes, model.parameters()))
        model.register_forward_pre_hook(self.begin_pass)
        model.register_forward_hook(lambda *_: setattr(self, "in_pass", False))
        attention, norm = model.blocks[0].self_attn, model.head.norm
        attention.register_forward_pre_hook(lambda *_: setattr(self.passes[-1], "computed", True))
        norm.register_forward_pre_hook(
            lambda _, args: setattr(self.passes[-1], "head_dtype", str(args[0].dtype))
        )
        for blocks, depth in stacks:
            missing = depth - len(blocks)
            self.weights += missing * sum(map(nbytes, blocks[-1].parameters()))
            blocks[-1].register_forward_pre_hook(
                lambda *_, times=1 + missing: setattr(self, "times", times)
            )
            blocks[-1].register_forward_hook(lambda *_: setattr(self, "times", 1))

    def begin_pass(self, *_: Any) -> None:
        self.passes.append(Pass(peak=self.alive))
        self.in_pass = True

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """Stands in for the VAE's decode."""
        self.alive_at_vae = self.alive - self.alive_at_start
        return latents

    @property
    def peak(self) -> int:
        """Bytes above the weights."""
        return max(one.peak for one in self.passes) - self.alive_at_start

    @property
    def syncs(self) -> list[int]:
        """The host's waits by step."""
        counts = [one.syncs for one in self.passes[1:]]
        return [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(tree, (list, tuple)):
        return [tensor for branch in tree for tensor in tensors(branch)]
    return [tree] if isinstance(tree, Tensor) else []


def on_gpu(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def host_value(tensor: Tensor) -> Tensor | None:
    return vars(tensor).get("host_value") if isinstance(tensor, FakeTensor) else tensor


def on_host(leaf: Any) -> Any:
    """An argument of an op for the same op on the host."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    value = host_value(leaf)
    return torch.ones(leaf.shape, dtype=leaf.dtype) if value is None else value


def with_value(value: Tensor, device: torch.device) -> Tensor:
    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
    fake.host_value = value
    return fake


def to_list(fake: Tensor) -> list[Any]:
    """A tensor's tolist, with one wait for the GPU: torch reads fake ones element by element."""
    copy = fake.cpu()
    with unset_fake_temporarily():
        return on_host(copy).tolist()


def to_number(leaf: Any) -> Any:
    """A leaf of what torch.tensor takes, which would read a fake one past the meter."""
    return leaf.item() if isinstance(leaf, FakeTensor) else leaf


def nbytes(tensor: Tensor) -> int:
    """Bytes in memory: an expanded dimension counts once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(side for side, stride in sides if stride)


# ------------------------------------------------------------------------------------ Wan's code


def prepare(repo: Path) -> None:
    """Make ``wan`` importable from a checkout, as on a machine with a GPU and flash-attn."""
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 15).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    guards[cuda] = guards[cuda] or guards[meta]  # a CPU build has none, and indexing needs one
    FakeTensor.tolist = to_list
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    prepare_torchvision()
    importlib.import_module("diffusers.models.modeling_utils")  # it looks for the real flash_attn
    unused = ("dashscope", "librosa", "peft", "decord", "wan.speech2video", "wan.animate")
    for name in ("flash_attn", *unused):
        sys.modules[name] = Absent(name)
    sys.modules["flash_attn"].flash_attn_varlen_func = flash_attention
    sys.modules["flash_attn_interface"] = None  # not installed
    sys.path.insert(0, str(repo))
    importlib.import_module("wan")
    new_tensor, generator = torch.tensor, torch.Generator
    torch.tensor = lambda data, **kwargs: new_tensor(tree_map(to_number, data), **kwargs)
    torch.Generator = lambda device=None: generator()  # a CPU build has none for the GPU
    gc.freeze()  # generate() collects garbage: not what was imported


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """flash-attn's kernel for one sample, [tokens, heads, dim], by torch, which knows its FLOPs."""
    heads_first = (u.unsqueeze(0).transpose(1, 2) for u in (q, k, v))
    return aten._scaled_dot_product_flash_attention(*heads_first)[0].transpose(1, 2).squeeze(0)


class StandIn:
    """T5, CLIP, VAE and VACE's video reader in one, and small enough to stay on the GPU."""

    def __init__(self, case: Case, meter: Meter) -> None:
        self.model, self.z_dim = self, case.channels
        self.config, self.decode = wan_config(case), meter.decode

    def __call__(self, texts: list[str], device: torch.device) -> list[Tensor]:
        return [torch.empty(126, 4096, dtype=self.config.t5_dtype, device=device)]

    def visual(self, images: list[Tensor]) -> Tensor:
        return torch.empty(len(images), 257, 1280, dtype=torch.float16, device=GPU)

    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        frames, *sides = videos[0].shape[1:]
        height, width = (side // self.config.vae_stride[1] for side in sides)
        return [torch.empty(self.z_dim, (frames - 1) // 4 + 1, height, width, device=GPU)]

    def to(self, *_: Any) -> StandIn:
        return self

    cpu = set_area = set_seq_len = to


def wan_config(case: Case) -> Any:
    return sys.modules["wan.configs"].WAN_CONFIGS[case.task]


def make_pipeline(case: Case, meter: Meter) -> Any:
    """A pipeline as its constructor leaves it, with stand-ins and without models."""
    names = {"t2v": "WanT2V", "i2v": "WanI2V", "vace": "WanVace", "ti2v": "WanTI2V"}
    kind, config = getattr(sys.modules["wan"], names[case.kind]), wan_config(case)
    sys.modules[kind.__module__].tqdm = iter  # no progress bar
    pipeline, stand_in = object.__new__(kind), StandIn(case, meter)
    vars(pipeline).update(config, config=config, device=GPU, rank=0, sp_size=1)
    vars(pipeline).update(dict.fromkeys(("text_encoder", "clip", "vae", "vid_proc"), stand_in))
    vars(pipeline).update(t5_cpu=False, init_on_cpu=False)
    return pipeline


def make_model(case: Case, meter: Meter, layers: int | None) -> nn.Module:
    """A fake model in float32 that stays on the GPU and is watched by the meter."""
    config, module, name = wan_config(case), "wan.modules.model", "WanModel"
    depth, every = config.num_layers, 2 if config.num_layers == 30 else 5
    sizes = {name: config[name] for name in ("dim", "ffn_dim", "freq_dim", "num_heads")}
    sizes |= {"model_type": case.kind, "num_layers": layers or depth, "out_dim": case.channels}
    sizes |= {"in_dim": 36 if case.kind == "i2v" else case.channels}
    if case.kind == "vace":  # it has a block more for every second or fifth one
        module, name = "wan.modules.vace_model", "VaceWanModel"
        sizes |= {"vace_in_dim": 96, "vace_layers": list(range(0, layers or depth, every))}
    with GPU:
        model = getattr(sys.modules[module], name)(**sizes).eval().requires_grad_(False)
    model.freqs = model.freqs.cpu()  # a loaded model has it there until its first call
    model.to = model.cpu = lambda *_: model
    stacks = [(model.blocks, depth)]
    if case.kind == "vace":
        stacks.append((model.vace_blocks, len(range(0, depth, every))))
    meter.watch(model, stacks)
    return model


def generate(pipeline: Any, case: Case) -> None:
    """Run the pipeline's own generate."""
    common = {"frame_num": case.frames, "sampling_steps": STEPS, "shift": SHIFT, "seed": 0}
    if case.kind == "i2v":
        image = Image.new("RGB", case.size)
        pipeline.generate("", image, max_area=math.prod(case.size), **common)
    elif case.kind == "vace":
        sources = pipeline.prepare_source([None], [None], [None], case.frames, case.size, GPU)
        pipeline.generate("", *sources, size=case.size, **common)
    else:
        pipeline.generate("", size=case.size, **common)


# ----------------------------------------------------------------------------------- the figures


@contextlib.contextmanager
def scripted(models: list[nn.Module], order: int | None) -> Iterator[None]:
    """TeaCache that computes the steps of ``COMPUTED``; stock if order is None."""
    if order is None:
        yield
        return
    config = TeaCacheConfig(STEPS, 1.0, coefficients=(0.0,), order=order)
    with teacache(models, config) as cache:
        schedule, decide = cache.schedule, cache.schedule.decide

        def decide_by_script(*args: Any, **kwargs: Any) -> bool:
            computed = decide(*args, **kwargs) or len(schedule.decisions) - 1 in COMPUTED
            schedule.decisions[-1] = replace(schedule.decisions[-1], computed=computed)
            return computed

        schedule.decide = decide_by_script
        yield


def simulate(case: Case, layers: int | None = None, order: int | None = None) -> Meter:
    """Run one generation, with ``layers`` blocks at the cost of all.

    Costs are within 1 %, memory is the same from two layers on, except that VACE has fewer hints.
    """
    meter = Meter()
    names = ["high_noise_model", "low_noise_model"] if "A14B" in case.task else ["model"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        pipeline = make_pipeline(case, meter)
        models = [make_model(case, meter, layers) for _ in names]
        vars(pipeline).update(zip(names, models, strict=True))
        meter.alive_at_start = meter.alive
        with meter, scripted(models, order):
            generate(pipeline, case)
    return meter


def figures(name: str, layers: int | None) -> dict[str, Any]:
    """Measurements of a case by their title, for stock and for both orders."""
    case = CASES[name]
    stock = simulate(case, layers)
    slowest = max(stock.passes, key=lambda one: one.seconds)
    found = {
        "weights, GiB": stock.weights / GIB,
        "stock's peak, GiB": (stock.weights + stock.peak) / GIB,
        "computed pass, TFLOP": slowest.flops / 1e12,
        "computed pass, GB": slowest.bytes / 1e9,
        "computed pass, launches": slowest.launches,
        "computed pass, s": slowest.seconds,
        "stock's host syncs by step": stock.syncs,
    }
    for order, title in enumerate(ORDERS):
        run = simulate(case, layers, order)
        skipped = max(one.seconds for one in run.passes[1:] if not one.computed)
        found |= {
            f"{title}: computed steps": [
                step for step, one in enumerate(run.passes[1::2]) if one.computed
            ],
            f"{title}: peak above stock, GiB": (run.peak - stock.peak) / GIB,
            f"{title}: above stock at the VAE, GiB": (run.alive_at_vae - stock.alive_at_vae) / GIB,
            f"{title}: skipped pass, ms": 1000 * skipped,
            f"{title}: skipped/computed pass, %": 100 * skipped / slowest.seconds,
            f"{title}: host syncs above stock": [
                a - b for a, b in zip(run.syncs, stock.syncs, strict=True)
            ],
            f"{title}: input of the head": sorted({one.head_dtype for one in run.passes[1:]}),
        }
    return found


def latencies(name: str, found: dict[str, Any]) -> list[list[Any]]:
    """[case, threshold, published seconds, predicted seconds, steps computed] by threshold.

    steps computed: the number that explains the published speed-up.
    """
    steps, (stock, by_thresh) = CASES[name].steps, PUBLISHED[name]
    computed, skipped = 2 * found["computed pass, s"], found["order 0: skipped pass, ms"] / 500
    rows = []
    for thresh, seconds in {"stock": stock, **by_thresh}.items():
        on_this_machine = seconds / stock * steps * computed
        count = round((on_this_machine - steps * skipped) / (computed - skipped))
        rows.append([name, thresh, seconds, count * computed + (steps - count) * skipped, count])
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, default=WAN, help="Wan2.1 or Wan2.2 checkout")
    parser.add_argument("--model", nargs="+", choices=CASES, help="default: all of the checkout")
    parser.add_argument("--layers", type=int, help="run only N blocks, at the cost of all")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prepare(args.wan_repo.resolve())
    tasks = sys.modules["wan.configs"].WAN_CONFIGS
    names = args.model or [name for name, case in CASES.items() if case.task in tasks]
    found = {name: figures(name, args.layers) for name in names}
    sampling = [row for name in names if name in PUBLISHED for row in latencies(name, found[name])]
    titles = found[names[0]]
    print(table(["", *names], [[title, *(found[n][title] for n in names)] for title in titles]))
    if sampling:
        print("\nSampling on an A800, in seconds\n")
        print(table(["model", "threshold", "published", "predicted", "steps computed"], sampling))
    if args.json:
        args.json.write_text(json.dumps({"figures": found, "sampling": sampling}, indent=1))


if __name__ == "__main__":
    main()
