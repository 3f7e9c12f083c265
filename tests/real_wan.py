"""The real Wan2.1 on a CPU, at small sizes: many jobs for one import of it.

    python tests/real_wan.py --repo WAN_REPO jobs.json OUT_DIR
    torchrun --nproc_per_node=2 tests/real_wan.py --repo WAN_REPO jobs.json OUT_DIR

jobs.json is a list of
    {"name": ..., "mode": "stock" | "teacache" | "reference", "argv": [flags],
     "seed": of the model's weights, 0 by default,
     "coefficients": [...], "thresh": ..., "use_ret_steps": ..., "order": ...}
the last four for reference only.
stock runs Wan2.1's generate.py, teacache the script at the top of the project, reference the stock
run with the method on top of it as its text says it (``Reference``). ``--ckpt_dir AUTO`` in argv
makes a checkpoint folder in OUT_DIR. Every job leaves there NAME.npy, the frames given to
cache_video or cache_image, and NAME.rank0.json with what was seen from outside (``Run.result``).

What is Wan2.1's own: generate.py, the pipelines' ``generate``, the schedulers, the models and their
forwards (also those for Ulysses and ring), FSDP's wrapping. What is not: the weights (small and
random), text encoder, VAE, CLIP, xfuser, flash-attn, and the sizes (``shrink``). CUDA's autocast is
done on the CPU, so that dtypes are those of a GPU: blocks take bfloat16 and return float32.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import inspect
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")
DIM = 48  # of the small models
PIPELINES = ("WanT2V", "WanI2V", "WanFLF2V", "WanVace")  # the first release has only two of them
WRITERS = ("cache_video", "cache_image")
KEPT: list[Any] = []  # what must live as long as the process


def seeded(*shape: int) -> Tensor:
    """The same random numbers at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------- before Wan2.1 is imported


def prepare(repo: str | Path) -> None:
    """Let ``import wan`` and ``import generate`` of the folder ``repo`` work without CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a machine with a GPU does the same as one without
    torch.set_num_threads(1)  # faster at these sizes, and the same under torchrun
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None  # three functions: torch wants no two names of one
    torch.cuda.synchronize = lambda: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.amp.autocast = autocast
    prepare_torchvision()
    sys.modules |= {"flash_attn": None, "flash_attn_interface": None}  # "not installed"
    sys.modules |= {module.__name__: module for module in fake_xfuser()}
    init = dist.init_process_group

    def init_process_group(backend: str = "", **kwargs: Any) -> None:
        """Gloo for every backend; generate.py asks again at every job."""
        if not dist.is_initialized():
            init("gloo", timeout=datetime.timedelta(seconds=60), **kwargs)

    dist.init_process_group = init_process_group
    sys.path.insert(0, str(repo))


def autocast(enabled: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """torch.cuda.amp.autocast, on the CPU, where float32 means none."""
    return torch.autocast("cpu", torch.bfloat16, enabled and dtype != torch.float32)


def prepare_torchvision() -> None:
    """A CUDA build of torchvision beside a CPU torch lacks two operators that its import names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


def fake_xfuser() -> list[ModuleType]:
    """The part of xfuser that Wan2.1 uses, for one group of all processes."""

    def all_gather(x: Tensor, dim: int) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    class LongContextAttention:
        """Every rank's queries against the keys and values of all of them."""

        def __call__(self, _: None, query: Tensor, key: Tensor, value: Tensor, **__: Any) -> Tensor:
            return attention(query, all_gather(key, 1), all_gather(value, 1))

    root, core = ModuleType("xfuser"), ModuleType("xfuser.core")
    distributed = ModuleType("xfuser.core.distributed")
    distributed.get_sequence_parallel_rank = lambda: dist.get_rank()
    distributed.get_sequence_parallel_world_size = lambda: dist.get_world_size()
    distributed.get_sp_group = lambda: SimpleNamespace(all_gather=all_gather)
    distributed.init_distributed_environment = lambda **kwargs: None
    distributed.initialize_model_parallel = lambda **kwargs: None
    long_ctx = ModuleType("xfuser.core.long_ctx_attention")
    long_ctx.xFuserLongContextAttention = LongContextAttention
    return [root, core, distributed, long_ctx]


# ----------------------------------------------------------------- in place of what is too large


def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any) -> Tensor:
    """flash_attention for one sample, [1, L, heads, C], without dropout, mask and window."""
    keys = k.size(1) if k_lens is None else int(k_lens)
    inputs = (u.to(v.dtype).transpose(1, 2) for u in (q, k[:, :keys], v[:, :keys]))
    return F.scaled_dot_product_attention(*inputs).transpose(1, 2).to(q.dtype)


class TextModel(nn.Module):
    """A prompt's bytes [L] -> context [L, 64]; ``blocks`` because FSDP's wrapping asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False)])
        self.blocks[0].weight.data = seeded(64, 64) / 8
        self.table = nn.Parameter(seeded(256, 64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.table[ids])


class TextEncoder:
    def __init__(self) -> None:
        self.model = TextModel().requires_grad_(False)

    def __call__(self, texts: list[str], device: torch.device) -> list[Tensor]:
        return [self.model(torch.tensor(list(text.encode()[:512]))).to(device) for text in texts]


class VAE:
    """Averages over 4 x 8 x 8 as 16 channels, and back; the first frame is one of its own."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(z_dim=16)

    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        def one(video: Tensor) -> Tensor:
            video = torch.cat([video[:, :1].expand(-1, 3, -1, -1), video], dim=1)
            return torch.einsum("zc,cthw->zthw", seeded(16, 3), F.avg_pool3d(video, (4, 8, 8)))

        with autocast(enabled=False):
            return [one(video) for video in videos]

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        def one(z: Tensor) -> Tensor:
            video = torch.einsum("cz,zthw->cthw", seeded(3, 16) / 16, z.float())
            for dim, times in ((1, 4), (2, 8), (3, 8)):
                video = video.repeat_interleave(times, dim)
            return video[:, 3:].clamp(-1, 1)

        with autocast(enabled=False):
            return [one(z) for z in latents]


class CLIP:
    """257 tokens of 1280 for every picture [3, 1, H, W]."""

    def __init__(self) -> None:
        self.model = nn.Identity()

    def visual(self, pictures: list[Tensor]) -> Tensor:
        tokens = [F.adaptive_avg_pool2d(p[:, 0], 16).flatten(1) for p in pictures]
        return torch.stack([torch.cat([u.mean(1, True), u], 1).T @ seeded(3, 1280) for u in tokens])


def make_model(kind: str, config: Any, seed: int) -> nn.Module:
    """A small WanModel or VaceWanModel for the pipeline class ``kind``.

    Nothing in it is zero that would let a block's work come to nothing. Its time embedding moves
    by distances of which the published polynomials, one for 1.3B and one for 14B, skip about half.
    """
    models = importlib.import_module("wan.modules")
    e_std, e0_bias_std = (0.05, 1.0) if config.dim < 2000 else (0.25, 4.0)
    size = dict(dim=DIM, ffn_dim=2 * DIM, num_heads=4, num_layers=3, text_dim=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "WanVace":
            model = models.VaceWanModel(vace_in_dim=96, **size)
        else:
            model_type = {"WanI2V": "i2v", "WanFLF2V": "flf2v"}.get(kind, "t2v")
            in_dim = 16 if model_type == "t2v" else 36
            model = models.WanModel(model_type=model_type, in_dim=in_dim, **size)
        nn.init.normal_(model.time_embedding[2].weight, std=e_std)
        nn.init.normal_(model.time_embedding[2].bias)
        nn.init.normal_(model.time_projection[1].bias, std=e0_bias_std)
        nn.init.normal_(model.head.head.weight, std=DIM**-0.5)
        for name, parameter in model.named_parameters():
            if ".before_proj." in name or ".after_proj." in name:
                nn.init.normal_(parameter, std=DIM**-0.5)
    return model.eval().requires_grad_(False)


def make_checkpoint(folder: str | Path, task: str, cfg: Any, seed: int = 0) -> Path:
    """A checkpoint folder with the files that Wan2.1's config ``cfg`` of a task names, all empty
    but config.json and the time embedding of ``make_model``."""
    from safetensors.torch import save_file

    folder = Path(folder)
    for part in ("t5_tokenizer", "clip_tokenizer"):
        if part in cfg:
            (folder / cfg[part]).mkdir(parents=True, exist_ok=True)
    for part in ("t5_checkpoint", "vae_checkpoint", "clip_checkpoint"):
        if part in cfg:
            (folder / cfg[part]).touch()
    config = {"dim": cfg["dim"], "model_type": task.split("-")[0].replace("t2i", "t2v")}
    (folder / "config.json").write_text(json.dumps(config))
    kinds = {"i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}
    model = make_model(kinds.get(task.split("-")[0], "WanT2V"), cfg, seed)
    tensors = {k: v for k, v in model.state_dict().items() if k.startswith("time_")}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


# ------------------------------------------------------------------------ what is seen of a run


class Reference:
    """TeaCache as its text says it, on top of a stock run: every step computes all blocks, and on
    a step that the method skips their output is thrown away for h + r; at order 1 that r is on the
    line through the last two, three quarters of the way, unless they are more than 4 apart."""

    def __init__(self, model: nn.Module, steps: int, job: dict[str, Any]):
        self.steps, self.thresh = steps, job["thresh"]
        self.use_ret_steps = job.get("use_ret_steps", False)
        self.p, self.order = np.poly1d(job["coefficients"]), job.get("order", 0)
        self.calls, self.a = 0, 0.0
        self.computed: list[bool] = []
        self.r: dict[int, list[tuple[int, Tensor]]] = {0: [], 1: []}
        signal = model.time_projection if self.use_ret_steps else model.time_embedding
        signal.register_forward_hook(self.decide)
        model.blocks[0].register_forward_pre_hook(self.enter)
        model.blocks[-1].register_forward_hook(self.leave)

    def decide(self, module: nn.Module, args: Any, output: Tensor) -> None:
        i, self.branch = divmod(self.calls, 2)
        self.calls += 1
        if self.branch == 1:
            return
        m = output.double().numpy()
        always = i < 5 if self.use_ret_steps else i in (0, self.steps - 1)
        if not always:
            d = np.abs(m - self.previous).mean() / np.abs(self.previous).mean()
            self.a += self.p(d)
        compute = bool(always or self.a >= self.thresh)
        if compute:
            self.a = 0.0
        self.computed.append(compute)
        self.previous = m

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.h = args[0]

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        step, past = len(self.computed) - 1, self.r[self.branch]
        if self.computed[-1]:
            past.append((step, output - self.h))
            return output
        last, r = past[-1]
        if self.order and len(past) > 1:
            before, old = past[-2]
            gap, ahead = last - before, step - last
            if gap <= 4:
                ahead = 4 if ahead > 4 else ahead
                ahead = 2 * gap if ahead > 2 * gap else ahead
                r = torch.lerp(old, r, 1 + 0.75 * ahead / gap)
        return self.h + r


def inner(model: nn.Module) -> nn.Module:
    """The WanModel in FSDP's wrapper, if it is in one."""
    return getattr(model, "module", model)


def state(model: nn.Module) -> tuple[Any, ...]:
    """The attributes of a WanModel instance, and the number of hooks of each of its modules."""
    own = vars(inner(model))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return set(own), [own.get(name) for name in ("forward", "forward_vace", "blocks")], hooks


class Run:
    """One job: what is asked, and what is seen of it from outside."""

    def __init__(self, job: dict[str, Any], out: Path):
        self.job, self.out = job, out
        self.steps_asked = 0
        self.ran: list[bool] = []  # by call of the model: did the first block run?
        self.vace_ran: list[bool] = []
        self.model: nn.Module | None = None
        self.reference: Reference | None = None

    def watch(self, model: nn.Module) -> None:
        """Called at the end of a pipeline's constructor."""

        def called(*_: Any) -> None:
            self.ran.append(False)
            self.vace_ran.append(False)

        self.model, wan_model = model, inner(model)
        model.register_forward_pre_hook(called)
        for name, ran in (("blocks", self.ran), ("vace_blocks", self.vace_ran)):
            if hasattr(wan_model, name):
                block = getattr(wan_model, name)[0]
                block.register_forward_pre_hook(lambda *_, ran=ran: ran.__setitem__(-1, True))
        if self.job["mode"] == "reference":
            self.reference = Reference(wan_model, self.steps_asked, self.job)
        self.before = state(model)

    def recorded(self, write: Callable) -> Callable:
        """cache_video or cache_image, which also keep the frames of the run as they came."""

        @functools.wraps(write)
        def wrapper(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.ran:  # else the script is only trying the writer
                np.save(self.out / f"{self.job['name']}.npy", tensor.float().numpy())
            return write(tensor, *args, **kwargs)

        return wrapper

    def result(self) -> dict[str, Any]:
        def by_step(ran: list[bool]) -> list[list[bool]]:
            return [ran[i : i + 2] for i in range(0, len(ran), 2)]

        has_vace = self.model is not None and hasattr(inner(self.model), "vace_blocks")
        return {
            "steps": by_step(self.ran),  # [conditional ran the blocks, unconditional did]
            "vace_steps": by_step(self.vace_ran) if has_vace else None,
            "restored": self.model is None or state(self.model) == self.before,
            "computed": self.reference and self.reference.computed,  # by the reference's decision
        }


# --------------------------------------------------------------------- after it was imported


class Harness:
    """The imported Wan2.1, with small pipelines that tell ``self.run`` of their model."""

    run: Run

    def __init__(self) -> None:
        self.generate, self.wan = map(importlib.import_module, ("generate", "wan"))
        self.writers = {name: getattr(self.generate, name) for name in WRITERS}
        self.flash = {
            module: module.flash_attention
            for name, module in sys.modules.items()
            if name.startswith("wan.") and hasattr(module, "flash_attention")
        }
        self.pipelines = {
            name: vars(self.wan)[name] for name in PIPELINES if name in vars(self.wan)
        }
        for name, kind in self.pipelines.items():
            kind.__init__ = self.constructor(name, kind.__init__)
        if "WanVace" in self.pipelines:
            prepare_small_sources(self.pipelines["WanVace"])
        self.shrink()

    def shrink(self) -> None:
        """About 1/8 of every side, in multiples of 16, under the names of the full sizes."""
        sizes, areas = self.generate.SIZE_CONFIGS, self.generate.MAX_AREA_CONFIGS
        for name, size in sizes.items():
            sizes[name] = tuple(round(side / 128) * 16 for side in size)
        for name in areas:
            areas[name] = math.prod(sizes[name])

    def constructor(self, name: str, stock: Callable) -> Callable:
        """A pipeline's ``__init__`` with the stock one's signature."""
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def __init__(pipeline: Any, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(pipeline, *args, **kwargs)
            given.apply_defaults()
            asked = SimpleNamespace(**given.arguments)
            vars(pipeline).update(settings(asked))
            model = make_model(name, asked.config, self.run.job.get("seed", 0))
            if asked.use_usp:
                use_usp(model)
            pipeline.model = shard(model) if asked.dit_fsdp else model
            self.run.watch(pipeline.model)

        return __init__

    def do(self, run: Run) -> None:
        """Run a job as if it were the first one."""
        self.run, job = run, run.job
        for name, kind in self.pipelines.items():
            setattr(self.wan, name, kind)
        for name, write in self.writers.items():
            setattr(self.generate, name, run.recorded(write))
        for module, flash in self.flash.items():
            module.flash_attention = flash if job["mode"] == "teacache" else attention
        argv = self.with_checkpoint(job["argv"], run.out)
        if job["mode"] == "teacache":
            script = importlib.import_module("teacache_generate")
            script.main([*argv, "--wan_repo", str(Path(self.generate.__file__).parent)])
        else:
            sys.argv = ["generate.py", *argv]
            args = self.generate._parse_args()
            run.steps_asked = args.sample_steps
            self.generate.generate(args)

    def with_checkpoint(self, argv: list[str], out: Path) -> list[str]:
        if "AUTO" not in argv:
            return argv
        task = argv[argv.index("--task") + 1] if "--task" in argv else "t2v-14B"
        folder = out / f"checkpoint-{task}-rank{os.getenv('RANK', '0')}"
        configs = self.generate.WAN_CONFIGS
        seed = self.run.job.get("seed", 0)
        make_checkpoint(folder, task, configs.get(task, configs["t2v-14B"]), seed)
        return [str(folder) if argument == "AUTO" else argument for argument in argv]


def settings(asked: SimpleNamespace) -> dict[str, Any]:
    """The attributes that the pipelines' ``generate`` reads, but for the model."""
    text_encoder = TextEncoder()
    if asked.t5_fsdp:
        text_encoder.model = shard(text_encoder.model)
    as_configured = ("num_train_timesteps", "param_dtype", "vae_stride", "patch_size")
    return {
        **{name: asked.config[name] for name in (*as_configured, "sample_neg_prompt")},
        **{name: getattr(asked, name) for name in ("config", "rank", "t5_cpu", "use_usp")},
        **{"device": CPU, "text_encoder": text_encoder, "vae": VAE(), "clip": CLIP()},
        "sp_size": dist.get_world_size() if asked.use_usp else 1,
    }


def use_usp(model: nn.Module) -> None:
    """Ulysses and ring as the stock constructors set them up: forwards set on the instances."""
    usp = importlib.import_module("wan.distributed.xdit_context_parallel")
    for block in [*model.blocks, *getattr(model, "vace_blocks", ())]:
        block.self_attn.forward = MethodType(usp.usp_attn_forward, block.self_attn)
    model.forward = MethodType(usp.usp_dit_forward, model)
    if hasattr(model, "vace_blocks"):
        model.forward_vace = MethodType(usp.usp_dit_forward_vace, model)


def shard(model: nn.Module) -> nn.Module:
    """FSDP by Wan2.1's own wrapping. The ranks' weights are the same ones: there is no syncing,
    which FSDP has on GPUs only."""
    shard_model = importlib.import_module("wan.distributed.fsdp").shard_model
    return shard_model(model, CPU, param_dtype=torch.float32, sync_module_states=False)


class Side(int):
    """A side of a small video. Two of them multiply to the full area: the only one that VACE's
    prepare_source takes."""

    def __mul__(self, other: int) -> int:
        return 720 * 1280 if int(self) * int(other) > 10_000 else 480 * 832


def prepare_small_sources(vace: Any) -> None:
    """Let VACE read its sources at the small sizes, onto the CPU."""
    stock = vace.prepare_source
    processor = importlib.import_module("wan.utils.vace_processor").VaceVideoProcessor

    class SmallVideoProcessor(processor):  # type: ignore[misc,valid-type]
        def set_area(self, area: int) -> None:
            super().set_area(area // 64)

    def prepare_source(self: Any, *sources: Any) -> Any:
        *others, size, _ = sources
        fps = self.config.sample_fps
        self.vid_proc = SmallVideoProcessor((4, 16, 16), 0, 0, fps, fps, True, 75600, True)
        return stock(self, *others, tuple(map(Side, size)), CPU)

    vace.prepare_source = prepare_source


# ------------------------------------------------------------------------------------ main


def attempt(harness: Harness, run: Run) -> tuple[int, str | None]:
    """Exit code and error that the job would have had as a process of its own."""
    try:
        harness.do(run)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0, None
        return 1, str(leaving.code)
    except Exception as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
    return 0, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="Wan2.1's folder")
    parser.add_argument("jobs", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    jobs = json.loads(given.jobs.read_text())
    given.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    prepare(given.repo.resolve())
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    harness = Harness()
    for job in jobs:
        for stream in (sys.stdout, sys.stderr):
            print(f"=== {job['name']}", file=stream, flush=True)
        run, began = Run(job, given.out), time.perf_counter()
        exit_code, error = attempt(harness, run)
        result = {"exit": exit_code, "error": error, **run.result()}
        result["seconds"] = round(time.perf_counter() - began, 2)
        target = given.out / f"{job['name']}.rank{os.getenv('RANK', '0')}.json"
        target.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
