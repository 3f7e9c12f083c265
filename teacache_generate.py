"""TeaCache for Wan2.1 and Wan2.2: nearly the same video in about half the time.

Copy this file beside Wan's generate.py and run it with the same flags and its own (--help):

    python teacache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B \\
        --prompt "Two cats box on a spotlighted stage." --teacache_thresh 0.08

Sections; each uses only those above it:
  rules         decide which steps are computed; plan them ahead of a run
  cache         keep residuals and patch a model to reuse them: teacache()
  attention     PyTorch's attention where flash-attn cannot run
  Wan           a checkout, its parser, timesteps, models and VAE; a checkpoint's time embedding
  checks        refuse a wrong command before the weights are loaded
  session       run Wan's generate(args); latents, videos and records on disk; the queue of a batch
  comparison    one prompt with several settings: table and picture
  command line  flags, jobs, main

The method is TeaCacheConfig, Schedule.decide, ResidualCache and TeaCache. A command runs through

    command > jobs_of > job_of (parses the flags, plans the schedule)
            > make_batch > Session.make > sample (TeaCache.decide, each step) > decode > write

To add a fitted model, add a Rule to RULES, or put teacache.json into its checkpoint (read_rule); to
add a kind of task, add a Kind to KINDS, and see check_numbers and check_input.

TeaCache: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108. Wan: https://github.com/Wan-Video/Wan2.1 and Wan2.2.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import logging
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from argparse import Namespace
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import ModuleType, NoneType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import imageio
import numpy as np
import safetensors
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageSequence
from torch import Tensor, nn


class Log(logging.LoggerAdapter):
    """Begins each message with the script's name, among Wan's own."""

    def process(self, msg: str, kwargs: Any) -> tuple[str, Any]:
        return f"TeaCache: {msg}", kwargs


log = Log(logging.getLogger("teacache"), {})

# ----------------------------------------------------------------------------------------- rules
# Decides which steps are computed. Uses numbers only: no tensors, models or files.
#
# TeaCache published the polynomials and their thresholds. Rule "sigma" is based on MagCache. New
# here: the straight line of residual_norm, order 1, and choosing a threshold for a speed-up.

# TeaCacheConfig.measure: what increments are computed from
EMBEDDING, PROJECTION, NOISE_LEVEL = "embedding", "projection", "noise level"
RETENTION_STEPS = 5  # the first steps, always computed with PROJECTION (--use_ret_steps)
TRAIN_TIMESTEPS = 1000  # a timestep is 1000 times the noise level
LARGE_THRESH = 1e9  # in place of infinity: only forced steps are computed


@dataclass(frozen=True)
class Polynomial:
    """Maps a relative L1 distance to an increment.

    coefficients: highest power first. thresholds: the published ones; the last is the default.
    """

    coefficients: Sequence[float]
    thresholds: Sequence[float]

    def __post_init__(self) -> None:
        numbers = [*self.coefficients, *self.thresholds]
        finite = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        if len(self.coefficients) != 5 or not self.thresholds or not finite:
            raise ValueError("a polynomial needs 5 coefficients and a threshold, finite numbers")
        if min(self.thresholds) < 0:
            raise ValueError(f"threshold {min(self.thresholds)} must be 0 or more")


@dataclass(frozen=True)
class Rule:
    """Decides which steps are computed: two polynomials fitted to a model, or "sigma" without.

    plain, retention: the polynomial without and with --use_ret_steps; None for "sigma".
    steps, shift, solver: the sampling settings of the fit.
    tasks: Wan's tasks that use this rule by default.
    area: pixels of a frame in the fit, where several rules have one task.
    why, named: set by choose_rule for one run; named: the user gave this name, so that check_plan
        warns where it would refuse.
    """

    name: str
    plain: Polynomial | None = None
    retention: Polynomial | None = None
    steps: int = 50
    shift: float = 5.0
    solver: str = "unipc"
    tasks: Sequence[str] = ()
    area: int = 0
    why: str = ""
    named: bool = False

    @property
    def is_sigma(self) -> bool:
        return self.plain is None

    def polynomial(self, ret: bool) -> Polynomial | None:
        return self.retention if ret else self.plain

    def __str__(self) -> str:
        return f"rule {self.name} ({self.why})"


# TeaCache's authors fitted these polynomials to Wan2.1 at generate.py's defaults. Tasks that no
# rule lists use "sigma", which has none: its increments come from the noise level.
# fmt: off
RULES: dict[str, Rule] = {rule.name: rule for rule in (
    Rule("sigma"),
    Rule("t2v-1.3B",
         Polynomial((2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
                    (0.05, 0.07, 0.08)),
         Polynomial((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
                    (0.05, 0.1)),
         tasks=("t2v-1.3B",)),
    Rule("t2v-14B",
         Polynomial((-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
                    (0.14, 0.15, 0.2)),
         Polynomial((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
                    (0.1, 0.2)),
         tasks=("t2v-14B", "t2i-14B")),
    Rule("i2v-14B-480P",
         Polynomial((-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
                    (0.13, 0.19, 0.26)),
         Polynomial((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
                    (0.2, 0.3)),
         steps=40, shift=3.0, tasks=("i2v-14B",), area=832 * 480),
    Rule("i2v-14B-720P",
         Polynomial((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
                    (0.18, 0.2, 0.3)),
         Polynomial((8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
                    (0.2, 0.3)),
         steps=40, tasks=("i2v-14B",), area=1280 * 720),
)}
# fmt: on

# MagCache's settings for Wan2.2's pairs of models: the share of each model's first steps that is
# always computed, and how many steps may be skipped in a row.
SIGMA_FOR_TWO_MODELS = {"t2v-A14B": ((0.4, 0.4), 2), "i2v-A14B": ((1.0, 0.1), 2)}


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of one generation.

    Important:
        steps: the pipeline's ``sampling_steps``.
        thresh: a step is computed once the accumulated increments reach it; 0 is stock Wan.
        coefficients: of the polynomial for the increments, highest power first.
    To tinker with:
        measure: what increments are computed from.
            EMBEDDING: the time embedding e [dim]; the first and the last step are forced.
            PROJECTION: e0 [6 * dim], which modulates the blocks; the first 5 steps are forced.
            NOISE_LEVEL: rule "sigma", without polynomial; the first fifth and the last step are
                forced, and at most a tenth of the steps is skipped in a row.
        order: a skipped step repeats the last residual (0, TeaCache) or continues the line
            through the last two (1, see ``ResidualCache``).
        guided_steps: the first steps on which the unconditional branch runs; after them it returns
            the conditional output, as at guidance scale 1. None: all steps.
        forced_steps: always computed. None: as the measure has it.
        max_skipped: steps skipped in a row at most. None: as the measure has it.
    ValueError: names the setting and the allowed values.
    """

    steps: int
    thresh: float
    coefficients: Sequence[float] = ()
    measure: str = EMBEDDING
    order: int = 0
    guided_steps: int | None = None
    forced_steps: Sequence[int] | None = None
    max_skipped: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.guided_steps or 0) < 0:
            raise ValueError(f"steps {self.steps}, guided_steps {self.guided_steps}: too few")
        if self.thresh is None or not 0 <= self.thresh < math.inf:
            raise ValueError(f"thresh {self.thresh} must be 0 (stock) or a positive number")
        if self.measure not in (EMBEDDING, PROJECTION, NOISE_LEVEL):
            raise ValueError(f"measure {self.measure!r} must be one of the three constants")
        if self.order not in (0, 1):
            raise ValueError(f"order {self.order} must be 0 or 1")
        if self.thresh > 0 and self.measure != NOISE_LEVEL and not len(self.coefficients):
            raise ValueError(f"measure {self.measure} needs coefficients, such as RULES has")
        default_forced, default_max = {
            EMBEDDING: ((0, self.steps - 1), self.steps),
            PROJECTION: (tuple(range(RETENTION_STEPS)), self.steps),
            NOISE_LEVEL: (first_and_last_steps([self.steps], [0.2]), math.ceil(self.steps / 10)),
        }[self.measure]
        if self.forced_steps is None:  # the dataclass is frozen
            object.__setattr__(self, "forced_steps", default_forced)
        if self.max_skipped is None:
            object.__setattr__(self, "max_skipped", default_max)

    @classmethod
    def from_rule(
        cls, rule: Rule, steps: int, thresh: float | None = None, ret: bool = False, **others: Any
    ) -> TeaCacheConfig:
        """Settings for a rule, such as ``RULES["t2v-1.3B"]``.

        thresh: the rule's default if None; "sigma" has none, see ``Schedule.for_speedup``.
        ret: use the polynomial for retention steps.
        """
        polynomial = rule.polynomial(ret)
        if polynomial is None:
            return cls(steps, thresh, measure=NOISE_LEVEL, **others)
        thresh = polynomial.thresholds[-1] if thresh is None else thresh
        measure = PROJECTION if ret else EMBEDDING
        return cls(steps, thresh, polynomial.coefficients, measure, **others)

    def increment(self, timestep: float, distance: float, last_computed_timestep: float) -> float:
        """What a step adds to the accumulated value.

        TeaCache (arXiv 2411.19108, section 3): the rescaled distance of the embedding to that of
        the step before. "sigma", after MagCache (arXiv 2506.09045): the relative change of the
        residual's norm since the last computed step, which is the whole error of one skipped step;
        the accumulated value sums these errors.
        """
        if self.measure == NOISE_LEVEL:
            return abs(1 - residual_norm(timestep) / residual_norm(last_computed_timestep))
        return float(np.polyval(self.coefficients, distance))

    def is_guided(self, step: int) -> bool:
        """Whether the unconditional branch runs on a step."""
        return self.guided_steps is None or step < self.guided_steps


def first_and_last_steps(steps_by_model: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """The first steps of each model, each share rounded up, and the last step of all."""
    found, begin = set[int](), 0
    for steps, share in zip(steps_by_model, shares, strict=True):
        found.update(range(begin, begin + math.ceil(share * steps - 1e-9)))
        begin += steps
    return tuple(sorted(found | {begin - 1}))


def residual_norm(timestep: float) -> float:
    """Norm of the blocks' residual at a timestep, up to a factor; only ratios are used.

    One line for all models: the norms that MagCache published for five Wan2.1 models differ from
    it by 0.3 to 2.2 % on average, 9 % at most, between noise levels 0.2 and 0.93.
    """
    return 0.33 + 0.66 * timestep / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Decision:
    """The decision of one step, and the numbers behind it."""

    timestep: float
    distance: float | None  # relative L1 to the step before; None at a model's first step
    increment: float | None  # None on a forced step
    accumulated: float  # compared with the threshold; 0 on a forced step
    computed: bool


class Schedule:
    """Decides each step of one generation."""

    def __init__(self, config: TeaCacheConfig):
        self.config = config
        self.decisions: list[Decision] = []

    def decide(self, timestep: float, distance: float | None) -> bool:
        """Decide the next step: True to compute it, False to reuse the last residual.

        distance: None at the first step of a model, which is always computed. "sigma" uses no more.
        """
        config, step, done = self.config, len(self.decisions), self.computed_steps
        forced = config.thresh == 0 or step in config.forced_steps or distance is None
        if forced or step - done[-1] > config.max_skipped:
            self.decisions.append(Decision(timestep, distance, None, 0.0, computed=True))
            return True
        previous, last_computed = self.decisions[-1], self.decisions[done[-1]]
        increment = config.increment(timestep, distance, last_computed.timestep)
        accumulated = increment + (0.0 if previous.computed else previous.accumulated)
        computed = not accumulated < config.thresh  # not-a-number computes
        self.decisions.append(Decision(timestep, distance, increment, accumulated, computed))
        return computed

    @property
    def computed_steps(self) -> list[int]:
        return [step for step, decision in enumerate(self.decisions) if decision.computed]

    @property
    def passes(self) -> int:
        """How often the blocks run: once or twice a computed step. Stock: twice every step."""
        return sum(1 + self.config.is_guided(step) for step in self.computed_steps)

    @property
    def speedup(self) -> float:
        """Speed-up of the transformer over stock if a skipped step took no time."""
        return 2 * len(self.decisions) / self.passes if self.passes else 1.0

    @property
    def negative_steps(self) -> list[int]:
        """Steps with a negative increment: the polynomial is used outside its fitted range."""
        return [step for step, d in enumerate(self.decisions) if (d.increment or 0) < 0]

    @property
    def longest_skip(self) -> int:
        """The most steps skipped in a row."""
        return max(map(len, self.as_text().split("#")))

    def as_text(self) -> str:
        """One character per step: # computed, . skipped."""
        return "".join("#" if decision.computed else "." for decision in self.decisions)

    def counts(self) -> str:
        """Such as "25 of 50 steps", with the passes where guidance ends early."""
        computed, steps = len(self.computed_steps), self.config.steps
        text = f"{computed} of {steps} steps"
        if self.passes != 2 * computed:
            text += f", {self.passes} of {2 * steps} passes"
        return text

    @classmethod
    def planned(
        cls, config: TeaCacheConfig, timesteps: Sequence[float], distances: Sequence[float | None]
    ) -> Schedule:
        """The schedule of a run, decided before the run."""
        schedule = cls(config)
        for timestep, distance in zip(timesteps, distances, strict=True):
            schedule.decide(timestep, distance)
        return schedule

    def again(self, **settings: Any) -> Schedule:
        """The same run planned with other settings, such as ``thresh=0.1``."""
        decisions, config = self.decisions, replace(self.config, **settings)
        timesteps = [decision.timestep for decision in decisions]
        return Schedule.planned(config, timesteps, [decision.distance for decision in decisions])

    def for_speedup(self, speedup: float) -> Schedule:
        """The plan with the fewest passes, but at least 2 * steps / speedup.

        Passes never increase with the threshold, which delays computed steps: bisection finds it.
        Of the thresholds that give this plan the middle one is taken: so rounding, on another
        machine or in bfloat16, seldom changes a decision. No threshold removes the passes of
        forced steps: there may be more than wanted.
        ValueError: an increment is negative; no threshold can be trusted.
        """
        wanted = 2 * self.config.steps / speedup - 1e-9
        if negative := self.again(thresh=LARGE_THRESH).negative_steps:
            raise ValueError(f"increments are negative at steps {ranges(negative)}")
        enough, too_large = 0.0, LARGE_THRESH
        for _ in range(70):  # from 1e9 to 1e-12
            middle = (enough + too_large) / 2
            if self.again(thresh=middle).passes >= wanted:
                enough = middle
            else:
                too_large = middle
        best = self.again(thresh=enough)
        exact = best.middle_threshold()
        rounded = self.again(thresh=float(f"{exact:.4g}"))  # machines differ in the 9th digit
        return rounded if rounded.as_text() == best.as_text() else self.again(thresh=exact)

    def middle_threshold(self) -> float:
        """The middle of the thresholds that give this schedule:
        max(sums of skipped steps) < threshold <= min(sums of computed steps). 0 if none skips."""
        free = [decision for decision in self.decisions if decision.increment is not None]
        skipped = [decision.accumulated for decision in free if not decision.computed]
        reached = [d.accumulated for d in free if d.computed and math.isfinite(d.accumulated)]
        if not skipped:
            return 0.0
        if not reached:
            return 2 * max(skipped) or 1.0  # any will do; 1 if no embedding changes
        return (max(skipped) + min(reached)) / 2


def ranges(steps: Sequence[int]) -> str:
    """Step numbers as short text: 1 2 3 7 as "1-3 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# ----------------------------------------------------------------------------------------- cache
# Keeps the residuals of one generation and patches the model to reuse them. Knows WanModel's
# forward, blocks, head, time_projection and forward_vace; no flags, files or pipelines.

PROBE_TOKENS = 1024  # measure on at most this many tokens per rank: every 32nd of 32,760
CONDITIONAL, UNCONDITIONAL = 0, 1  # branches: with the prompt, then without


def relative_l1(embedding: Tensor, previous: Tensor) -> Tensor:
    """mean|embedding - previous| / mean|previous| of two tensors of one shape, a scalar tensor."""
    return (embedding - previous).abs().mean() / previous.abs().mean()


@contextmanager
def patched(target: object, **attributes: Any) -> Iterator[None]:
    """Set attributes of one object, and restore them whatever happens.

    Writes to ``vars(target)``: the class stays as it is, and an nn.Module registers nothing.
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


def synchronize() -> None:
    """Wait for the GPU, where there is one, so that the clock counts its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_distributed() -> bool:
    """Whether several processes make one video together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(terms: Sequence[Tensor]) -> Tensor:
    """Sum each tensor over the tokens of all ranks; float64 [len(terms)] on the device.

    Use ratios of sums only: ranks that hold the same tokens (FSDP without Ulysses) count twice.
    """
    sums = torch.stack([term.sum(dtype=torch.float64) for term in terms])
    if is_distributed():
        dist.all_reduce(sums)
    return sums


@dataclass
class ComputedStep:
    """The residuals B(h) - h of one computed step, by branch."""

    step: int
    residual: dict[int, Tensor]  # [1, tokens, dim]
    probe: dict[int, Tensor]  # at most PROBE_TOKENS of the tokens in float32, to measure with


def lines_between(
    old: dict[int, Tensor], new: dict[int, Tensor], branches: Collection[int]
) -> list[Tensor]:
    """The changes from old to new that order 1 continues: of the unconditional branch, and of the
    difference of the branches; of the conditional branch where guidance has ended."""
    lines = [new[b] - old[b] for b in (UNCONDITIONAL, CONDITIONAL) if b in branches]
    if len(lines) == 2:
        lines[1] -= lines[0]
    return lines


class ResidualCache:
    """Predicts the residual of a skipped step from the last one or two computed steps.

    Order 0 repeats the newest residual (TeaCache). Order 1 continues the line through the last
    two, over the timestep, for the unconditional residual and for the difference of the branches:

        prediction = new + gain * reach * (new - old)
        reach      = (timestep[step] - timestep[new]) / (timestep[new] - timestep[old])

    It follows the line for as many steps as lie between old and new; then it stays constant.
    Each computed step measures both gains: as the factor that brings reach * (new - old) nearest
    to (actual - new), in least squares, clipped to 0..1. Errors of the difference count most, as
    guidance multiplies it: a gain of its own makes them smaller than a gain of each branch does.
    D2Cache published a linear prediction for Wan2.1 before; the gains are this project's.

    decisions: of each step so far, for its timestep.
    """

    def __init__(self, decisions: Sequence[Decision]):
        self.decisions = decisions
        self.history: deque[ComputedStep] = deque(maxlen=2)  # old, new
        self.gains: Sequence[float] | Tensor = (1.0, 1.0)  # once measured, a tensor on the GPU

    def predict(self, order: int, branch: int, step: int, of: str = "residual") -> Tensor:
        """The residual of a skipped step; with of="probe", its probe."""
        newest = getattr(self.history[-1], of)[branch]
        if order == 0 or len(self.history) < 2:
            return newest
        old, new = self.history
        reach = self.reach(min(step, 2 * new.step - old.step))  # as far as old lies back
        branches = new.probe if branch == CONDITIONAL else [UNCONDITIONAL]
        lines = lines_between(getattr(old, of), getattr(new, of), branches)
        prediction = newest.clone()
        for i, line in enumerate(lines):
            prediction += line.mul_(self.gains[i] * reach)  # in place: 1.5 GB each for 14B at 720P
        return prediction

    def reach(self, step: int) -> float:
        """How far a step lies beyond the newest one, in lengths of the line; 0 without a line."""
        if len(self.history) < 2:
            return 0.0
        old, new = self.history
        begin, end, now = (self.decisions[i].timestep for i in (old.step, new.step, step))
        return (now - end) / (end - begin) if end != begin else 0.0

    def free(self, keep: int) -> None:
        """Free the residuals of all but the ``keep`` newest steps; probes stay."""
        for computed in list(self.history)[: len(self.history) - keep]:
            computed.residual.clear()

    def add(self, now: ComputedStep) -> Tensor | None:
        """Take a computed step; measure its predictions, and the gains.

        Returns [sum|R|, sum|R - prediction of order 0|, sum|R - prediction of order 1|] over the
        probes R of both branches and all ranks; None for a model's first step.
        """
        if not self.history:
            self.history.append(now)
            return None
        sizes = []  # three of each branch
        for branch, probe in now.probe.items():
            errors = [probe - self.predict(order, branch, now.step, "probe") for order in (0, 1)]
            sizes += [size.abs() for size in (probe, *errors)]
        old, new = self.history[0], self.history[-1]  # the same if there is one: lines are 0
        lines = lines_between(old.probe, new.probe, now.probe)
        actual = lines_between(new.probe, now.probe, now.probe)
        along = [a * line for a, line in zip(actual, lines, strict=True)]
        squared = [line**2 for line in lines]
        counts = [len(sizes), len(along), len(squared)]
        sizes, along, squared = sum_over_ranks([*sizes, *along, *squared]).split(counts)
        if reach := self.reach(now.step):  # over the whole gap, beyond where predictions stop
            self.gains = (along / (reach * squared)).nan_to_num(0.0).clamp(0, 1)
        self.history.append(now)
        return sizes.view(-1, 3).sum(0)


class TeaCache:
    """Patches a pipeline's models for one generation, and holds its state.

    Wan calls a model twice a step, first with the prompt (the conditional branch), then without.
    For the generation these parts of the model instance are patched:

        forward           counts the call; after guidance has ended, the unconditional call
                          returns the conditional output
        time_projection   decides, once a step; on a skipped step it projects one token only
        forward_vace      returns None on a skipped step
        blocks' forward   the first one called notes its input h; on a skipped step each returns
                          its input
        head's forward    gets B(h) on a computed step and stores B(h) - h, gets
                          h + prediction on a skipped one

    At threshold 0 nothing is patched, or ``forward`` alone if guidance ends early. After the last
    call, before the VAE, all tensors are freed. Wan2.2's A14B samples with one model, then with
    another: the first step of each is computed, and no residual is used across them.
    """

    def __init__(self, config: TeaCacheConfig):
        self.config, self.schedule = config, Schedule(config)
        if config.thresh == 0:  # stock: nothing is decided later
            self.schedule.decisions += [Decision(math.nan, None, None, 0.0, True)] * config.steps
        self.thread = threading.get_ident()  # step and branch are counted for one thread
        self.drifts: list[tuple[int, tuple[float, float]]] = []  # step, relative error by order
        self.unread: list[tuple[int, Tensor]] = []  # step, sums of ResidualCache.add
        # while one model samples
        self.model: nn.Module | None = None
        self.residuals = ResidualCache(self.schedule.decisions)
        self.embedding: Tensor | None = None  # of the step before
        # during a step
        self.step, self.branch = -1, UNCONDITIONAL  # so that the first call begins step 0
        self.computes = True
        self.storing: ComputedStep | None = None
        self.timestep: Tensor | None = None
        self.output: Any = None  # of the conditional call
        # during a call
        self.block_input: Tensor | None = None  # h

    # Calls of the model

    def forward(
        self, model: nn.Module, forward: Callable, /, x: Any, t: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces the forward of a model, or of what wraps it, and calls it.

        t: [1], or [1, tokens] in Wan2.2's ti2v.
        RuntimeError: the model is not called twice a step, or called from another thread; its
            forward bypasses the patches, so that nothing would be skipped.
        """
        if threading.get_ident() != self.thread:
            raise RuntimeError("teacache() serves the thread that entered it: use one per thread")
        self.begin_call(model, t)
        if self.branch == UNCONDITIONAL and not self.config.is_guided(self.step):
            output = self.output
        else:
            output = forward(x, t, *args, **kwargs)
            decided = len(self.schedule.decisions) > self.step  # by time_projection
            head_ran = self.block_input is None
            if self.config.thresh > 0 and not (decided and head_ran):
                raise RuntimeError(
                    f"step {self.step}: this model's forward does not call time_projection, blocks "
                    "and head in this order, which TeaCache needs: use --teacache_thresh 0"
                )
        self.output = output if self.branch == CONDITIONAL else None
        if self.step == self.config.steps - 1 and self.branch == UNCONDITIONAL:
            self.finish()
        return output

    def begin_call(self, model: nn.Module, t: Tensor) -> None:
        """Find out which step and branch a call is.

        Wan passes one tensor object to both calls of a step: identity needs no wait for the GPU.
        """
        same = t is self.timestep
        if self.branch == CONDITIONAL and (same or torch.equal(t, self.timestep)):
            self.branch = UNCONDITIONAL  # the second call of a step
        elif same:
            raise RuntimeError(f"step {self.step}: the model was called three times, not twice")
        else:  # the first call of the next step
            self.check_two_calls()
            self.step, self.branch = self.step + 1, CONDITIONAL
        if self.step == self.config.steps:  # steps count from 0
            raise RuntimeError(
                f"the pipeline takes more than {self.step} steps: set TeaCacheConfig.steps to its "
                "sampling_steps, and enter teacache() for each video"
            )
        self.timestep = t
        if model is not self.model:  # its first call
            self.model, self.embedding = model, None
            self.residuals = ResidualCache(self.schedule.decisions)

    def check_two_calls(self) -> None:
        """RuntimeError: the step that ends here lacks its unconditional call."""
        if self.step >= 0 and self.branch == CONDITIONAL and self.config.is_guided(self.step):
            raise RuntimeError(f"step {self.step}: the model was called once, not twice")

    # The decision

    def project(self, projection: Callable, /, e: Tensor) -> Tensor:
        """Replaces time_projection: e [..., dim] to e0 [..., 6 * dim].

        Wan2.2 has one e per token, [1, tokens, dim]; the last one decides, since the first may
        belong to a given image at timestep 0. On a skipped step no block reads e0, but the model
        still reshapes it: one token is projected and expanded.
        """
        last = e.flatten(0, -2)[-1:]
        if self.branch == CONDITIONAL:
            self.decide(projection(last)[0] if self.config.measure == PROJECTION else last[0])
        if self.computes:
            return projection(e)
        return projection(last).expand(*e.shape[:-1], -1)

    def decide(self, embedding: Tensor) -> None:
        """Decide a step for both branches, with one wait for the GPU. All ranks decide from rank
        0's numbers: if they differed, they would wait for each other forever."""
        numbers = [self.timestep.flatten()[-1].double().to(embedding.device)]
        if self.embedding is not None:
            numbers.append(relative_l1(embedding, self.embedding).double())
        numbers = torch.stack(numbers)
        if is_distributed():
            dist.broadcast(numbers, src=0)
        timestep, *distance = numbers.tolist()
        self.embedding = embedding.clone()  # a view would keep the embeddings of all tokens
        self.computes = self.schedule.decide(timestep, distance[0] if distance else None)
        if self.computes:
            # make room for the blocks; order 1 still needs the newest residual
            self.residuals.free(keep=self.config.order)
            self.storing = ComputedStep(self.step, {}, {})

    # Blocks and head

    def run_vace(self, forward_vace: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """Replaces forward_vace: only the blocks read its hints."""
        return forward_vace(*args, **kwargs) if self.computes else None

    def run_block(self, block: Callable, /, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces each block's forward."""
        if self.block_input is None:
            self.block_input = x.clone()  # a fork may add to x in place
        return block(x, *args, **kwargs) if self.computes else x

    def run_head(self, head: Callable, /, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replaces the head's forward; x [1, tokens, dim] is B(h), or h on a skipped step.

        The sum is out of place: under autocast h is bfloat16, B(h) and the residual are float32,
        and the head must get float32 on every step.
        """
        h, self.block_input = self.block_input, None
        if h is None:
            raise RuntimeError(f"step {self.step}: the model's forward called none of its blocks")
        if self.computes:
            self.remember(h, x)
        else:
            x = h + self.residuals.predict(self.config.order, self.branch, self.step)
        return head(x, *args, **kwargs)

    def remember(self, h: Tensor, out: Tensor) -> None:
        """Store a branch's residual; after the step's last branch, measure the predictions."""
        every = math.ceil(h.size(1) / PROBE_TOKENS)
        self.storing.probe[self.branch] = (out[:, ::every] - h[:, ::every]).float()
        self.storing.residual[self.branch] = out - h
        if self.branch == UNCONDITIONAL or not self.config.is_guided(self.step):
            sums = self.residuals.add(self.storing)
            # the drift of skipped steps shows at the computed step after them
            if sums is not None and not self.schedule.decisions[self.step - 1].computed:
                self.unread.append((self.step, sums))

    # The end

    def finish(self) -> None:
        """Read the drifts and free all tensors: after the last call, or when the VAE decodes.

        RuntimeError: the last step lacks its unconditional call.
        """
        if self.model is None:
            return
        self.check_two_calls()
        read = torch.stack([sums for _, sums in self.unread]).tolist() if self.unread else []
        for (step, _), (size, error_0, error_1) in zip(self.unread, read, strict=True):
            if size > 0 and math.isfinite(size + error_0 + error_1):
                self.drifts.append((step, (error_0 / size, error_1 / size)))
        self.branch = UNCONDITIONAL  # the step is complete
        self.release()

    def release(self) -> None:
        """Free models and tensors; decisions and drifts stay."""
        self.residuals = ResidualCache(self.schedule.decisions)
        self.unread.clear()
        self.model = self.embedding = self.storing = self.output = self.block_input = None
        self.timestep = None

    def drift(self, order: int) -> float | None:
        """Mean relative error of the residuals that an order predicts, or None if no step was
        computed after a skipped one."""
        return float(np.mean([by[order] for _, by in self.drifts])) if self.drifts else None

    def summary(self) -> str:
        """The computed steps and the drift, in one line."""
        order, steps = self.config.order, self.schedule.computed_steps
        text = f"computed {self.schedule.counts()}"
        if len(steps) < self.config.steps:
            text += f" ({' '.join(map(str, steps))})"
        if self.drifts:
            step, worst = max(self.drifts, key=lambda drift: drift[1][order])
            text += (
                f", mean drift {percent(self.drift(order))} (max {percent(worst[order])} at step "
                f"{step}; order {1 - order}: {percent(self.drift(1 - order))})"
            )
        return text


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@contextmanager
def teacache(models: nn.Module | Sequence[nn.Module], config: TeaCacheConfig) -> Iterator[TeaCache]:
    """Let one ``generate`` of a Wan pipeline skip steps.

        config = TeaCacheConfig.from_rule(RULES["t2v-1.3B"], steps=50)
        with teacache(pipeline.model, config) as cache:
            video = pipeline.generate(prompt, size=(832, 480), sampling_steps=50)
        print(cache.summary())

    models: the pipeline's WanModel or VaceWanModel, or a wrapper of it (FSDP, PEFT); for Wan2.2's
        A14B both models. Only these instances are patched, and restored also after an error.
    With several processes all must take the same steps, as Wan's do.
    TypeError: not a Wan transformer. RuntimeError: a model is compiled as a whole, is patched by
        another ``teacache``, takes more steps than configured, or is not called twice a step.
    """
    cache = TeaCache(config)
    models = models if isinstance(models, (list, tuple)) else [models]
    if config.thresh == 0 and config.is_guided(config.steps - 1):
        models = []  # stock
    found = [(model, find_transformer(model)) for model in models]
    with ExitStack() as stack:
        for model, inner in found:
            stack.enter_context(patched_model(cache, model, inner))
        try:
            yield cache
            cache.finish()
        finally:
            cache.release()
    taken = cache.step + 1
    if taken not in (0, config.steps):
        log.warning(f"set up for {config.steps} steps, but the pipeline took {taken}")
    if negative := cache.schedule.negative_steps:
        what = f"increments were negative at steps {ranges(negative)}"
        log.warning(f"{what}: the polynomial was used outside its fitted range")


def find_transformer(model: object) -> nn.Module:
    """The module with blocks, head and time_projection, inside any wrapper."""
    compiled = False
    for module in model.modules() if isinstance(model, nn.Module) else ():
        compiled = compiled or is_compiled(module)
        if {"blocks", "head", "time_projection"} <= module._modules.keys():
            if compiled:
                raise RuntimeError("the model is compiled as a whole: compile its blocks instead")
            return module
    raise TypeError(
        f"teacache() needs Wan's own transformer, such as pipeline.model, not a "
        f"{type(model).__name__}"
    )


def is_compiled(module: nn.Module) -> bool:
    return (
        hasattr(module, "_orig_mod")  # torch.compile(module)
        or getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


@contextmanager
def patched_model(cache: TeaCache, model: nn.Module, inner: nn.Module) -> Iterator[None]:
    """Patch one transformer, ``inner``, which ``model`` is or wraps."""
    if "teacache" in vars(inner):
        raise RuntimeError("this model is patched by another teacache(): leave that one first")
    with ExitStack() as stack:
        # the wrapper's: FSDP's mixed precision casts t, which begin_call compares, on its way in
        forward = functools.partial(cache.forward, inner, model.forward)
        forward = functools.wraps(model.forward)(forward)  # keeps its signature
        stack.enter_context(patched(inner, teacache=cache))
        stack.enter_context(patched(model, forward=forward))
        if cache.config.thresh > 0:
            for block in inner.blocks:
                stack.enter_context(patched_call(block, cache.run_block))
            stack.enter_context(patched_call(inner.time_projection, cache.project))
            stack.enter_context(patched_call(inner.head, cache.run_head))
            if hasattr(inner, "forward_vace"):
                run_vace = functools.partial(cache.run_vace, inner.forward_vace)
                stack.enter_context(patched(inner, forward_vace=run_vace))
        yield


def patched_call(module: nn.Module, replacement: Callable) -> Any:
    """Patch what calling a module runs: the result of ``module.compile()``, else its forward."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    name = "_compiled_call_impl" if compiled else "forward"
    return patched(module, **{name: functools.partial(replacement, getattr(module, name))})


# ------------------------------------------------------------------------------------- attention
# PyTorch's attention where flash-attn cannot run. Knows the names of Wan's modules.


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, k_lens: Tensor | None = None, dropout_p: float = 0.0,
    softmax_scale: float | None = None, q_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), **ignored: Any,
) -> Tensor:  # fmt: skip
    """Wan's ``flash_attention`` with scaled_dot_product_attention, computed in v's dtype.

    q [B, Lq, N, C], k and v [B, Lk, N, C]; k_lens [B]: valid keys. Returns [B, Lq, N, C] in q's
    dtype. ignored: version, deterministic, dtype, q_lens. NotImplementedError: a window, which
    Wan does not use.
    """
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size {window_size} needs flash-attn")
    mask, q = None, q if q_scale is None else q * q_scale
    if k_lens is not None:
        longest = int(k_lens.max())  # slicing keeps the fast kernels, which take no mask
        k, v = k[:, :longest], v[:, :longest]
        if int(k_lens.min()) < longest:
            valid = k_lens.to(q.device).view(-1, 1, 1, 1)
            mask = torch.arange(longest, device=q.device) < valid  # [B, 1, 1, longest]
    heads_first = [tensor.to(v.dtype).transpose(1, 2) for tensor in (q, k, v)]
    attend = nn.functional.scaled_dot_product_attention
    out = attend(*heads_first, mask, dropout_p, causal, scale=softmax_scale)
    return out.transpose(1, 2).to(q.dtype)


def prepare_flash_attention() -> None:
    """Let Wan's import survive a broken flash-attn; call it before ``import wan``.

    Wan expects ModuleNotFoundError; a package built for another torch raises anything. Newer
    versions of flash-attn 3 return a tensor where Wan takes the first of a tuple.
    """
    found = {}
    for name in ("flash_attn", "flash_attn_interface"):  # flash-attn 2 and 3
        try:
            found[name] = importlib.import_module(name).flash_attn_varlen_func
        except Exception:
            sys.modules[name] = None  # type: ignore[assignment]
    if varlen := found.get("flash_attn_interface"):

        @functools.wraps(varlen)
        def in_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            out = varlen(*args, **kwargs)
            return out if isinstance(out, tuple) else (out,)

        sys.modules["flash_attn_interface"].flash_attn_varlen_func = in_tuple


def install_attention(device: torch.device) -> None:
    """Replace Wan's ``flash_attention`` where it cannot run on a device; call after ``import wan``.

    Calls each module's function once with 16 tokens. Leaves an attention of the user's own.
    """
    reasons = {}
    for name, module in list(sys.modules.items()):
        attend = getattr(module, "flash_attention", None) if name.startswith("wan.") else None
        names_used = getattr(getattr(attend, "__code__", None), "co_names", ())
        if "FLASH_ATTN_2_AVAILABLE" not in names_used:  # a global that Wan's own reads
            continue
        version = {"version": 2} if name.endswith(".clip") else {}  # as CLIP calls it
        q = torch.zeros(1, 16, 1, 128, dtype=torch.bfloat16, device=device)
        try:
            attend(q, q, q, **version)
        except Exception as error:
            module.flash_attention = sdpa_attention
            reasons[name] = str(error).strip().split("\n")[0] or "it needs flash-attn and a GPU"
    used = sys.modules["wan.modules.model"].flash_attention
    text = f": {used.__module__}.{used.__name__}"
    if reasons:
        where = "" if used is sdpa_attention else f" in {', '.join(reasons)}"
        why = next(iter(reasons.values()))
        text = f"{where}: PyTorch's (Wan's cannot run here: {why:.200})"
    log.info(f"attention{text}")


# ------------------------------------------------------------------------------------------- Wan
# A checkout of Wan2.1 or Wan2.2: import, parser, timesteps, models of a pipeline, VAE, writers; a
# checkpoint's time embedding. Knows no jobs.


class Refused(Exception):
    """A wrong command, found before the weights are loaded: one line each, exit status 2."""

    def __init__(self, *messages: str):
        super().__init__(*(" ".join(message.split()) for message in messages))


def require(condition: Any, message: str) -> None:
    """Refuse the command unless the condition holds."""
    if not condition:
        raise Refused(message)


@contextmanager
def refusing(what: str, cure: str) -> Iterator[None]:
    """Turn any exception into a refusal: each decoder and writer raises its own kinds."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise Refused(f"{what}: {reason.splitlines()[0][:200]}: {cure}") from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses a wrong command."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message.removeprefix('argument ')} (see --help)")


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for its processes."""
    return int(os.getenv(name) or default)


def is_rank_0() -> bool:
    """Whether this process logs and writes for all that make a video together."""
    return environment("RANK", 0) == 0


def device_of_run() -> torch.device:
    """The device of this process's models."""
    gpu = f"cuda:{environment('LOCAL_RANK', 0)}"
    return torch.device(gpu if torch.cuda.is_available() else "cpu")


VIDEO_WRITERS = ("cache_video", "save_video")  # in generate.py of Wan2.1 and Wan2.2
IMAGE_WRITER = "cache_image"  # Wan2.2 makes no images


class Kind(NamedTuple):
    """What the tasks of one kind need before the weights are loaded."""

    transformers: Sequence[str]  # model_type of the transformers that fit
    inputs: Sequence[str] = ()  # flags of the files that generate.py opens


KINDS = {  # by the first word of a task, such as t2v of t2v-14B
    "t2v": Kind(("t2v",)),
    "t2i": Kind(("t2v",)),
    "i2v": Kind(("i2v",), ("image",)),
    "flf2v": Kind(("flf2v", "i2v"), ("first_frame", "last_frame")),
    "vace": Kind(("vace",), ("src_video", "src_mask", "src_ref_images")),
    "ti2v": Kind(("ti2v",), ("image",)),
}
INPUTS = tuple(dict.fromkeys(flag for kind in KINDS.values() for flag in kind.inputs))
UNSUPPORTED_TASKS = ("s2v-14B", "animate-14B")  # of Wan2.2


def kind_of(args: Namespace) -> str:
    return args.task.split("-")[0]


def makes_image(args: Namespace) -> bool:
    return kind_of(args) == "t2i"


# Flags of generate.py that the script reads. A fork may lack the optional ones.
NEEDED_FLAGS = (
    "task", "size", "frame_num", "ckpt_dir", "save_file", "prompt", "base_seed", "sample_solver",
    "sample_steps", "sample_shift", "sample_guide_scale",
)  # fmt: skip
OPTIONAL_FLAGS = {
    "ulysses_size": 1, "ring_size": 1, "dit_fsdp": False, "t5_fsdp": False, "t5_cpu": False,
    "offload_model": None, "use_prompt_extend": False, **dict.fromkeys(INPUTS),
}  # fmt: skip


class Wan:
    """An imported checkout of Wan2.1 or Wan2.2. Caches what is slow to compute."""

    def __init__(self, generate_py: ModuleType):
        self.generate_py, self.package = generate_py, sys.modules["wan"]
        writers = (*VIDEO_WRITERS, IMAGE_WRITER)
        self.writers = {w: vars(generate_py)[w] for w in writers if hasattr(generate_py, w)}
        self.warn = functools.cache(log.warning)  # once, however many videos it is true for
        self.distances = functools.cache(embedding_distances)
        self.checked = set[tuple[Any, ...]]()  # checkpoints, and folders and endings of targets

    def task_config(self, task: str) -> dict[str, Any]:
        """A task's model config: sizes, names of files."""
        return self.generate_py.WAN_CONFIGS[task]

    def examples(self, task: str) -> dict[str, str]:
        """The prompt and inputs that generate.py uses where none are given."""
        return getattr(self.generate_py, "EXAMPLE_PROMPT", {}).get(task, {})

    def fps(self, args: Namespace) -> float:
        return self.task_config(args.task)["sample_fps"]

    def pipelines(self) -> dict[str, type]:
        """The pipeline classes that generate.py looks up in the package when it runs."""
        exported = vars(self.package).items()
        return {name: value for name, value in exported if hasattr(value, "generate")}

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parse with generate.py's own parser, and let it check and complete the flags."""
        ours = SimpleNamespace(**vars(argparse) | {"ArgumentParser": Parser})
        with patched(self.generate_py, argparse=ours), patched(sys, argv=[sys.argv[0], *argv]):
            try:
                args = self.generate_py._parse_args()
            except AssertionError as error:
                what = "--ckpt_dir, --task, --size or --frame_num"
                raise Refused(f"{what}: {error} (see --help)") from error
        for name in NEEDED_FLAGS:
            what = f"--{name}: TeaCache reads this flag, and {self.generate_py.__file__} has none"
            require(hasattr(args, name), f"{what}: add it, or use Wan's own generate.py")
        what = f"--task {args.task}: TeaCache does not support it, since it samples clip after clip"
        require(args.task not in UNSUPPORTED_TASKS, f"{what}: run generate.py itself")
        for name, default in OPTIONAL_FLAGS.items():
            vars(args).setdefault(name, default)
        return args

    def vae(self, args: Namespace, device: torch.device) -> Any:
        """A task's VAE alone."""
        file = self.task_config(args.task)["vae_checkpoint"]  # Wan2.1_VAE.pth, Wan2.2_VAE.pth
        module, vae_class = "vae", "WanVAE"  # of Wan2.1
        if importlib.util.find_spec(f"wan.modules.{module}") is None:  # vae2_2, Wan2_2_VAE
            version = file.split("_")[0].removeprefix("Wan").replace(".", "_")
            module, vae_class = f"vae{version}", f"Wan{version}_VAE"
        make = getattr(importlib.import_module(f"wan.modules.{module}"), vae_class)
        return make(vae_pth=str(Path(args.ckpt_dir) / file), device=device)

    def timesteps(self, args: Namespace) -> list[int]:
        """The timesteps of a run, from Wan's own schedulers."""
        steps, shift = args.sample_steps, args.sample_shift
        train = self.task_config(args.task)["num_train_timesteps"]
        common = {"num_train_timesteps": train, "shift": 1, "use_dynamic_shifting": False}
        if args.sample_solver != "unipc":
            dpm = importlib.import_module("wan.utils.fm_solvers")
            scheduler = dpm.FlowDPMSolverMultistepScheduler(**common)
            sigmas = dpm.get_sampling_sigmas(steps, shift)
            return dpm.retrieve_timesteps(scheduler, device="cpu", sigmas=sigmas)[0].tolist()
        unipc = importlib.import_module("wan.utils.fm_solvers_unipc")
        scheduler = unipc.FlowUniPCMultistepScheduler(**common)
        scheduler.set_timesteps(steps, device="cpu", shift=shift)
        timesteps = scheduler.timesteps.tolist()
        what = f"--sample_steps {steps} --sample_shift {shift}: the first two timesteps are equal"
        cure = "unipc fails at the last step: use fewer steps, or dpm++"
        require(timesteps[:1] != timesteps[1:2], f"{what}, and {cure}")
        return timesteps


def models_of(pipeline: Any) -> list[nn.Module]:
    """A pipeline's transformers, in the order in which they sample."""
    if hasattr(pipeline, "high_noise_model"):
        return [pipeline.high_noise_model, pipeline.low_noise_model]
    return [pipeline.model]


def transformer_folders(ckpt_dir: str, task_config: dict[str, Any]) -> list[Path]:
    """The folders of these transformers in a checkpoint, in the same order."""
    names = [task_config.get(f"{noise}_noise_checkpoint") for noise in ("high", "low")]
    return [Path(ckpt_dir) / name for name in names if name] or [Path(ckpt_dir)]


def split_by_model(timesteps: Sequence[float], task_config: dict[str, Any]) -> tuple[int, ...]:
    """The number of steps of each transformer: (steps,), or (high noise, low noise) for A14B."""
    if "boundary" not in task_config:
        return (len(timesteps),)
    high = sum(timestep >= task_config["boundary"] * TRAIN_TIMESTEPS for timestep in timesteps)
    return (high, len(timesteps) - high)


def count_guided_steps(
    scale: float | Sequence[float] | None, steps_by_model: Sequence[int], until: float
) -> int | None:
    """The number of first steps that need the unconditional branch; None for all.

    scale: Wan's guide_scale; at 1 the branch is multiplied by 0. A14B has two, that of the
        low-noise model first, although the high-noise model samples first.
    until: the share of all steps to guide.
    """
    steps = sum(steps_by_model)
    low, high = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    guided = steps
    if low == 1:
        guided = steps_by_model[0] if high != 1 else 0
    guided = min(guided, round(until * steps))
    return None if guided == steps else guided


# Importing a checkout

PACKAGES = {"cv2": "opencv-python", "PIL": "pillow", "skimage": "scikit-image"}  # pip's names


def import_wan(wan_repo: str | None, generates: bool) -> Wan:
    """Import Wan's generate.py. generates: sampling follows, which needs CUDA and attention."""
    script = Path(__file__)
    folders = [Path(wan_repo)] if wan_repo else [script.parent, script.resolve().parent, Path.cwd()]
    found = [f for f in folders if (f / "generate.py").is_file() and (f / "wan").is_dir()]
    looked = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    cure = "git clone https://github.com/Wan-Video/Wan2.1 and copy this script into it"
    require(found, f"--wan_repo: no generate.py beside a package wan in {looked}: {cure}")
    sys.path.insert(0, str(found[0].resolve()))
    if generates:
        check_gpus()
    prepare_flash_attention()
    no_gpu = {} if generates else {"current_device": lambda: 0}
    with patched(torch.cuda, **no_gpu):  # wan/modules/t5.py asks for the device when imported
        try:
            generate_py = importlib.import_module("generate")
        except Exception as error:
            raise Refused(why_no_import(error)) from error
    needed = ("_parse_args", "generate", "WAN_CONFIGS")
    missing = [name for name in needed if not hasattr(generate_py, name)]
    if not any(hasattr(generate_py, writer) for writer in VIDEO_WRITERS):
        missing.append(" or ".join(VIDEO_WRITERS))
    what = f"--wan_repo {found[0]}: its generate.py has no {', '.join(missing)}"
    require(not missing, f"{what}: use Wan2.1's or Wan2.2's, or a fork nearer to them")
    if hasattr(generate_py, "_init_logging"):
        generate_py._init_logging(environment("RANK", 0))  # only rank 0 logs
    if generates:
        install_attention(device_of_run())
    return Wan(generate_py)


def check_gpus() -> None:
    """Check that each process of this machine has a GPU, where there is one, and that torchrun's
    variables fit each other."""
    rank, processes = environment("RANK", 0), environment("WORLD_SIZE", 1)
    what = f"RANK {rank}: there are {processes} processes"
    require(rank < processes, f"{what}: start with torchrun, or unset RANK")
    rank, processes = environment("LOCAL_RANK", 0), environment("LOCAL_WORLD_SIZE", 1)
    count = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
    require(processes <= count, f"--nproc_per_node {processes}: must be {count} GPUs or fewer")
    what = f"LOCAL_RANK {rank}: there are {count} GPUs"
    require(rank < count, f"{what}: start with torchrun, or unset LOCAL_RANK")


def why_no_import(error: Exception) -> str:
    """The reason and the cure of a failed import of Wan, in one line."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) < 400 else f"{reason[:200]} ... {reason[-200:]}"
    package = (getattr(error, "name", "") or "").split(".")[0]
    if package == "wan":
        cure = "this checkout lacks it: clone it again"
    elif isinstance(error, ModuleNotFoundError) and package:
        cure = f"pip install {PACKAGES.get(package, package)}"
    else:
        gpu = "a GPU" if torch.cuda.is_available() else "no GPU (Wan needs one: see nvidia-smi)"
        cure = f"install what Wan lists, built for torch {torch.__version__}, which finds {gpu}"
    return f"Wan cannot be imported: {type(error).__name__}: {reason}: {cure}"


# A checkpoint's time embedding


def read_json(file: Path) -> dict[str, Any]:
    with refusing(f"--ckpt_dir {file}: cannot be read", "download this file again"):
        return dict(json.loads(file.read_text(encoding="utf-8-sig")))


def tensor_files(folder: Path) -> dict[str | None, Path]:
    """The file of each of a transformer's tensors; {None: file} if one file holds all."""
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    for name in names:  # in the order in which from_pretrained looks
        index = folder / f"{name}.index.json"
        if index.is_file():
            file_of = read_json(index)["weight_map"]
            return {tensor: folder / file for tensor, file in file_of.items()}
        if (folder / name).exists():
            return {None: folder / name}
    return {None: folder / names[0]}  # missing: check_file refuses it


def read_tensor(folder: Path, name: str) -> Any:
    """One tensor of a transformer; only an old pickle is read as a whole."""
    files = tensor_files(folder)
    file = files.get(None) or files[name]
    if file.suffix == ".safetensors":
        return safetensors.safe_open(file, "pt").get_tensor(name)
    mmap = zipfile.is_zipfile(file)  # an older pickle cannot be mapped
    return torch.load(file, mmap=mmap, weights_only=True, map_location="cpu")[name]


def embedding_distances(folder: Path, timesteps: Sequence[float], measure: str) -> list[float]:
    """The relative L1 distances of one transformer's embeddings, one fewer than timesteps."""

    def linear(x: Tensor, layer: str) -> Tensor:
        weight, bias = (read_tensor(folder, f"{layer}.{name}") for name in ("weight", "bias"))
        return nn.functional.linear(x, weight.float(), bias.float())

    if measure == NOISE_LEVEL:
        return [math.nan] * (len(timesteps) - 1)  # not used
    sinusoid = sys.modules["wan.modules.model"].sinusoidal_embedding_1d
    freq_dim = read_tensor(folder, "time_embedding.0.weight").shape[1]
    hidden = linear(sinusoid(freq_dim, torch.tensor(timesteps)).float(), "time_embedding.0")
    e = linear(nn.functional.silu(hidden), "time_embedding.2")
    if measure == PROJECTION:  # e0; 14B has 0.6 GB of weights for it
        e = linear(nn.functional.silu(e), "time_projection.1")
    return [relative_l1(e[i], e[i - 1]).item() for i in range(1, len(e))]


def distances_ahead(
    wan: Wan, args: Namespace, measure: str, timesteps: Sequence[float]
) -> list[float | None]:
    """The distances of a run, from its checkpoint; None at the first step of each model."""
    distances, task_config = list[float | None](), wan.task_config(args.task)
    folders = transformer_folders(args.ckpt_dir, task_config)
    cure = "download it again, or use --teacache_rule sigma, which needs none"
    for folder, steps in zip(folders, split_by_model(timesteps, task_config), strict=True):
        begin = len(distances)
        of_model = tuple(timesteps[begin : begin + steps])
        with refusing(f"--ckpt_dir {folder}: its time embedding cannot be read", cure):
            distances += [None, *wan.distances(folder, of_model, measure)] if of_model else []
    return distances


# Writing


def write_frames(wan: Wan, frames: Tensor, file: str | Path, fps: float | None) -> None:
    """Write [3, F, H, W] in [-1, 1] as Wan does: a video or, without fps, an image of one frame.

    OSError: read back, the file does not hold all frames.
    """
    if fps is None:  # Wan's writer hides its errors: check_written finds them
        options = {"nrow": 1, "normalize": True, "value_range": (-1, 1)}
        wan.writers[IMAGE_WRITER](tensor=frames.squeeze(1)[None], save_file=str(file), **options)
    else:
        levels = (frames.cpu().clamp(-1, 1) + 1) / 2 * 255
        with imageio.get_writer(str(file), fps=fps, codec="libx264", quality=8) as writer:
            for frame in levels.byte().permute(1, 2, 3, 0).numpy():  # truncated, as by Wan
                writer.append_data(frame)
    check_written(file, frames.size(1))


def is_image_file(file: str | Path) -> bool:
    """Whether Pillow writes a file, such as a GIF: animations lose frames that repeat."""
    image_format = Image.registered_extensions().get(Path(file).suffix.lower())
    return image_format not in (None, "MPEG")  # Pillow knows MPEG by name only


def check_written(file: str | Path, frames: int) -> None:
    """OSError: the file does not hold the frames."""
    try:
        if is_image_file(file):
            with Image.open(file) as picture:
                for frame in ImageSequence.Iterator(picture):
                    frame.load()
            return
        with imageio.get_reader(file) as reader:
            found = sum(1 for _ in reader)
    except Exception as error:  # each decoder has its own
        raise OSError(f"{file} does not hold {frames} frames: {error!r:.200}") from error
    if found < frames:
        raise OSError(f"{file} holds {found} of {frames} frames")


# ---------------------------------------------------------------------------------------- checks
# Refuses a wrong command before a weight is loaded: numbers, checkpoint, inputs, target. Each
# check raises Refused with one line and leaves no file behind.


def check_numbers(wan: Wan, args: Namespace) -> None:
    """Check the numbers that the VAE, the sampler and the processes must be able to use."""
    frames, kind = args.frame_num, kind_of(args)
    below = max((frames - 1) // 4, 0) * 4 + 1
    require(frames == below, f"--frame_num {frames}: must be 4n+1, such as {below} or {below + 4}")
    early = IMAGE_WRITER in wan.writers and "WanFLF2V" not in wan.pipelines()  # Wan2.1
    only_81 = kind == "flf2v" or (kind == "i2v" and early)  # hard-coded there
    what = f"--frame_num {frames}: must be 81 for {args.task}, as Wan2.1 has it"
    require(frames == 81 or not only_81, what)
    steps, shift, scale = args.sample_steps, args.sample_shift, args.sample_guide_scale
    require(steps >= 1, f"--sample_steps {steps}: must be 1 or more, such as 50")
    require(0 < shift < math.inf, f"--sample_shift {shift}: must be positive, such as 5")
    require(np.isfinite(scale).all(), f"--sample_guide_scale {scale}: must be a number, such as 5")
    require(args.base_seed < 2**63, f"--base_seed {args.base_seed}: must be under 2**63")
    processes, ulysses, ring = environment("WORLD_SIZE", 1), args.ulysses_size, args.ring_size
    what = f"--t5_fsdp {args.t5_fsdp} --dit_fsdp {args.dit_fsdp}: must be started with torchrun"
    enough = processes > 1 or not (args.t5_fsdp or args.dit_fsdp)
    require(enough, f"{what} --nproc_per_node=N, N above 1")
    what = f"--ulysses_size {ulysses} --ring_size {ring}"
    must = f"their product must be the number of processes, {processes} here"
    fits = ulysses * ring in (1, processes) and min(ulysses, ring) > 0
    require(fits, f"{what}: {must}; torchrun --nproc_per_node={ulysses * ring}")
    has_xfuser = not uses_xfuser(args) or importlib.util.find_spec("xfuser")
    require(has_xfuser, f"{what}: No module named 'xfuser': pip install 'xfuser>=0.4.1'")


def uses_xfuser(args: Namespace) -> bool:
    """Whether xfuser splits the tokens over the processes; Wan2.2 does without."""
    split = args.ulysses_size * args.ring_size > 1
    return split and importlib.util.find_spec("wan.distributed.xdit_context_parallel") is not None


def check_checkpoint(wan: Wan, args: Namespace, all_files: bool) -> None:
    """Check, once a command, that every file to load exists, is complete, and fits the task.

    all_files: check text encoder, VAE and CLIP too, not the transformers alone; one value for
        all videos of a command.
    """
    if (key := (args.ckpt_dir, args.task)) in wan.checked:
        return
    folder, task_config = Path(args.ckpt_dir), wan.task_config(args.task)
    what = f"--ckpt_dir {folder}"
    require(folder.is_dir(), f"{what}: must be a folder with a checkpoint of {args.task}")
    for transformer in transformer_folders(args.ckpt_dir, task_config):
        check_transformer(args, transformer, task_config)
    for name, value in task_config.items() if all_files else ():
        # the two keys with "noise" are folders of transformers
        if name.endswith(("_checkpoint", "_tokenizer")) and "noise" not in name:
            check_file(args, folder / value)
    wan.checked.add(key)


def check_transformer(args: Namespace, folder: Path, task_config: dict[str, Any]) -> None:
    """Check that a transformer's files are complete, and that its kind and size fit the task."""
    what = f"--ckpt_dir {folder}: damaged, incomplete or not of --task {args.task}"
    with refusing(what, "download it again, or give the task or folder that fits"):
        for file in [folder / "config.json", *sorted(set(tensor_files(folder).values()))]:
            check_file(args, file)
        found = read_json(folder / "config.json")
        kind, model_type = KINDS.get(kind_of(args)), found.get("model_type")
        if kind and model_type and model_type not in kind.transformers:
            raise ValueError(f"a {model_type} transformer, not one of --task {args.task}")
        if found.get("dim") != task_config["dim"]:
            dims = f"dim {found.get('dim')}, but --task {args.task} has {task_config['dim']}"
            raise ValueError(f"its transformer has {dims} (1536 is 1.3B, 3072 5B, 5120 14B)")


def check_file(args: Namespace, path: Path) -> None:
    """Check that a file of weights, or a tokenizer's folder, exists and is complete."""
    what = f"--ckpt_dir {args.ckpt_dir}: {path.name}"
    needed = f"is missing, and --task {args.task} needs it"
    require(path.exists(), f"{what} {needed}: give that task's checkpoint, not one for Diffusers")
    files = [path]
    if path.is_dir():
        files = [f for f in path.iterdir() if not f.is_dir() and not f.name.startswith(".")]
    require(files, f"{what} is an empty folder: download it again")
    for file in files:
        what = f"--ckpt_dir {args.ckpt_dir}: {file.name}"
        with refusing(what, "download this file again"):
            damage = find_damage(file)
        require(not damage, f"{what}: {damage}: download this file again")


def find_damage(file: Path) -> str | None:
    """What is wrong with a file of weights, from its size and its ends; None if nothing is."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, which git lfs pull replaces"
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, "pt"):  # raises if the file is cut short
            return None
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
        return "is cut short"  # an older pickle shows no such sign
    if file.suffix in (".pth", ".bin") and head[:1] not in (b"P", b"\x80"):
        return "holds no weights"  # but perhaps an error's web page
    return None


def check_named(flag: str, value: Any) -> None:
    what = f'--{flag} "": is empty, as from an unset shell variable'
    require(value != "", f"{what}: give a file or leave it out")


def check_inputs(wan: Wan, args: Namespace) -> None:
    """Check that every image and video that generate.py will open exists and can be read."""
    kind, examples = kind_of(args), wan.examples(args.task)
    both = kind != "flf2v" or bool(args.first_frame) == bool(args.last_frame)
    require(both, "--first_frame, --last_frame: give both, or Wan2.1 uses its example for both")
    # VACE takes its whole example if there is no prompt, else nothing of it
    whole_example = kind == "vace" and args.prompt is None
    if kind == "vace" and not whole_example:
        examples = {}
    for name in KINDS[kind].inputs if kind in KINDS else ():
        given = getattr(args, name)
        what = f"--{name} {given}: needs --prompt, or Wan2.1 uses its own example"
        require(given is None or not whole_example, what)
        value = examples.get(name) if given is None else given
        files = (value or "").split(",") if name == "src_ref_images" else [value]
        for file in filter(None, files):
            check_input(name, file)


def check_input(name: str, file: str) -> None:
    """Check that Pillow, or for a video decord, can read a file, as Wan2.1 does."""
    is_video = name in ("src_video", "src_mask")
    # Wan2.1 does not list decord
    cure = "give a file that exists" + "; have decord (pip install decord)" * is_video
    with refusing(f"--{name} {file}: cannot be read", cure):
        if is_video:
            importlib.import_module("decord").VideoReader(file)[0]
        else:
            Image.open(file).convert("RGB")


def check_target(wan: Wan, args: Namespace) -> None:
    """Write two frames (one for an image) into the target's folder, with its ending."""
    image, target = makes_image(args), Path(args.save_file).absolute()
    ending, cure = (".png", "") if image else (".mp4", "; have ffmpeg (pip install imageio-ffmpeg)")
    what = f"--save_file {target}: cannot be written"
    with (
        refusing(what, f"give a {ending} in a folder that exists{cure}"),
        tempfile.TemporaryDirectory(dir=target.resolve().parent) as folder,
        redirect_stderr(StringIO()),
        redirect_stdout(StringIO()),
    ):
        if target.is_dir() or not target.suffix:
            raise OSError("no file with an ending")
        if len(os.fsencode(target.name)) > 220:
            raise OSError("too long, for NAME.latents.pt beside it")
        if target.exists():
            target.open("r+b").close()
        if (key := (target.parent, target.suffix)) in wan.checked:
            return
        probe = Path(folder) / f"probe{target.suffix}"
        ramp = torch.linspace(-1, 1, 2).view(1, 2, 1, 1).expand(3, 2, 64, 64)
        write_frames(wan, ramp[:, :1] if image else ramp, probe, None if image else 16)
    wan.checked.add(key)


# --------------------------------------------------------------------------------------- session
# Makes videos with Wan's own generate(args) on one pipeline, with a record beside each; the queue
# of a batch. Knows jobs, not our flags.
#
# If decoding or writing fails, NAME.latents.pt is kept beside the video and NAME.json names it.
# --teacache_decode, or a batch or comparison that is started again, then makes the video.

# errors that need no traceback
PLAIN_ERRORS = (Refused, torch.cuda.OutOfMemoryError, OSError, FloatingPointError)
SAMPLE, DECODE, SKIP = "sample", "decode", "skip"  # what is left to do for a job
RECORD, LATENTS = ".json", ".latents.pt"  # endings of the files beside a video
STOCK, NOISE, NOISE_STD = "stock", "noise 1e-4", 1e-4  # labels of a comparison's first two jobs


@dataclass
class Job:
    """One video to make.

    args: generate.py's flags. planned: its schedule.
    settings: what makes two videos the same (``settings_of``).
    label, compared_in: of an entry of a comparison; its table is named after compared_in.
    has_seed: the user gave a seed. by_default: the user gave neither a threshold nor a speed-up.
    needs_free_name: a default name of a single video, which may be taken when sampling begins:
        begin_video reserves a free one by creating its record.
    has_record: the record beside the target is of an earlier run of this job.
    """

    args: Namespace
    rule: Rule
    planned: Schedule
    settings: dict[str, Any]
    label: str
    has_seed: bool
    by_default: bool
    compared_in: Path | None = None
    needs_free_name: bool = False
    has_record: bool = False
    todo: str = SAMPLE

    @property
    def config(self) -> TeaCacheConfig:
        return self.planned.config

    @property
    def target(self) -> Path:
        return Path(self.args.save_file)


# Files beside a video


def beside(target: Path, ending: str) -> Path:
    return target.with_name(target.stem + ending)


def numbered(path: Path) -> Iterator[Path]:
    """A path, then the same with a number before its ending: x.mp4, x.2.mp4, x.3.mp4."""
    yield path
    ending = LATENTS if path.name.endswith(LATENTS) else path.suffix
    for i in itertools.count(2):
        yield path.with_name(f"{path.name.removesuffix(ending)}.{i}{ending}")


def create_new(path: Path) -> Path:
    """Create a file that no other run has, under the next number if the name is taken."""
    for free in numbered(path):  # endless
        with suppress(FileExistsError):
            free.open("xb").close()
            return free


def read_record(target: Path) -> dict[str, Any] | None:
    """The record beside a target, if one exists. Refused: the file is not a record."""
    file = beside(target, RECORD)
    if not file.exists():
        return None
    with refusing(f"--save_file {target}: {file} exists", "give another --save_file"):
        record = json.loads(file.read_text(encoding="utf-8"))
        text, number = (str, NoneType), (int, NoneType)
        kinds = {"status": str, "prompt": text, "seed": int, "frames": number, "computed": list}
        kinds |= {"steps": int, "seconds": dict, "latents": text, "settings": dict}
        values = record if isinstance(record, dict) else {}
        if not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
            raise ValueError("it is not a record of this script")
    return record


def is_finished(record: dict[str, Any] | None) -> bool:
    return record is not None and record["status"] == "finished"


def write_record(target: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, one key per line."""
    lines = (f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items())
    write_whole(beside(target, RECORD), "{\n" + ",\n".join(lines) + "\n}\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: it is never half written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # a name of a file may be no UTF-8
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Video:
    """One video, as far as it came. Its record holds the same.

    target: where it is written; another than the job's for a second video, or where the default
        name was taken.
    """

    job: Job
    target: Path
    prompt: str | None = None  # as passed to pipeline.generate
    cache: TeaCache | None = None  # once sampling begins
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    frames: int | None = None
    latents: Path | None = None  # on disk, until the video is
    failure: Exception | None = None  # of decoder or writer
    status: str = "started"
    began: float | None = None  # when sampling began
    recorded: bool = False  # the record beside the target is this video's

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and catch its failure: Wan must go on to the barrier of all ranks."""
        synchronize()
        began = time.perf_counter()
        try:
            yield
            synchronize()
        except Exception as error:
            self.failure = error
            # Wan would log "Saving ..." and "Finished."; the next video and the end of make undo it
            logging.disable(logging.INFO)
        self.seconds[name] = time.perf_counter() - began

    def record(self) -> dict[str, Any]:
        job, cache = self.job, self.cache
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {
            "status": self.status,
            "file": str(self.target),
            "prompt": self.prompt,
            "asked_prompt": job.settings["prompt"],
            "seed": job.args.base_seed,
            "rule": job.rule.name,
            "thresh": job.config.thresh,
            "order": job.config.order,
            "frames": self.frames,
            "computed": cache.schedule.computed_steps if cache else [],
            "steps": job.config.steps,
            "drift": cache.drift(job.config.order) if cache else None,
            "seconds": self.seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "latents": str(self.latents.absolute()) if self.latents else None,
            "settings": job.settings,
        }

    def save_record(self) -> None:
        """On rank 0. What cannot be written is logged, and stops no video."""
        self.recorded = True
        try:
            if is_rank_0():
                write_record(self.target, self.record())
        except OSError as error:
            log.error(f"the record of {self.target} cannot be written: {error}")

    def save_end(self, status: str) -> None:
        """Record a failure or a stop, but not over the record of another run."""
        self.status = status
        if self.recorded or not beside(self.target, RECORD).exists():
            self.save_record()

    def keep_latents(self, latents: Sequence[Tensor], fps: float) -> None:
        """Write latents, and what it takes to decode them, beside the target; if that fails, into
        the folder for temporary files. Plain types only, for ``torch.load(weights_only=True)``."""
        args, target = self.job.args, self.target.absolute()
        content = {
            "latents": [latent.detach().cpu() for latent in latents],
            "task": args.task,
            "ckpt_dir": str(Path(args.ckpt_dir).absolute()),
            "save_file": str(target),
            "fps": fps,
            "seed": args.base_seed,
            "prompt": self.prompt,
        }
        for folder in (target.parent, Path(tempfile.gettempdir())):
            file = None
            try:
                file = create_new(beside(folder / target.name, LATENTS))
                torch.save(content, file)
                self.latents = file
                return
            except (OSError, RuntimeError) as error:
                log.error(f"latents cannot be kept in {folder}: {error}")
            finally:
                if file and self.latents is None:  # failed or stopped
                    file.unlink(missing_ok=True)

    def rename(self, target: Path) -> None:
        """Follow a fork that passes another name to the writer."""
        beside(self.target, RECORD).unlink(missing_ok=True)
        self.target = target
        if self.latents and self.latents.exists():
            self.latents = self.latents.replace(create_new(beside(target, LATENTS)))

    def finish(self, frames: int) -> None:
        """The file was written and read back: delete its latents."""
        self.status, self.frames = "finished", frames
        if self.latents:
            self.latents.unlink(missing_ok=True)
            self.latents = None
        self.save_record()


# The videos of a process


class BatchEnds(Exception):
    """No further video can be made; the failure behind it was logged."""


def with_noise(latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents with noise too small to see: the same in each call and on all ranks."""
    generator = torch.Generator().manual_seed(0)
    return [x + NOISE_STD * torch.randn(x.shape, generator=generator).to(x) for x in latents]


class Session:
    """Makes videos with Wan's own generate(args), on a pipeline that is loaded once.

    generate(args) builds a pipeline and calls its generate(), which samples and calls vae.decode();
    then it calls a writer. These four are replaced by load, sample, decode and write. A fork's
    generate(args) may make several videos: each call of pipeline.generate is one.
    """

    def __init__(self, wan: Wan, several_lines: bool = False):
        self.wan, self.several_lines = wan, several_lines
        self.pipelines: dict[str, Any] = {}
        self.loading, self.load_seconds = False, 0.0
        self.failed = False  # a video, or the files of a comparison
        self.job: Job | None = None
        self.videos: list[Video] = []  # of the job

    @contextmanager
    def patches(self, with_xfuser: bool) -> Iterator[None]:
        """Patch Wan's modules, once, around all videos."""
        generate_py, classes = self.wan.generate_py, self.wan.pipelines()
        loaders = {name: functools.partial(self.load, name, classes[name]) for name in classes}
        replaced = {w: functools.partial(self.write, w) for w in self.wan.writers}
        once = functools.cache  # each video asks for the same
        for name in {"DashScopePromptExpander", "QwenPromptExpander"} & vars(generate_py).keys():
            replaced[name] = once(getattr(generate_py, name))
        group = {
            "init_process_group": once(dist.init_process_group),
            "destroy_process_group": lambda *args: None,
        }
        with ExitStack() as stack:
            stack.enter_context(patched(self.wan.package, **loaders))
            stack.enter_context(patched(generate_py, **replaced))
            stack.enter_context(patched(dist, **group))
            if with_xfuser:
                xfuser = importlib.import_module("xfuser.core.distributed")
                names = ("init_distributed_environment", "initialize_model_parallel")
                parallel = {name: once(getattr(xfuser, name)) for name in names}
                stack.enter_context(patched(xfuser, **parallel))
            yield
        if dist.is_initialized():  # after an error the process ends
            dist.destroy_process_group()

    # In place of Wan's four steps

    def load(self, name: str, cls: type, *args: Any, **kwargs: Any) -> Any:
        if name not in self.pipelines:
            self.loading, began = True, time.perf_counter()
            pipeline = cls(*args, **kwargs)
            self.loading, self.load_seconds = False, time.perf_counter() - began
            pipeline.generate = functools.partial(self.sample, pipeline, pipeline.generate)
            pipeline.vae.decode = functools.partial(self.decode, pipeline.vae.decode)
            self.pipelines[name] = pipeline
        return self.pipelines[name]

    def sample(self, pipeline: Any, generate: Callable, *args: Any, **kwargs: Any) -> Any:
        prompt = args[0] if args else kwargs.get("input_prompt", kwargs.get("prompt"))
        video, models = self.begin_video(prompt), models_of(pipeline)
        job, called, calls = video.job, time.perf_counter(), itertools.count()

        def before_call(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            call = next(calls)
            if call == 0:
                synchronize()
                video.began = time.perf_counter()
                video.seconds["encode"] = video.began - called
            if call == 1:  # the last one of the first step
                hooks.close()
            return (with_noise(args[0]), *args[1:]) if job.label == NOISE else None

        with ExitStack() as hooks, teacache(models, job.config) as video.cache:
            for model in models:
                hooks.enter_context(model.register_forward_pre_hook(before_call))
            result = generate(*args, **kwargs)
        if video.began is None:
            raise RuntimeError("this pipeline does not call its model, and TeaCache cannot act")
        cache = video.cache
        if job.label not in (STOCK, NOISE):
            seconds = f", sampling {video.seconds.get('sampling', 0):.1f} s"
            log.info(f"{video.target}: {cache.summary()}{seconds}")
        if cache.schedule.computed_steps != job.planned.computed_steps:
            log.warning(
                f"{video.target}: computed {cache.schedule.as_text()}, "
                f"other steps than planned: {job.planned.as_text()}"
            )
        return result

    def begin_video(self, prompt: str | None) -> Video:
        logging.disable(logging.NOTSET)
        if self.videos[0].cache is not None:  # a fork's second video; make has made the first
            target = next(itertools.islice(numbered(self.job.target), len(self.videos), None))
            self.videos.append(Video(self.job, target))
        video = self.videos[-1]
        video.prompt = prompt
        if self.job.needs_free_name and is_rank_0():  # its record takes the name
            record = create_new(beside(video.target, RECORD))
            video.target = record.with_suffix(video.target.suffix)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        video.seconds["load"], self.load_seconds = self.load_seconds, 0.0
        video.save_record()
        return video

    def decode(self, decode: Callable, latents: list[Tensor], *args: Any) -> list[Tensor]:
        """Replaces vae.decode, on rank 0: latents to disk, then decode."""
        video = self.videos[-1]
        video.cache.finish()
        synchronize()
        if video.began is not None:
            video.seconds["sampling"] = time.perf_counter() - video.began
        # returned after a failure, since Wan must reach the barrier where all ranks wait; write
        # ignores it
        decoded = [torch.zeros(3, 1, 16, 16)]
        with video.phase("decode"):
            if not all(latent.isfinite().all() for latent in latents):
                raise FloatingPointError("the latents are not finite: the video would be black")
            video.keep_latents(latents, self.wan.fps(video.job.args))
            video.save_record()
            decoded = decode(latents, *args)
        return decoded

    def write(
        self, name: str, tensor: Tensor, save_file: Any = None, fps: Any = None, *_: Any, **__: Any
    ) -> str | None:
        """Replaces Wan's writers, on rank 0; tensor [1, 3, F, H, W], of an image [1, 3, H, W]."""
        video, args, is_image = self.videos[-1], self.job.args, name == IMAGE_WRITER
        if video.failure:
            return None
        frames = tensor[0].unsqueeze(1) if is_image else tensor[0]  # [3, F, H, W]
        rate = None if is_image else fps or self.wan.fps(args)
        with video.phase("write"):
            if save_file is not None and str(save_file) != args.save_file:  # a fork's own name
                video.rename(Path(save_file))
            write_frames(self.wan, frames, video.target, rate)
        if video.failure:
            return None
        video.finish(frames.size(1))
        return str(video.target)

    # A job

    def make(self, job: Job) -> Video:
        """Make a job's video, and tell a failure once.

        BatchEnds: the model cannot be loaded, or other ranks may wait elsewhere. Refused: Wan
        objects to the flags before it loads, and there is no other line to go on with.
        """
        self.job, self.videos = job, [Video(job, job.target, recorded=job.has_record)]
        try:
            self.wan.generate_py.generate(copy.copy(job.args))
            self.check_made()
        except Exception as error:
            self.fail(error)
        except BaseException:  # a signal
            self.stop()
            raise
        finally:
            logging.disable(logging.NOTSET)
            job.args.save_file = str(self.videos[0].target)  # the name may have been taken
            self.clean_up(job)
        return self.videos[0]

    def fail(self, error: Exception) -> None:
        """Tell the failures of the job's videos; ``error`` may be one, or follow from one."""
        of_command = isinstance(error, (AssertionError, ValueError, ImportError, OSError))
        if of_command and not (self.loading or self.pipelines):  # nothing is loaded
            refused = Refused(f"{type(error).__name__}: {error} (see --help)")
            if not self.several_lines:
                raise refused from error
            error = refused
        last, failures = self.videos[-1], [video.failure for video in self.videos]
        elsewhere = last.failure is None and error not in failures
        if elsewhere:  # in the sampling of the last video, say
            last.failure = error
        for video in self.videos:
            if video.failure:
                self.tell_failure(video, video.failure)
        # without a model, or with ranks that may wait at another place, nothing can follow
        if self.loading or (is_distributed() and elsewhere):
            raise BatchEnds from error

    def stop(self) -> None:
        """Record that a signal stopped the video; log how to finish it."""
        video = self.videos[-1]
        if video.status != "finished":
            video.save_end("stopped")
        if video.latents:
            log.error(f"{video.target} is not finished: {self.how_to_finish(video)}")

    def tell_failure(self, video: Video, error: Exception) -> None:
        """Log what failed, where the latents are, and the command that finishes the video."""
        self.failed = True
        video.failure = None  # holds the tensors of where it was raised
        video.save_end(f"failed: {error!r:.500}")
        text = f"{video.target} failed: {str(error) or type(error).__name__:.500}"
        if video.latents and video.latents.is_file():
            text += f"\n{self.how_to_finish(video)}"
        log.error(text, exc_info=None if isinstance(error, PLAIN_ERRORS) else error)

    def how_to_finish(self, video: Video) -> str:
        wan_repo = Path(self.wan.generate_py.__file__).parent
        argv = [sys.executable, str(Path(__file__).absolute()), "--wan_repo", str(wan_repo)]
        argv += ["--teacache_decode", str(video.latents)]
        command = subprocess.list2cmdline(argv) if os.name == "nt" else shlex.join(argv)
        return f"the latents are in {video.latents}; this makes the video:\n{command}"

    def check_made(self) -> None:
        """Raise the first failure of the job's videos; ``make`` tells each."""
        for video in self.videos:
            if video.failure:
                raise video.failure
            if video.cache is None:
                raise RuntimeError("generate.py made no video with a pipeline of package wan")
            if is_rank_0() and video.status != "finished":
                raise RuntimeError(f"generate.py did not write {video.target} with its own writer")

    def clean_up(self, job: Job) -> None:
        """Free memory; after a failure, bring the pipeline to the state in which a video begins."""
        failed = any(video.status.startswith("failed") for video in self.videos)
        for pipeline in self.pipelines.values() if failed else ():
            if hasattr(getattr(pipeline.vae, "model", None), "clear_cache"):
                pipeline.vae.model.clear_cache()  # Wan's VAE keeps its feature maps until then
            if job.args.offload_model is not False and not is_distributed():
                encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "clip")]
                for model in [*models_of(pipeline), *(e.model for e in encoders if e)]:
                    model.cpu()
        gc.collect()
        torch.cuda.empty_cache()


# Kept latents


def read_latents(file: Path) -> dict[str, Any]:
    """The content of a file of kept latents. Refused: it cannot be decoded."""
    what = f"--teacache_decode {file}: cannot be used"
    with refusing(what, "give a NAME.latents.pt that was kept"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"latents", "task", "ckpt_dir", "save_file", "fps"} - content.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return content


def decode_latents(wan: Wan, file: Path, content: dict[str, Any], args: Namespace) -> None:
    """Decode kept latents, write the video (or image), finish its record, delete the latents.

    args: task, ckpt_dir, save_file.
    """
    # the record is beside the video, or beside the latents where a fork renamed it
    targets = {Path(content["save_file"]), Path(str(file).removesuffix(LATENTS) + RECORD)}
    records = {}
    for target in targets:
        with suppress(Refused):  # another program's file
            records[target] = read_record(target) or {}
    device = device_of_run()
    with torch.no_grad():
        frames = wan.vae(args, device).decode([u.to(device) for u in content["latents"]])[0]
    fps = None if makes_image(args) else content["fps"]
    write_frames(wan, frames, args.save_file, fps)
    done = {"status": "finished", "latents": None}
    done |= {"frames": frames.size(1), "file": args.save_file}
    for target, record in records.items():
        if Path(record.get("latents") or "").name == file.name:  # the folder may have moved
            write_record(target, record | done)
    file.unlink()


# A batch, and its queue


class Queue:
    """Hands the jobs of a batch to the processes of torchrun, each a single-GPU Wan of its own.

    The processes share torchrun's own store. Waiting is polling: a blocked wait would delay
    signals. Make it before CUDA is initialised and Wan is imported.
    """

    def __init__(self) -> None:
        with refusing("WORLD_SIZE is set", "start with torchrun, or unset WORLD_SIZE"):
            self.store, self.rank, self.processes = next(dist.rendezvous("env://"))
        local, visible = environment("LOCAL_RANK", 0), os.getenv("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible is not None else [*map(str, range(local + 1))]
        own = devices[local] if local < len(devices) else ""
        os.environ |= {"CUDA_VISIBLE_DEVICES": own, "RANK": "0", "LOCAL_RANK": "0"}
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        if self.rank:  # one progress bar is enough
            bar = importlib.import_module("tqdm").tqdm
            bar.__init__ = functools.partialmethod(bar.__init__, disable=True)

    def turns(self, count: int) -> Iterator[int]:
        """The numbers of the jobs that this process is the first to take."""
        while (number := self.store.add("next", 1) - 1) < count:
            yield number

    def finish(self, last: Callable[[], int]) -> int:
        """Wait for all processes; then rank 0 runs ``last`` and leaves after the others, since
        torchrun stops them if it fails. Returns the exit status."""
        self.store.add("finished", 1)
        self.wait(lambda: self.store.add("finished", 0) == self.processes)
        if self.rank:
            self.wait(lambda: self.store.check(["table"]))
            self.store.add("left", 1)
            return 0
        status = last()
        self.store.set("table", "printed")
        self.wait(lambda: self.store.add("left", 0) == self.processes - 1)
        return status

    @staticmethod
    def wait(until: Callable[[], bool]) -> None:
        while not until():
            time.sleep(1)


def make_batch(session: Session, jobs: Sequence[Job], queue: Queue | None) -> int:
    """Make one video after the other, then print the table of all. Returns the exit status."""
    with suppress(BatchEnds):
        for i in queue.turns(len(jobs)) if queue else range(len(jobs)):
            if len(jobs) > 1 and jobs[i].todo != SKIP:
                log.info(f"video {i + 1} of {len(jobs)}: {jobs[i].target}")
            video = make_one(session, jobs[i])
            if queue and queue.rank:
                log.info(f"{video.target}: {video.status}")
    end = functools.partial(end_batch, session, jobs)
    return queue.finish(end) if queue else end()


def make_one(session: Session, job: Job) -> Video:
    """Make a video, decode the latents that an earlier run has kept, or skip it."""
    if job.todo == SKIP:
        log.info(f"{job.target} is finished: skipped")
        return Video(job, job.target, status="finished")
    record = read_record(job.target) if job.todo == DECODE else None
    if record is None:
        return session.make(job)
    video = Video(job, job.target, latents=Path(record["latents"]), status="finished")
    session.videos = [video]  # end_batch asks whether a video was made
    try:
        if is_rank_0():
            log.info(f"{job.target}: decoding the latents of an earlier run")
            decode_latents(session.wan, video.latents, read_latents(video.latents), job.args)
    except Exception as error:
        session.tell_failure(video, error)  # writes no record over that of the sampling
        with suppress(OSError):
            write_record(job.target, record | {"status": video.status})
    return video


def end_batch(session: Session, jobs: Sequence[Job]) -> int:
    """Print the table of a batch from its records, whoever made them; return the exit status."""
    if not is_rank_0() or (len(jobs) == 1 and session.videos):
        return int(session.failed)
    failed = session.failed
    log.info("computed  sampling   drift  file")
    for job in jobs:
        record = {"status": "not made, or no record"}
        with suppress(Refused):
            record = read_record(job.target) or record
        figures = record["status"][:26]
        if record["status"] == "finished":
            drift = "" if record["drift"] is None else percent(record["drift"])
            counts = f"{len(record['computed']):5}/{record['steps']:<2}"
            figures = f"{counts}  {record['seconds'].get('sampling', 0):6.1f} s  {drift:>6}"
        failed = failed or record["status"] != "finished"
        log.info(f"{figures:>26}  {job.target}")
    return int(failed)


# ------------------------------------------------------------------------------------ comparison
# Compares the videos of one prompt and seed: stock, stock with a little noise, and each entry.
# Reads the written files alone, so that a stopped comparison continues where it was.


@dataclass(frozen=True)
class Row:
    """One setting of a comparison."""

    label: str
    seconds: float  # of the sampling
    speedup: float  # over the faster of the two stock runs
    computed: list[int]
    steps: int
    drift: float | None
    psnr: float  # dB, to stock; infinite where the frames are equal
    ssim: float | None  # None without scikit-image


def psnr(frames: np.ndarray, stock: np.ndarray) -> float:
    """PSNR of two videos in dB, uint8 [F, H, W, 3]."""
    pairs = zip(torch.from_numpy(frames), torch.from_numpy(stock), strict=True)
    mean_square = float(np.mean([(a.double() - b.double()).square().mean() for a, b in pairs]))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def ssim(frames: np.ndarray, stock: np.ndarray) -> float | None:
    """Mean SSIM over the frames, with scikit-image where it can be imported."""
    try:
        similarity = importlib.import_module("skimage.metrics").structural_similarity
    except Exception:  # one built for another numpy raises its own
        return None
    pairs = zip(frames, stock, strict=True)
    return float(np.mean([similarity(a, b, channel_axis=2, data_range=255) for a, b in pairs]))


def compare(jobs: Sequence[Job], fps: float) -> list[Row]:
    """Measure the finished videos of one prompt; write table and pictures.

    jobs: stock, noise, then the entries. FileNotFoundError: there is no video of stock.
    """
    finished = [(job, r) for job in jobs if is_finished(r := read_record(job.target))]
    if not finished or finished[0][0].label != STOCK:
        raise FileNotFoundError("without stock nothing can be compared")
    videos = [read_frames(job.target) for job, _ in finished]
    seconds = {job.label: record["seconds"]["sampling"] for job, record in finished}
    # the first run of a process also warms up
    fastest = min(seconds[label] for label in (STOCK, NOISE) if label in seconds)
    rows = [
        Row(
            label=job.label,
            seconds=seconds[job.label],
            speedup=fastest / seconds[job.label],
            computed=record["computed"],
            steps=record["steps"],
            drift=record["drift"],
            psnr=psnr(video, videos[0]),
            ssim=ssim(video, videos[0]),
        )
        for (job, record), video in zip(finished, videos, strict=True)
    ]
    write_comparison(jobs[0].compared_in, rows, videos, fps)
    return rows


def write_comparison(
    target: Path, rows: Sequence[Row], videos: Sequence[np.ndarray], fps: float
) -> None:
    """NAME.compare.json, .png and, of videos, .mp4 with all side by side."""
    file = target.with_name(f"{target.stem}.compare.json")
    # JSON has no infinity
    dicts = [asdict(row) | {"psnr": row.psnr if row.psnr < math.inf else None} for row in rows]
    text = ",\n ".join(json.dumps(entry) for entry in dicts)
    write_whole(file, f"[{text}]\n")
    picture(rows, videos).save(file.with_suffix(".png"))
    if len(videos[0]) > 1:
        write_side_by_side(rows, videos, file.with_suffix(".mp4"), fps)


def read_frames(file: Path) -> np.ndarray:
    """uint8 [F, H, W, 3] of a video or an image."""
    with imageio.get_reader(file) as reader:
        return np.stack([np.asarray(frame)[..., :3] for frame in reader])


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] 480 pixels wide, but at most three times its size; even sides."""
    height, width = frame.shape[:2]
    scale = min(480 / width, 3)
    size = [2 * round(side * scale / 2) for side in (width, height)]
    return np.asarray(Image.fromarray(frame).resize(size))


def caption(row: Row, width: int, height: int) -> np.ndarray:
    """A setting's figures and, below, its schedule as boxes: filled where a step is computed."""
    image = Image.new("RGB", (width, height), "white")
    draw, side = ImageDraw.Draw(image), (width - 16) / row.steps
    fidelity = "" if row.label == STOCK else f"PSNR {row.psnr:.1f} dB"
    texts = [row.label, f"{row.seconds:.1f} s    {row.speedup:.2f}x", fidelity]
    longest = max(draw.textlength(text, font_size=20) for text in texts)
    for i, text in enumerate(texts):
        draw.text((8, 4 + 26 * i), text, "black", font_size=min(20, 20 * (width - 16) / longest))
    for step in range(row.steps):
        fill = "black" if step in row.computed else "white"
        left = 8 + step * side
        draw.rectangle((left, 86, left + 0.75 * side, 98), fill, "gray")
    return np.asarray(image)


def picture(rows: Sequence[Row], videos: Sequence[np.ndarray]) -> Image.Image:
    """One row per setting: caption, middle frame and, times 8, its difference from stock's."""
    middle, lines = len(videos[0]) // 2, []
    stock = videos[0][middle].astype(int)
    for row, video in zip(rows, videos, strict=True):
        difference = np.minimum(8 * np.abs(video[middle] - stock), 255).astype(np.uint8)
        frames = np.hstack([thumbnail(video[middle]), thumbnail(difference)])
        below = max(110 - frames.shape[0], 0)  # room for the caption
        frames = np.pad(frames, ((0, below), (0, 0), (0, 0)), constant_values=255)
        lines.append(np.hstack([caption(row, 360, frames.shape[0]), frames]))
    return Image.fromarray(np.vstack(lines))


def write_side_by_side(
    rows: Sequence[Row], videos: Sequence[np.ndarray], file: Path, fps: float
) -> None:
    """All videos in one, at most 4,096 pixels wide: in several rows if needed."""
    height, width = thumbnail(videos[0][0]).shape[:2]
    columns = min(len(rows), max(1, 4096 // width))
    heads = [caption(row, width, 110) for row in rows]
    blank = np.full((height + 110, width, 3), 255, np.uint8)
    # a player can begin before the file's end, and show the colours as they were written
    params = ["-movflags", "+faststart", "-colorspace", "smpte170m"]
    options = {"fps": fps, "macro_block_size": 2, "quality": 8, "ffmpeg_params": params}
    with imageio.get_writer(file, **options) as writer:
        for frames in zip(*videos, strict=True):
            cells = [np.vstack([h, thumbnail(f)]) for h, f in zip(heads, frames, strict=True)]
            cells += [blank] * (-len(cells) % columns)
            lines = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
            writer.append_data(np.vstack(lines))
    check_written(file, len(videos[0]))


def give_prompt(jobs: Sequence[Job], extended: str) -> None:
    """Give jobs the prompt that was extended for one."""
    for job in jobs:
        job.args.prompt, job.args.use_prompt_extend = extended, False


def make_entries(session: Session, jobs: Sequence[Job]) -> None:
    """Make the videos of one prompt; --use_prompt_extend runs once, for all.

    BatchEnds: see Session.make.
    """
    for job in jobs:
        log.info(f"comparison {job.compared_in}: {job.label}")
        prompt = make_one(session, job).prompt
        if job.args.use_prompt_extend and prompt is not None:
            give_prompt(jobs, prompt)


def run_comparisons(session: Session, jobs_by_line: Sequence[Sequence[Job]]) -> int:
    """Compare each line of the jobs file, or the one command; print the table of all."""
    count, rows_by_line = sum(map(len, jobs_by_line)), []
    log.info(f"{count} videos, {2 * len(jobs_by_line)} of them stock")
    with suppress(BatchEnds):
        for jobs in jobs_by_line:
            make_entries(session, jobs)
            if not is_rank_0():
                continue
            try:
                rows_by_line.append(compare(jobs, session.wan.fps(jobs[0].args)))
            except Exception as error:  # the videos exist, and other lines may follow
                session.failed = True
                log.error(f"{jobs[0].compared_in}: the comparison cannot be written: {error}")
    with suppress(BrokenPipeError):  # `... | head`: the exit status still shows a failure
        if rows_by_line:
            print("\n".join(comparison_table(rows_by_line)))
    return int(session.failed)


def comparison_table(rows_by_line: Sequence[Sequence[Row]]) -> list[str]:
    """One line per label: means over the lines of the jobs file."""
    by_label = defaultdict[str, list[Row]](list)
    for row in itertools.chain(*rows_by_line):
        by_label[row.label].append(row)
    width = max(map(len, by_label))
    table = [("", ["computed", "sampling", "speed-up", "drift", "PSNR", "SSIM"])]
    forms = {"seconds": "{:.1f} s", "speedup": "{:.2f}x", "drift": "{:.1%}", "psnr": "{:.1f}"}
    forms["ssim"] = "{:.3f}"
    for label, rows in by_label.items():
        computed = np.mean([len(row.computed) for row in rows])
        cells = [f"{computed:.0f}/{rows[0].steps}"]
        for name, form in forms.items():
            known = [value for row in rows if (value := getattr(row, name)) is not None]
            cells.append(form.format(np.mean(known)) if known else "")
        table.append((label, cells))
    lines = [
        f"{label:{width}}" + "".join(f"{cell:>10}" for cell in cells) for label, cells in table
    ]
    floor = f"The floor is the PSNR of {NOISE}: above it, an entry differs less than by noise."
    lines.append(floor if NOISE in by_label else f"no floor: {NOISE} has failed")
    has_ssim = any(row.ssim is not None for row in itertools.chain(*rows_by_line))
    return lines if has_ssim else [*lines, "for the SSIM: pip install scikit-image"]


# ---------------------------------------------------------------------------------- command line
# Our flags, the jobs that a command means, main. ``ours`` are our flags, ``args`` generate.py's.

# Flags that the loaded model depends on: the same for all lines of a jobs file.
FOR_ALL_LINES = (
    "task", "ckpt_dir", "ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp", "t5_cpu",
    "convert_model_dtype", "prompt_extend_method", "prompt_extend_model",
)  # fmt: skip
# Flags that change how a video is made, not what it shows.
NOT_IN_SETTINGS = (
    "save_file", "offload_model", "t5_cpu", "t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size",
    "base_seed",  # compared by itself
)  # fmt: skip
NOT_IN_A_LINE = (
    "teacache_plan", "teacache_compare", "teacache_decode", "teacache_jobs", "wan_repo",
)  # fmt: skip
SPACE = "\x1f"  # stands for a space, see hide_spaces
OLD_FLAGS = {
    "--teacache_model": "use --teacache_rule NAME",
    "--teacache_coefficients": "use --teacache_rule FILE",
    "--teacache_report": "leave it out: every video has a record, NAME.json beside it",
}


class Amount(NamedTuple):
    """How much to skip: a threshold, or the speed-up to find one for. One value of two flags: the
    one of a line or an entry overrides the other of the command line."""

    value: float
    is_speedup: bool = False

    @property
    def flag(self) -> str:
        return f"--teacache_{'speedup' if self.is_speedup else 'thresh'}"

    def __str__(self) -> str:
        return f"{self.flag} {self.value:g}"


def number_from(low: float, allowed: str, high: float = math.inf) -> Callable[[str], float]:
    """The type of a flag: a finite number from ``low`` to ``high``."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text} must be {allowed}")

    return convert


def as_threshold(text: str) -> Amount:
    return Amount(number_from(0, "0 (stock) or more, such as 0.08")(text))


def as_speedup(text: str) -> Amount:
    return Amount(number_from(1, "1 or more, such as 2")(text), is_speedup=True)


def our_parser() -> Parser:
    """The flags that generate.py does not have."""
    parser = Parser(allow_abbrev=False, add_help=False, description="TeaCache for generate.py")
    which = parser.add_argument_group("which steps are computed")
    amounts = which.add_mutually_exclusive_group()
    amount = {"dest": "amount", "metavar": "X"}
    thresh, fewer = "higher skips more; 0 is stock", "or: find a threshold that runs 1/X of passes"
    amounts.add_argument("--teacache_thresh", type=as_threshold, help=thresh, **amount)
    amounts.add_argument("--teacache_speedup", type=as_speedup, help=fewer, **amount)
    names = f"{', '.join(RULES)}, or a JSON file; default: teacache.json in --ckpt_dir, or by task"
    which.add_argument("--teacache_rule", metavar="NAME|FILE", help=names)
    retention = "the rule's polynomial for retention steps"
    which.add_argument("--use_ret_steps", action="store_true", help=retention)

    others = parser.add_argument_group("what the other steps do")
    order = {"type": int, "choices": (0, 1), "default": 0}
    extrapolate = "1: extrapolate the residual; default: 0, repeat it"
    others.add_argument("--teacache_order", **order, help=extrapolate)
    share = {"type": number_from(0, "from 0 to 1, such as 0.6", high=1), "default": 1.0}
    guide = "guide the first SHARE of the steps only; default: 1"
    others.add_argument("--teacache_guide_until", **share, metavar="SHARE", help=guide)

    instead = parser.add_argument_group("instead of one video").add_mutually_exclusive_group()
    plan = "print which steps thresholds compute"
    instead.add_argument("--teacache_plan", action="store_true", help=plan)
    entries = "stock and each entry: 0.08, 2x, sigma:2x, or 2x@1 for order 1"
    instead.add_argument("--teacache_compare", nargs="+", metavar="ENTRY", help=entries)
    decode = "make the video from kept latents"
    instead.add_argument("--teacache_decode", metavar="FILE", help=decode)

    files = parser.add_argument_group("files")
    jobs = "one video per line: a prompt, or flags"
    files.add_argument("--teacache_jobs", metavar="FILE", help=jobs)
    folder = "Wan's folder; default: this script's, else the current"
    files.add_argument("--wan_repo", metavar="DIR", help=folder)
    return parser


def our_flags(*parts: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Our flags, and what is left for generate.py.

    parts: the command line; a line of a jobs file and an entry of a comparison, which override it.
    No part may have both a threshold and a speed-up.
    """
    parser, ours, left = our_parser(), Namespace(), []
    for flag in itertools.chain(*parts):
        name = flag.split("=")[0]
        require(name not in OLD_FLAGS, f"{name}: is gone: {OLD_FLAGS.get(name)}")
    for part in parts:
        ours, rest = parser.parse_known_args(hide_spaces(part), ours)
        left += show_spaces(rest)
    for name, value in vars(ours).items():
        check_named(name, value)
        setattr(ours, name, show_spaces(value))
    return ours, left


def hide_spaces(flags: Sequence[str]) -> list[str]:
    """Hide the spaces of flags from argparse. It would take "--prompt=a b", which is not ours, for
    another entry of --teacache_compare: because of the space it does not look like a flag."""
    return [flag.replace(" ", SPACE) if flag.startswith("--") else flag for flag in flags]


def show_spaces(value: Any) -> Any:
    if isinstance(value, list):
        return [show_spaces(entry) for entry in value]
    return value.replace(SPACE, " ") if isinstance(value, str) else value


# The rule of a run


def choose_rule(ours: Namespace, args: Namespace) -> Rule:
    """As asked, the checkpoint's teacache.json, the task's published rule, or "sigma"."""
    asked, own_file = ours.teacache_rule, Path(args.ckpt_dir) / "teacache.json"
    if asked in RULES:
        return replace(RULES[asked], why="as asked", named=True)
    if asked or own_file.is_file():
        return read_rule(Path(asked or own_file))
    rules = [rule for rule in RULES.values() if args.task in rule.tasks]
    if not rules:
        return replace(RULES["sigma"], why=f"none is fitted to {args.task}")
    if len(rules) == 1:
        return replace(rules[0], why=f"task {args.task}")
    # i2v's for 480P and 720P: by the name that the checkpoint was downloaded under, else by area
    for name in download_names(Path(args.ckpt_dir)):
        words = set(re.split("[^0-9a-z]+", name.lower()))
        fitting = [rule for rule in rules if rule.name.split("-")[-1].lower() in words]
        if len(fitting) == 1:
            return replace(fitting[0], why=f"checkpoint {name}")
    area = math.prod(map(int, args.size.split("*")))
    rule = min(rules, key=lambda rule: abs(rule.area - area))
    return replace(rule, why=f"guessed from --size {args.size}; --teacache_rule names one")


def download_names(folder: Path) -> list[str]:
    """Names that may tell what a checkpoint folder holds: its own, then of links to it, the last
    one first; in a hub's cache (NAME/snapshots/COMMIT) also NAME. No parents."""
    names, paths = [], [folder.absolute()]
    while paths[0].is_symlink():
        paths.insert(0, paths[0].parent / paths[0].readlink())
    for path in (folder.resolve(), *paths):
        names += [path.name, path.parent.parent.name if path.parent.name == "snapshots" else ""]
    return names


def read_rule(file: Path) -> Rule:
    """A rule as JSON: {"steps", "shift", "solver", "plain": {"coefficients", "thresholds"},
    "retention": the same}."""

    cure = f"give one of {', '.join(RULES)}, or a file in the form that the README shows"
    with refusing(f"--teacache_rule {file}: cannot be used", cure):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        polynomials = {name: Polynomial(**content.pop(name)) for name in ("plain", "retention")}
        rule = Rule(file.name, **polynomials, **content, why=f"from {file.absolute().parent.name}")
        is_fit = isinstance(rule.steps, int) and isinstance(rule.shift, (int, float))
        if not (is_fit and isinstance(rule.solver, str)):
            raise ValueError("steps and shift must be numbers, solver a name")
    return rule


# The settings and the plan of a run


def config_of(
    ours: Namespace, args: Namespace, rule: Rule, steps_by_model: Sequence[int]
) -> TeaCacheConfig:
    """The settings of a run, at the rule's default threshold if none is given."""
    amount, forced, max_skipped = ours.amount, None, None
    if rule.is_sigma and args.task in SIGMA_FOR_TWO_MODELS:
        shares, max_skipped = SIGMA_FOR_TWO_MODELS[args.task]
        forced = first_and_last_steps(steps_by_model, shares)
    thresh = amount.value if amount and not amount.is_speedup else None
    if thresh is None and rule.is_sigma:
        thresh = 0.0  # until plan_amount finds one
    # stock, asked for by a threshold of 0, runs the unconditional branch at a scale of 1 too
    scale = None if amount == Amount(0.0) else args.sample_guide_scale
    return TeaCacheConfig.from_rule(
        rule,
        args.sample_steps,
        thresh,
        ours.use_ret_steps,
        order=ours.teacache_order,
        guided_steps=count_guided_steps(scale, steps_by_model, ours.teacache_guide_until),
        forced_steps=forced,
        max_skipped=max_skipped,
    )


def plan_amount(amount: Amount | None, at_config: Schedule, rule: Rule) -> Schedule:
    """The plan of a run: at its threshold, or for its speed-up. By default "sigma" computes half of
    the steps, or as few as its forced steps allow; --teacache_guide_until saves passes on top."""
    if amount is None and rule.is_sigma:  # half of the steps, whatever guidance saves
        half = at_config.again(guided_steps=None).for_speedup(2.0)
        return at_config.again(thresh=half.config.thresh)
    if amount is None or not amount.is_speedup:
        return at_config
    try:
        planned = at_config.for_speedup(amount.value)
    except ValueError as error:
        cure = "no threshold can be trusted: use --teacache_rule sigma"
        raise Refused(f"{amount}: with {rule} {error}, and {cure}") from error
    fewest = at_config.again(thresh=LARGE_THRESH)
    if fewest.passes > math.ceil(2 * planned.config.steps / amount.value - 1e-9):
        raise Refused(
            f"{amount}: no threshold reaches it; the most is {fewest.speedup:.3g}, at "
            f"--teacache_thresh {planned.config.thresh:.4g}"
        )
    return planned


def check_plan(wan: Wan, job: Job, amount: Amount) -> None:
    """Warn where a polynomial is used away from the settings of its fit; there refuse a schedule
    that skips too many steps in a row, unless the user named the rule. amount: as asked."""
    rule, planned, args, away = job.rule, job.planned, job.args, []
    if not rule.is_sigma and planned.config.thresh > 0:
        now = {"steps": args.sample_steps, "shift": args.sample_shift, "solver": args.sample_solver}
        fit = {name: getattr(rule, name) for name in now}
        away = [f"{n} {now[n]} (fitted at {fit[n]})" for n in now if now[n] != fit[n]]
    notes = [*away]
    if planned.negative_steps:
        notes.append(f"increments are negative at steps {ranges(planned.negative_steps)}")
    if planned.longest_skip > max(6, len(planned.decisions) / 4):
        notes.append(f"{planned.longest_skip} steps in a row are skipped")
        cures = f"use a lower {amount.flag}, --teacache_thresh 0, --teacache_rule sigma"
        if rule.name in RULES:
            cures += f", or --teacache_rule {rule.name} to run it all the same"
        what = f"{amount}: {rule} would compute {planned.counts()}: {'; '.join(notes)}"
        require(rule.named or not away, f"{what}: {cures}")
    if notes:
        wan.warn(f"{rule}: {'; '.join(notes)}: check the video")


def settings_of(args: Namespace, config: TeaCacheConfig, rule: Rule) -> dict[str, Any]:
    """What makes two videos with one seed the same: generate.py's flags, a fork's too, and ours as
    resolved."""

    def resolved(name: str, value: Any) -> Any:
        if name == "prompt" or not isinstance(value, str):
            return value
        is_path = name in ("ckpt_dir", *INPUTS) or os.sep in value
        if is_path and all(map(os.path.exists, value.split(","))):
            return ",".join(map(os.path.realpath, value.split(",")))
        return value

    flags = {n: resolved(n, v) for n, v in vars(args).items() if n not in NOT_IN_SETTINGS}
    settings = flags | {"teacache": {"rule": rule.name, **asdict(config)}}
    return json.loads(json.dumps(settings, default=str))  # as a record holds it


def job_of(wan: Wan, *parts: Sequence[str], label: str = "") -> Job:
    """One video: its flags parsed and checked, its schedule planned. label: of a comparison."""
    ours, rest = our_flags(*parts)
    args = wan.parse(rest)
    check_args(wan, args, all_files=not ours.teacache_plan)
    rule = choose_rule(ours, args)
    require(
        not (ours.use_ret_steps and rule.is_sigma),
        f"--use_ret_steps: {rule} has no such steps: leave it out, or give --teacache_rule, one of "
        f"{', '.join(name for name in RULES if name != 'sigma')}",
    )
    timesteps = wan.timesteps(args)
    steps_by_model = split_by_model(timesteps, wan.task_config(args.task))
    config = config_of(ours, args, rule, steps_by_model)
    distances = distances_ahead(wan, args, config.measure, timesteps)
    planned = plan_amount(ours.amount, Schedule.planned(config, timesteps, distances), rule)
    settings = settings_of(args, planned.config, rule)
    job = Job(args, rule, planned, settings, label, gives_seed(rest), ours.amount is None)
    if not ours.teacache_plan:
        check_plan(wan, job, ours.amount or Amount(job.config.thresh))
    return job


def check_args(wan: Wan, args: Namespace, all_files: bool) -> None:
    """Check generate.py's flags, the checkpoint and, if all_files, the inputs that they name."""
    for name in ("ckpt_dir", "save_file", *INPUTS):
        check_named(name, getattr(args, name))
    check_numbers(wan, args)
    check_checkpoint(wan, args, all_files)
    if all_files:
        check_inputs(wan, args)
    if args.prompt and os.path.isfile(args.prompt):
        wan.warn(f"--prompt {args.prompt}: is a file: --teacache_jobs reads its lines")


def announce(jobs: Sequence[Job]) -> None:
    """Log what will be computed, before anything is loaded: equal plans once."""
    texts = Counter[str]()
    for job in jobs:
        if job.label in (STOCK, NOISE) or job.todo == SKIP:
            continue
        config, planned, default = job.config, job.planned, " (default)" * job.by_default
        if job.by_default and job.rule.is_sigma and 2 * len(planned.computed_steps) > config.steps:
            default = " (default: as near to half of the steps as its limits allow)"
        does = f"{planned.counts()} (about {planned.speedup:.1f}x)"
        if planned.passes == 2 * config.steps:
            does = f"all {config.steps} steps, as stock does"
        label, order = f"{job.label}: " if job.label else "", ", order 1" * config.order
        settings = f"{job.rule}, threshold {config.thresh:.4g}{default}{order}"
        texts[f"{label}{settings}: computes {does}"] += 1
    for text, count in texts.items():
        log.info(f"{f'{count:,} videos: ' if count > 1 else ''}{text}")


# The lines of a jobs file


def read_jobs(file: str) -> list[tuple[int, list[str]]]:
    """The videos of a jobs file: line number and flags.

    A line that begins with -- is flags, read as the shell would; any other is a prompt as it
    stands. Blank lines and lines that begin with # are skipped. UTF-8, or UTF-16 with a byte order
    mark, as Notepad and Excel write it.
    """
    what = f"--teacache_jobs {file}"
    require(
        not file.lower().endswith((".csv", ".json", ".jsonl")),
        f"{what}: must be plain text, a line per video: a prompt, or flags such as "
        '--prompt "A cat." --base_seed 1',
    )
    with refusing(f"{what}: cannot be read", "give a text file with a video per line"):
        content = Path(file).read_bytes()
    utf_16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise Refused(f"{what}: line {line}: is not UTF-8: save as UTF-8") from error
    lines = []
    for i, line in enumerate(map(str.strip, StringIO(text, newline=None)), 1):
        require("\0" not in line, f"{what}: line {i}: is not UTF-8: save as UTF-8")

        if line.startswith("--"):
            with refusing(f"{what}: line {i}", "close the quotes"):
                lines.append((i, shlex.split(line)))
        elif line and not line.startswith("#"):
            lines.append((i, [f"--prompt={line}"]))
    require(lines, f"{what}: has no line with a prompt or flags")
    return lines


def check_line(flags: Sequence[str]) -> None:
    """Refuse flags of the whole command in a line."""
    ours, rest = our_flags(flags)
    given = [name for name in NOT_IN_A_LINE if getattr(ours, name)]
    given += ["help"] if {"-h", "--help"} & set(rest) else []
    require(not given, f"--{' --'.join(given)}: give it on the command line, not in a line")


def check_same_model(args: Namespace, first: Namespace) -> None:
    """Refuse a line that needs another model than the first one."""
    for name in FOR_ALL_LINES:
        value, of_all = getattr(args, name, None), getattr(first, name, None)
        what = f"--{name} {value}: must be the same in all lines, {of_all} in the first"
        require(value == of_all, f"{what}: the model is loaded once")


# From a command to jobs


def jobs_of(wan: Wan, ours: Namespace, argv: Sequence[str]) -> list[list[Job]]:
    """The videos of each line of the jobs file, or of the one command.

    Refused: each error once, with the numbers of its lines, or without if all lines have it.
    """
    lines = read_jobs(ours.teacache_jobs) if ours.teacache_jobs else [(0, [])]
    jobs, taken, errors = [], dict[Path, str](), defaultdict[str, list[int]](list)
    for i, flags in lines:
        try:
            check_line(flags)
            jobs.append(jobs_of_line(wan, [argv, flags], taken, i))
            check_same_model(jobs[-1][0].args, jobs[0][0].args)
        except Refused as error:
            for message in error.args:
                errors[message].append(i)

    messages = []
    for message, found in errors.items():
        of_all = not ours.teacache_jobs or 1 < len(lines) == len(found)
        where = "" if of_all else f"--teacache_jobs {ours.teacache_jobs}: line {ranges(found)}: "
        messages.append(f"{where}{message}")
    if messages:
        raise Refused(*messages)
    return jobs


def jobs_of_line(
    wan: Wan, parts: Sequence[Sequence[str]], taken: dict[Path, str], line: int
) -> list[Job]:
    """The videos of one prompt and seed: one, or a comparison.

    parts: the command line, and a line of the jobs file.
    taken: targets of the command so far, without endings, and what has them.
    """
    ours, _ = our_flags(*parts)
    continues = bool(ours.teacache_jobs or ours.teacache_compare)
    jobs = [job_of_entry(wan, parts, *entry) for entry in entries_of(ours)]
    name_jobs(wan, jobs, taken, continues)
    for job in jobs:
        key = job.target.resolve().with_suffix("")
        other = taken.get(key)
        require(not other, f"--save_file {job.target}: {other} has this name too: give another")
        taken[key] = f"line {line}" if line else f"entry {job.label}"
        if is_rank_0():
            check_target(wan, job.args)
    found = [decide_todo(job, continues) for job in jobs if not job.needs_free_name]
    records = [record for record in found if record]
    if not jobs[0].has_seed:  # all entries have the recorded seed, or that of the first
        seeds = {record["seed"] for record in records} or {jobs[0].args.base_seed}
        what = f"--save_file {jobs[0].target}: it and its entries have several seeds"
        require(len(seeds) == 1, f"{what}: give --base_seed or another name")
        for job in jobs:
            (job.args.base_seed,) = seeds
    extended = [record["prompt"] for record in records if record["prompt"] is not None]
    if jobs[0].args.use_prompt_extend and extended:
        give_prompt(jobs, extended[0])
    return jobs


def job_of_entry(wan: Wan, parts: Sequence[Sequence[str]], label: str, flags: Sequence[str]) -> Job:
    try:
        return job_of(wan, *parts, flags, label=label)
    except Refused as error:
        what = f"--teacache_compare {label}: " if label not in ("", STOCK, NOISE) else ""
        raise Refused(*(f"{what}{message}" for message in error.args)) from error


def gives_seed(argv: Sequence[str]) -> bool:
    """Whether flags for generate.py have a seed. At each parse generate.py draws one otherwise."""
    parser = Parser(add_help=False)  # abbreviates flags as generate.py does
    parser.add_argument("--base_seed", type=int, default=-1)
    return parser.parse_known_args(argv)[0].base_seed >= 0


def name_jobs(wan: Wan, jobs: Sequence[Job], taken: dict[Path, str], continues: bool) -> None:
    """Give each job its target; without --save_file it gets a default name."""
    first, given = jobs[0], jobs[0].args.save_file
    target = Path(given or default_name(wan, first, with_digest=continues))
    if not given and not first.has_seed:  # two equal lines without a seed are two videos
        names = numbered(target)
        target = next(name for name in names if name.resolve().with_suffix("") not in taken)
    first.needs_free_name = not given and not continues
    loses_frames = is_image_file(target) and not makes_image(first.args)
    what = f"--save_file {target}: loses frames that repeat"
    require(not (first.label and loses_frames), f"{what}: compare .mp4 files")
    for job in jobs:
        if job.label:
            taken[target.resolve().with_suffix("")] = "a comparison"
            words = "-".join(re.findall(r"[\w.]+", job.label))
            job.compared_in = target
            job.args.save_file = str(target.with_name(f"{target.stem}.{words}{target.suffix}"))
        else:
            job.args.save_file = str(target)


def default_name(wan: Wan, job: Job, with_digest: bool) -> str:
    """What the video shows; then threshold, seed and time or, where a command can be started
    again, a digest of the settings as given."""
    args, example = job.args, wan.examples(job.args.task).get("prompt", "")
    words = "_".join(re.findall(r"\w+", example if args.prompt is None else args.prompt))[:50]
    if not with_digest:
        mark = f"{job.config.thresh:.4g}_{args.base_seed}_{time.strftime('%Y%m%d_%H%M%S')}"
    else:
        settings = job.settings | {"seed": args.base_seed if job.has_seed else None}
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    ending = ".png" if makes_image(args) else ".mp4"
    return f"{args.task}_{args.size.replace('*', 'x')}_{words}_{mark}{ending}"


def decide_todo(job: Job, continues: bool) -> dict[str, Any] | None:
    """Set what is left to do from the record beside the target; return it if the job continues it.

    continues: a batch or a comparison, which resumes; a single video is made again, as by
    generate.py.
    """
    target, record = job.target, read_record(job.target)
    if record is None:
        what = f"--save_file {target}: exists without a record"
        require(not (continues and target.exists()), f"{what}: delete it, or give another name")
        return None
    same_seed = not job.has_seed or record["seed"] == job.args.base_seed
    same = same_seed and record["settings"] == job.settings
    if not continues:
        if not same:
            log.info(f"{target} was made with other settings: it will be overwritten")
        return None
    what = f"--save_file {target}: exists, made with other settings, see its {RECORD}"
    require(same, f"{what}: give another name")
    job.has_record = True
    if is_finished(record):
        with suppress(OSError):
            check_written(target, record["frames"])
            job.todo = SKIP
    elif record["latents"] and Path(record["latents"]).is_file():
        with suppress(Refused):  # they cannot be decoded: sample again
            read_latents(Path(record["latents"]))
            job.todo = DECODE
    return record


def entries_of(ours: Namespace) -> list[tuple[str, list[str]]]:
    """The videos of one prompt and seed: label and flags."""
    if not ours.teacache_compare:
        return [("", [])]
    what = f"{ours.amount} beside --teacache_compare"
    require(ours.amount is None, f"{what}: give it as an entry, such as 0.08 or 2x")
    with refusing("--teacache_compare: its picture cannot be drawn", "pip install 'pillow>=10.1'"):
        caption(Row("", 1.0, 1.0, [], 1, None, 1.0, None), 64, 110)
    stock = ["--teacache_thresh", "0", "--teacache_order", "0", "--teacache_guide_until", "1"]
    asked = [(entry, entry_flags(entry)) for entry in ours.teacache_compare]
    return [(STOCK, stock), (NOISE, stock), *asked]


def entry_flags(entry: str) -> list[str]:
    """[RULE:]THRESHOLD[@ORDER] or [RULE:]SPEEDUPx[@ORDER] as flags."""
    match = re.fullmatch(r"(?:(.+):)?([^:@]+?)(x?)(?:@([01]))?", entry)
    what = f"--teacache_compare {entry}"
    require(match, f"{what}: give thresholds as 0.08, speed-ups as 2x, RULE:2x, or 2x@1")
    rule, value, x, order = match.groups()
    flags = [f"--teacache_{'speedup' if x else 'thresh'}={value}"]
    flags += [f"--teacache_rule={rule}"] if rule else []
    return flags + ([f"--teacache_order={order}"] if order else [])


# What a command runs


def print_plan(wan: Wan, ours: Namespace, argv: Sequence[str]) -> None:
    """For --teacache_plan: the schedule at the current threshold, the rule's, and some around."""
    job = job_of(wan, argv)
    config = job.config
    polynomial = job.rule.polynomial(ours.use_ret_steps)
    tried = list(polynomial.thresholds) if polynomial else [config.thresh or 0.1]
    ladder = [tried[-1] * factor for factor in (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)]
    # thresholds that print alike are one, and the current one is kept
    by_text = {f"{thresh:.4g}": thresh for thresh in [*ladder, *tried, config.thresh]}
    print(f"TeaCache plan: {job.rule}, {config.steps} steps")
    print("   thresh  computed  skipped  speed-up  longest skip  schedule (# computed, . skipped)")
    for thresh in sorted(by_text.values()):
        schedule = job.planned.again(thresh=thresh)
        computed, mark = len(schedule.computed_steps), ">" if thresh == config.thresh else " "
        print(
            f"{mark} {thresh:7.4g}  {computed:8}  {config.steps - computed:7}  "
            f"{schedule.speedup:7.2f}x  {schedule.longest_skip:12}  {schedule.as_text()}"
        )
    print("speed-up: of the transformer, if a skipped step took no time")
    try:
        check_plan(wan, job, Amount(config.thresh))
    except Refused as error:
        print(f"a run would be refused: {error}")


def run_decode(ours: Namespace, argv: Sequence[str]) -> None:
    """For --teacache_decode."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--save_file")
    parser.add_argument("--ckpt_dir")
    flags, file = parser.parse_args(argv), Path(ours.teacache_decode)
    for name, value in vars(flags).items():
        check_named(name, value)
    what, unset = f"--teacache_decode {file}", vars(our_flags([])[0])
    others = {name for name, value in vars(ours).items() if value != unset[name]}
    cure = "leave out all flags but --save_file, --ckpt_dir and --wan_repo"
    require(others <= {"teacache_decode", "wan_repo"}, f"{what}: needs no other flags: {cure}")
    require(environment("WORLD_SIZE", 1) == 1, f"{what}: start one process, without torchrun")
    content = read_latents(file)
    given = {name: value for name, value in vars(flags).items() if value}
    args = Namespace(**(content | given))
    wan = import_wan(ours.wan_repo, generates=False)  # works without a GPU, slowly
    require(
        args.task in wan.generate_py.WAN_CONFIGS,
        f"{what}: is of --task {args.task}, which this --wan_repo does not have",
    )
    check_file(args, Path(args.ckpt_dir) / wan.task_config(args.task)["vae_checkpoint"])
    check_target(wan, args)
    target = Path(args.save_file)
    is_other = target.exists() and is_finished(read_record(target))
    require(not is_other, f"--save_file {target}: is a finished video: give another name")
    decode_latents(wan, file, content, args)
    log.info(f"wrote {args.save_file} and deleted {file}")


def runs_a_queue(ours: Namespace, argv: Sequence[str]) -> bool:
    """Whether each process of torchrun makes its own videos."""
    parser = Parser(add_help=False)
    for name in ("ulysses_size", "ring_size"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in ("dit_fsdp", "t5_fsdp"):
        parser.add_argument(f"--{name}", action="store_true")
    flags, processes = parser.parse_known_args(argv)[0], environment("WORLD_SIZE", 1)
    together = flags.ulysses_size * flags.ring_size > 1 or flags.dit_fsdp or flags.t5_fsdp
    if processes == 1 or together or ours.teacache_plan:
        return False
    share = f"--ulysses_size {processes}"
    require(
        not ours.teacache_compare,
        f"--teacache_compare: {processes} processes would each make it: start one, or add {share}",
    )
    if not ours.teacache_jobs and is_rank_0():
        log.warning(
            f"{processes} processes make the same video {processes} times: add {share} "
            "to share it, or give --teacache_jobs, a video per line"
        )
    return bool(ours.teacache_jobs)


def jobs_of_queue(wan: Wan, ours: Namespace, argv: Sequence[str], queue: Queue) -> list[list[Job]]:
    """The jobs of a queue: rank 0 makes them and hands them to the others."""
    jobs = None
    if queue.rank == 0:
        try:
            jobs = jobs_of(wan, ours, argv)
        finally:
            queue.store.set("jobs", pickle.dumps(jobs))
        return jobs
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    queue.wait(lambda: queue.store.check(["jobs"]))
    jobs = pickle.loads(queue.store.get("jobs"))
    if jobs is None:
        raise Refused()  # rank 0 says why
    return jobs


def command(argv: Sequence[str]) -> int:
    """Run a command line; return the exit status. Refused: what is wrong, before loading."""
    ours, rest = our_flags(argv)
    if {"-h", "--help"} & set(rest):
        print(our_parser().format_help())
        import_wan(ours.wan_repo, generates=False).parse(rest)  # prints generate.py's, and exits
    if ours.teacache_decode:
        run_decode(ours, rest)
        return 0
    queue = Queue() if runs_a_queue(ours, rest) else None
    wan = import_wan(ours.wan_repo, generates=not ours.teacache_plan)
    if ours.teacache_plan:
        require(not ours.teacache_jobs, "--teacache_plan, --teacache_jobs: give one of them")
        if is_rank_0():
            print_plan(wan, ours, argv)
        return 0
    jobs_by_line = jobs_of_queue(wan, ours, argv, queue) if queue else jobs_of(wan, ours, argv)
    jobs = [job for line in jobs_by_line for job in line]
    if queue is None or queue.rank == 0:
        announce(jobs)
    session = Session(wan, several_lines=len(jobs_by_line) > 1)
    with session.patches(uses_xfuser(jobs[0].args)):
        if ours.teacache_compare:
            return run_comparisons(session, jobs_by_line)
        return make_batch(session, jobs, queue)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does. Ignored ones (nohup) stay ignored."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    defaults = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in defaults:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; ``argv`` is what follows the program's name. Exits with 2 for what was
    refused, 1 for what failed, 128 + its number for a signal; returns otherwise."""
    # a log line to a closed pipe must not print a traceback
    with patched(logging, raiseExceptions=False):
        status = exit_status(sys.argv[1:] if argv is None else argv)
    if status:
        sys.exit(status)


def exit_status(argv: Sequence[str]) -> int:
    """Run a command line and log how it fails."""
    local_rank = environment("LOCAL_RANK", 0)  # before the queue sets it to 0
    alone = environment("LOCAL_WORLD_SIZE", 1) == 1  # then LOCAL_RANK is a left-over
    try:
        with stopped_by_signals():
            try:
                status = command(argv)
            except SystemExit as leaving:  # of --help
                status = leaving.code or 0
            if sys.stdout:  # None if it was closed before the start
                sys.stdout.flush()
            return status
    except Refused as error:
        lines = (f"teacache_generate.py: error: {message}\n" for message in error.args)
        sys.stderr.writelines(lines if local_rank == 0 or alone else ())  # once per machine
        return 2
    except BrokenPipeError:  # of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        log.error(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    except BatchEnds:
        return 1
    except Exception as error:
        plain = isinstance(error, PLAIN_ERRORS)
        log.error(f"{error if plain else repr(error)}", exc_info=None if plain else error)
        return 1


if __name__ == "__main__":
    main()
