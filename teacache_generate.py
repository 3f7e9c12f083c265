"""TeaCache for Wan2.1: nearly the same video, much sooner. This one file is the whole of it.

Copy it beside Wan2.1's generate.py and run it with generate.py's flags and its own (--help):

    python teacache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B \\
        --prompt "Two cats box on a spotlighted stage." --teacache_thresh 0.08

It reads in the order in which it runs, in layers that do not know each other:
  policy        numbers in, decisions out: which steps are computed; plan, target speed-up, fit
  cache         tensors: one residual a branch, put in place of the blocks of one WanModel
  attention     PyTorch's, where flash-attn cannot be had
  command line  flags, every check before a weight is loaded, then Wan2.1's own generate()

TeaCache: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108. Wan2.1: https://github.com/Wan-Video/Wan2.1.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import imageio
import numpy as np
import safetensors
import torch
from PIL import Image
from torch import Tensor, nn

log = logging.getLogger("teacache")

# ---------------------------------------------------------------------------------------- policy


@dataclass(frozen=True)
class Fit:
    """A polynomial of degree 4, highest power first, with thresholds that were tried with it.

    The last threshold is the default. fitted_range: distances that it was fitted on, if known.
    """

    thresholds: Sequence[float]
    coefficients: Sequence[float]
    fitted_range: Sequence[float] | None = None


# FITS[use_ret_steps][row], all as published by the authors of TeaCache for Wan2.1.
# fmt: off
FITS: dict[bool, dict[str, Fit]] = {
    False: {
        "t2v-1.3B": Fit((0.05, 0.07, 0.08), (
            2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774)),
        "t2v-14B": Fit((0.14, 0.15, 0.2), (
            -5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404)),
        "i2v-14B-480P": Fit((0.13, 0.19, 0.26), (
            -302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289)),
        "i2v-14B-720P": Fit((0.18, 0.2, 0.3), (
            -114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683)),
    },
    True: {
        "t2v-1.3B": Fit((0.05, 0.1), (
            -52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)),
        "t2v-14B": Fit((0.1, 0.2), (
            -303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)),
        "i2v-14B-480P": Fit((0.2, 0.3), (
            257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977)),
        "i2v-14B-720P": Fit((0.2, 0.3), (
            8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401)),
    },
}
# fmt: on
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
    fitted_range: a step whose distance is outside is computed.
    order: a skipped step holds the last residual (0, as published), or goes on along the line
        through the last two computed ones (1).
    ValueError: thresh is negative, infinite or not a number.
    """

    steps: int
    thresh: float
    coefficients: Sequence[float]
    use_ret_steps: bool = False
    guide_scale: float = 5.0
    fitted_range: Sequence[float] | None = None
    order: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.thresh < math.inf:
            raise ValueError(f"thresh {self.thresh} must be 0 (off) or a positive number")

    @classmethod
    def from_fit(
        cls, fit: Fit, steps: int, thresh: float | None = None, **others: Any
    ) -> TeaCacheConfig:
        """The settings for a fit, such as ``FITS[False]["t2v-1.3B"]``; ``others`` by name."""
        thresh = fit.thresholds[-1] if thresh is None else thresh
        return cls(steps, thresh, fit.coefficients, fitted_range=fit.fitted_range, **others)

    @property
    def one_branch(self) -> bool:
        """Whether the unconditional branch is left out. At thresh 0 it is not: stock to the bit."""
        return self.guide_scale == 1 and self.thresh > 0

    def always_computes(self, step: int) -> bool:
        """Whether a step is computed whatever the distances say, as one after the last would be."""
        first = step < RETENTION_STEPS if self.use_ret_steps else step == 0
        last = self.steps if self.use_ret_steps else self.steps - 1
        return first or step >= last or self.thresh == 0

    def keeps(self, step: int) -> bool:
        """Whether a residual of this step may be of use on a later one."""
        return not (self.always_computes(step + 1) and self.always_computes(step + 1 + self.order))


@dataclass(frozen=True)
class Step:
    """What was decided at one step, and from what."""

    timestep: float
    distance: float | None  # relative L1 distance of the signal to the step before; None at step 0
    increment: float | None  # the polynomial at the distance; None on an always computed step
    accumulated: float  # what is held against the threshold; 0 on an always computed step
    computed: bool
    outside: bool = False  # of the fitted range, and computed for that


class Schedule:
    """The decisions of one generation, step by step (arXiv 2411.19108, section 3)."""

    def __init__(self, config: TeaCacheConfig):
        self.config, self.steps = config, list[Step]()

    def decide(self, timestep: float, distance: float | None) -> bool:
        """Take the next step: True to compute it, False to reuse the last residual."""
        if self.config.always_computes(len(self.steps)):
            self.steps.append(Step(timestep, distance, None, 0.0, computed=True))
            return True
        increment, before = float(np.polyval(self.config.coefficients, distance)), self.steps[-1]
        accumulated = increment + (0.0 if before.computed else before.accumulated)
        low, high = self.config.fitted_range or (-math.inf, math.inf)
        outside = not low <= distance <= high
        computed = outside or not accumulated < self.config.thresh  # so not-a-number computes
        self.steps.append(Step(timestep, distance, increment, accumulated, computed, outside))
        return computed

    @property
    def computed(self) -> list[int]:
        """The numbers of the computed steps."""
        return [i for i, step in enumerate(self.steps) if step.computed]

    def warnings(self) -> list[str]:
        """What is odd about these decisions, a line each."""
        lowered = [i for i, step in enumerate(self.steps) if (step.increment or 0) < 0]
        outside = [i for i, step in enumerate(self.steps) if step.outside]
        low = (
            f"negative increments at steps {numbers(lowered)}: the coefficients are not made "
            "for these distances, and too many steps may be skipped"
        )
        out = (
            f"steps {numbers(outside)} are computed, since their distances are outside those "
            f"that the coefficients were fitted on: {self.config.fitted_range}"
        )
        return [text for text, steps in ((low, lowered), (out, outside)) if steps]

    @property
    def longest_skip(self) -> int:
        """The largest number of steps skipped in a row."""
        return max(map(len, self.marks().split("#")))

    def marks(self) -> str:
        """The schedule as a line, # computed and . skipped."""
        return "".join("#" if step.computed else "." for step in self.steps)


def reach(since: int, gap: int) -> float:
    """For order 1: how far to go on along the line through the last two computed residuals.

    since: steps since the last one; gap: steps between the two. Not all the way, which overshoots,
    at most two gaps or 4 steps on, and nowhere from two that are more than 4 steps apart (measured:
    tests/bench_order.py).
    """
    return 0.75 * min(since, 2 * gap, 4) / gap if gap <= 4 else 0.0


def numbers(steps: Sequence[int]) -> str:
    return " ".join(map(str, steps))


def plan(
    config: TeaCacheConfig, timesteps: Sequence[float], distances: Sequence[float]
) -> Schedule:
    """All decisions at once: distances are those of the second step and on."""
    schedule = Schedule(config)
    for timestep, distance in zip(timesteps, [None, *distances], strict=True):
        schedule.decide(timestep, distance)
    return schedule


def plan_speedup(
    config: TeaCacheConfig, timesteps: Sequence[float], distances: Sequence[float], speedup: float
) -> Schedule:
    """The plan of the smallest threshold that computes at most steps / speedup, else of the fewest.

    A decision changes only where the threshold passes a sum of increments in a row, so it is enough
    to look right above each of these: 0.01 % above, for the rounding of another machine.
    """
    increments = np.polyval(config.coefficients, distances)
    sums = {float(u) for i in range(len(increments)) for u in np.cumsum(increments[i:]) if u > 0}
    edges = [0.0, *sorted(sums)]
    above = [min(1.0001 * low, (low + high) / 2) for low, high in itertools.pairwise(edges)]
    fewest = plan(replace(config, thresh=0.0), timesteps, distances)
    for thresh in [edges[-1] / 1e6, *above[1:], 1.0001 * edges[-1]]:
        if len(fewest.computed) * speedup <= config.steps:
            break
        schedule = plan(replace(config, thresh=thresh), timesteps, distances)
        fewest = min(fewest, schedule, key=lambda u: len(u.computed))
    return fewest


def fit(points: Sequence[Sequence[float]], use_ret_steps: bool) -> tuple[Fit, float]:
    """Least squares of degree 4 over all of ``Recorder.points``, and its R squared.

    Its threshold is the smallest that computes half of the steps, or as few as can be. The range is
    0.1 % wider than the points, for the rounding of another machine.
    """
    x = np.array([point[3 if use_ret_steps else 2] for point in points])
    y = np.array([point[4] for point in points])
    coefficients = np.polyfit(x, y, 4)
    unexplained = np.square(y - np.polyval(coefficients, x)).sum()
    r_squared = float(1 - unexplained / np.square(y - y.mean()).sum())
    made = Fit((0.0,), coefficients.tolist(), (0.999 * x.min(), 1.001 * x.max()))
    of_one_run = {int(point[0]): float(u) for point, u in zip(points, x, strict=True)}
    config = TeaCacheConfig.from_fit(made, len(of_one_run) + 1, use_ret_steps=use_ret_steps)
    schedule = plan_speedup(config, range(config.steps), list(of_one_run.values()), 2.0)
    return replace(made, thresholds=(schedule.config.thresh,)), r_squared


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
        # By branch, of the last 1 + order computed steps, newest first: step and B(h) - h,
        # [1, tokens, dim].
        self.residuals: dict[int, list[tuple[int, Tensor]]] = {}
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
        scalars = [self.timestep.flatten()[0].double()]
        if self.signal is not None:
            scalars.append(relative_l1(signal, self.signal).double())
        timestep, *distance = torch.stack(scalars).tolist()
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
        kept = self.residuals.pop(self.branch, [])
        if self.computing:
            del kept[self.config.order :]  # before the blocks need the memory
            out = h
            for block in self.model_blocks:
                out = block(out, **kwargs)
            if self.config.keeps(self.step):
                kept.insert(0, (self.step, out - h))
        else:
            out = h + self.residual(kept)
        if self.config.keeps(self.step):
            self.residuals[self.branch] = kept
        return out

    def residual(self, kept: list[tuple[int, Tensor]]) -> Tensor:
        """For a skipped step: the last one, or on the line through the last two."""
        (last, newest), *older = kept
        if not older:
            return newest
        before, oldest = older[0]
        return oldest.lerp(newest, 1 + reach(self.step - last, last - before))

    def release(self) -> None:
        """Let go of model and tensors; decisions and times stay."""
        self.residuals.clear()
        self.model_forward = self.model_blocks = self.model_forward_vace = None
        self.signal = self.output = self.timestep = None

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
        if not computed:
            return "TeaCache: no step was taken"
        stock = np.median(seconds[computed]) * len(seconds) * (1 + self.config.one_branch)
        return (
            f"TeaCache: computed {len(computed)} of {len(seconds)} steps "
            f"({numbers(computed)}), sampling {self.seconds:.1f} s, "
            f"about {stock / self.seconds:.2f}x of stock (estimated from the computed steps)"
        )


class Recorder(TeaCache):
    """Records, at thresh 0, what a polynomial is fitted to: for calibration.

    points: [step, branch, distance of e, distance of e0, relative L1 change of the residual], each
    to the step before. The residuals of the step before are in the CPU's memory, and go through the
    GPU's in 16 parts.
    """

    def __init__(self, model: nn.Module, config: TeaCacheConfig):
        super().__init__(model, config)
        self.points: list[list[float]] = []
        self.signals: list[Tensor] = []
        self.last: dict[int, Tensor] = {}

    def decide(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        super().decide(module, inputs, output)
        if self.branch == 0:
            before, self.signals = self.signals, [inputs[0], output]
            pairs = zip(self.signals, before, strict=False)
            self.distances = [relative_l1(now, then).item() for now, then in pairs]

    def blocks(self, h: Tensor, **kwargs: Any) -> Tensor:
        out = super().blocks(h, **kwargs)
        if self.branch not in self.last:
            self.last[self.branch] = torch.zeros(out.shape, dtype=torch.float32)
        parts = (u.split(-(-out.size(1) // 16), dim=1) for u in (h, out, self.last[self.branch]))
        sums = torch.zeros(2, dtype=torch.float64, device=out.device)  # of the change, of the size
        for h_part, out_part, last in zip(*parts, strict=True):
            residual, before = (out_part - h_part).float(), last.to(out.device)
            sums += torch.stack([(residual - before).abs().sum(), before.abs().sum()])
            last.copy_(residual)
        if self.step > 0:
            change, size = sums.tolist()
            self.points.append([self.step, self.branch, *self.distances, change / size])
        return out


@contextmanager
def teacache(
    model: nn.Module, config: TeaCacheConfig, kind: type[TeaCache] = TeaCache
) -> Iterator[TeaCache]:
    """Let one ``generate`` of a Wan2.1 pipeline skip steps.

        config = TeaCacheConfig.from_fit(FITS[False]["t2v-1.3B"], steps=50)
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
    cache = kind(model, config)

    forward = functools.wraps(model.forward)(functools.partial(cache.forward))
    stand_ins = {"forward": forward, "blocks": (cache.blocks,), "forward_vace": cache.forward_vace}
    hook = model.time_projection.register_forward_hook(cache.decide)
    try:
        with hook, shadow(model, **stand_ins):  # without VACE, forward_vace is never asked
            yield cache
    finally:
        cache.release()
    if cache.calls != 2 * config.steps:
        cache.marks.append(time.perf_counter())
        log.warning(f"TeaCache: set up for {config.steps} steps, but saw {cache.calls / 2:g}")
    for warning in cache.schedule.warnings():
        log.warning(f"TeaCache: {warning}")


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
    usable = []
    for name in FLASH_ATTENTION:
        try:
            importlib.import_module(name)
            usable.append(name)
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
CALIBRATION = {"version": 1}  # what a teacache.json begins with
MODES = ("plain", "retention steps")


def is_rank_0() -> bool:
    """Whether this process speaks and writes, of all that torchrun has started."""
    return os.getenv("RANK", "0") == "0"


def refuse(message: str) -> NoReturn:
    """Say in one line what is wrong with the command, before any weight is loaded; exit with 2."""
    if os.getenv("LOCAL_RANK", "0") == "0":
        print(f"teacache_generate.py: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def refusing(what: str, cure: str) -> Iterator[None]:
    """Refuse what cannot be read or written; each decoder and writer has its own exceptions."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        refuse(f"{what}: {reason.splitlines()[0][:200]}: {cure}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that objects in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message.removeprefix('argument ')} (see --help)")


def at_least(low: float, allowed: str) -> Callable[[str], float]:
    """The type of a flag: a finite number from ``low`` on."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= float(text) < math.inf:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text} must be {allowed}")

    return number


def own_parser() -> Parser:
    """The flags that generate.py does not have."""
    parser = Parser(allow_abbrev=False, add_help=False, description="TeaCache for generate.py")
    add, either = parser.add_argument, parser.add_mutually_exclusive_group
    thresh, speedup = at_least(0, "0 (off) or more, such as 0.08"), at_least(1, "1 or more, as 2.0")
    how_much, whose, instead = (either().add_argument for _ in range(3))
    how_much("--teacache_thresh", type=thresh, metavar="X", help="higher is faster, 0 is off")
    how_much("--teacache_speedup", type=speedup, metavar="X", help="or: a threshold that gives X")
    add("--teacache_order", type=int, default=0, choices=(0, 1), help="1: extrapolate residuals")
    add("--use_ret_steps", action="store_true", help="compare e0, always compute the first 5 steps")
    whose("--teacache_model", choices=ROWS, help="row of coefficients; default: as the task")
    whose("--teacache_coefficients", metavar="FILE", help="default: teacache.json in --ckpt_dir")
    instead("--teacache_plan", action="store_true", help="print what thresholds do, and no more")
    instead("--teacache_calibrate", action="store_true", help="fit coefficients: teacache.json")
    add("--teacache_prompts", metavar="FILE", help="for the calibration, one a line")
    add("--teacache_report", metavar="FILE", help="write what was decided and measured, as JSON")
    add("--wan_repo", metavar="DIR", help="Wan2.1; default: this script's folder, else the current")
    return parser


def parse_own(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those that are left for generate.py."""
    own, rest = own_parser().parse_known_args(argv)
    for name in ("thresh", "speedup", "model"):
        if own.teacache_calibrate and getattr(own, f"teacache_{name}") is not None:
            refuse(f"--teacache_calibrate, --teacache_{name}: give one of them")
    if own.teacache_prompts and not own.teacache_calibrate:
        refuse(f"--teacache_prompts {own.teacache_prompts}: is for --teacache_calibrate only")
    return own, rest


def import_wan(wan_repo: str | None, generates: bool) -> ModuleType:
    """Wan2.1's generate.py as a module. Only to generate does it need CUDA."""
    folders = [Path(wan_repo)] if wan_repo else [Path(__file__).parent, Path.cwd()]
    found = [f for f in folders if (f / "generate.py").is_file() and (f / "wan").is_dir()]
    if not found:
        looked = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
        refuse(
            f"--wan_repo {wan_repo or '(not given)'}: no generate.py beside a package wan in "
            f"{looked}: git clone https://github.com/Wan-Video/Wan2.1 and copy this script into it"
        )
    sys.path.insert(0, str(found[0].resolve()))
    usable, cuda = usable_flash_attention(), torch.cuda.is_available()
    no_gpu = {} if generates or cuda else {"current_device": lambda: 0}
    try:
        with shadow(torch.cuda, **no_gpu):  # wan/modules/t5.py asks for the device when imported
            wan_generate = importlib.import_module("generate")
    except (ImportError, AssertionError, RuntimeError) as error:
        if generates and not cuda and not isinstance(error, ImportError):
            cure = f"see nvidia-smi, and whether torch {torch.__version__} is a CUDA build"
            refuse(f"no CUDA device, and Wan2.1 needs one ({error}): {cure}")
        refuse(f"Wan2.1 cannot be imported: {error}: install what its requirements.txt lists")
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
            refuse(f"--ckpt_dir, --task, --size or --frame_num: {error} (see --help)")


def check_numbers(args: argparse.Namespace) -> None:
    """Numbers that the VAE, the sampler and the processes of torchrun can work with."""
    frames, processes = args.frame_num, int(os.getenv("WORLD_SIZE", "1"))
    below = max((frames - 1) // 4, 0) * 4 + 1
    pipeline = getattr(sys.modules["wan"], f"Wan{args.task.split('-')[0].upper()}", None)
    only_81 = pipeline and "ones(1, 81" in inspect.getsource(pipeline.generate)
    lone_fsdp = processes == 1 and (args.t5_fsdp or args.dit_fsdp)
    parts, torchrun = args.ulysses_size * args.ring_size, "torchrun --nproc_per_node="
    split = parts in (1, processes) and min(args.ulysses_size, args.ring_size) > 0
    product = f"their product must be the number of processes, {processes} here; {torchrun}{parts}"
    for right, flags, allowed in (
        (frames == below, "frame_num", f"must be 4n+1, such as {below} or {below + 4}"),
        (frames == 81 or not only_81, "frame_num", f"must be 81 for {args.task}, as Wan2.1 has it"),
        (args.sample_steps >= 1, "sample_steps", "must be 1 or more, such as 50"),
        (0 < args.sample_shift < math.inf, "sample_shift", "must be positive, such as 5"),
        (math.isfinite(args.sample_guide_scale), "sample_guide_scale", "must be a number, as 5"),
        (args.base_seed < 2**63, "base_seed", "must be under 2**63"),
        (not lone_fsdp, "t5_fsdp dit_fsdp", f"must be started by {torchrun}N, N above 1"),
        (split, "ulysses_size ring_size", product),
    ):
        if not right:
            given = " ".join(f"--{name} {getattr(args, name)}" for name in flags.split())
            refuse(f"{given}: {allowed}")


def shards_of(folder: Path) -> dict[str, str | None]:
    """The file of each of the transformer's tensors; {None: file} where one file has them all."""
    weights = "diffusion_pytorch_model.safetensors"
    index = folder / f"{weights}.index.json"
    return json.loads(index.read_text())["weight_map"] if index.is_file() else {None: weights}


def check_checkpoint(args: argparse.Namespace, config: dict[str, Any], all_parts: bool) -> None:
    """Every file that will be loaded is there, and the transformer is of the task's size."""
    folder, task = Path(args.ckpt_dir), args.task
    if not folder.is_dir():
        refuse(f"--ckpt_dir {folder}: must be a folder with a checkpoint of {task}")
    parts = [file for key, file in config.items() if key.endswith(("_checkpoint", "_tokenizer"))]
    what = f"--ckpt_dir {folder}: damaged, incomplete or not of --task {task}"
    with refusing(what, "download it again, or give the task or the folder that fits"):
        shards = sorted(set(shards_of(folder).values()))
        for name in ("config.json", *shards, *(parts if all_parts else [])):
            if not (folder / name).exists():
                raise ValueError(f"{name} is missing, and --task {task} needs it")
        told = dict(json.loads((folder / "config.json").read_text()))
        kind = task.split("-")[0].replace("t2i", "t2v")
        if told.get("model_type", kind) not in {kind, kind.replace("flf2v", "i2v")}:
            raise ValueError(f"a {told['model_type']} transformer, which --task {task} cannot use")
        if told.get("dim") != config["dim"]:
            dims = f"dim {told.get('dim')}, that of --task {task} {config['dim']}"
            raise ValueError(f"its transformer has {dims} (1536 is 1.3B, 5120 is 14B)")


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
            with refusing(f"--{name} {file}: cannot be read", "give a file that is there"):
                if name in videos:  # as Wan2.1 reads them, although it does not require decord
                    importlib.import_module("decord").VideoReader(file)[0]
                else:
                    Image.open(file).convert("RGB")


def check_output(args: argparse.Namespace, wan_generate: ModuleType) -> None:
    """Two frames go through Wan2.1's own writer, into the folder and with the ending asked for."""
    image, said = args.task.startswith("t2i"), io.StringIO()
    ending, write = (".png", "cache_image") if image else (".mp4", "cache_video")
    target = Path(args.save_file or f"video{ending}").absolute()
    cure = f"give a {ending} in a folder that is there; have ffmpeg (pip install imageio-ffmpeg)"
    with (
        refusing(f"--save_file {target}: cannot be written", cure),
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
        redirect_stderr(io.StringIO()),
        redirect_stdout(said),
    ):
        if target.is_dir() or not target.suffix:
            raise OSError("no file with an ending")
        frames = torch.linspace(-1, 1, 2).view(1, 1, 2, 1, 1).expand(1, 3, 2, 64, 64)
        probe = f"{folder}/probe{target.suffix}"
        getattr(wan_generate, write)(frames[:, :, 0] if image else frames, probe, retry=1)
        if said.getvalue():
            raise OSError(said.getvalue())
        check_written(probe, 1 if image else 2)


def check_written(file: str, frames: int) -> None:
    """OSError: the file does not hold the frames, since the disk was full, or ffmpeg failed."""
    try:
        with imageio.get_reader(file) as reader:
            found = sum(1 for _ in reader)
    except Exception as error:  # each decoder has its own
        raise OSError(f"{file} does not hold {frames} frames: {error!r:.200}") from error
    merges_equal_ones = Path(file).suffix.lower() in (".gif", ".png")
    if found < (min(frames, 2) if merges_equal_ones else frames):
        raise OSError(f"{file} does not hold {frames} frames, but {found}")


def choose_row(args: argparse.Namespace) -> tuple[str, str]:
    """The row for a run, and why that one."""
    if args.task == "i2v-14B":
        name = Path(args.ckpt_dir).absolute().name  # a parent folder may say anything
        said = {"480p", "720p"} & set(re.split("[^0-9a-z]+", name.lower()))
        small = said == {"480p"} if len(said) == 1 else args.size in ("832*480", "480*832")
        why = f"checkpoint {name}" if len(said) == 1 else f"size {args.size}"
        return "i2v-14B-480P" if small else "i2v-14B-720P", why
    if args.task in BORROWED_ROWS:
        return BORROWED_ROWS[args.task], f"borrowed: nobody has fitted {args.task}"
    if args.task not in TASK_ROWS:
        cure = f"add --teacache_model, one of {ROWS}, or make one by --teacache_calibrate"
        refuse(f"--task {args.task}: no row is known for it; {cure}")
    return TASK_ROWS[args.task], f"task {args.task}"


def choose_fit(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Fit, str, str]:
    """The fit of a run, what it is, and what to warn of: as asked, the checkpoint's, or a row."""
    ret, file = own.use_ret_steps, Path(args.ckpt_dir) / "teacache.json"
    if own.teacache_model:
        return FITS[ret][own.teacache_model], f"row {own.teacache_model} (as asked)", ""
    if own.teacache_coefficients or file.is_file():
        file = Path(own.teacache_coefficients or file)
        made, made_for = read_calibration(file, MODES[ret])
        now = settings_of(args)
        other = [f"{k} {made_for.get(k)}, now {v}" for k, v in now.items() if made_for.get(k) != v]
        return made, f"calibration {file}", f"made for {'; '.join(other)}" if other else ""
    row, why = choose_row(args)
    warning = "compare with --teacache_thresh 0 before you trust it" if "borrow" in why else ""
    return FITS[ret][row], f"row {row} ({why})", warning


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that the distances and residuals of a run depend on, but for the prompt.

    The model is told by the sizes of its files, and 4 KiB at 64 places of each.
    """
    folder, digest = Path(args.ckpt_dir), hashlib.sha256()
    for name in sorted(set(shards_of(folder).values())):
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for place in range(64):
                file.seek(size * place // 64)
                digest.update(file.read(4096))
    names = ("task", "size", "sample_steps", "sample_shift", "sample_solver")
    return {**{k: getattr(args, k) for k in names}, "model": digest.hexdigest()[:16]}


def timesteps_of(args: argparse.Namespace, train_timesteps: int) -> list[int]:
    """The timesteps of a run, by Wan2.1's own schedulers."""
    solvers = importlib.import_module("wan.utils.fm_solvers")
    common = {"num_train_timesteps": train_timesteps, "shift": 1, "use_dynamic_shifting": False}
    if args.sample_solver != "unipc":
        scheduler = solvers.FlowDPMSolverMultistepScheduler(**common)
        sigmas = solvers.get_sampling_sigmas(args.sample_steps, args.sample_shift)
        return solvers.retrieve_timesteps(scheduler, device="cpu", sigmas=sigmas)[0].tolist()
    unipc = importlib.import_module("wan.utils.fm_solvers_unipc")
    scheduler = unipc.FlowUniPCMultistepScheduler(**common)
    scheduler.set_timesteps(args.sample_steps, device="cpu", shift=args.sample_shift)
    timesteps = scheduler.timesteps.tolist()
    if timesteps[:1] == timesteps[1:2]:
        refuse(
            f"--sample_steps {args.sample_steps} --sample_shift {args.sample_shift}: the first two "
            "timesteps are equal, with which unipc fails at the last step: fewer steps, or dpm++"
        )
    return timesteps


def distances_of(folder: Path, timesteps: Sequence[float], use_ret_steps: bool) -> list[float]:
    """The distances of a run, one less than steps, from the weights of the time embedding alone."""
    shards = shards_of(folder)

    def linear(x: Tensor, layer: str, rows: slice = slice(None)) -> Tensor:
        weight, bias = (tensor(f"{layer}.{part}")[rows].float() for part in ("weight", "bias"))
        return nn.functional.linear(x, weight, bias)

    def tensor(name: str) -> Any:
        file = folder / (shards.get(None) or shards[name])
        return safetensors.safe_open(file, "pt").get_slice(name)  # reads nothing yet

    with refusing(f"--ckpt_dir {folder}: its time embedding cannot be read", "download it again"):
        freq_dim = tensor("time_embedding.0.weight").get_shape()[1]
        sinusoid = sys.modules["wan.modules.model"].sinusoidal_embedding_1d
        e = linear(sinusoid(freq_dim, torch.tensor(timesteps)).float(), "time_embedding.0")
        signals = [linear(nn.functional.silu(e), "time_embedding.2")]
        if use_ret_steps:  # e0, one of its six parts at a time: for 14B it has 0.6 GB of weights
            e, dim = nn.functional.silu(signals[0]), signals[0].size(1)
            parts = (slice(i * dim, (i + 1) * dim) for i in range(6))
            signals = (linear(e, "time_projection.1", rows) for rows in parts)
        sums = [(u.diff(dim=0).abs().sum(1), u[:-1].abs().sum(1)) for u in signals]
    change, size = (torch.stack(u).sum(0) for u in zip(*sums, strict=True))
    return (change / size).tolist()


def speedup_config(
    config: TeaCacheConfig, timesteps: list[int], distances: list[float], speedup: float
) -> TeaCacheConfig:
    """With the threshold for ``--teacache_speedup``, said with its schedule."""
    schedule = plan_speedup(config, timesteps, distances, speedup)
    computed, steps, thresh = len(schedule.computed), config.steps, schedule.config.thresh
    if computed * speedup > steps:
        nearest = f"the nearest is {steps / computed:.3g}, at --teacache_thresh {thresh:.4g}"
        refuse(f"--teacache_speedup {speedup}: no threshold reaches it; {nearest}")
    does = f"computes {computed} of {steps} steps, {schedule.marks()}"
    log.info(f"TeaCache: speed-up {speedup:g} by thresh {thresh:.4g}: {does}")
    return schedule.config


def print_plan(
    fit: Fit, config: TeaCacheConfig, timesteps: list[int], distances: list[float]
) -> None:
    """What the thresholds around the current one do."""
    print("   thresh  computed  skipped  speed-up  longest skip  schedule (# computed, . skipped)")
    ladder = {fit.thresholds[-1] * factor for factor in (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)}
    for thresh in sorted({config.thresh, *fit.thresholds, *ladder}):
        schedule = plan(replace(config, thresh=thresh), timesteps, distances)
        mark, computed = "> "[thresh != config.thresh], len(schedule.computed)
        print(
            f"{mark} {thresh:7.4g}  {computed:8}  {config.steps - computed:7}  "
            f"{config.steps / computed:7.2f}x  {schedule.longest_skip:12}  {schedule.marks()}"
        )
    print("speed-up: of the transformer, if a skipped step took no time")
    for warning in plan(config, timesteps, distances).warnings():
        print(f"warning: {warning}")


def read_calibration(file: Path, mode: str) -> tuple[Fit, dict[str, Any]]:
    """The fit for a mode in a teacache.json, and the settings that it was made for."""
    cure = "make it again by --teacache_calibrate, or give --teacache_model"
    with refusing(f"--teacache_coefficients {file}: damaged or not a calibration", cure):
        told = json.loads(file.read_text())
        if told["version"] != CALIBRATION["version"]:
            raise ValueError(f"version {told['version']} is not {CALIBRATION['version']}")
        sizes = {"thresholds": 1, "coefficients": 5, "fitted_range": 2}
        fits = {m: Fit(**{name: told["fits"][m][name] for name in sizes}) for m in MODES}
        for made, (name, size) in itertools.product(fits.values(), sizes.items()):
            values = getattr(made, name)
            if len(values) != size or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must be {size} finite numbers")
        if fits[mode].thresholds[0] < 0 or fits[mode].fitted_range[0] >= fits[mode].fitted_range[1]:
            raise ValueError("a threshold below 0, or an empty range")
        return fits[mode], dict(told["settings"])


class Calibrated(Exception):
    """A calibration is done, and Wan2.1 has no video to save."""


class Calibration:
    """A teacache.json in the making. What is recorded lies beside it in a .partial until then."""

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace):
        self.file = Path(own.teacache_coefficients or Path(args.ckpt_dir) / "teacache.json")
        self.partial = self.file.with_name(f"{self.file.name}.partial")
        self.told = {**CALIBRATION, "settings": settings_of(args), "runs": []}
        self.prompts: list[str] = []  # none: the one that Wan2.1 gives, which it may have extended
        if args.sample_steps < 7:
            refuse(f"--sample_steps {args.sample_steps}: a calibration needs 7 or more, such as 50")
        if own.teacache_prompts:
            with refusing(f"--teacache_prompts {own.teacache_prompts}", "give a file of prompts"):
                lines = Path(own.teacache_prompts).read_text(encoding="utf-8").splitlines()
                self.prompts = [line.strip() for line in lines if line.strip()]
                if not self.prompts:
                    raise ValueError("must hold a prompt a line")
        with refusing(f"--teacache_coefficients {self.file}: cannot be written", "see its folder"):
            told = json.loads(self.partial.read_text()) if self.partial.is_file() else self.told
            if told["settings"] != self.told["settings"]:
                raise ValueError(f"{self.partial} is of other settings; go on with those, or rm it")
            whole = 2 * (args.sample_steps - 1)  # points; an interrupted run has fewer
            self.told["runs"] = [run for run in told["runs"] if len(run["points"]) == whole]
            self.write(self.partial)

    def write(self, file: Path) -> None:
        """All of it or nothing, and on rank 0 only."""
        if is_rank_0():
            written = file.with_name(f"{file.name}.tmp")
            written.write_text(json.dumps(self.told))
            os.replace(written, file)

    def run(
        self, pipeline: Any, generate: Callable, prompt: str, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Each prompt with every step computed and nothing decoded, then the fits."""
        config, seed = TeaCacheConfig(kwargs["sampling_steps"], 0.0, ()), kwargs.pop("seed")
        for i, text in enumerate(self.prompts or [prompt]):
            log.info(f"TeaCache: calibration on prompt {i + 1}: {text}")
            if any(run["prompt"] == text for run in self.told["runs"]):
                continue  # it was recorded before
            nothing = shadow(pipeline.vae, decode=lambda latents: [torch.zeros(1)])
            with nothing, teacache(pipeline.model, config, Recorder) as recorder:
                run = {"prompt": text, "seed": seed + i, "points": recorder.points}
                self.told["runs"].append(run)
                try:
                    generate(text, *args, seed=seed + i, **kwargs)
                finally:
                    self.write(self.partial)
        points = [point for run in self.told["runs"] for point in run["points"]]
        self.told["fits"] = {}
        for use_ret_steps, mode in enumerate(MODES):
            made, r_squared = fit(points, bool(use_ret_steps))
            self.told["fits"][mode] = {**asdict(made), "r_squared": r_squared}
            log.info(f"TeaCache: {mode}: R squared {r_squared:.3f} over {len(points)} points")
            if r_squared < 0.8:
                log.warning(f"TeaCache: {mode}: a poor fit: distances tell little of the change")
        self.write(self.file)
        if is_rank_0():
            self.partial.unlink()
        log.info(f"TeaCache: wrote {self.file}; a calibration makes no video")
        raise Calibrated


class Job:
    """One run of the command line: what was asked, what was measured, and what must not be lost."""

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, wan_generate: ModuleType):
        self.own, self.args, self.wan_generate = own, args, wan_generate
        self.cache: TeaCache | None = None
        self.seconds: dict[str, float] = {}  # by phase
        self.config: TeaCacheConfig | None = None  # and what its fit is, and is to be warned of
        self.name, self.warning = "calibration", ""
        self.loading = False

    def run(self, make: Callable) -> None:
        """Wan2.1's ``generate(args)``, in whose pipelines ``make`` takes ``generate``'s place."""

        def pipeline_of(kind: type, *args: Any, **kwargs: Any) -> Any:
            self.loading = True
            pipeline = kind(*args, **kwargs)
            pipeline.generate = functools.partial(make, pipeline, pipeline.generate)
            return pipeline

        report = f"--teacache_report {self.own.teacache_report}"
        with refusing(f"{report}: cannot be written", "see its folder"):
            self.write_report("started")
        wan, here, status = sys.modules["wan"], self.wan_generate, "finished"
        kinds = {name: kind for name, kind in vars(wan).items() if hasattr(kind, "generate")}
        pipelines = {k: functools.partial(pipeline_of, kind) for k, kind in kinds.items()}
        writers = {k: self.keeping(getattr(here, k)) for k in ("cache_video", "cache_image")}
        try:
            with shadow(wan, **pipelines), shadow(here, **writers):
                here.generate(self.args)
            if self.cache is None:
                raise RuntimeError("no pipeline of this Wan2.1 has run with TeaCache")
        except Calibrated:
            status = "calibrated"
        except BaseException as error:
            status = f"failed: {error!r}"
            if isinstance(error, KeyboardInterrupt):
                log.error("TeaCache: interrupted")
                sys.exit(130)
            if isinstance(error, (AssertionError, ImportError)) and not self.loading:
                refuse(f"{error} (see --help)")
            raise
        finally:
            try:
                self.write_report(status)
            except OSError as full:  # which must not hide what came before
                log.error(f"TeaCache: {report}: {full}")

    def generate(
        self, pipeline: Any, generate: Callable, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """A pipeline's ``generate`` with TeaCache."""
        config = replace(self.config, guide_scale=kwargs["guide_scale"])
        asked = (self.own.teacache_thresh, self.own.teacache_speedup) != (None, None)
        said = "" if asked else " (default)"
        said = said if config.thresh else " (off: stock Wan2.1)"
        mode = MODES[config.use_ret_steps] + (", order 1" if config.order else "")
        thresh = f"thresh {config.thresh:g}{said}"
        log.info(f"TeaCache: {self.name}, {thresh}, {mode}, {config.steps} steps")
        if self.warning and config.thresh:
            log.warning(f"TeaCache: {self.name}: {self.warning}")
        decode = self.keeping(pipeline.vae.decode)
        self.began = time.perf_counter()
        with teacache(pipeline.model, config) as self.cache, shadow(pipeline.vae, decode=decode):
            video = generate(*args, **kwargs)
        log.info(self.cache.summary())
        return video

    def keeping(self, function: Callable) -> Callable:
        """``vae.decode`` or a writer of Wan2.1: where it fails, what it was given is kept."""
        phase = function.__name__  # decode, cache_video, cache_image

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began, said = time.perf_counter(), io.StringIO()
            try:
                with redirect_stdout(said):  # cache_video prints its error, cache_image does not
                    result = function(*args, **kwargs)
                if phase != "decode":
                    tensor, file = kwargs["tensor"], kwargs["save_file"]
                    if result is None and not said.getvalue():
                        open(file, "ab").close()  # most often, this raises the reason
                    if result is None:
                        raise OSError(said.getvalue().strip() or "its writer gives no reason")
                    check_written(file, tensor.size(2) if phase == "cache_video" else 1)
                return result
            except BaseException as error:
                self.rescue(phase, (*args, *kwargs.values())[0], error)
                raise
            finally:
                self.seconds[phase] = time.perf_counter() - began

        return wrapper

    def rescue(self, phase: str, made: Any, error: BaseException) -> None:
        """Save latents or frames beside the video, else in /tmp, and say the way to a video."""
        name, args = time.strftime("teacache_%Y%m%d_%H%M%S.pt"), self.args
        beside = Path(args.save_file or name).absolute().parent
        for path in (beside / name, Path(tempfile.gettempdir()) / name):
            try:
                torch.save(made, path)
                break
            except (OSError, RuntimeError) as full:
                path.unlink(missing_ok=True)
                log.error(f"TeaCache: nothing can be kept in {path.parent}: {full}")
        else:
            log.error(f"TeaCache: {phase} failed: {error!r}, and what it was given is lost")
            return
        image, config = args.task.startswith("t2i"), self.wan_generate.WAN_CONFIGS[args.task]
        frames = f'torch.load("{path}", map_location="cpu")'
        target = path.with_suffix(".png" if image else ".mp4")
        if phase == "decode":
            vae = Path(args.ckpt_dir).absolute() / config["vae_checkpoint"]
            frames = f'(v := WanVAE(vae_pth="{vae}")).decode([u.to(v.device) for u in {frames}])'
            frames += "[0][None]" + "[:, :, 0]" * image
        write = f'cache_{"image" if image else "video"}({frames}, "{target}"'
        write += ")" if image else f", fps={config['sample_fps']})"
        imports = "import torch; from wan.modules.vae import WanVAE; from wan.utils.utils import *"
        log.error(
            f"TeaCache: {phase} failed: {error!r}. What it was given is in {path}; this makes "
            f"{target} of it:\ncd {shlex.quote(str(Path(self.wan_generate.__file__).parent))} && "
            f"python -c {shlex.quote(f'{imports}; {write}')}"
        )

    def write_report(self, status: str) -> None:
        """For ``--teacache_report``: all that is known, as far as the run came."""
        if not self.own.teacache_report or not is_rank_0():
            return
        cuda = torch.cuda.is_available()
        report = {
            "status": status,
            "settings": {**vars(self.args), **vars(self.own)},
            "fit": self.name,
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
    own, rest = parse_own(argv)
    asks_help = {"-h", "--help"} & set(rest)
    if asks_help:
        print(own_parser().format_help())
    wan_generate = import_wan(own.wan_repo, generates=not (asks_help or own.teacache_plan))
    args = parse_wan(wan_generate, rest)
    wan_config, examples = wan_generate.WAN_CONFIGS[args.task], wan_generate.EXAMPLE_PROMPT
    check_numbers(args)
    check_checkpoint(args, wan_config, all_parts=not own.teacache_plan)
    timesteps = timesteps_of(args, wan_config["num_train_timesteps"])
    job = Job(own, args, wan_generate)
    if own.teacache_calibrate:
        check_inputs(args, examples[args.task])
        job.run(Calibration(own, args).run)
        return
    fit, job.name, job.warning = choose_fit(own, args)
    steps, ret = args.sample_steps, own.use_ret_steps
    config = TeaCacheConfig.from_fit(
        fit, steps, own.teacache_thresh, use_ret_steps=ret, order=own.teacache_order
    )
    if own.teacache_plan or own.teacache_speedup:
        distances = distances_of(Path(args.ckpt_dir), timesteps, ret)
    if own.teacache_speedup:
        config = speedup_config(config, timesteps, distances, own.teacache_speedup)
    if own.teacache_plan:
        if is_rank_0():
            print(f"TeaCache plan: {job.name}, {MODES[ret]}, {steps} steps")
            print_plan(fit, config, timesteps, distances)
            print(f"warning: {job.warning}\n" if job.warning else "", end="")
        return
    check_inputs(args, examples[args.task])
    if is_rank_0():
        check_output(args, wan_generate)
    job.config = config
    job.run(job.generate)


if __name__ == "__main__":
    main()
