"""Runs many jobs on the real Wan2.1 or Wan2.2, small and on a CPU, after one import of Wan.

    python tests/real_wan/harness.py --repo WAN_REPO jobs.json OUT_DIR    (or with torchrun)

jobs.json: a list of {"name", "mode", "argv": flags, "fails": "decode" to let the VAE fail,
"float32": autocast to that dtype}. Modes: stock runs generate.py, teacache the script at the top of
the project, reference stock with ``Reference`` on its models (and its settings in the job).
``--ckpt_dir AUTO`` makes a checkpoint folder. Each job writes to OUT_DIR its videos before the
codec, NAME.rank0.0.npy, NAME.rank0.1.npy and so on, and NAME.rank0.json (``Run.result``).

Replaced: weights (small and random), text encoder, VAE, CLIP, flash-attn, NCCL, sizes. CUDA's
autocast runs on the CPU with a GPU's dtypes: blocks take bfloat16 and return float32.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

DEVICE = torch.device("cpu")  # bench_gpu.py sets another
DIM, TEXT = 48, 64  # width of the small models; bytes of a prompt
RANK = int(os.getenv("RANK", "0"))  # the script's queue changes the environment


def seeded(*shape: int) -> Tensor:
    """The same random numbers at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


# ------------------------------------------------------------------------ before Wan is imported


def prepare(repo: str | Path) -> None:
    """Let ``import wan`` and ``import generate`` of the folder ``repo`` work without CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a machine with a GPU does the same as one without
    torch.set_num_threads(1)  # faster at these sizes, and the same under torchrun
    torch.cuda.current_device = lambda: 0
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda device=None: None)  # torch wants no two names of one
    torch.amp.autocast, torch.layer_norm, F.linear = Autocast, layer_norm, linear
    torch.cuda.amp.autocast = functools.partial(Autocast, "cuda")
    sys.modules |= {"flash_attn": None, "flash_attn_interface": None}  # "not installed"
    prepare_imports(repo)
    prepare_distributed()


def prepare_imports(repo: str | Path) -> None:
    """Let ``wan`` of a folder be imported without packages that are slow and not used here, or not
    installed."""
    prepare_torchvision()
    unused = ["librosa", "peft", "dashscope", "scipy.stats"]
    unused += [name for name in ("decord", "ftfy") if importlib.util.find_spec(name) is None]
    for name in unused:
        sys.modules[name] = Absent(name)
    sys.path.insert(0, str(repo))


class Autocast(torch.autocast):
    """CUDA's autocast, on the CPU. To float32 it casts too, which matters to bfloat16 weights."""

    float32 = False  # whether the current job computes in float32

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True):
        super().__init__("cpu", torch.bfloat16, enabled)
        self.fast_dtype = torch.float32 if self.float32 else dtype or torch.float16


def layer_norm(x: Tensor, shape: Any, *affine: Any, stock: Callable = torch.layer_norm) -> Tensor:
    """CUDA's autocast does this function in float32, weights and all."""
    if torch.is_autocast_enabled("cpu"):
        x, *affine = (u.float() if isinstance(u, Tensor) else u for u in (x, *affine))
    return stock(x, shape, *affine)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stock: Callable = F.linear
) -> Tensor:
    """In bfloat16: sums in float64 and rounds once. Ten times faster than the CPU's own kernel, and
    a token's result does not depend on how many tokens its rank has."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        inputs = [u.to(torch.get_autocast_dtype("cpu")) for u in inputs]
    if inputs[0].dtype != torch.bfloat16:
        return stock(x, weight, bias)
    with torch._C._DisableAutocast():
        return stock(*(u.double() for u in inputs)).bfloat16()


class Absent(ModuleType):
    """A module that is imported from and never used."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def prepare_torchvision() -> None:
    """A CUDA build of torchvision beside a CPU torch lacks two operators that its import names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        prepare_torchvision.library = library  # must live as long as the process


def prepare_distributed() -> None:
    """Gloo for every backend, and the facts of a GPU that xfuser's imports read."""
    init, new_group, count = dist.init_process_group, dist.new_group, itertools.count()
    shared = f"{tempfile.gettempdir()}/real_wan.{os.getenv('TORCHELASTIC_RUN_ID')}"

    def init_process_group(backend: str = "", **kwargs: Any) -> None:
        """With a store of its own: after Wan2.2's destroy_process_group, torchrun's is used up."""
        ranks = {name: int(os.environ[name.upper()]) for name in ("rank", "world_size")}
        store = Path(f"{shared}.{next(count)}")
        atexit.register(store.unlink, missing_ok=True)
        init("gloo", init_method=store.as_uri(), timeout=datetime.timedelta(seconds=60), **ranks)

    def gloo_group(*args: Any, backend: str = "", **kwargs: Any) -> Any:
        return new_group(*args, backend="gloo", **kwargs)

    dist.init_process_group, dist.new_group = init_process_group, gloo_group
    gpu = SimpleNamespace(name="", major=8, minor=0)
    torch.cuda.get_device_properties = lambda device=None: gpu
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.get_device_name = lambda device=None: ""
    torch.version.cuda = "12.4"


def prepare_xfuser() -> None:
    """Use the CPU's attention, and forget the groups of earlier jobs."""
    if int(os.getenv("WORLD_SIZE", "1")) == 1 or importlib.util.find_spec("xfuser") is None:
        return
    kernels = importlib.import_module("yunchang.kernels.attention")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernels._scaled_dot_product_flash_attention = kernel
    state = importlib.import_module("xfuser.core.distributed.parallel_state")
    vars(state).update(dict.fromkeys(("_WORLD", "_DP", "_CFG", "_SP", "_TP", "_PP")))


# --------------------------------------------------------------- stand-ins for what is too large


def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any) -> Tensor:
    """flash_attention for one sample, [1, L, heads, C], without dropout, mask and window."""
    keys = k.size(1) if k_lens is None else int(k_lens)
    inputs = (u.to(v.dtype).transpose(1, 2) for u in (q, k[:, :keys], v[:, :keys]))
    return F.scaled_dot_product_attention(*inputs).transpose(1, 2).to(q.dtype)


class TextEncoder:
    """A prompt's bytes [L] -> context [L, 64]."""

    def __init__(self, **_: Any) -> None:
        self.model = nn.Identity()

    def __call__(self, texts: list[str], device: torch.device) -> list[Tensor]:
        return [seeded(256, 64)[list(text.encode()[:TEXT])].to(device) for text in texts]


class VAE:
    """Averages over 4 x side x side as z_dim channels, and back; the first frame is its own."""

    z_dim, side = 16, 8
    run: Callable[[], Run]  # the current job

    def __init__(self, *, vae_pth: str, **_: Any) -> None:
        torch.load(vae_pth)
        self.device, self.dtype = DEVICE, torch.float32
        self.model = SimpleNamespace(z_dim=self.z_dim)

    @torch.autocast("cpu", enabled=False)
    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        longer = (torch.cat([v[:, :1].expand(-1, 3, -1, -1), v], dim=1) for v in videos)
        small = (F.avg_pool3d(video, (4, self.side, self.side)) for video in longer)
        return [torch.einsum("zc,cthw->zthw", seeded(self.z_dim, 3), video) for video in small]

    @torch.autocast("cpu", enabled=False)
    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        small = torch.einsum("cz,zthw->cthw", seeded(3, self.z_dim) / 16, latents[0].float())
        video = F.interpolate(small[None], scale_factor=(4, self.side, self.side))[0, :, 3:]
        return type(self).run().decode(lambda: [video.clamp(-1, 1)])


class VAE48(VAE):  # that of ti2v-5B
    z_dim, side = 48, 16


class CLIP:
    """257 tokens of 1280 for every picture [3, 1, H, W]."""

    def __init__(self, **_: Any) -> None:
        self.model = nn.Identity()

    def visual(self, pictures: list[Tensor]) -> Tensor:
        tokens = [F.adaptive_avg_pool1d(p.flatten(1), 257) for p in pictures]
        return torch.stack([u.T @ seeded(3, 1280) for u in tokens])


def model_config(task: str, cfg: Any) -> dict[str, Any]:
    """The config.json of a task's transformer. cfg: Wan's config of the task."""
    config = {name: cfg[name] for name in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")}
    kind = task.split("-")[0].replace("t2i", "t2v")
    channels = 48 if kind == "ti2v" else 16
    in_dim = 36 if kind in ("i2v", "flf2v") else channels
    return config | {"model_type": kind, "in_dim": in_dim, "out_dim": channels}


def new_model(model_type: str, **sizes: Any) -> nn.Module:
    """A WanModel or VaceWanModel."""
    if model_type == "vace":
        models = importlib.import_module("wan.modules.vace_model")
        return models.VaceWanModel(vace_in_dim=96, **sizes)
    return importlib.import_module("wan.modules.model").WanModel(model_type, **sizes)


def make_model(config: dict[str, Any], seed: int) -> nn.Module:
    """A small model for a checkpoint's config.json: no weights of zero, which would undo a block's
    work, and a time embedding of which the polynomials skip about half."""
    e_std, e0_bias_std = (0.05, 1.0) if config["dim"] < 2000 else (0.25, 4.0)
    size = dict(dim=DIM, ffn_dim=2 * DIM, num_heads=4, num_layers=2, text_dim=64)
    size |= {name: config[name] for name in ("model_type", "in_dim", "out_dim")}
    if config["model_type"] not in ("i2v", "flf2v"):  # these cut their context at 512
        size["text_len"] = TEXT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(**size)
        if hasattr(model, "img_emb"):  # of CLIP's 1280, narrow in between
            model.img_emb.proj[1], model.img_emb.proj[3] = nn.Linear(1280, 32), nn.Linear(32, DIM)
        stds = {"time_embedding.2.weight": e_std, "time_embedding.2.bias": 1.0}
        stds |= {"time_projection.1.bias": e0_bias_std, "head.head.weight": DIM**-0.5}
        for name, parameter in model.named_parameters():
            std = DIM**-0.5 if "er_proj." in name else stds.get(name)  # before_proj, after_proj
            if std:
                nn.init.normal_(parameter, std=std)
    return model.to(DEVICE).eval().requires_grad_(False)


def from_pretrained(folder: str | Path, subfolder: str = "") -> nn.Module:
    """Replaces WanModel's; the two models of A14B differ."""
    config = json.loads((Path(folder) / subfolder / "config.json").read_text())
    return make_model(config, seed=1000 * (subfolder == "high_noise_model"))


def make_checkpoint(folder: Path, task: str, cfg: Any) -> None:
    """Write the files that Wan's config ``cfg`` of a task names, sound and tiny; of transformers
    config.json and the time embedding of ``make_model``."""
    for part in {"t5_tokenizer", "clip_tokenizer"} & cfg.keys():
        (folder / cfg[part]).mkdir(parents=True)
        (folder / cfg[part] / "tokenizer.json").write_text("{}")
    for part in {"t5_checkpoint", "vae_checkpoint", "clip_checkpoint"} & cfg.keys():
        torch.save({"weight": torch.zeros(4)}, folder / cfg[part])
    config = model_config(task, cfg)
    for name in [v for k, v in cfg.items() if k.endswith("_noise_checkpoint")] or [""]:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        weights = from_pretrained(folder, name).state_dict()
        tensors = {k: v for k, v in weights.items() if k.startswith("time_")}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------ what is seen of a run


class Reference:
    """TeaCache from its formula, on top of a stock run: every step computes all blocks, and on a
    skipped step the head gets h + r.

    Of a job: ``thresh``, or the record that has it; ``method``, plain, ret or sigma, the first two
    with ``coefficients``; ``forced``, steps that are computed; ``in_a_row``, the most skipped in a
    row; ``guided_steps`` n: from step n on the unconditional call returns the conditional output.
    ``order`` 0: r is the last residual r1. 1: u = u1 + g k (u1 - u2), with u2 the unconditional
    one before, and the same with another g for c - u; k is how far the noise level has moved, in
    gaps between the two, but for no more steps than lie between them. g: 1, then at each computed
    step the least-squares factor for its k and residual, clipped to 0..1. After guidance c has the
    first g.

    Two models share one schedule. The first step of each is computed; its residuals start anew.
    """

    def __init__(self, models: list[nn.Module], steps: int, job: dict[str, Any]):
        self.method, self.order = job.get("method", "plain"), job.get("order", 0)
        self.p = np.poly1d(job.get("coefficients", [0]))
        self.guided_steps = job.get("guided_steps", steps)
        self.thresh = job["thresh"]
        if isinstance(self.thresh, str):
            self.thresh = json.loads(Path(self.thresh).read_text())["thresh"]
        first = {"plain": [0], "ret": range(5), "sigma": range(math.ceil(steps / 5))}[self.method]
        self.forced = job.get("forced", [*first, *[steps - 1] * (self.method != "ret")])
        a_tenth = math.ceil(steps / 10)
        self.in_a_row = job.get("in_a_row", a_tenth if self.method == "sigma" else steps)
        self.calls, self.accumulated, self.model = 0, 0.0, None
        self.computed: list[bool] = []
        self.levels: list[float] = []
        for model in models:
            model.register_forward_pre_hook(functools.partial(self.call, model), with_kwargs=True)
            model.register_forward_hook(self.returned)
            if self.method != "sigma":
                measured = "time_embedding" if self.method == "plain" else "time_projection"
                inner(model).get_submodule(measured).register_forward_hook(self.decide_by_embedding)
            inner(model).blocks[0].register_forward_pre_hook(self.enter)
            inner(model).head.register_forward_pre_hook(self.leave)

    def call(self, model: nn.Module, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.step, self.branch = divmod(self.calls, 2)
        self.calls += 1
        if self.branch == 1:
            return
        t = kwargs["t"] if "t" in kwargs else args[1]
        self.levels.append(float(t.flatten()[-1]) / 1000)  # the first tokens of ti2v may have 0
        self.first_of_model, self.model = model is not self.model, model
        if self.first_of_model:
            self.past: list[tuple[int, list[Tensor]]] = []  # step, c and u
            self.gains = [1.0, 1.0]
        if self.method == "sigma":
            now, last = (0.33 + 0.66 * self.levels[step] for step in (-1, self.last_computed()))
            self.decide(abs(1 - now / last))

    def last_computed(self) -> int:
        return max((step for step, computed in enumerate(self.computed) if computed), default=0)

    def decide_by_embedding(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.branch == 1:
            return
        m = (output[:, -1] if output.dim() == 3 else output).double().cpu().numpy()
        previous = m if self.step == 0 else self.previous
        self.previous = m
        self.decide(self.p(np.abs(m - previous).mean() / np.abs(previous).mean()))

    def decide(self, change: float) -> None:
        self.accumulated += change
        forced = self.first_of_model or self.step in self.forced
        too_long = self.step - self.last_computed() > self.in_a_row
        self.computed.append(bool(forced or too_long or self.accumulated >= self.thresh))
        if self.computed[-1]:
            self.accumulated = 0.0

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.h = args[0]

    def leave(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        if not self.computed[-1]:
            return (self.h + self.predicted(), *args[1:])
        guided = self.step < self.guided_steps
        if self.branch == 0:
            self.past.append((self.step, []))
        if self.branch == 0 or guided:
            self.past[-1][1].append(args[0] - self.h)
        if self.branch == guided and len(self.past) > 2:
            self.measure(*self.past[-3:])
        return None

    def gaps(self, step: int, last: int, before: int) -> float:
        """From the noise level of the last step to that of another, in gaps between these two."""
        s2, s1, s = (self.levels[i] for i in (before, last, step))
        return (s - s1) / (s1 - s2) if s1 != s2 else 0.0

    def predicted(self) -> Tensor:
        last, newest = self.past[-1]
        r1 = newest[self.branch % len(newest)]
        if self.order == 0 or len(self.past) < 2:
            return r1
        before, older = self.past[-2]
        k = self.gaps(min(self.step, 2 * last - before), last, before)
        changes = u_and_difference(newest, older)[: 2 - self.branch]
        return sum((self.gains[i] * k * x for i, x in enumerate(changes)), r1)

    def measure(self, *last_three: tuple[int, list[Tensor]]) -> None:
        """The gains, from a part of the tokens of all ranks."""
        (before, r2), (last, r1), (now, r) = (
            (step, [x[:, :: math.ceil(x.size(1) / 1024)] for x in both])
            for step, both in last_three
        )
        r1, r2, k = r1[: len(r)], r2[: len(r)], self.gaps(now, last, before)
        lines, actual = u_and_difference(r1, r2), u_and_difference(r, r1)
        pairs = zip(actual, lines, strict=True)
        sums = torch.stack([(x * line).double().sum() for a, line in pairs for x in (a, line)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        if k:
            products = sums.view(-1, 2).tolist()
            self.gains = [min(max(a / (k * b), 0.0), 1.0) if b else 0.0 for a, b in products]

    def returned(self, module: nn.Module, args: Any, output: list[Tensor]) -> list[Tensor] | None:
        if self.branch == 0:
            self.conditional = output
        return self.conditional if self.step >= self.guided_steps else None


def u_and_difference(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """Changes of u and of c - u; of c where there is no u."""
    if len(new) == 1:
        return [new[0] - old[0]]
    return [new[1] - old[1], (new[0] - old[0]) - (new[1] - old[1])]


def inner(model: nn.Module) -> nn.Module:
    """The WanModel, in a wrapper or not."""
    return next(m for m in model.modules() if {"blocks", "head"} <= m._modules.keys())


def state(model: nn.Module) -> tuple[Any, ...]:
    """What a patch would change: attributes of the WanModel, what each of its modules calls, and
    the number of their hooks."""
    called = ("forward", "forward_vace", "_compiled_call_impl")
    modules = [
        (*map(vars(m).get, called), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]
    return set(vars(inner(model))), modules


class Run:
    """One job, and what is seen of it from outside."""

    def __init__(self, job: dict[str, Any], out: Path):
        self.job, self.out = job, out
        self.steps_asked = self.constructed = self.decoded = 0
        self.ran, self.vace_ran = [], []  # by call of a model: did its first block, VACE's compute?
        self.patched: list[bool] = []  # by video: was a model patched when it was decoded?
        self.models, self.before = [], []
        self.reference: Reference | None = None

    def watch(self, pipeline: Any) -> None:
        """Called at the end of a pipeline's constructor. On a skipped step a block is called, but
        not its attention."""
        names = ("model", "high_noise_model", "low_noise_model")
        models = [vars(pipeline)[name] for name in names if name in vars(pipeline)]
        self.constructed, self.models = self.constructed + 1, models

        def called(*_: Any) -> None:
            self.ran.append(False)
            self.vace_ran.append(False)

        def computed(ran: list[bool], *_: Any) -> None:
            ran[-1] = True

        for model in models:
            model.register_forward_pre_hook(called)
            for name, ran in (("blocks", self.ran), ("vace_blocks", self.vace_ran)):
                for block in getattr(inner(model), name, [])[:1]:
                    block.self_attn.register_forward_pre_hook(functools.partial(computed, ran))
        if self.job["mode"] == "reference":
            self.reference = Reference(models, self.steps_asked, self.job)
        self.before = [state(model) for model in models]

    def decode(self, decode: Callable) -> list[Tensor]:
        """Called by the VAE: saves the frames."""
        if self.job.get("fails") == "decode":
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        (video,) = decode()
        np.save(self.out / f"{self.job['name']}.rank{RANK}.{self.decoded}.npy", video.cpu())
        self.decoded += 1
        self.patched.append([state(model) for model in self.models] != self.before)
        return [video]

    def result(self) -> dict[str, Any]:
        has_vace = any(hasattr(inner(model), "vace_blocks") for model in self.models)
        seen = ("ran", "constructed", "decoded", "patched")
        return {name: vars(self)[name] for name in seen} | {
            "vace_ran": self.vace_ran if has_vace else self.ran,
            "restored": [state(model) for model in self.models] == self.before,
            "computed": self.reference and self.reference.computed,
        }


# ----------------------------------------------------------------------- after Wan was imported


class Side(int):
    """A side of a small video. Two of them multiply to an area that VACE's prepare_source takes."""

    def __mul__(self, other: int) -> int:
        return 720 * 1280 if int(self) * int(other) > 2_000 else 480 * 832


class Harness:
    """The imported Wan, with small pipelines that report their models to ``self.run``."""

    def __init__(self) -> None:
        self.generate, wan = map(importlib.import_module, ("generate", "wan"))
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "wan"]
        has_flash = [module for module in modules if hasattr(module, "flash_attention")]
        self.flash = {module: module.flash_attention for module in has_flash}
        self.stand_in(modules)
        self.shrink()

        def construct(pipeline: Any, stock: Callable, *args: Any, **kwargs: Any) -> None:
            stock(pipeline, *args, **kwargs)
            self.run.watch(pipeline)

        for kind in [value for value in vars(wan).values() if hasattr(value, "generate")]:
            kind.device = property(lambda pipeline: DEVICE, lambda pipeline, device: None)
            kind.__init__ = functools.partialmethod(construct, kind.__init__)
            if hasattr(kind, "prepare_source"):
                stock = kind.prepare_source
                kind.prepare_source = functools.partialmethod(self.prepare_source, stock)

    def stand_in(self, modules: list[ModuleType]) -> None:
        """Replace what is large, wherever it was imported to."""
        VAE.run = lambda: self.run
        shard_model = importlib.import_module("wan.distributed.fsdp").shard_model

        def shard(model: nn.Module, **_: Any) -> nn.Module:
            """Wan's own, but without syncing, which FSDP has on GPUs only: all ranks' are equal."""
            return shard_model(model, DEVICE, sync_module_states=False)

        small = {"T5EncoderModel": TextEncoder, "CLIPModel": CLIP, "shard_model": shard}
        small |= {"WanVAE": VAE, "Wan2_1_VAE": VAE, "Wan2_2_VAE": VAE48}
        for module in modules:
            for name in small.keys() & vars(module).keys():
                setattr(module, name, small[name])
            for name in {"WanModel", "VaceWanModel"} & vars(module).keys():
                getattr(module, name).from_pretrained = staticmethod(from_pretrained)

    def shrink(self) -> None:
        """Make sides 1/16 as long, in multiples of 16, and ti2v's 1/8, under their old names."""
        sizes, areas = self.generate.SIZE_CONFIGS, self.generate.MAX_AREA_CONFIGS
        for name, size in sizes.items():
            part = 8 if 704 in size else 16
            sizes[name] = tuple(Side(round(side / part / 16) * 16) for side in size)
        for name in areas:
            areas[name] = math.prod(map(int, sizes[name]))

    @staticmethod
    def prepare_source(vace: Any, stock: Callable, *sources: Any) -> Any:
        """VACE's own: reads its sources at the small sizes, onto the device."""
        reader = vace.vid_proc
        reader.set_area = lambda area: type(reader).set_area(reader, area // 256)
        return stock(vace, *sources[:-1], DEVICE)

    def do(self, run: Run) -> None:
        """Run a job as if it were the first one."""
        self.run, job = run, run.job
        Autocast.float32 = job.get("float32", False)
        if dist.is_initialized():
            dist.destroy_process_group()
        prepare_xfuser()
        for module, flash in self.flash.items():
            runs_here = job["mode"] == "teacache" or flash.__name__ != "flash_attention"  # a fork's
            module.flash_attention = flash if runs_here else attention
        argv = [self.checkpoint(job, run.out) if u == "AUTO" else u for u in job["argv"]]
        if job["mode"] == "teacache":
            script = importlib.import_module("teacache_generate")
            script.main([*argv, "--wan_repo", str(Path(self.generate.__file__).parent)])
        else:
            sys.argv = ["generate.py", *argv]
            args = self.generate._parse_args()
            run.steps_asked = args.sample_steps
            self.generate.generate(args)

    def checkpoint(self, job: dict[str, Any], out: Path) -> str:
        """The folder for a job's task, one for each rank."""
        task = job["argv"][job["argv"].index("--task") + 1]
        folder = out / f"checkpoint-{task}.rank{RANK}"
        if not folder.exists():
            make_checkpoint(folder, task, self.generate.WAN_CONFIGS[task])
        return str(folder)


def main() -> None:
    repo, jobs, out = map(Path, sys.argv[2:])
    warnings.simplefilter("ignore")
    prepare(repo.resolve())
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    harness = Harness()
    gc.collect()
    gc.freeze()  # Wan and the script collect after each run: half a second through all imports
    for job in json.loads(jobs.read_text()):
        for stream in (sys.stdout, sys.stderr) if RANK == 0 else ():
            print(f"=== {job['name']}", file=stream, flush=True)
        run, status, error = Run(job, out), 0, None  # as of a process of its own
        try:
            harness.do(run)
        except SystemExit as leaving:
            status = leaving.code or 0
        except Exception as raised:
            traceback.print_exc()
            status, error = 1, repr(raised)
        result = {"exit": status, "error": error, **run.result()}
        (out / f"{job['name']}.rank{RANK}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
