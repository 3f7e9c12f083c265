"""TeaCache for Wan2.1: the same video, two to three times sooner. This one file is the whole of it.

Copy it beside Wan2.1's generate.py and run it with generate.py's flags and its own (--help):

    python teacache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B \\
        --prompt "Two cats box on a spotlighted stage." --teacache_thresh 0.08

It reads in the order in which it runs, in layers that do not know each other:
  policy        numbers in, a decision out: which steps are computed and which are skipped
  cache         tensors: one residual a branch, put in place of the blocks of one WanModel
  attention     PyTorch's, where flash-attn cannot be had
  command line  flags, every check before a weight is loaded, then Wan2.1's own generate()

TeaCache: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108. Wan2.1: https://github.com/Wan-Video/Wan2.1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import io
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import imageio
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

log = logging.getLogger("teacache")

# ---------------------------------------------------------------------------------------- policy


# FITS[use_ret_steps][row]: a default threshold, and a polynomial of degree 4, highest power first.
# The coefficients, and the thresholds as a range, are published by the authors of TeaCache.
FITS: dict[bool, dict[str, tuple[float, list[float]]]] = {
    False: {
        "t2v-1.3B": (
            0.08,
            [2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975, 0.137887774],
        ),
        "t2v-14B": (
            0.2,
            [-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404],
        ),
        "i2v-14B-480P": (0.26, [-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289]),
        "i2v-14B-720P": (0.3, [-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683]),
    },
    True: {
        "t2v-1.3B": (0.1, [-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664]),
        "t2v-14B": (0.2, [-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525]),
        "i2v-14B-480P": (0.3, [257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977]),
        "i2v-14B-720P": (0.3, [8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401]),
    },
}
ROWS = tuple(FITS[False])
RETENTION_STEPS = 5


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of one generation.

    steps: the pipeline's ``sampling_steps``.
    thresh: a step is computed once the accumulated distance reaches it; 0 computes every step.
    coefficients: a polynomial, relative L1 distance to increment, highest power first.
    use_ret_steps: compare e0 [1, 6, dim] and always compute the first 5 steps; else compare
        e [1, dim] and always compute the first and the last step.
    guide_scale: the pipeline's; Wan2.1 multiplies the unconditional output by 0 where it is 1.
    """

    steps: int
    thresh: float
    coefficients: list[float]
    use_ret_steps: bool = False
    guide_scale: float = 5.0

    @classmethod
    def from_row(
        cls, row: str, steps: int, thresh: float | None = None, use_ret_steps: bool = False
    ) -> TeaCacheConfig:
        """The published settings for one of ``ROWS``; KeyError for another."""
        default, coefficients = FITS[use_ret_steps][row]
        return cls(steps, default if thresh is None else thresh, coefficients, use_ret_steps)

    @property
    def one_branch(self) -> bool:
        """Whether the unconditional branch is left out. At thresh 0 it is not: stock to the bit."""
        return self.guide_scale == 1 and self.thresh > 0

    def always_computes(self, step: int) -> bool:
        """Whether a step is computed whatever the distances say, as one after the last would be."""
        first = step < RETENTION_STEPS if self.use_ret_steps else step == 0
        last = self.steps if self.use_ret_steps else self.steps - 1
        return first or step >= last or self.thresh == 0


@dataclass(frozen=True)
class Step:
    """What was decided at one step, and from what."""

    timestep: float
    distance: float | None  # relative L1 distance of the signal to the step before; None at step 0
    increment: float | None  # the polynomial at the distance; None on an always computed step
    accumulated: float  # what is held against the threshold; 0 on an always computed step
    computed: bool


class Schedule:
    """The decisions of one generation, step by step (arXiv 2411.19108, section 3)."""

    def __init__(self, config: TeaCacheConfig):
        self.config, self.steps = config, list[Step]()

    def decide(self, timestep: float, distance: float | None) -> bool:
        """Take the next step: True to compute it, False to reuse the last residual."""
        increment, accumulated, computed = None, 0.0, True
        if not self.config.always_computes(len(self.steps)):
            increment = float(np.polyval(self.config.coefficients, distance))
            before = self.steps[-1]
            accumulated = increment + (0.0 if before.computed else before.accumulated)
            computed = not accumulated < self.config.thresh  # not-a-number computes the step
        self.steps.append(Step(timestep, distance, increment, accumulated, computed))
        return computed

    @property
    def computed(self) -> list[int]:
        """The numbers of the computed steps."""
        return [i for i, step in enumerate(self.steps) if step.computed]

    @property
    def lowered(self) -> list[int]:
        """The steps with a negative increment: far outside what the polynomial was fitted on."""
        return [i for i, step in enumerate(self.steps) if (step.increment or 0) < 0]


# ----------------------------------------------------------------------------------------- cache


def relative_l1(signal: Tensor, previous: Tensor) -> Tensor:
    """mean|signal - previous| / mean|previous| of two tensors of one shape, as a scalar tensor."""
    return (signal - previous).abs().mean() / previous.abs().mean()


@contextmanager
def shadow(target: object, **attributes: Any) -> Iterator[None]:
    """Put attributes in the way of an object's own ones, and take them away whatever happens.

    They go into ``vars(target)``: the class is left alone, and an nn.Module registers nothing.
    """
    namespace = vars(target)
    before = {name: namespace[name] for name in attributes if name in namespace}
    namespace.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del namespace[name]
        namespace.update(before)


class TeaCache:
    """The state of one generation, and what stands in place of the model's methods during it.

    Wan2.1 calls the model twice a step: first with the prompt (branch 0), then without (branch 1).
    """

    def __init__(self, model: nn.Module, config: TeaCacheConfig):
        self.config, self.schedule = config, Schedule(config)
        self.residuals: dict[int, Tensor] = {}  # by branch: B(h) - h, [1, tokens, dim]
        self.marks: list[float] = []  # seconds: begin of sampling, each decision, end of sampling
        self.calls, self.computing = 0, True
        self.signal: Tensor | None = None
        self.model_forward, self.model_blocks = model.forward, model.blocks
        self.model_forward_vace = getattr(model, "forward_vace", None)

    def forward(self, x: list[Tensor], t: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """In place of ``model.forward``, and around it: stock, VACE's or Ulysses/ring's."""
        self.step, self.branch = divmod(self.calls, 2)
        if self.step == self.config.steps:
            raise RuntimeError(
                f"TeaCache is set up for {self.step} steps, and the pipeline takes more: make "
                "TeaCacheConfig.steps the pipeline's sampling_steps"
            )
        self.marks = self.marks or [time.perf_counter()]
        self.calls, self.timestep = self.calls + 1, t
        if self.branch == 0 or not self.config.one_branch:
            self.output = self.model_forward(x, t, *args, **kwargs)
        if self.calls == 2 * self.config.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())
        return self.output

    def decide(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of time_projection, which takes e [1, dim] to e0 [1, 6 * dim].

        It sees both as the model made them, before any block runs, and decides at the conditional
        call for both branches, with the one host synchronisation of a step.
        """
        if self.branch == 1:
            return
        signal = output if self.config.use_ret_steps else inputs[0]
        numbers = [self.timestep.flatten()[0].double()]
        if self.signal is not None:
            numbers.append(relative_l1(signal, self.signal).double())
        timestep, *distance = torch.stack(numbers).tolist()
        self.signal = signal
        self.computing = self.schedule.decide(timestep, distance[0] if distance else None)
        self.marks.append(time.perf_counter())

    def forward_vace(self, *args: Any, **kwargs: Any) -> list[Tensor] | None:
        """In place of ``model.forward_vace``: its hints are for the blocks that are skipped."""
        return self.model_forward_vace(*args, **kwargs) if self.computing else None

    def blocks(self, h: Tensor, **kwargs: Any) -> Tensor:
        """In place of all blocks, h [1, tokens, dim] to B(h): computed, or h + residual.

        Out of place: under autocast h is bfloat16, B(h) and the residual are float32, and so the
        head gets float32 on every step.
        """
        residual = self.residuals.pop(self.branch, None)
        if self.computing:
            residual, out = None, h  # frees the old one before the blocks need the memory
            for block in self.model_blocks:
                out = block(out, **kwargs)
        else:
            out = h + residual
        if not self.config.always_computes(self.step + 1):  # else nobody would use it
            self.residuals[self.branch] = out - h if self.computing else residual
        return out

    @property
    def seconds(self) -> float:
        """Of the sampling, so far or in all."""
        return self.marks[-1] - self.marks[0]

    @property
    def step_seconds(self) -> np.ndarray:
        """From each decision to the next; the last to the end of the sampling."""
        return np.diff(self.marks[1:])

    def summary(self) -> str:
        """What was computed, how long it took, and what it saved, in one line."""
        computed, seconds = self.schedule.computed, self.step_seconds
        stock = np.median(seconds[computed]) * len(seconds) * (1 + self.config.one_branch)
        return (
            f"TeaCache: computed {len(computed)} of {len(seconds)} steps "
            f"({' '.join(map(str, computed))}), sampling {self.seconds:.1f} s, "
            f"about {stock / self.seconds:.2f}x of stock (estimated from the computed steps)"
        )


@contextmanager
def teacache(model: nn.Module, config: TeaCacheConfig) -> Iterator[TeaCache]:
    """Let one ``generate`` of a Wan2.1 pipeline skip steps.

        config = TeaCacheConfig.from_row("t2v-1.3B", steps=50)
        with teacache(pipeline.model, config) as cache:
            video = pipeline.generate(prompt, size=(832, 480), sampling_steps=50)
        print(cache.summary())

    model: the pipeline's WanModel or VaceWanModel, or the FSDP wrapper of one. This instance only
        is touched, and left as it was, also after an error.
    RuntimeError: the model is in use by another ``teacache``, or takes more steps than configured.
    """
    model = getattr(model, "module", model)  # FSDP's
    if "blocks" in vars(model):
        raise RuntimeError("this model is in use by another teacache(): leave that one first")
    cache = TeaCache(model, config)

    @functools.wraps(model.forward)
    def forward(x: list[Tensor], t: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        return cache.forward(x, t, *args, **kwargs)

    stand_ins = {"forward": forward, "blocks": (cache.blocks,)}
    if hasattr(model, "forward_vace"):
        stand_ins["forward_vace"] = cache.forward_vace
    hook = model.time_projection.register_forward_hook(cache.decide)
    try:
        with shadow(model, **stand_ins):
            yield cache
    finally:
        hook.remove()
        cache.residuals.clear()
    if cache.calls != 2 * config.steps:
        log.warning(f"TeaCache: set up for {config.steps} steps, but saw {cache.calls / 2:g}")
    if lowered := cache.schedule.lowered:
        log.warning(
            f"TeaCache: negative increments at steps {' '.join(map(str, lowered))}: outside what "
            "the coefficients were fitted on, where too many steps may be skipped"
        )


# ------------------------------------------------------------------------------------- attention


FLASH_ATTENTION = ("flash_attn", "flash_attn_interface")  # 2 and 3; CLIP asks for 2


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    version: int | None = None,
) -> Tensor:
    """Wan2.1's ``flash_attention`` by scaled_dot_product_attention, computed in v's dtype.

    q [B, Lq, N, C], k and v [B, Lk, N, C], k_lens [B] valid keys; [B, Lq, N, C] in q's dtype comes
    back. ``version``, of flash-attn, is ignored. NotImplementedError: a window; Wan2.1 has none.
    """
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size {window_size} needs flash-attn")
    mask = None
    if k_lens is not None and int(k_lens.min()) < k.size(1):
        mask = torch.arange(k.size(1), device=q.device) < k_lens.to(q.device)[:, None]
        mask = mask[:, None, None]  # [B, 1, 1, Lk]
    heads_first = (u.to(v.dtype).transpose(1, 2) for u in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*heads_first, mask, dropout_p, causal)
    return out.transpose(1, 2).to(q.dtype)


def usable_flash_attention() -> list[str]:
    """Which of flash-attn 2 and 3 can be used; the others are hidden from Wan2.1's import."""
    usable, old_gpu = [], torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    for name in FLASH_ATTENTION:
        try:
            importlib.import_module(name)
            usable += [] if old_gpu else [name]
        except ImportError:  # also a wheel for another torch; Wan2.1 expects ModuleNotFoundError,
            sys.modules[name] = None  # type: ignore[assignment]  # which this makes of it
    return usable


def install_attention(usable: list[str]) -> None:
    """Give every module of Wan2.1 an attention that works here."""
    if "flash_attn_interface" in usable:
        interface = sys.modules["flash_attn_interface"]
        varlen = interface.flash_attn_varlen_func

        @functools.wraps(varlen)
        def in_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            out = varlen(*args, **kwargs)  # a tensor from newer versions; Wan2.1 takes [0] of it
            return out if isinstance(out, tuple) else (out,)

        interface.flash_attn_varlen_func = in_tuple
    wanted = {"wan.modules.clip": {"flash_attn"}, "wan.modules.model": set(FLASH_ATTENTION)}
    without = [name for name, any_of in wanted.items() if not any_of & set(usable)]
    for name in without:
        if name in sys.modules:
            sys.modules[name].flash_attention = sdpa_attention
    if without:
        log.info(f"no flash-attn for {' and '.join(without)}: scaled_dot_product_attention instead")


# ---------------------------------------------------------------------------------- command line

# The row of a task. That of i2v-14B depends on the resolution; VACE and FLF2V borrow theirs.
TASK_ROWS = {"t2v-1.3B": "t2v-1.3B", "t2v-14B": "t2v-14B", "t2i-14B": "t2v-14B"}
BORROWED_ROWS = {"vace-1.3B": "t2v-1.3B", "vace-14B": "t2v-14B", "flf2v-14B": "i2v-14B-720P"}


def refuse(message: str) -> NoReturn:
    """Say in one line what is wrong with the command, before any weight is loaded; exit with 2."""
    if os.getenv("LOCAL_RANK", "0") == "0":
        print(f"teacache_generate.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that objects in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (see --help)")


def own_parser() -> Parser:
    """The flags that generate.py does not have."""
    parser = Parser(allow_abbrev=False, add_help=False, description="TeaCache for generate.py")
    add = parser.add_argument
    add(
        "--teacache_thresh", type=float, metavar="X", help="higher: faster; 0: off; default: by row"
    )
    add("--use_ret_steps", action="store_true", help="compare e0, always compute the first 5 steps")
    add("--teacache_model", choices=ROWS, help="row of coefficients; default: by task, checkpoint")
    add("--teacache_report", metavar="FILE", help="write what was decided and measured, as JSON")
    add("--wan_repo", metavar="DIR", help="Wan2.1; default: this script's folder, else the current")
    return parser


def import_wan(wan_repo: str | None, generates: bool) -> ModuleType:
    """Wan2.1's generate.py as a module. Only to generate does it need CUDA."""
    folders = [Path(wan_repo)] if wan_repo else [Path(__file__).parent, Path.cwd()]
    found = [f for f in folders if (f / "generate.py").is_file() and (f / "wan").is_dir()]
    if not found:
        refuse(
            f"--wan_repo {wan_repo or '(not given)'}: no generate.py beside a package wan in "
            f"{' or '.join(str(f.resolve()) for f in folders)}: git clone "
            "https://github.com/Wan-Video/Wan2.1 and copy this script into it"
        )
    sys.path.insert(0, str(found[0].resolve()))
    usable = usable_flash_attention()
    no_gpu = {} if generates or torch.cuda.is_available() else {"current_device": lambda: 0}
    try:
        with shadow(torch.cuda, **no_gpu):  # wan/modules/t5.py asks for the device when imported
            wan_generate = importlib.import_module("generate")
    except ImportError as error:
        refuse(f"Wan2.1 cannot be imported ({error}): pip install -r {found[0]}/requirements.txt")
    except (AssertionError, RuntimeError) as error:
        if torch.cuda.is_available():
            raise
        refuse(
            f"no CUDA device, and Wan2.1 needs one ({error}): see nvidia-smi, and whether torch "
            f"{torch.__version__} is a CUDA build"
        )
    wan_generate._init_logging(int(os.getenv("RANK", "0")))  # only rank 0 speaks
    install_attention(usable)
    return wan_generate


def parse_wan(wan_generate: ModuleType, argv: list[str]) -> argparse.Namespace:
    """generate.py's parser and assertions, with their objections in our form."""
    our_argparse = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
    with shadow(wan_generate, argparse=our_argparse), shadow(sys, argv=[sys.argv[0], *argv]):
        try:
            return wan_generate._parse_args()
        except AssertionError as error:
            refuse(f"{error} (see --help)")


def check_numbers(args: argparse.Namespace) -> None:
    """Frames that the VAE can make, at least one step, and processes as the flags need them."""
    frames, kind = args.frame_num, {"i2v": "WanI2V", "flf2v": "WanFLF2V"}
    if frames < 1 or frames % 4 != 1:
        below = max((frames - 1) // 4, 0) * 4 + 1
        refuse(f"--frame_num {frames}: must be 4n+1, such as {below} or {below + 4}")
    pipeline = getattr(sys.modules["wan"], kind.get(args.task.split("-")[0], ""), None)
    if pipeline and "ones(1, 81" in inspect.getsource(pipeline.generate) and frames != 81:
        refuse(f"--frame_num {frames}: must be 81 for {args.task}, as this Wan2.1 hard-codes it")
    if args.sample_steps < 1:
        refuse(f"--sample_steps {args.sample_steps}: must be 1 or more, such as 50")
    processes, wanted = int(os.getenv("WORLD_SIZE", "1")), args.ulysses_size * args.ring_size
    if processes == 1 and (args.t5_fsdp or args.dit_fsdp):
        refuse("--t5_fsdp, --dit_fsdp: must be started by torchrun --nproc_per_node=N, N above 1")
    if wanted not in (1, processes):
        refuse(
            f"--ulysses_size {args.ulysses_size} --ring_size {args.ring_size}: their product must "
            f"be the number of processes, {processes} here; torchrun --nproc_per_node={wanted}"
        )


def check_checkpoint(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Every file that will be loaded is there, and the transformer is of the task's size."""
    folder, weights = Path(args.ckpt_dir), "diffusion_pytorch_model.safetensors"
    if not folder.is_dir():
        refuse(f"--ckpt_dir {folder}: must be a folder with a checkpoint of {args.task}")
    parts = [file for key, file in config.items() if key.endswith(("_checkpoint", "_tokenizer"))]
    index, shards = folder / f"{weights}.index.json", [weights]
    try:
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in ("config.json", *shards, *parts):
            if not (folder / name).exists():
                refuse(
                    f"--ckpt_dir {folder}: {name} is missing, and --task {args.task} needs it: "
                    "complete the download, or give the task that the checkpoint is of"
                )
        dim = json.loads((folder / "config.json").read_text())["dim"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"--ckpt_dir {folder}: its JSON files are damaged ({error!r}): download it again")
    if dim != config["dim"]:
        refuse(
            f"--ckpt_dir {folder}: its transformer has dim {dim}, that of --task {args.task} "
            f"{config['dim']} (1536 is 1.3B, 5120 is 14B): give the task or the folder that fits"
        )


def check_inputs(args: argparse.Namespace, examples: dict[str, str]) -> None:
    """Every image and video that generate.py will open is there and can be read."""
    frames, videos = ("image", "first_frame", "last_frame"), ("src_video", "src_mask")
    if examples.get("first_frame") and bool(args.first_frame) != bool(args.last_frame):
        refuse("--first_frame, --last_frame: give both, or Wan2.1 takes its example for both")
    for name in (*frames, *videos, "src_ref_images"):
        value = getattr(args, name, None)
        if value and name not in frames and args.prompt is None:
            refuse(f"--{name} {value}: needs --prompt, or Wan2.1 takes its example instead")
        if value is None and (name in frames or args.prompt is None):
            value = examples.get(name)
        for file in value.split(",") if value else ():
            try:
                if name in videos:
                    imageio.get_reader(file).get_data(0)
                else:
                    Image.open(file).convert("RGB")
            except Exception as error:  # each decoder has its own
                refuse(f"--{name} {file}: cannot be read ({error}): give a file that is there")


def check_output(args: argparse.Namespace, wan_generate: ModuleType) -> None:
    """Two frames go through Wan2.1's own writer, into the folder and with the ending asked for."""
    image, said = args.task.startswith("t2i"), io.StringIO()
    target = Path(args.save_file or ("image.png" if image else "video.mp4")).absolute()
    frames = torch.linspace(-1, 1, 2).view(1, 1, 2, 1, 1).expand(1, 3, 2, 64, 64)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder, redirect_stdout(said):
            probe = f"{folder}/probe{target.suffix}"
            if image:
                wan_generate.cache_image(frames[:, :, 0], probe, retry=1)
            else:
                wan_generate.cache_video(frames, probe, fps=8, retry=1)
            with imageio.get_reader(probe) as reader:
                if sum(1 for _ in reader) < 2 - image:
                    raise ValueError("no video comes of it")
    except Exception as error:  # each writer has its own
        refuse(
            f"--save_file {target}: cannot be written ({said.getvalue().strip() or error}): give a "
            f"{'.png' if image else '.mp4'} in a folder that is there; ffmpeg comes with pip "
            "install imageio-ffmpeg"
        )


def choose_row(args: argparse.Namespace, asked: str | None) -> tuple[str, str]:
    """The row for a run, and why that one."""
    if asked:
        return asked, "as asked"
    if args.task == "i2v-14B":
        name = Path(args.ckpt_dir).absolute().name  # a parent folder may say anything
        said = {"480p", "720p"} & set(re.split("[^0-9a-z]+", name.lower()))
        small = said == {"480p"} if len(said) == 1 else args.size in ("832*480", "480*832")
        why = f"checkpoint {name}" if len(said) == 1 else f"size {args.size}"
        return "i2v-14B-480P" if small else "i2v-14B-720P", why
    if args.task in BORROWED_ROWS:
        return BORROWED_ROWS[args.task], f"borrowed: nobody has fitted {args.task}"
    if args.task not in TASK_ROWS:
        refuse(f"--task {args.task}: no row is known for it; add --teacache_model, one of {ROWS}")
    return TASK_ROWS[args.task], f"task {args.task}"


class Job:
    """One run of the command line: what was asked, what was measured, and what must not be lost."""

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, wan_generate: ModuleType):
        self.own, self.args, self.wan_generate = own, args, wan_generate
        self.wan_config = wan_generate.WAN_CONFIGS[args.task]
        self.row, self.why = choose_row(args, own.teacache_model)
        self.cache: TeaCache | None = None
        self.seconds: dict[str, float] = {}  # by phase
        self.loading = False

    def run(self) -> None:
        """Wan2.1's ``generate(args)``, with TeaCache in its pipelines and its results kept."""
        wan, here, status = sys.modules["wan"], self.wan_generate, "finished"
        classes = {name: member for name, member in vars(wan).items() if inspect.isclass(member)}
        pipelines = {k: self.with_teacache(v) for k, v in classes.items() if hasattr(v, "generate")}
        writers = {k: self.keeping(getattr(here, k)) for k in ("cache_video", "cache_image")}
        try:
            with shadow(wan, **pipelines), shadow(here, **writers):
                here.generate(self.args)
            if self.cache is None:
                raise RuntimeError("no pipeline of this Wan2.1 has run with TeaCache")
        except BaseException as error:
            status = f"failed: {error!r}"
            if isinstance(error, (AssertionError, ImportError)) and not self.loading:
                refuse(f"{error} (see --help)")
            raise
        finally:
            self.write_report(status)

    def with_teacache(self, pipeline: type) -> type:
        """A pipeline class with TeaCache around its ``generate``."""
        job = self

        class TeaCachePipeline(pipeline):  # type: ignore[misc,valid-type]
            def __init__(self, *args: Any, **kwargs: Any):
                job.loading = True
                super().__init__(*args, **kwargs)

            def generate(self, *args: Any, **kwargs: Any) -> Tensor | None:
                config = job.configure(kwargs["sampling_steps"], kwargs["guide_scale"])
                decode = job.keeping(self.vae.decode, str(self.device))
                job.began = time.perf_counter()
                with teacache(self.model, config) as job.cache, shadow(self.vae, decode=decode):
                    video = super().generate(*args, **kwargs)
                log.info(job.cache.summary())
                return video

        return TeaCachePipeline

    def configure(self, steps: int, guide_scale: float) -> TeaCacheConfig:
        """The settings for a pipeline's ``generate``, said in one line."""
        thresh, ret = self.own.teacache_thresh, self.own.use_ret_steps
        config = TeaCacheConfig.from_row(self.row, steps, thresh, ret)
        said = " (default)" if thresh is None else " (off: stock Wan2.1)" if thresh == 0 else ""
        mode = "retention steps" if ret else "plain"
        log.info(
            f"TeaCache: row {self.row} ({self.why}), thresh {config.thresh:g}{said}, {mode}, "
            f"{steps} steps"
        )
        if config.thresh and self.why.startswith("borrowed"):
            log.warning(
                f"TeaCache: {self.why}: compare with --teacache_thresh 0 before you trust it"
            )
        return replace(config, guide_scale=guide_scale)

    def keeping(self, function: Callable, device: str = "cpu") -> Callable:
        """``vae.decode`` or a writer of Wan2.1: where it fails, what it was given is kept."""
        phase = function.__name__  # decode, cache_video, cache_image

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began, said = time.perf_counter(), io.StringIO()
            try:
                with redirect_stdout(said):  # cache_video prints its error, cache_image does not
                    result = function(*args, **kwargs)
                if result is None and not said.getvalue():
                    open(kwargs["save_file"], "ab").close()  # most often, this raises the reason
                if result is None:
                    raise OSError(said.getvalue().strip() or "its writer gives no reason")
                if phase != "decode" and not os.path.getsize(result):
                    raise OSError(f"{result} is empty")
                return result
            except BaseException as error:
                self.rescue(phase, (*args, *kwargs.values())[0], device, error)
                raise
            finally:
                self.seconds[phase] = time.perf_counter() - began

        return wrapper

    def rescue(self, phase: str, tensors: Any, device: str, error: BaseException) -> None:
        """Save latents or frames beside the video, else in /tmp, and say the way to a video."""
        name = time.strftime("teacache_%Y%m%d_%H%M%S.pt")
        path = Path(self.args.save_file or name).absolute().with_name(name)
        try:
            torch.save(tensors, path)
        except (OSError, RuntimeError):
            path = Path(tempfile.gettempdir()) / name
            torch.save(tensors, path)
        file, quoted = str(path.with_suffix(".mp4")), json.dumps  # in "": the shell has the ''
        video = f"torch.load({quoted(str(path))}, map_location={quoted(device)})"
        call = f"cache_video({video}, {quoted(file)}, fps={self.wan_config['sample_fps']})"
        if phase == "decode":
            vae = str(Path(self.args.ckpt_dir).absolute() / self.wan_config["vae_checkpoint"])
            made = (
                f"WanVAE(vae_pth={quoted(vae)}, device={quoted(device)}).decode({video})[0][None]"
            )
            call = call.replace(video, made)
        elif phase == "cache_image":
            file = str(path.with_suffix(".png"))
            call = f"cache_image({video}, {quoted(file)})"
        code = (
            "import torch; from wan.modules.vae import WanVAE; "
            f"from wan.utils.utils import cache_image, cache_video; {call}"
        )
        log.error(
            f"TeaCache: {phase} failed: {error!r}. What it was given is in {path}; this makes "
            f"{file} of it:\ncd {shlex.quote(str(Path(self.wan_generate.__file__).parent))} && "
            f"{shlex.join(['python', '-c', code])}"
        )

    def write_report(self, status: str) -> None:
        """For ``--teacache_report``: all that is known, as far as the run came."""
        if not self.own.teacache_report or os.getenv("RANK", "0") != "0":
            return
        cuda = torch.cuda.is_available()
        report = {
            "status": status,
            "settings": {**vars(self.args), **vars(self.own)},
            "row": self.row,
            "row_because": self.why,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "versions": {"python": sys.version, "torch": torch.__version__},
            "seconds": self.seconds,
        }
        if self.cache and self.cache.marks:
            self.seconds["encode"] = self.cache.marks[0] - self.began
            self.seconds["sampling"] = self.cache.seconds
            report["config"] = asdict(self.cache.config)
            report["computed"] = self.cache.schedule.computed
            report["steps"] = [asdict(step) for step in self.cache.schedule.steps]
        Path(self.own.teacache_report).write_text(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> None:
    """The command line; ``argv`` is what follows the program's name."""
    own, rest = own_parser().parse_known_args(argv)
    thresh, asks_help = own.teacache_thresh, {"-h", "--help"} & set(rest)
    if thresh is not None and not 0 <= thresh < float("inf"):
        refuse(f"--teacache_thresh {thresh}: must be 0 (off) or a positive number, such as 0.08")
    if asks_help:
        print(own_parser().format_help())
    wan_generate = import_wan(own.wan_repo, generates=not asks_help)
    args = parse_wan(wan_generate, rest)
    check_numbers(args)
    check_checkpoint(args, wan_generate.WAN_CONFIGS[args.task])
    check_inputs(args, wan_generate.EXAMPLE_PROMPT[args.task])
    check_output(args, wan_generate)
    job = Job(own, args, wan_generate)
    try:
        job.write_report("started")
    except OSError as error:
        refuse(f"--teacache_report {own.teacache_report}: cannot be written ({error})")
    try:
        job.run()
    except KeyboardInterrupt:
        log.error("TeaCache: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
