"""TeaCache for Wan2.1 and Wan2.2: nearly the same video, much sooner. This one file is all of it.

Copy it beside Wan's generate.py and run it with generate.py's flags and its own (--help):

    python teacache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B \\
        --prompt "Two cats box on a spotlighted stage." --teacache_thresh 0.08

Each section knows only those above it:
  policy        numbers in, decisions out: which steps are computed
  planning      all decisions ahead, and the threshold for a speed-up
  measurements  what a run measures of itself
  cache         tensors: the last residual or two of a branch, in place of the blocks of a model
  attention     PyTorch's, where flash-attn cannot be had
  Wan           what the script needs of Wan2.1 and Wan2.2
  checks        what is refused before a weight is loaded
  jobs          runs of Wan's own generate(args), one or many, with one pipeline
  comparison    of several settings with stock, on the user's own model
  command line  flags, the settings and jobs that they mean, main

Where to begin:
  the method    TeaCacheConfig, Schedule.decide, Residuals, TeaCache
  a run         command, job_of, Session.make, Run
  a failure     latents are on disk before they are decoded: Run.decode, write_ahead, decode_latents
  measured      of every run: seconds, an estimate of its speed-up, and how far off its guesses were
                (Measurements); of a comparison, beside stock: the speed-up itself, PSNR, SSIM
  to be added   a fitted model to ROWS, a kind of task to KINDS, a Wan with other names to RELEASES

TeaCache: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv 2411.19108. Wan: https://github.com/Wan-Video/Wan2.1 and Wan2.2.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import imageio
import numpy as np
import safetensors
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageSequence
from torch import Tensor, nn

log = logging.getLogger("teacache")

# ---------------------------------------------------------------------------------------- policy
# Owns the published polynomials, the settings of a run, and the decision of each step. Knows
# numbers only: no tensors, no models, no files.
#
# Published are the modes plain and retention with their polynomials and thresholds (TeaCache), and
# the rule of mode sigma (MagCache). Ours are residual_norm, which spares that rule a table for each
# model; order 1; guided_steps; and the threshold for a speed-up.

PLAIN, RETENTION, SIGMA = "plain", "retention", "sigma"  # the modes
RETENTION_STEPS = 5
TRAIN_TIMESTEPS = 1000  # of Wan's schedulers: a timestep is 1000 times the noise level

# What was fitted


@dataclass(frozen=True)
class Polynomial:
    """From a relative L1 distance to an increment: degree 4, highest power first.

    thresholds: those that were tried with it; the last is the default.
    """

    coefficients: Sequence[float]
    thresholds: Sequence[float]


@dataclass(frozen=True)
class Row:
    """What was fitted for one model: a polynomial for each mode, at these sampling settings.

    tasks: those that run this model. Where several rows have a task, the checkpoint's name or the
        size of the video tells which (``choose_among``).
    For the row "sigma" nothing is fitted, and there is no Row: wherever a row may be None, that is
    meant.
    """

    plain: Polynomial
    retention: Polynomial
    steps: int
    shift: float
    solver: str = "unipc"
    tasks: Sequence[str] = ()

    def polynomial(self, use_ret_steps: bool) -> Polynomial:
        return self.retention if use_ret_steps else self.plain


# Published by the authors of TeaCache for Wan2.1, fitted at generate.py's defaults. A new model is
# one entry more; a task that no row has runs by "sigma".
# fmt: off
ROWS: dict[str, Row] = {
    "t2v-1.3B": Row(
        Polynomial((2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
                   (0.05, 0.07, 0.08)),
        Polynomial((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
                   (0.05, 0.1)),
        steps=50, shift=5.0, tasks=("t2v-1.3B",)),
    "t2v-14B": Row(
        Polynomial((-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
                   (0.14, 0.15, 0.2)),
        Polynomial((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
                   (0.1, 0.2)),
        steps=50, shift=5.0, tasks=("t2v-14B", "t2i-14B")),
    "i2v-14B-480P": Row(
        Polynomial((-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
                   (0.13, 0.19, 0.26)),
        Polynomial((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
                   (0.2, 0.3)),
        steps=40, shift=3.0, tasks=("i2v-14B",)),
    "i2v-14B-720P": Row(
        Polynomial((-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
                   (0.18, 0.2, 0.3)),
        Polynomial((8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
                   (0.2, 0.3)),
        steps=40, shift=5.0, tasks=("i2v-14B",)),
}
# fmt: on


def mode_of(row: Row | None, use_ret_steps: bool) -> str:
    if row is None:
        return SIGMA
    return RETENTION if use_ret_steps else PLAIN


# The decision


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of one generation.

    steps: the pipeline's ``sampling_steps``.
    thresh: a step is computed once the accumulated increments reach it; 0 computes every step.
    mode: where increments come from, and which steps are always computed.
        "plain": coefficients at the distance of e [dim], the embedding of the timestep, to that of
            the step before; the first and the last step.
        "retention": coefficients at the distance of e0 [6 * dim], the projection of e that
            modulates the blocks; the first 5 steps.
        "sigma": the noise level alone (``residual_norm``); the first fifth and the last step.
    coefficients: of the polynomial, highest power first; not used by "sigma".
    guided_steps: on so many steps, the first ones, the unconditional branch runs; after them it
        returns the conditional output, as at guidance scale 1. None: on all, as stock.
    order: a skipped step holds the last residual (0, as published), or goes on along the line
        through the last two (1, see ``Residuals``).
    ValueError: no steps; a threshold that is negative, infinite or not a number; another mode or
        order; a polynomial without coefficients.
    """

    steps: int
    thresh: float
    mode: str = PLAIN
    coefficients: Sequence[float] = ()
    guided_steps: int | None = None
    order: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.guided_steps or 0) < 0:
            raise ValueError(f"steps {self.steps}, guided_steps {self.guided_steps}: too few")
        if not 0 <= self.thresh < math.inf:
            raise ValueError(f"thresh {self.thresh} must be 0 (off) or a positive number")
        if self.mode not in (PLAIN, RETENTION, SIGMA):
            raise ValueError(f"mode {self.mode!r} must be {PLAIN}, {RETENTION} or {SIGMA}")
        if self.order not in (0, 1):
            raise ValueError(f"order {self.order} must be 0 or 1")
        if self.thresh > 0 and self.mode != SIGMA and not len(self.coefficients):
            raise ValueError(f"mode {self.mode} needs coefficients, such as those of ROWS")

    @classmethod
    def from_row(
        cls,
        row: Row | None,
        steps: int,
        thresh: float | None = None,
        use_ret_steps: bool = False,
        **others: Any,
    ) -> TeaCacheConfig:
        """The settings for a row, such as ``ROWS["t2v-1.3B"]``.

        thresh: the row's default if None; of "sigma" 0, which skips nothing: see ``plan_speedup``.
        """
        mode = mode_of(row, use_ret_steps)
        if row is None:
            return cls(steps, 0.0 if thresh is None else thresh, mode, **others)
        polynomial = row.polynomial(use_ret_steps)
        thresh = polynomial.thresholds[-1] if thresh is None else thresh
        return cls(steps, thresh, mode, polynomial.coefficients, **others)

    def always_computes(self, step: int) -> bool:
        """Whether a step is computed whatever its increment."""
        if self.mode == RETENTION:
            first, last = RETENTION_STEPS, self.steps
        elif self.mode == SIGMA:
            first, last = math.ceil(self.steps / 5), self.steps - 1
        else:
            first, last = 1, self.steps - 1
        return step < first or step >= last or self.thresh == 0

    def increment(self, timestep: float, distance: float, last_computed_timestep: float) -> float:
        """What a step adds to the accumulated value.

        By the polynomials it is TeaCache's rule (arXiv 2411.19108, section 3): the rescaled
        distance. By "sigma" it is that of MagCache (arXiv 2506.09045): the change of the residual's
        norm since the last computed step, a sum of which is accumulated; without its limit to the
        steps that are skipped in a row.
        """
        if self.mode == SIGMA:
            return abs(1 - residual_norm(timestep) / residual_norm(last_computed_timestep))
        return float(np.polyval(self.coefficients, distance))

    def is_guided(self, step: int) -> bool:
        """Whether the unconditional branch runs on a step."""
        return self.guided_steps is None or step < self.guided_steps


def residual_norm(timestep: float) -> float:
    """The norm of the blocks' residual at a timestep, up to a factor: only ratios are used.

    One line for all models: the norms that are published with MagCache for five Wan2.1 models are
    within 0.5 to 2.5 % of lines like it, between noise levels .2 and .93, whatever the shift.
    """
    return 0.33 + 0.66 * timestep / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Decision:
    """What was decided at one step, and from what."""

    timestep: float
    distance: float | None  # relative L1, of e or e0 to that of the step before; None at the first
    increment: float | None  # None where the threshold is not asked
    accumulated: float  # what is held against the threshold; 0 where it is not asked
    computed: bool


@dataclass(frozen=True)
class Reach:
    """For order 1: how far a step is beyond the last computed one.

    gaps: (level - newer) / (newer - older), of its noise level and those of the last two computed
        steps. The residual changes most evenly with the noise level: on the published norms of the
        real models a line over it has a third of the error of a line over the step's number.
    steps_beyond: in steps.
    """

    gaps: float
    steps_beyond: int


NOWHERE = Reach(0.0, 0)


class Schedule:
    """The decisions of one generation, a step each."""

    def __init__(self, config: TeaCacheConfig):
        self.config = config
        self.decisions: list[Decision] = []

    def decide(self, timestep: float, distance: float | None) -> bool:
        """Take the next step: True to compute it, False to reuse the last residual.

        distance: None at the first step of a model, which is computed.
        """
        if self.config.always_computes(len(self.decisions)) or distance is None:
            self.decisions.append(Decision(timestep, distance, None, 0.0, computed=True))
            return True
        previous, last_computed = self.decisions[-1], self.decisions[self.computed_steps[-1]]
        increment = self.config.increment(timestep, distance, last_computed.timestep)
        accumulated = increment + (0.0 if previous.computed else previous.accumulated)
        computed = not accumulated < self.config.thresh  # so not-a-number computes
        self.decisions.append(Decision(timestep, distance, increment, accumulated, computed))
        return computed

    def overrule(self, computed: bool) -> None:
        """Replace what was decided last by what rank 0 has decided."""
        self.decisions[-1] = replace(self.decisions[-1], computed=computed)

    @property
    def computed_steps(self) -> list[int]:
        return [i for i, decision in enumerate(self.decisions) if decision.computed]

    def reach(self, bounded: bool) -> Reach:
        """How far the newest step is beyond the last computed one before it.

        bounded: but no more steps than the last two are apart. It is for a guess; what a computed
            step tells of the line is measured without a bound.
        NOWHERE without two, and where both are at one noise level. After Wan2.2's change of models
        the older one may be of the other model: ``Residuals`` then has one step only, and no use
        for a reach.
        """
        now = len(self.decisions) - 1
        earlier = [step for step in self.computed_steps if step < now]
        if len(earlier) < 2:
            return NOWHERE
        older, newer = earlier[-2:]
        farthest = min(now, newer + (newer - older)) if bounded else now
        level, level_newer, level_older = (
            self.decisions[step].timestep for step in (farthest, newer, older)
        )
        if level_newer == level_older:
            return NOWHERE
        gaps = (level - level_newer) / (level_newer - level_older)
        return Reach(gaps, farthest - newer)

    @property
    def passes(self) -> int:
        """How often the blocks run: once or twice on a computed step; 2 * steps for stock."""
        return sum(1 + self.config.is_guided(step) for step in self.computed_steps)

    @property
    def speedup(self) -> float:
        """Of the transformer against stock's 2 * steps passes, if a skipped step took no time."""
        return 2 * len(self.decisions) / self.passes if self.passes else 1.0

    @property
    def negative_steps(self) -> list[int]:
        """Those with a negative increment, for which the polynomial was not made."""
        return [i for i, decision in enumerate(self.decisions) if (decision.increment or 0) < 0]

    @property
    def longest_skip(self) -> int:
        """The largest number of steps skipped in a row."""
        return max(map(len, self.marks().split("#")))

    def marks(self) -> str:
        """The schedule as text, # computed and . skipped."""
        return "".join("#" if decision.computed else "." for decision in self.decisions)

    def summary(self) -> str:
        """How much is computed: "25 of 50 steps (about 2.0x)"."""
        count, steps = len(self.computed_steps), len(self.decisions)
        text = f"{count} of {steps} steps"
        if self.passes != 2 * count:
            text += f", {self.passes} of {2 * steps} passes"
        return f"{text} (about {self.speedup:.1f}x)"

    def faults(self) -> list[str]:
        """Why this schedule should not be run unseen, a phrase each."""
        found = []
        if self.negative_steps:
            found.append(f"its increments are negative at steps {ranges(self.negative_steps)}")
        if self.longest_skip > len(self.decisions) / 4:
            found.append(f"it skips {self.longest_skip} steps in a row")
        return found


def ranges(steps: Sequence[int]) -> str:
    """Numbers in a few words: 1 2 3 7 is "1-3 7"."""
    ends: list[list[int]] = []
    for step in steps:
        if ends and step == ends[-1][1] + 1:
            ends[-1][1] = step
        else:
            ends.append([step, step])
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)


# -------------------------------------------------------------------------------------- planning
# Owns all decisions of a run ahead of it, and the threshold for a speed-up. Numbers only, too.


def plan(
    config: TeaCacheConfig, timesteps: Sequence[float], distances: Sequence[float | None]
) -> Schedule:
    """All decisions at once.

    distances: of each step to the one before, None at the first step of a model. By "sigma" any
        number does.
    """
    schedule = Schedule(config)
    for timestep, distance in zip(timesteps, distances, strict=True):
        schedule.decide(timestep, distance)
    return schedule


def plan_speedup(
    config: TeaCacheConfig,
    timesteps: Sequence[float],
    distances: Sequence[float | None],
    speedup: float,
) -> Schedule:
    """The plan with the fewest passes that has at least 2 * steps / speedup of them.

    Its threshold is the middle of all that give the same plan, so that the rounding of another
    machine or of bfloat16 does not change it. Even the largest threshold may leave more passes than
    that, since some steps are always computed.
    ValueError: an increment is negative, and no threshold can be trusted.
    """

    def at(thresh: float) -> Schedule:
        return plan(replace(config, thresh=thresh), timesteps, distances)

    thresholds = distinct_thresholds(config, timesteps, distances)
    fewest = at(thresholds[-1])
    if fewest.negative_steps:
        raise ValueError(f"the increments are negative at steps {ranges(fewest.negative_steps)}")
    wanted = 2 * config.steps / speedup - 1e-9
    # passes never grow with the threshold: those with too few are at the end of the list
    count = bisect.bisect_left(thresholds, True, key=lambda thresh: at(thresh).passes < wanted)
    largest = thresholds[count - 1] if count else 0.0  # of those with enough
    return at(middle_threshold(at(largest)))


def distinct_thresholds(
    config: TeaCacheConfig, timesteps: Sequence[float], distances: Sequence[float | None]
) -> list[float]:
    """A threshold for every schedule that there is, in order.

    A decision changes only where the threshold crosses a sum of increments in a row: between any
    two of these, and above the last, one is enough. Sums that differ by rounding alone are one.
    """
    sums = set[float]()
    for start, last_computed_timestep in enumerate(timesteps):
        total = 0.0
        for step in range(start + 1, len(timesteps)):
            if distances[step] is None:  # another model begins, and the sum anew
                break
            total += config.increment(timesteps[step], distances[step], last_computed_timestep)
            if 0 < total < math.inf:  # so not-a-number is left out too
                sums.add(total)
    edges = [0.0, *sorted(sums)]
    intervals = [ends for ends in itertools.pairwise(edges) if ends[1] - ends[0] > 1e-6 * ends[1]]
    above_all = 2 * edges[-1] or 1.0
    return [*(sum(ends) / 2 for ends in intervals), above_all]


def middle_threshold(schedule: Schedule) -> float:
    """The middle of the thresholds that give a schedule; 0 where it skips nothing."""
    free = [decision for decision in schedule.decisions if decision.increment is not None]
    skipped = [decision.accumulated for decision in free if not decision.computed]
    computed = [decision.accumulated for decision in free if decision.computed]
    computed = [accumulated for accumulated in computed if math.isfinite(accumulated)]
    if not skipped:
        return 0.0
    if not computed:
        return 2 * max(skipped) or 1.0
    return (max(skipped) + min(computed)) / 2


# ---------------------------------------------------------------------------------- measurements
# Owns what a run measures of itself: seconds, an estimate of its speed-up, drift. Knows schedules.


@dataclass(frozen=True)
class Drift:
    """How far the guesses were off at a computed step that came after skipped ones.

    by_order: mean|true - guess| / mean|true| of the residuals, of order 0 and of order 1.
    """

    step: int
    by_order: tuple[float, float]


class Measurements:
    """Marks of time and drift. No step waits for the GPU that would not anyway: marks are taken
    where it is decided, errors are read at the end."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.times: list[float] = []  # seconds: begin of sampling, each decision, end of sampling
        self.drifts: list[Drift] = []
        self.unread: list[tuple[int, Tensor]] = []  # step, and Residuals.errors on the device

    def mark(self) -> None:
        self.times.append(time.perf_counter())

    def read(self) -> None:
        """Bring the errors to the host, all at once."""
        read = torch.stack([errors for _, errors in self.unread]).tolist() if self.unread else []
        for (step, _), (size, error_0, error_1) in zip(self.unread, read, strict=True):
            if size > 0 and math.isfinite(size + error_0 + error_1):
                self.drifts.append(Drift(step, (error_0 / size, error_1 / size)))
        self.unread.clear()

    @property
    def seconds(self) -> float:
        """Of the sampling, so far or in all."""
        return self.times[-1] - self.times[0] if self.times else 0.0

    @property
    def speedup(self) -> float:
        """Against stock's 2 * steps passes, at the median seconds of the passes that were run."""
        seconds = np.diff(self.times[1:])  # of each step: from its decision to the next
        schedule = self.schedule
        finished = [step for step in schedule.computed_steps if step < len(seconds)]
        of_a_pass = [seconds[step] / (1 + schedule.config.is_guided(step)) for step in finished]
        return float(np.median(of_a_pass)) * 2 * len(seconds) / self.seconds

    def drift(self, order: int) -> float | None:
        """The mean drift by an order; None if no step was computed after a skipped one."""
        if not self.drifts:
            return None
        return float(np.mean([drift.by_order[order] for drift in self.drifts]))

    def summary(self) -> str:
        """What was computed, how long it took, what it saved and how far off it was."""
        schedule, config = self.schedule, self.schedule.config
        if len(self.times) < 3:  # begin of sampling, a decision, end of sampling
            return "TeaCache: no step was taken"
        computed, steps = schedule.computed_steps, len(schedule.decisions)
        text = (
            f"TeaCache: computed {len(computed)} of {steps} steps "
            f"({' '.join(map(str, computed))}), sampling {self.seconds:.1f} s, "
            f"about {self.speedup:.2f}x of stock (estimated from the computed steps)"
        )
        if config.guided_steps is not None and config.guided_steps < steps:
            text += f"; {schedule.passes} of {2 * steps} passes"
        if not self.drifts:
            return text
        order, other = config.order, 1 - config.order
        worst = max(self.drifts, key=lambda drift: drift.by_order[order])
        return (
            f"{text}; reused residuals were off by {percent(self.drift(order))} (largest "
            f"{percent(worst.by_order[order])} at step {worst.step}); by order {other} they would "
            f"have been by {percent(self.drift(other))}"
        )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ----------------------------------------------------------------------------------------- cache
# Owns the residuals of one generation and what stands in for a model's methods during it. Knows
# WanModel's forward, blocks and time_projection; no flags, files or pipelines.

SAMPLE_TOKENS = 1024  # of a rank are measured at most: of 32,760 tokens every 32nd
CONDITIONAL, UNCONDITIONAL = 0, 1  # the branches: with the prompt, and then without
DIFFERENCE = 2  # of the two, which guidance multiplies


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


def synchronize() -> None:
    """Wait for the GPU, so that the next mark of time is of what was asked before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Several processes


def across_ranks() -> bool:
    """Whether several processes make this video together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_rank_0(decision: bool, device: torch.device) -> bool:
    """Rank 0's decision, on every rank: ranks that decide by themselves may differ, and hang."""
    if not across_ranks():
        return decision
    flag = torch.tensor([int(decision)], device=device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())


def totals(terms: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor, float64 on the device, over the tokens of all ranks.

    Only for ratios: where each rank has all tokens, as without Ulysses and ring, every sum is too
    large by the number of ranks.
    """
    sums = torch.stack([term.sum(dtype=torch.float64) for term in terms])
    if across_ranks():
        dist.all_reduce(sums)
    return sums


# The residuals, and what a skipped step takes for its own


@dataclass
class ComputedStep:
    """A computed step, and its residuals by branch."""

    step: int
    sampled: dict[int, Tensor]  # every n-th token in float32, [1, up to 1024, dim], to measure by
    residuals: dict[int, Tensor]  # of all tokens, [1, tokens, dim], as long as they are needed

    def sampled_quantities(self) -> dict[int, Tensor]:
        """What is measured apart: the branches and, with guidance, their difference."""
        found = dict(self.sampled)
        if UNCONDITIONAL in found:
            found[DIFFERENCE] = found[CONDITIONAL] - found[UNCONDITIONAL]
        return found


class Residuals:
    """The last two computed steps, and a guess from them.

    Order 0 holds the newest residual, R'. Order 1, which is ours, goes on along the line from the
    older one, R'', and the line bends, so that each step farther adds less:
        guess = R' + D w    with D = R' - R'' and w = k / (1 + b m)
    k = ``Reach.gaps`` and m = ``Reach.steps_beyond`` of the bounded reach: a guess stops after as
    many steps as R' is after R'', and stays there. b is the bend. It begins with 1 / n for a
    first line of n steps; then each computed step R corrects it, with k and m of the unbounded
    reach, that is, of where R is:
        gain = <R - R', D> / (k <D, D>), clipped to 0 .. 1    what was right of the line
        mean = (gain + 1 / (1 + b m)) / 2                     a single gain tells little of the next
        b    = (1 / mean - 1) / m
    Products are over the sampled tokens of all ranks. With one computed step so far R' is held; at
    k = 0 nothing is corrected; at D = 0 the gain is 0; each model of Wan2.2 begins anew.

    With guidance U, of the unconditional branch, and C - U have a bend each, since guidance
    multiplies the error of C - U. The guess of C is the sum of their guesses:
        C' + D_C w_(C-U) + D_U (w_U - w_(C-U))
    C has a bend of its own, too: corrected from the beginning, and used once the newest computed
    step is without U.
    """

    def __init__(self) -> None:
        self.newest_first: list[ComputedStep] = []
        # of each branch and of DIFFERENCE; tensors, so that nothing waits for the GPU
        self.bends: dict[int, Tensor] = {}

    def guess(self, branch: int, order: int, reach: Reach) -> Tensor:
        """The residual [1, tokens, dim] of a branch for a skipped step."""
        if order == 0 or len(self.newest_first) < 2:
            return self.newest_first[0].residuals[branch]
        return self.extrapolate(
            reach, branch, *(computed.residuals for computed in self.newest_first)
        )

    def extrapolate(
        self, reach: Reach, branch: int, newer: dict[int, Tensor], older: dict[int, Tensor]
    ) -> Tensor:
        """Order 1, from the residuals of two steps by branch, or from samples of them.

        In place where it can be: for 14B at 720P a residual has 1.5 GB.
        """
        change = newer[branch] - older[branch]
        if branch == CONDITIONAL and UNCONDITIONAL in newer:
            change_of_u = newer[UNCONDITIONAL] - older[UNCONDITIONAL]
            w_difference, w_u = self.way(DIFFERENCE, reach), self.way(UNCONDITIONAL, reach)
            change.mul_(w_difference).add_(change_of_u.mul_(w_u - w_difference))
        else:
            change.mul_(self.way(branch, reach))
        return change.add_(newer[branch])

    def way(self, quantity: int, reach: Reach) -> Tensor:
        """How much of the line to go: w."""
        return reach.gaps * self.damping(quantity, reach)

    def damping(self, quantity: int, reach: Reach) -> Tensor:
        return 1 / (1 + self.bends[quantity] * reach.steps_beyond)

    def free_all_but(self, count: int) -> None:
        """Let go of all residuals but those of so many steps, the newest ones; samples stay."""
        for computed in self.newest_first[count:]:
            computed.residuals.clear()

    def errors(self, computed: ComputedStep, reach: Reach) -> Tensor:
        """What both orders would have guessed for a computed step, against what is true.

        [sum|R|, sum|R - guess of order 0|, sum|R - guess of order 1|] of the sampled tokens of both
        branches, float64 on the device, over all ranks.
        """
        samples = [earlier.sampled for earlier in self.newest_first]
        sizes, errors_0, errors_1 = [], [], []
        for branch, true in computed.sampled.items():
            held = extrapolated = samples[0][branch]
            if len(samples) == 2:
                extrapolated = self.extrapolate(reach, branch, *samples)
            sizes.append(true.abs())
            errors_0.append((true - held).abs())
            errors_1.append((true - extrapolated).abs())
        return totals([torch.stack(terms) for terms in (sizes, errors_0, errors_1)])

    def add(self, computed: ComputedStep, reach: Reach) -> None:
        """Take a computed step, and correct the bends by it. reach: how far it was, unbounded."""
        if len(self.newest_first) == 1:
            steps_between = computed.step - self.newest_first[0].step
            first_bend = torch.tensor(1 / steps_between, dtype=torch.float64)
            self.bends = dict.fromkeys((CONDITIONAL, UNCONDITIONAL, DIFFERENCE), first_bend)
        elif self.newest_first and reach.gaps != 0:  # at 0 there was no line, or no way to go
            self.correct_bends(computed, reach)
        self.newest_first = [computed, *self.newest_first[:1]]

    def correct_bends(self, computed: ComputedStep, reach: Reach) -> None:
        """By how much of the line was right at a computed step."""
        steps = (computed, *self.newest_first)
        now, newer, older = (step.sampled_quantities() for step in steps)
        products = []
        for quantity in now:
            line = newer[quantity] - older[quantity]
            products += [(now[quantity] - newer[quantity]) * line, line * line]
        for quantity, (along, squared) in zip(now, totals(products).view(-1, 2), strict=True):
            # a line of length 0 has no gain
            gain = (along / (reach.gaps * squared)).nan_to_num(0.0).clamp(0, 1)
            mean = (gain + self.damping(quantity, reach)) / 2  # above 0, since a damping is
            self.bends[quantity] = (1 / mean - 1) / reach.steps_beyond


# In place of the models' methods


@dataclass(frozen=True)
class Originals:
    """A model's own methods and blocks, which the stand-ins call."""

    forward: Callable
    blocks: Sequence[nn.Module]
    forward_vace: Callable | None  # None without VACE


class TeaCache:
    """The state of one generation, and what stands in place of the models' methods during it.

    Wan calls a model twice a step, first with the prompt (the conditional branch), then without.
    In each call come, in this order:
        forward       counts the call, and calls the model's own; once guidance has ended, the
                      unconditional call gets the conditional output instead
        decide        after time_projection: whether the step is computed, for both its calls
        forward_vace  calls VACE's own, on a computed step
        blocks        on a computed step calls the model's own blocks and keeps their residual, on
                      a skipped one adds a guess of it
    After the last call, before the VAE, all tensors are let go of.

    Wan2.2 begins with one model and goes on with another: the first step of each is computed, and
    nothing that was kept of the one is of use to the other.
    """

    def __init__(self, config: TeaCacheConfig):
        self.config, self.schedule = config, Schedule(config)
        self.measurements = Measurements(self.schedule)
        self.calls = 0  # of the models, so far
        # of the model that is sampling
        self.active: Originals | None = None
        self.residuals = Residuals()
        self.signal: Tensor | None = None  # of the step before
        # of the step
        self.step, self.computes = 0, True
        self.computing: ComputedStep | None = None
        self.output: list[Tensor] | None = None  # of the last call that ran
        # of the call
        self.branch = CONDITIONAL
        self.timestep: Tensor | None = None
        self.outer_timestep: Tensor | None = None  # as it reached FSDP, which may cast it
        self.blocks_were_called = False

    def forward(
        self, originals: Originals, x: list[Tensor], t: Tensor, *args: Any, **kwargs: Any
    ) -> list[Tensor]:
        """In place of a model's forward, and around it: stock, VACE's or that of Ulysses/ring.

        t: [1], or [1, tokens] as Wan2.2's ti2v has it.
        RuntimeError: calls that are not two a step, or of more steps than configured.
        """
        self.begin_call(originals, t if self.outer_timestep is None else self.outer_timestep)
        if self.branch == CONDITIONAL or self.config.is_guided(self.step):
            self.blocks_were_called = False
            self.output = originals.forward(x, t, *args, **kwargs)
            self.check_stand_ins()
        output = self.output  # without guidance the conditional one, for both branches
        if self.calls == 2 * self.config.steps:
            self.end_sampling()
        return output

    def check_stand_ins(self) -> None:
        """RuntimeError: a forward had its way without them."""
        if not self.blocks_were_called or len(self.schedule.decisions) != self.step + 1:
            raise RuntimeError(
                "TeaCache: this model's forward went past the stand-in for its blocks, so "
                "nothing would be skipped: wrap blocks, not the model, in torch.compile"
            )

    def note_timestep(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Forward pre-hook of FSDP's wrapper: its mixed precision casts the inputs of the model."""
        self.outer_timestep = kwargs["t"] if "t" in kwargs else args[1]

    def begin_call(self, originals: Originals, t: Tensor) -> None:
        """Count the call, and see whether it is the one that was expected."""
        self.step, self.branch = divmod(self.calls, 2)
        if self.step == self.config.steps:
            raise RuntimeError(
                f"TeaCache is set up for one video of {self.step} steps, and the pipeline takes "
                "more: make TeaCacheConfig.steps its sampling_steps, and enter teacache() for each"
            )
        if (
            self.branch == UNCONDITIONAL
            and t is not self.timestep
            and not torch.equal(t, self.timestep)
        ):
            raise RuntimeError(
                "TeaCache needs two calls of the model a step, with the prompt and then without; "
                "this pipeline's second call has another timestep: it is of a distilled model?"
            )
        if self.calls == 0:
            synchronize()  # the prompt's encoding is not sampling
            self.measurements.mark()
        self.calls, self.timestep = self.calls + 1, t
        if originals is not self.active:  # the first call of a model
            self.active, self.signal, self.residuals = originals, None, Residuals()

    def decide(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Forward hook of time_projection, which takes e to e0; both still as the model made them.

        e and e0 are [1, dim] and [1, 6 * dim], or [1, tokens, ...] in Wan2.2, of which the last
        token tells: the first ones may be of an image that is given, at timestep 0.
        It decides at the conditional call for both branches, with the one host synchronisation
        of a step. Among several processes rank 0 decides, with one more.
        """
        if self.branch == UNCONDITIONAL:
            return
        signal = output if self.config.mode == RETENTION else inputs[0]
        signal = signal.flatten(0, -2)[-1]
        scalars = [self.timestep.flatten()[-1].double()]
        if self.signal is not None:
            scalars.append(relative_l1(signal, self.signal).double())
        timestep, *distance = torch.stack(scalars).tolist()
        self.signal = signal.clone()  # a view would keep all tokens' alive
        decision = self.schedule.decide(timestep, distance[0] if distance else None)
        self.computes = as_rank_0(decision, self.timestep.device)
        self.schedule.overrule(self.computes)
        self.measurements.mark()

    def forward_vace(self, originals: Originals, *args: Any, **kwargs: Any) -> list[Tensor] | None:
        """In place of ``model.forward_vace``: its hints are for the blocks that are skipped."""
        return originals.forward_vace(*args, **kwargs) if self.computes else None

    def blocks(self, originals: Originals, h: Tensor, **kwargs: Any) -> Tensor:
        """In place of all blocks, h [1, tokens, dim] to B(h): computed, or h + residual.

        Out of place: under autocast h is bfloat16, B(h) and the residual are float32, and so the
        head gets float32 on every step.
        """
        self.blocks_were_called = True
        if self.computes:
            return self.compute(originals, h, **kwargs)
        reach = self.schedule.reach(bounded=True)
        return h + self.residuals.guess(self.branch, self.config.order, reach)

    def compute(self, originals: Originals, h: Tensor, **kwargs: Any) -> Tensor:
        """B(h), and what is to be remembered of it."""
        if self.branch == CONDITIONAL:
            # before the blocks need the memory; order 1 will need the newest as the older of two
            self.residuals.free_all_but(self.config.order)
            self.computing = ComputedStep(self.step, {}, {})
        out = h
        for block in originals.blocks:
            out = block(out, **kwargs)
        if self.config.thresh > 0:
            self.learn(h, out)
        return out

    def learn(self, h: Tensor, out: Tensor) -> None:
        """Keep a computed step's residual and, after skipped steps, hold the guesses against it."""
        every = math.ceil(h.size(1) / SAMPLE_TOKENS)
        self.computing.sampled[self.branch] = (out[:, ::every] - h[:, ::every]).float()
        self.computing.residuals[self.branch] = out - h
        is_last_call = self.branch == UNCONDITIONAL or not self.config.is_guided(self.step)
        if not is_last_call:
            return
        if self.residuals.newest_first and not self.schedule.decisions[self.step - 1].computed:
            errors = self.residuals.errors(self.computing, self.schedule.reach(bounded=True))
            self.measurements.unread.append((self.step, errors))
        self.residuals.add(self.computing, self.schedule.reach(bounded=False))

    def end_sampling(self) -> None:
        """Take the time, read what was measured, and let go of all tensors: the VAE is next."""
        synchronize()
        self.measurements.mark()
        self.measurements.read()
        self.release()

    def release(self) -> None:
        """Let go of models and tensors; decisions and what was measured stay."""
        self.residuals = Residuals()
        self.measurements.unread.clear()
        self.active = self.signal = self.computing = self.output = None
        self.timestep = self.outer_timestep = None

    def summary(self) -> str:
        """What was computed and measured, in a line."""
        return self.measurements.summary()


@contextmanager
def teacache(models: nn.Module | Sequence[nn.Module], config: TeaCacheConfig) -> Iterator[TeaCache]:
    """Let one ``generate`` of a Wan pipeline skip steps.

        config = TeaCacheConfig.from_row(ROWS["t2v-1.3B"], steps=50)
        with teacache(pipeline.model, config) as cache:
            video = pipeline.generate(prompt, size=(832, 480), sampling_steps=50)
        print(cache.summary())

    models: the pipeline's WanModel or VaceWanModel, or the FSDP wrapper of one; for Wan2.2's
        A14B both of its models. These instances only are touched, and left as they were, also
        after an error.
    Among several processes all must take the same steps, as Wan's own do.
    RuntimeError: a model is in use by another ``teacache``, takes more steps than configured, or
        is called otherwise than twice a step.
    """
    cache = TeaCache(config)
    with ExitStack() as stack:
        for model in [models] if isinstance(models, nn.Module) else models:
            inner = getattr(model, "module", model)
            if inner is not model:  # FSDP's wrapper
                hook = model.register_forward_pre_hook(cache.note_timestep, with_kwargs=True)
                stack.enter_context(hook)
            stack.enter_context(stand_ins(inner, cache))
        try:
            yield cache
            if cache.calls != 2 * config.steps:
                cache.end_sampling()
        finally:
            cache.release()
    if cache.calls != 2 * config.steps:
        log.warning(f"TeaCache: set up for {config.steps} steps, but saw {cache.calls / 2:g}")
    if cache.schedule.negative_steps:
        log.warning(
            f"TeaCache: negative increments at steps {ranges(cache.schedule.negative_steps)}: the "
            "coefficients are not made for these distances, and too many steps may be skipped"
        )


@contextmanager
def stand_ins(model: nn.Module, cache: TeaCache) -> Iterator[None]:
    """Put a cache in the way of one model's forward, blocks and forward_vace."""
    if "blocks" in vars(model):
        raise RuntimeError("this model is in use by another teacache(): leave that one first")
    originals = Originals(model.forward, model.blocks, getattr(model, "forward_vace", None))
    forward = functools.wraps(model.forward)(functools.partial(cache.forward, originals))
    blocks = (functools.partial(cache.blocks, originals),)  # one in place of all: called once
    forward_vace = functools.partial(cache.forward_vace, originals)
    hook = model.time_projection.register_forward_hook(cache.decide)
    with hook, shadow(model, forward=forward, blocks=blocks, forward_vace=forward_vace):
        yield


# ------------------------------------------------------------------------------------- attention
# Owns PyTorch's attention in flash-attn's place. Knows the names of Wan's modules.

# flash-attn 2 and 3: the compute capabilities that have kernels, from the first up to the second.
# On others they fail at the first block (Dao-AILab/flash-attention issue 1049, pull request 2593).
FLASH_ATTENTION = {
    "flash_attn": ((8, 0), (math.inf, 0)),
    "flash_attn_interface": ((9, 0), (10, 0)),
}


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    version: int | None = None,
) -> Tensor:
    """Wan's ``flash_attention`` by scaled_dot_product_attention, computed in v's dtype.

    q [B, Lq, N, C], k and v [B, Lk, N, C], k_lens [B] valid keys; [B, Lq, N, C] in q's dtype comes
    back. ``version``, of flash-attn, is ignored. NotImplementedError: a window; Wan has none.
    """
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError(f"window_size {window_size} needs flash-attn")
    mask = None
    if k_lens is not None:
        longest = int(k_lens.max())  # a mask would rule out the fast kernels: Wan has one sample
        k, v = k[:, :longest], v[:, :longest]
        if int(k_lens.min()) < longest:
            mask = torch.arange(longest, device=q.device) < k_lens.to(q.device)[:, None]
            mask = mask[:, None, None]  # [B, 1, 1, longest]
    heads_first = (heads.to(v.dtype).transpose(1, 2) for heads in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*heads_first, mask, dropout_p, causal)
    return out.transpose(1, 2).to(q.dtype)


def hide_unusable_flash_attention(capability: tuple[int, int] | None) -> list[str]:
    """Hide those of flash-attn 2 and 3 that cannot compute here from Wan's import; the others come
    back.

    capability: the GPU's compute capability; None without one. A package of another torch or CUDA
    can fail at import with any exception.
    """
    usable = []
    for name, (lowest, beyond) in FLASH_ATTENTION.items():
        with suppress(Exception):
            if capability is not None and lowest <= capability < beyond:
                importlib.import_module(name)
                usable.append(name)
        if name not in usable:  # Wan expects ModuleNotFoundError, which this makes of an import
            sys.modules[name] = None  # type: ignore[assignment]
    return usable


def install_attention(usable: Sequence[str]) -> None:
    """Give every module of Wan an attention that works here; call it after ``import wan``.

    usable: what ``hide_unusable_flash_attention`` gave, [] where there is no flash-attn.
    """
    if "flash_attn_interface" in usable:
        interface = sys.modules["flash_attn_interface"]
        varlen = interface.flash_attn_varlen_func

        @functools.wraps(varlen)
        def in_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            out = varlen(*args, **kwargs)  # a tensor from newer versions; Wan takes [0] of it
            return out if isinstance(out, tuple) else (out,)

        interface.flash_attn_varlen_func = in_tuple
    replaced = []
    for name, module in list(sys.modules.items()):
        if name.startswith("wan.") and hasattr(module, "flash_attention"):
            serves = {"flash_attn"} if name == "wan.modules.clip" else set(FLASH_ATTENTION)
            if serves.isdisjoint(usable):  # CLIP's calls ask for flash-attn 2
                module.flash_attention = sdpa_attention
                replaced.append(name)
    if replaced:
        where = " for CLIP" if replaced == ["wan.modules.clip"] else ""
        log.info(f"TeaCache: no usable flash-attn{where}: scaled_dot_product_attention instead")


# ------------------------------------------------------------------------------------------- Wan
# Owns what the script needs of a checkout of Wan2.1 or Wan2.2 (import, parser, timesteps, models
# of a pipeline, VAE, writers) and of a checkpoint (time embedding). Knows no jobs.

# What is wrong with a command


class Refused(Exception):
    """What is wrong with the command, found before any weight is loaded: a line each, exit 2."""

    def __init__(self, *messages: str):
        super().__init__(*(" ".join(message.split()) for message in messages))


def require(condition: Any, message: str) -> None:
    """Refuse the command unless the condition holds."""
    if not condition:
        raise Refused(message)


@contextmanager
def refusing(what: str, cure: str) -> Iterator[None]:
    """Refuse what cannot be read or written; each decoder and writer has its own exceptions."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise Refused(f"{what}: {reason.splitlines()[0][:200]}: {cure}") from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that objects in one line."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message.removeprefix('argument ')} (see --help)")


# What torchrun tells


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for its processes."""
    return int(os.getenv(name) or default)


def is_rank_0() -> bool:
    """Whether this process speaks and writes, of all that torchrun has started."""
    return environment("RANK", 0) == 0


# A checkout


@dataclass(frozen=True)
class Release:
    """What is named otherwise in Wan2.1 and in Wan2.2; told apart by the name of the writer.

    All other differences are seen where they matter: in the task's config, the parser's flags, the
    attributes of a pipeline or the modules that are there.
    """

    name: str
    video_writer: str  # of generate.py
    image_writer: str | None
    vaes: dict[str, str]  # how a config's vae_checkpoint begins: MODULE.CLASS in wan.modules
    no_cache: Sequence[str] = ()  # tasks that sample clip after clip, with other models


RELEASES = (
    Release("Wan2.1", "cache_video", "cache_image", {"Wan2.1_VAE": "vae.WanVAE"}),
    Release(
        "Wan2.2",
        "save_video",
        None,
        {"Wan2.1_VAE": "vae2_1.Wan2_1_VAE", "Wan2.2_VAE": "vae2_2.Wan2_2_VAE"},
        no_cache=("s2v-14B", "animate-14B"),
    ),
)


@dataclass(frozen=True)
class Kind:
    """What the tasks of one kind need, before a weight is loaded."""

    transformers: Sequence[str]  # the model_type of those that will do
    inputs: Sequence[str] = ()  # the flags whose files generate.py opens


KINDS = {  # by the first word of a task, such as t2v of t2v-14B
    "t2v": Kind(("t2v",)),
    "t2i": Kind(("t2v",)),
    "i2v": Kind(("i2v",), ("image",)),
    "flf2v": Kind(("flf2v", "i2v"), ("first_frame", "last_frame")),
    "vace": Kind(("vace",), ("src_video", "src_mask", "src_ref_images")),
    "ti2v": Kind(("ti2v",), ("image",)),
}
INPUTS = tuple(dict.fromkeys(flag for kind in KINDS.values() for flag in kind.inputs))


def kind_of(args: argparse.Namespace) -> str:
    return args.task.split("-")[0]


def makes_image(args: argparse.Namespace) -> bool:
    """Whether a task makes one image, not a video."""
    return kind_of(args) == "t2i"


class Wan:
    """A checkout of Wan2.1 or Wan2.2, imported.

    generate_py: its generate.py. release: what differs. What is slow to find out and the same for
    many videos is remembered here.
    """

    def __init__(self, generate_py: ModuleType, release: Release):
        self.generate_py, self.release = generate_py, release
        self.package = sys.modules["wan"]
        self.writers = [w for w in (release.video_writer, release.image_writer) if w]
        self.folder = Path(generate_py.__file__).parent
        self.known_distances: dict[tuple[Any, ...], list[float | None]] = {}
        self.good_targets = set[tuple[Path, str]]()  # folder and ending

    def task_config(self, task: str) -> dict[str, Any]:
        """The model's config of a task: sizes, names of files."""
        return self.generate_py.WAN_CONFIGS[task]

    def examples(self, task: str) -> dict[str, str]:
        """The prompt and inputs that generate.py takes where none are given."""
        return getattr(self.generate_py, "EXAMPLE_PROMPT", {}).get(task, {})

    def pipelines(self) -> dict[str, type]:
        """The pipeline classes that generate.py looks up in the package when it runs."""
        exported = vars(self.package).items()
        return {name: value for name, value in exported if hasattr(value, "generate")}

    def parse(self, argv: Sequence[str], whole: bool = True) -> argparse.Namespace:
        """generate.py's parser and assertions, with their objections in our form.

        whole: it is all of a command line; to a part of one its assertions do not apply.
        """
        our_argparse = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
        argv = [sys.argv[0], *argv]
        replaced = {"argparse": our_argparse}
        replaced |= {} if whole else {"_validate_args": lambda args: None}
        with shadow(self.generate_py, **replaced), shadow(sys, argv=argv):
            try:
                args = self.generate_py._parse_args()
            except AssertionError as error:
                what = "--ckpt_dir, --task, --size or --frame_num"
                raise Refused(f"{what}: {error} (see --help)") from error
        require(
            args.task not in self.release.no_cache,
            f"--task {args.task}: it samples clip after clip with other models, which TeaCache is "
            "not made for: run generate.py itself",
        )
        return args

    def vae(self, args: argparse.Namespace, device: torch.device) -> Any:
        """The VAE of a task alone."""
        file = self.task_config(args.task)["vae_checkpoint"]
        names = [name for start, name in self.release.vaes.items() if file.startswith(start)]
        module, vae_class = names[0].split(".")
        make = getattr(importlib.import_module(f"wan.modules.{module}"), vae_class)
        return make(vae_pth=str(Path(args.ckpt_dir) / file), device=device)

    def timesteps(self, args: argparse.Namespace) -> list[int]:
        """The timesteps of a run, by Wan's own schedulers."""
        solvers = importlib.import_module("wan.utils.fm_solvers")
        train = self.task_config(args.task)["num_train_timesteps"]
        common = {"num_train_timesteps": train, "shift": 1, "use_dynamic_shifting": False}
        if args.sample_solver != "unipc":
            scheduler = solvers.FlowDPMSolverMultistepScheduler(**common)
            sigmas = solvers.get_sampling_sigmas(args.sample_steps, args.sample_shift)
            return solvers.retrieve_timesteps(scheduler, device="cpu", sigmas=sigmas)[0].tolist()
        unipc = importlib.import_module("wan.utils.fm_solvers_unipc")
        scheduler = unipc.FlowUniPCMultistepScheduler(**common)
        scheduler.set_timesteps(args.sample_steps, device="cpu", shift=args.sample_shift)
        timesteps = scheduler.timesteps.tolist()
        require(
            timesteps[:1] != timesteps[1:2],
            f"--sample_steps {args.sample_steps} --sample_shift {args.sample_shift}: the first two "
            "timesteps are equal, with which unipc fails at the last step: fewer steps, or dpm++",
        )
        return timesteps


def ring_size(args: argparse.Namespace) -> int:
    """1 for Wan2.2, which has no ring."""
    return getattr(args, "ring_size", 1)


# The transformers of a task, and when they run


def models_of(pipeline: Any) -> list[nn.Module]:
    """The transformers of a pipeline, in the order in which they sample."""
    if hasattr(pipeline, "high_noise_model"):
        return [pipeline.high_noise_model, pipeline.low_noise_model]
    return [pipeline.model]


def transformer_folders(ckpt_dir: str, task_config: dict[str, Any]) -> list[Path]:
    """The folders of a checkpoint's transformers, in the order in which they sample."""
    names = [task_config.get(f"{noise}_noise_checkpoint") for noise in ("high", "low")]
    return [Path(ckpt_dir) / name for name in names if name] or [Path(ckpt_dir)]


def steps_of_first(timesteps: Sequence[float], task_config: dict[str, Any]) -> int:
    """How many steps the first transformer of a pipeline samples: all, where it has one only."""
    if "boundary" not in task_config:
        return len(timesteps)
    return sum(timestep >= task_config["boundary"] * TRAIN_TIMESTEPS for timestep in timesteps)


def count_guided_steps(
    scale: float | Sequence[float] | None, steps: int, of_first: int, until: float
) -> int | None:
    """On how many steps guidance needs the unconditional branch; None for all of them.

    scale: Wan's guide_scale, of Wan2.2's A14B a pair (low noise, high noise). At 1 the output of
        that branch is multiplied by 0, and it need not run; a scale of None never ends it.
    of_first: ``steps_of_first``, which are those of high noise.
    until: the share of the steps that is asked for.
    """
    low, high = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    if low != 1:
        guided = steps
    elif high != 1:
        guided = of_first
    else:
        guided = 0
    guided = min(guided, round(until * steps))
    return None if guided == steps else guided


# Importing it

PACKAGES = {"cv2": "opencv-python", "PIL": "pillow", "skimage": "scikit-image"}  # by other names


def import_wan(wan_repo: str | None, generates: bool) -> Wan:
    """Wan's generate.py, imported. Only to generate does it need and touch CUDA."""
    script = Path(__file__)
    folders = [Path(wan_repo)] if wan_repo else [script.parent, script.resolve().parent, Path.cwd()]
    found = [f for f in folders if (f / "generate.py").is_file() and (f / "wan").is_dir()]
    looked = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    require(
        found,
        f"--wan_repo {wan_repo or '(not given)'}: no generate.py beside a package wan in {looked}: "
        "git clone https://github.com/Wan-Video/Wan2.1 and copy this script into it",
    )
    sys.path.insert(0, str(found[0].resolve()))
    cuda = generates and torch.cuda.is_available()
    usable = hide_unusable_flash_attention(compute_capability() if cuda else None)
    no_gpu = {} if generates else {"current_device": lambda: 0}
    with shadow(torch.cuda, **no_gpu):  # wan/modules/t5.py asks for the device when imported
        try:
            generate_py = importlib.import_module("generate")
        except Exception as error:
            raise Refused(why_no_import(error, cuda_needed=generates and not cuda)) from error
    releases = [r for r in RELEASES if hasattr(generate_py, r.video_writer)]
    needed = ("_parse_args", "generate", "WAN_CONFIGS")
    missing = [name for name in needed if not hasattr(generate_py, name)]
    missing += [] if releases else [" or ".join(release.video_writer for release in RELEASES)]
    require(
        not missing,
        f"--wan_repo {found[0]}: its generate.py has no {', '.join(missing)}: it is not that of "
        "Wan2.1 or Wan2.2, or a fork too far from them",
    )
    if hasattr(generate_py, "_init_logging"):
        generate_py._init_logging(environment("RANK", 0))  # only rank 0 speaks
    install_attention(usable)
    return Wan(generate_py, releases[0])


def compute_capability() -> tuple[int, int]:
    """That of this process's GPU."""
    device, there = environment("LOCAL_RANK", 0), torch.cuda.device_count()
    processes = environment("LOCAL_WORLD_SIZE", 1)
    require(processes <= there, f"--nproc_per_node {processes}: must be {there} GPUs or fewer")
    require(
        device < there,
        f"LOCAL_RANK {device}: there are {there} GPUs: start by torchrun, or unset LOCAL_RANK",
    )
    return torch.cuda.get_device_capability(device)


def why_no_import(error: Exception, cuda_needed: bool) -> str:
    """What to do about an exception from importing Wan, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) < 400 else f"{reason[:200]} ... {reason[-200:]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if package == "wan":
            return f"Wan cannot be imported: {reason}: this checkout lacks it: clone it again"
        install = PACKAGES.get(package, package)
        return f"Wan cannot be imported: {reason}: pip install {install}"
    if "torchvision" in reason:
        cure = f"install the torchvision that was built for torch {torch.__version__}"
        return f"Wan cannot be imported: {reason}: {cure}"
    if cuda_needed and not isinstance(error, ImportError) and re.search("(?i)cuda|nvidia", reason):
        cure = f"see nvidia-smi, and whether torch {torch.__version__} is a CUDA build"
        return f"no CUDA device, and Wan needs one ({reason}): {cure}"
    cure = "install what its requirements.txt lists"
    return f"Wan cannot be imported: {type(error).__name__}: {reason}: {cure}"


# What the time embedding of a checkpoint says, for the plan


def read_json(file: Path) -> dict[str, Any]:
    with refusing(f"--ckpt_dir {file}: cannot be read", "download this file again"):
        return dict(json.loads(file.read_text(encoding="utf-8-sig")))


def tensor_files(folder: Path) -> dict[str | None, Path]:
    """The file of each of a transformer's tensors; {None: file} where one file has them all."""
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    for name in names:  # in the order in which from_pretrained looks
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = read_json(index)["weight_map"]
            return {tensor: folder / file for tensor, file in files.items()}
        if (folder / name).exists():
            return {None: folder / name}
    return {None: folder / names[0]}  # is not there: check_intact says so


def read_tensor(folder: Path, name: str) -> Any:
    """One tensor of a transformer, to be sliced: only an old pickle is read as a whole."""
    files = tensor_files(folder)
    file = files.get(name) or files.get(None)
    if file is None:
        raise KeyError(f"its index names no file for {name}")
    if file.suffix == ".safetensors":
        return safetensors.safe_open(file, "pt").get_slice(name)
    mmap = zipfile.is_zipfile(file)  # an older pickle cannot be mapped
    return torch.load(file, mmap=mmap, weights_only=True, map_location="cpu")[name]


def signal_distances(folder: Path, timesteps: Sequence[float], mode: str) -> list[float]:
    """The relative L1 distances of one transformer's signal, one less than timesteps."""

    def linear(x: Tensor, layer: str, outputs: slice = slice(None)) -> Tensor:
        weight, bias = (read_tensor(folder, f"{layer}.{n}")[outputs] for n in ("weight", "bias"))
        return nn.functional.linear(x, weight.float(), bias.float())

    sinusoid = sys.modules["wan.modules.model"].sinusoidal_embedding_1d
    freq_dim = read_tensor(folder, "time_embedding.0.weight")[:1].shape[1]
    hidden = linear(sinusoid(freq_dim, torch.tensor(timesteps)).float(), "time_embedding.0")
    e = linear(nn.functional.silu(hidden), "time_embedding.2")
    signals = [e]
    if mode == RETENTION:  # e0, one of its six parts at a time: for 14B it has 0.6 GB of weights
        dim, modulation = e.size(1), nn.functional.silu(e)
        sixths = (slice(i * dim, (i + 1) * dim) for i in range(6))
        signals = (linear(modulation, "time_projection.1", sixth) for sixth in sixths)
    change, size = 0.0, 0.0
    for values in signals:  # [timesteps, dim]
        change = change + values.diff(dim=0).abs().sum(1)
        size = size + values[:-1].abs().sum(1)
    return (change / size).tolist()


def distances_of(
    wan: Wan, args: argparse.Namespace, timesteps: Sequence[float], mode: str
) -> list[float | None]:
    """The distance of each step to the one before, read out of the weights; None at the first step
    of each transformer.

    mode: that of the config; "sigma" does without, and nothing is read.
    """
    key = (args.ckpt_dir, mode, *timesteps)
    if key not in wan.known_distances:
        task_config, distances = wan.task_config(args.task), []
        of_first = steps_of_first(timesteps, task_config)
        by_model = (timesteps[:of_first], timesteps[of_first:])  # of one model all are the first
        folders = transformer_folders(args.ckpt_dir, task_config)
        for folder, its_timesteps in zip(folders, by_model, strict=False):
            if its_timesteps and mode == SIGMA:
                distances += [None, *[math.nan] * (len(its_timesteps) - 1)]
            elif its_timesteps:
                with refusing(
                    f"--ckpt_dir {folder}: its time embedding cannot be read",
                    "download it again, or take --teacache_model sigma, which needs none",
                ):
                    distances += [None, *signal_distances(folder, its_timesteps, mode)]
        wan.known_distances[key] = distances
    return wan.known_distances[key]


# Writing, and reading back what was written


def write_video(wan: Wan, video: Tensor, file: str, fps: int, image: bool) -> None:
    """A video [3, F, H, W] in [-1, 1], or its one frame, by Wan's writer. OSError: not all."""
    options = {"nrow": 1, "normalize": True, "value_range": (-1, 1)}
    if image:
        write = getattr(wan.generate_py, wan.release.image_writer)
        checked(write, tensor=video.squeeze(1)[None], save_file=file, **options)
    else:
        write = getattr(wan.generate_py, wan.release.video_writer)
        checked(write, tensor=video[None], save_file=file, fps=fps, **options)


def checked(write: Callable, *args: Any, **kwargs: Any) -> str:
    """Call a writer of Wan, which hides its errors. OSError: the file does not hold the frames."""
    call = inspect.signature(write).bind(*args, **kwargs)
    if "retry" in inspect.signature(write).parameters:
        call.arguments["retry"] = 1  # Wan2.1's tells the reason of the last try only
    arguments = {**call.arguments, **call.kwargs}  # a fork's may take **kwargs
    tensor, file = arguments["tensor"], str(arguments["save_file"])
    with logged_and_printed() as printed:
        write(*call.args, **call.kwargs)
    try:
        check_written(file, tensor.size(2) if tensor.dim() == 5 else 1)
    except OSError as error:
        raise OSError(f"{error}: {why_not_written(file, printed.getvalue())}") from error
    return file


@contextmanager
def logged_and_printed() -> Iterator[io.StringIO]:
    """What is printed and logged meanwhile: Wan2.1's writer prints its error, Wan2.2's logs it."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(text):
            yield text
    finally:
        logging.getLogger().removeHandler(handler)


def why_not_written(file: str, printed: str) -> str:
    """The reason, as far as anybody tells it."""
    folder = Path(file).absolute().parent
    if folder.is_dir() and shutil.disk_usage(folder).free < 2**20:
        return "the disk is full (No space left on device)"
    try:
        if Path(file).exists():
            open(file, "ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error)
    return printed.strip() or "its writer gives no reason"


def check_written(file: str, frames: int) -> None:
    """OSError: the file does not hold the frames, since the disk was full, or ffmpeg failed."""
    try:
        image_format = Image.registered_extensions().get(Path(file).suffix.lower())
        if image_format not in (None, "MPEG"):  # of MPEG Pillow knows the name only
            with Image.open(file) as picture:
                found = sum(frame.load() is not None for frame in ImageSequence.Iterator(picture))
            found = frames if found else 0  # equal frames are merged into one
        else:
            with imageio.get_reader(file) as reader:
                found = sum(1 for _ in reader)
    except Exception as error:  # each decoder has its own
        raise OSError(f"{file} does not hold {frames} frames: {error!r:.200}") from error
    if found < frames:
        raise OSError(f"{file} does not hold {frames} frames, but {found}")


# ---------------------------------------------------------------------------------------- checks
# Owns what is looked at before a weight is loaded: numbers, checkpoint, inputs, target. Each check
# raises Refused with one line, and leaves nothing behind.


def check_numbers(wan: Wan, args: argparse.Namespace) -> None:
    """Numbers that the VAE, the sampler and the processes of torchrun can work with."""
    frames, processes = args.frame_num, environment("WORLD_SIZE", 1)
    below = max((frames - 1) // 4, 0) * 4 + 1
    require(frames == below, f"--frame_num {frames}: must be 4n+1, such as {below} or {below + 4}")
    pipeline = wan.pipelines().get(f"Wan{kind_of(args).upper()}")
    require(
        frames == 81 or not makes_81_frames_only(pipeline),
        f"--frame_num {frames}: must be 81 for {args.task}, as Wan2.1 has it",
    )
    steps, shift, scale = args.sample_steps, args.sample_shift, args.sample_guide_scale
    require(steps >= 1, f"--sample_steps {steps}: must be 1 or more, such as 50")
    require(0 < shift < math.inf, f"--sample_shift {shift}: must be positive, such as 5")
    require(np.isfinite(scale).all(), f"--sample_guide_scale {scale}: must be a number, as 5")
    require(args.base_seed < 2**63, f"--base_seed {args.base_seed}: must be under 2**63")
    require(
        processes > 1 or not (args.t5_fsdp or args.dit_fsdp),
        f"--t5_fsdp {args.t5_fsdp} --dit_fsdp {args.dit_fsdp}: must be started by "
        "torchrun --nproc_per_node=N, N above 1",
    )
    ulysses, ring = args.ulysses_size, ring_size(args)
    sizes = f"--ulysses_size {ulysses}"
    sizes += f" --ring_size {ring}" if hasattr(args, "ring_size") else ""
    require(
        ulysses * ring in (1, processes) and min(ulysses, ring) > 0,
        f"{sizes}: their product must be the number of processes, {processes} here; "
        f"torchrun --nproc_per_node={ulysses * ring}",
    )
    require(
        not uses_xfuser(args) or importlib.util.find_spec("xfuser"),
        f"{sizes}: No module named 'xfuser': pip install 'xfuser>=0.4.1'",
    )


def makes_81_frames_only(pipeline: type | None) -> bool:
    """Whether a pipeline's mask is of 81 frames, whatever it is asked for."""
    return pipeline is not None and "ones(1, 81" in inspect.getsource(pipeline.generate)


def uses_xfuser(args: argparse.Namespace) -> bool:
    """Whether the tokens are split over the processes by xfuser: Wan2.1 does, Wan2.2 does not."""
    split = args.ulysses_size * ring_size(args) > 1
    return split and importlib.util.find_spec("wan.distributed.xdit_context_parallel") is not None


def damage(file: Path) -> str | None:
    """What is wrong with a file of weights, by its size and its ends; None if nothing is seen."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(64)
        if size == 0:
            return "is empty: download this file again"
        if head.startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the file: run git lfs pull in its folder"
        if file.suffix == ".safetensors":
            header = int.from_bytes(head[:8], "little")
            if header > size:
                return "is cut short: download this file again"
            opened.seek(8)
            ends = [
                t["data_offsets"][1]
                for t in json.loads(opened.read(header)).values()
                if "data_offsets" in t
            ]
            expected = 8 + header + max(ends, default=0)
            if size != expected:
                return f"has {size:,} bytes of {expected:,}: download this file again"
        elif head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
            return "is cut short: download this file again"  # an older pickle has no such sign
        elif file.suffix in (".pth", ".bin") and head[:1] not in (b"P", b"\x80"):
            return "holds no weights, but perhaps an error's web page: download this file again"
    return None


def foreign_checkpoint(folder: Path, task_config: dict[str, Any]) -> str | None:
    """What a folder is that other code is for."""
    if (folder / "model_index.json").is_file():
        return "is a -Diffusers checkpoint: download the one of the same name without -Diffusers"
    if (folder / "high_noise_model").is_dir() and "high_noise_checkpoint" not in task_config:
        return "is a Wan2.2 A14B checkpoint: give its task, with --wan_repo a checkout of Wan2.2"
    if (folder / "Wan2.2_VAE.pth").is_file() and task_config["vae_checkpoint"] != "Wan2.2_VAE.pth":
        return "is a Wan2.2 5B checkpoint: give its task, with --wan_repo a checkout of Wan2.2"
    return None


def check_checkpoint(
    args: argparse.Namespace, task_config: dict[str, Any], all_files: bool
) -> None:
    """Every file that will be loaded is there and whole, and the transformer is the task's."""
    folder = Path(args.ckpt_dir)
    require(
        folder.is_dir(), f"--ckpt_dir {folder}: must be a folder with a checkpoint of {args.task}"
    )
    foreign = foreign_checkpoint(folder, task_config)
    require(not foreign, f"--ckpt_dir {folder}: {foreign}")
    for transformer in transformer_folders(args.ckpt_dir, task_config):
        check_transformer(args, transformer, task_config)
    if not all_files:
        return
    for key, name in task_config.items():  # the two keys with "noise" are folders of transformers
        if key.endswith(("_checkpoint", "_tokenizer")) and "noise" not in key:
            check_intact(args, folder / name)


def check_intact(args: argparse.Namespace, path: Path) -> None:
    """A file of weights, or a folder of a tokenizer, is there and whole."""
    what = f"--ckpt_dir {args.ckpt_dir}: {path.name}"
    require(path.exists(), f"{what} is missing, and --task {args.task} needs it: download it")
    files = [path]
    if path.is_dir():
        files = [f for f in path.iterdir() if not f.is_dir() and not f.name.startswith(".")]
    require(files, f"{what} is an empty folder: download it again")
    for file in files:
        with refusing(f"--ckpt_dir {args.ckpt_dir}: {file.name}", "download this file again"):
            fault = damage(file)
        require(not fault, f"--ckpt_dir {args.ckpt_dir}: {file.name} {fault}")


def check_transformer(args: argparse.Namespace, folder: Path, task_config: dict[str, Any]) -> None:
    """A transformer's files are there and whole, and it is of the task's kind and size."""
    what = f"--ckpt_dir {folder}: damaged, incomplete or not of --task {args.task}"
    with refusing(what, "download it again, or give the task or the folder that fits"):
        for file in [folder / "config.json", *sorted(set(tensor_files(folder).values()))]:
            check_intact(args, file)
        found = read_json(folder / "config.json")
        kind, model_type = KINDS.get(kind_of(args)), found.get("model_type")
        if kind and model_type and model_type not in kind.transformers:
            raise ValueError(f"a {model_type} transformer, not one of --task {args.task}")
        if found.get("dim") != task_config["dim"]:
            dims = f"dim {found.get('dim')}, that of --task {args.task} {task_config['dim']}"
            raise ValueError(f"its transformer has {dims} (1536 is 1.3B, 3072 5B, 5120 14B)")


def inputs_of(args: argparse.Namespace, examples: dict[str, str]) -> dict[str, str]:
    """The flags whose files generate.py will open, with their files."""
    kind = kind_of(args)
    takes_examples = kind != "vace" or args.prompt is None  # for what is not given
    found = {}
    for name in KINDS[kind].inputs if kind in KINDS else ():
        file = getattr(args, name, None)
        if file is None and takes_examples:
            file = examples.get(name)
        if file is not None:
            found[name] = file
    return found


def check_named(flag: str, file: str | None) -> None:
    require(
        file != "",
        f'--{flag} "": is empty, as of an unset shell variable: give a file or leave it out',
    )


def check_inputs(args: argparse.Namespace, examples: dict[str, str]) -> None:
    """Every image and video that generate.py will open is there and can be read."""
    if kind_of(args) == "flf2v":
        require(
            bool(args.first_frame) == bool(args.last_frame),
            "--first_frame, --last_frame: give both, or Wan2.1 takes its example for both",
        )
    for name in KINDS["vace"].inputs:
        value = getattr(args, name, None)
        require(
            value is None or args.prompt is not None or kind_of(args) != "vace",
            f"--{name} {value}: needs --prompt, or Wan2.1 takes its example instead",
        )
    for name, value in inputs_of(args, examples).items():
        for file in value.split(",") if name == "src_ref_images" else [value]:
            with refusing(f"--{name} {file}: cannot be read", "give a file that is there"):
                if name in ("src_video", "src_mask"):
                    video_reader(name)(file)[0]
                else:
                    Image.open(file).convert("RGB")


def video_reader(flag: str) -> Any:
    """What Wan2.1 reads videos with, and does not require."""
    try:
        return importlib.import_module("decord").VideoReader
    except ImportError as error:
        raise Refused(f"--{flag}: {error}: pip install decord") from error


def check_prompt_extension(wan: Wan, args: argparse.Namespace) -> None:
    """What a prompt expander needs is there, as far as can be told without loading it."""
    if not args.use_prompt_extend:
        return
    flags = f"--use_prompt_extend --prompt_extend_method {args.prompt_extend_method}"
    if args.prompt_extend_method == "dashscope":
        require(importlib.util.find_spec("dashscope"), f"{flags}: pip install dashscope")
        require(
            os.getenv("DASH_API_KEY"),
            f"{flags}: needs a key: export DASH_API_KEY=..., or --prompt_extend_method local_qwen",
        )
        return
    model = args.prompt_extend_model
    known = getattr(getattr(wan.generate_py, "QwenPromptExpander", None), "model_dict", {})
    is_hub_name = model and re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith(".")
    require(
        model is None or model in known or is_hub_name or Path(model).exists(),
        f"--prompt_extend_model {model}: is neither a folder nor one of {', '.join(known)}",
    )


def check_target(wan: Wan, args: argparse.Namespace) -> None:
    """Two frames, of an image one, go through Wan's own writer into the folder and with the ending
    asked for."""
    image, printed = makes_image(args), io.StringIO()
    target = Path(args.save_file).absolute()
    ending, cure = (".png", "") if image else (".mp4", "; have ffmpeg (pip install imageio-ffmpeg)")
    with (
        refusing(
            f"--save_file {target}: cannot be written",
            f"give a {ending} in a folder that is there{cure}",
        ),
        tempfile.TemporaryDirectory(dir=target.resolve().parent) as folder,
        redirect_stderr(io.StringIO()),
        redirect_stdout(printed),
    ):
        if target.is_dir() or not target.suffix:
            raise OSError("no file with an ending")
        if target.exists():
            target.open("r+b").close()
        if (target.parent, target.suffix) in wan.good_targets:
            return
        frames = torch.linspace(-1, 1, 2).view(1, 1, 2, 1, 1).expand(1, 3, 2, 64, 64)
        probe = f"{folder}/probe{target.suffix}"
        write_video(wan, frames[0, :, :1] if image else frames[0], probe, 16, image)
    wan.good_targets.add((target.parent, target.suffix))


# ------------------------------------------------------------------------------------------ jobs
# Owns runs of Wan's own generate(args), one or many with one pipeline: latents on disk before they
# are decoded, the table of a batch, the report. Knows what our flags have become, not how.


# A job, and what stops it


@dataclass
class Job:
    """One video to be made: generate.py's flags, and how TeaCache is set."""

    args: argparse.Namespace
    config: TeaCacheConfig
    row_text: str  # whose coefficients, and why
    planned: Schedule
    by_default: bool = False  # neither a threshold nor a speed-up was asked for
    # of a comparison
    compared_in: Path | None = None  # the target that its own files are named after
    label: str = ""
    noise: float = 0.0  # added to the latents that the model sees at the first step


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal that ends a process."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does. What was ignored (nohup) stays ignored."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(number)

    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n is not None}
    # None is one that Python did not set, and cannot put back
    ours = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


# Names, and latents on disk

LATENTS = ".latents.pt"  # the ending of latents that are kept


def numbered(path: Path) -> Iterator[Path]:
    """A path, and then the same with a number before its ending: x.mp4, x.2.mp4, x.3.mp4."""
    yield path
    ending = LATENTS if path.name.endswith(LATENTS) else path.suffix
    stem = path.name.removesuffix(ending)
    for i in itertools.count(2):
        yield path.with_name(f"{stem}.{i}{ending}")


def default_target(args: argparse.Namespace, prompt: str, mark: str) -> str:
    """A name for a video that says what it is of; ``mark`` tells it from others."""
    words = "_".join(re.findall(r"\w+", prompt))[:50]
    ending = ".png" if makes_image(args) else ".mp4"
    return f"{args.task}_{args.size.replace('*', 'x')}_{words}_{mark}{ending}"


def latents_path(target: Path) -> Path:
    return target.with_name(target.stem + LATENTS)


def write_ahead(latents: Sequence[Tensor], job: Job, fps: int) -> Path | None:
    """Put latents, and what it takes to make the video of them, on disk: beside the target, or in
    the folder for temporary files. None, and an error in the log, if neither can be written.

    Plain types only, for ``torch.load(weights_only=True)``.
    """
    target = Path(job.args.save_file).absolute()
    content = {
        "latents": [latent.detach().cpu() for latent in latents],
        "task": job.args.task,
        "ckpt_dir": str(Path(job.args.ckpt_dir).absolute()),
        "save_file": str(target),
        "fps": fps,
        "seed": job.args.base_seed,
        "prompt": job.args.prompt,
    }
    for folder in (target.parent, Path(tempfile.gettempdir())):
        try:
            return write_exclusively(content, latents_path(folder / target.name))
        except (OSError, RuntimeError) as error:
            log.error(f"TeaCache: latents cannot be kept in {folder}: {error}")
    return None


def write_exclusively(content: dict[str, Any], path: Path) -> Path:
    """torch.save under a name that nobody has: a second run gets another one."""
    for free in numbered(path):  # without an end
        try:
            file = free.open("xb")
        except FileExistsError:
            continue
        try:
            with file:
                torch.save(content, file)
        except BaseException:
            free.unlink()
            raise
        return free


def decode_command(wan: Wan, latents: Path) -> str:
    """The command line that makes a video of kept latents, quoted for this system's shell."""
    script = str(Path(__file__).absolute())
    flags = ["--wan_repo", str(wan.folder), "--teacache_decode", str(latents)]
    argv = [sys.executable, script, *flags]
    return subprocess.list2cmdline(argv) if os.name == "nt" else shlex.join(argv)


# One run of generate(args)


@contextmanager
def nudged(models: Sequence[nn.Module], std: float) -> Iterator[None]:
    """Noise on the latents that the model sees at the first step: on both branches and all ranks
    the same."""
    calls = itertools.count()

    def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if next(calls) >= 2:  # the first step has two
            return None
        generator = torch.Generator().manual_seed(0)
        latents = [x + std * torch.randn(x.shape, generator=generator).to(x) for x in args[0]]
        return (latents, *args[1:])

    with ExitStack() as stack:
        for model in models if std > 0 else ():
            stack.enter_context(model.register_forward_pre_hook(add))
        yield


class Run:
    """One run of generate(args): what stands in place of Wan's steps, and what was measured."""

    def __init__(self, wan: Wan, job: Job, keep_frames: bool = False):
        self.wan, self.job, self.keep_frames = wan, job, keep_frames
        self.cache: TeaCache | None = None
        self.frames: np.ndarray | None = None  # uint8 [F, H, W, 3], if they are kept
        self.latents: Path | None = None
        self.seconds: dict[str, float] = {}  # by phase
        self.failure: Exception | None = None
        self.status = "started"

    def sample(self, pipeline: Any, generate: Callable, *args: Any, **kwargs: Any) -> Tensor | None:
        """In place of a pipeline's ``generate``, and around it."""
        models, job = models_of(pipeline), self.job
        decode = functools.partial(self.decode, pipeline.vae.decode)
        began = time.perf_counter()
        with (
            nudged(models, job.noise),
            teacache(models, job.config) as self.cache,
            shadow(pipeline.vae, decode=decode),
        ):
            video = generate(*args, **kwargs)
        measurements = self.cache.measurements
        if measurements.times:
            self.seconds["encode"] = measurements.times[0] - began
            self.seconds["sampling"] = measurements.seconds
        if job.config.thresh > 0 or not job.label:  # of stock, in a comparison, there is no news
            log.info(self.cache.summary())
        planned, taken = job.planned, self.cache.schedule
        if planned.computed_steps != taken.computed_steps:
            log.warning(
                f"TeaCache: planned were {len(planned.computed_steps)} steps, {planned.marks()}, "
                f"and computed {len(taken.computed_steps)}, {taken.marks()}"
            )
        return video

    def decode(self, decode: Callable, latents: list[Tensor], *args: Any) -> list[Tensor]:
        """In place of ``vae.decode``, on rank 0. A failure waits until the ranks are together."""
        synchronize()
        began = time.perf_counter()
        try:
            fps = self.wan.task_config(self.job.args.task)["sample_fps"]
            self.latents = write_ahead(latents, self.job, fps)
            if not all(latent.isfinite().all() for latent in latents):
                raise FloatingPointError("the latents are not finite: a video of them is black")
            video = decode(latents, *args)
            synchronize()
            if self.keep_frames:
                self.frames = to_bytes(video[0])
            return video
        except Exception as error:
            self.failure = error
            # at once, since Wan goes on to say that it saves a video
            log.error(f"TeaCache: not decoded: {error}")
            return [torch.zeros(3, 1, 16, 16)]
        finally:
            self.seconds["decode"] = time.perf_counter() - began

    def write(self, write: Callable, *args: Any, **kwargs: Any) -> str | None:
        """In place of Wan's writer, on rank 0: the file is read back, then the latents go."""
        if self.failure:
            return None
        began = time.perf_counter()
        try:
            file = checked(write, *args, **kwargs)
        except Exception as error:
            self.failure = error
            return None
        finally:
            self.seconds[write.__name__] = time.perf_counter() - began
        if self.latents:
            self.latents.unlink(missing_ok=True)
            self.latents = None
        return file

    def explain(self, error: BaseException) -> None:
        """Say what went wrong, and how to go on."""
        log.error(f"TeaCache: {self.job.args.save_file}: failed: {error!r}")
        if self.latents and self.latents.is_file():
            how = f"this makes the video of them:\n{decode_command(self.wan, self.latents)}"
            if isinstance(error, FloatingPointError):
                how = "no video can be made of them, but what went wrong can be looked for"
            log.error(f"TeaCache: its latents are in {self.latents}; {how}")

    def report(self) -> dict[str, Any]:
        """All that is known, as far as the run came."""
        job, cache = self.job, self.cache
        report = {
            "status": self.status,
            "file": job.args.save_file,
            "settings": vars(job.args),
            "row": job.row_text,
            "config": asdict(job.config),
            "seconds": self.seconds,
            "latents": str(self.latents) if self.latents else None,
        }
        if job.label:
            report["label"] = job.label
        if cache and cache.measurements.times:
            schedule, measurements = cache.schedule, cache.measurements
            drifts = {drift.step: drift_report(drift.by_order) for drift in measurements.drifts}
            report["computed"] = schedule.computed_steps
            report["passes"] = schedule.passes
            report["drift"] = drift_report([measurements.drift(0), measurements.drift(1)])
            report["speedup"] = measurements.speedup if self.status == "finished" else None
            report["steps"] = [
                {**asdict(decision), "drift": drifts.get(step)}
                for step, decision in enumerate(schedule.decisions)
            ]
        return report


def drift_report(by_order: Sequence[float | None]) -> dict[str, float | None]:
    return {f"order {order}": drift for order, drift in enumerate(by_order)}


def to_bytes(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3] in the CPU's memory, as Wan's writer does."""
    levels = (video.cpu().clamp(-1, 1) + 1) / 2 * 255
    return levels.byte().permute(1, 2, 3, 0).numpy()


# Many runs, with one pipeline


def once(make: Callable) -> Callable:
    """A function whose first result is that of all its calls."""
    results: list[Any] = []

    @functools.wraps(make)
    def first_result(*args: Any, **kwargs: Any) -> Any:
        if not results:
            results.append(make(*args, **kwargs))
        return results[0]

    return first_result


class Session:
    """Runs in this process, with one pipeline, one process group and one prompt expander.

    report: a file that says what is known, from the beginning on. flags: ours, for the report.
    """

    def __init__(self, wan: Wan, report: str | None, flags: dict[str, Any]):
        self.wan, self.flags = wan, flags
        self.report_file = Path(report) if report and is_rank_0() else None
        self.runs = list[Run]()
        self.videos = 1  # that this command is to make
        self.pipelines = {name: once(kind) for name, kind in wan.pipelines().items()}
        self.load_began = False  # from then on a failure is not the command's
        self.all_written = True  # the comparisons

    @contextmanager
    def opened(self, with_xfuser: bool) -> Iterator[None]:
        """Around all runs: what each generate(args) would make anew is made once, and its process
        group lives until the last one is over."""

        def only_once(module: ModuleType, *names: str) -> None:
            makers = {name: once(getattr(module, name)) for name in names if hasattr(module, name)}
            stack.enter_context(shadow(module, **makers))

        with ExitStack() as stack:
            only_once(self.wan.generate_py, "DashScopePromptExpander", "QwenPromptExpander")
            only_once(dist, "init_process_group")
            stack.enter_context(shadow(dist, destroy_process_group=lambda *args: None))
            if with_xfuser:
                xfuser = importlib.import_module("xfuser.core.distributed")
                only_once(xfuser, "init_distributed_environment", "initialize_model_parallel")
            yield
        if dist.is_available() and dist.is_initialized():  # after an error the process ends with it
            dist.destroy_process_group()

    def pipeline(self, name: str, run: Run, *args: Any, **kwargs: Any) -> Any:
        """In place of a pipeline class: the one that is there, or a new one."""
        self.load_began = True
        pipeline = self.pipelines[name](*args, **kwargs)
        generate = functools.partial(type(pipeline).generate, pipeline)
        pipeline.generate = functools.partial(run.sample, pipeline, generate)
        return pipeline

    def make(self, job: Job, keep_frames: bool = False) -> Run:
        """One video. Whatever goes wrong is raised: what fails in decoder or writer, when all ranks
        are past it."""
        run = Run(self.wan, job, keep_frames)
        self.runs.append(run)
        generate_py = self.wan.generate_py
        pipelines = {n: functools.partial(self.pipeline, n, run) for n in self.pipelines}
        writers = {n: self.writer(run, getattr(generate_py, n)) for n in self.wan.writers}
        try:
            with shadow(self.wan.package, **pipelines), shadow(generate_py, **writers):
                generate_py.generate(job.args)
            if run.failure:
                raise run.failure
            if run.cache is None or run.cache.calls == 0:
                raise RuntimeError("no model of this Wan's pipelines was run with TeaCache")
            run.status = "finished"
        except BaseException as error:
            # after a failure of the decoder Wan went on with a frame in place of the video
            cause = run.failure if run.failure and isinstance(error, Exception) else error
            run.status = f"failed: {cause!r}"
            if isinstance(error, (AssertionError, ValueError)) and not self.load_began:
                raise Refused(f"{type(error).__name__}: {error} (see --help)") from error
            run.explain(cause)
            raise
        finally:
            self.write_report()
        return run

    @staticmethod
    def writer(run: Run, write: Callable) -> Callable:
        return functools.wraps(write)(functools.partial(run.write, write))

    def make_all(self, jobs: Sequence[Job]) -> None:
        """One video after the other, and the table of them."""
        self.videos = len(jobs)
        if not jobs:  # all videos are there: the report is of none
            self.write_report()
        for job in jobs:
            self.attempt(job)
        if len(jobs) > 1:
            for text in batch_table(self.runs):
                log.info(text)

    def attempt(self, job: Job, keep_frames: bool = False) -> Run:
        """One video. Its failure is said, and is in the run's status; it is raised where it may
        have left the other ranks somewhere else."""
        if self.videos > 1:
            log.info(f"TeaCache: {self.progress()}: {job.args.save_file}")
        try:
            self.make(job, keep_frames)
        except Exception as error:
            in_step = error is self.runs[-1].failure  # of decoder or writer: all ranks are past it
            if isinstance(error, Refused) or (across_ranks() and not in_step):
                raise
            log.error("TeaCache: here is where:", exc_info=self.runs[-1].failure or error)
        self.runs[-1].failure = None  # it holds on to the tensors of where it was raised
        gc.collect()
        torch.cuda.empty_cache()
        return self.runs[-1]

    @property
    def failed(self) -> list[Run]:
        return [run for run in self.runs if run.status != "finished"]

    def progress(self) -> str:
        """Which video is next, and how long all that are left will take, by those before them."""
        seconds = [sum(run.seconds.values()) for run in self.runs if run.status == "finished"]
        number, to_go = len(self.runs) + 1, ""
        if seconds:  # without the load, which was once
            minutes = np.mean(seconds) * (self.videos - len(self.runs)) / 60
            to_go = f", about {math.ceil(minutes)} min to go"
        return f"video {number} of {self.videos}{to_go}"

    def write_report(self) -> None:
        """For --teacache_report; what cannot be written is said, and hides nothing."""
        if not self.report_file:
            return
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        common = {
            "flags": self.flags,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "versions": {"python": sys.version, "torch": torch.__version__},
        }
        reports = [run.report() for run in self.runs]
        content = {**common, "videos": reports}
        if self.videos == 1 and reports:
            content |= reports[0]
        try:
            self.report_file.write_text(json.dumps(content, indent=1, default=str))
        except OSError as error:
            log.error(f"TeaCache: --teacache_report {self.report_file}: {error}")


def batch_table(runs: Sequence[Run]) -> list[str]:
    """What a batch made, a line a video."""
    lines = ["TeaCache: computed  sampling  speed-up   drift  file"]
    for run in runs:
        cache = run.cache
        if run.status != "finished" or not cache:
            lines.append(f"TeaCache: {run.status[:36]:>36}  {run.job.args.save_file}")
            continue
        measurements = cache.measurements
        drift = measurements.drift(cache.config.order)
        lines.append(
            f"TeaCache: {len(cache.schedule.computed_steps):5}/{len(cache.schedule.decisions):<2}  "
            f"{measurements.seconds:6.1f} s  {measurements.speedup:7.2f}x  "
            f"{percent(drift) if drift is not None else '':>6}  {run.job.args.save_file}"
        )
    return lines


# ------------------------------------------------------------------------------------ comparison
# Owns the videos of one prompt and seed side by side (stock, stock with a little noise, and each
# setting asked for), their pictures and their table.

NOISE_STD = 1e-4
STOCK, NOISE = "stock", "noise 1e-4"  # the labels of the first two


@dataclass(frozen=True)
class Outcome:
    """What came of one job of a comparison: its video, held against stock's."""

    label: str
    computed: int
    steps: int
    seconds: float  # of the sampling
    speedup: float
    drift: float | None
    psnr: float  # dB; infinite where the frames are equal
    ssim: float | None  # None without scikit-image

    @property
    def texts(self) -> list[str]:
        """What stands over it in a picture."""
        fidelity = "" if self.label == STOCK else f"{self.psnr:.1f} dB"
        return [self.label, f"{self.seconds:.1f} s    {self.speedup:.2f}x", fidelity]


def psnr(frames: np.ndarray, stock: np.ndarray) -> float:
    """Of two videos, uint8 [F, H, W, 3], in dB."""
    pairs = zip(torch.from_numpy(frames), torch.from_numpy(stock), strict=True)
    mean_square = float(np.mean([(a.double() - b.double()).square().mean() for a, b in pairs]))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def ssim(frames: np.ndarray, stock: np.ndarray) -> float | None:
    """The mean over the frames, by scikit-image, where it can be imported."""
    try:
        similarity = importlib.import_module("skimage.metrics").structural_similarity
    except Exception:  # one that was built for another numpy has its own
        return None
    pairs = zip(frames, stock, strict=True)
    return float(np.mean([similarity(a, b, channel_axis=2, data_range=255) for a, b in pairs]))


def compare(session: Session, jobs: Sequence[Job]) -> list[Outcome]:
    """Run the jobs of one prompt and seed, the first of them stock; write what compares them.
    Without stock's video there is nothing to compare with, and the others are not made."""
    outcomes, shown, stock = [], [], None
    for job in jobs:
        run = session.attempt(job, keep_frames=True)
        cache, video, run.frames = run.cache, run.frames, None
        if job is jobs[0]:
            stock = video
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if not as_rank_0(run.status == "finished", device):
                session.videos -= len(jobs) - 1
                break
        if video is None or run.status != "finished":  # None on all ranks but 0
            continue
        shown.append(shrunk(video))
        outcomes.append(
            Outcome(
                label=job.label,
                computed=len(cache.schedule.computed_steps),
                steps=len(cache.schedule.decisions),
                seconds=cache.measurements.seconds,
                speedup=1.0,
                drift=cache.measurements.drift(job.config.order),
                psnr=psnr(video, stock),
                ssim=ssim(video, stock),
            )
        )
    # the first run warms up, so that the faster of the two is stock's time
    stock_seconds = [one.seconds for one in outcomes if one.label in (STOCK, NOISE)]
    outcomes = [replace(one, speedup=min(stock_seconds) / one.seconds) for one in outcomes]
    if shown:
        target, task = jobs[0].compared_in, jobs[0].args.task
        try:
            write_comparison(outcomes, shown, target, session.wan.task_config(task)["sample_fps"])
        except Exception as error:  # the videos are there, and other lines may wait
            session.all_written = False
            log.error(f"TeaCache: the comparison of {target} is not written: {error}")
    return outcomes


def write_comparison(
    outcomes: Sequence[Outcome], videos: Sequence[np.ndarray], target: Path, fps: int
) -> None:
    """NAME.compare.mp4, all side by side; .png, a strip of frames; .json, the table.

    videos: uint8 [F, H, W, 3] of even sides, as ``shrunk`` makes them.
    """
    length, _, width, _ = videos[0].shape
    files = {e: target.with_name(f"{target.stem}.compare.{e}") for e in ("mp4", "png", "json")}
    if length > 1:
        head = np.hstack([heading(one.texts, width) for one in outcomes])
        with imageio.get_writer(files["mp4"], fps=fps, macro_block_size=2) as writer:
            for frames in zip(*videos, strict=True):
                writer.append_data(np.vstack([head, np.hstack(frames)]))
        check_written(str(files["mp4"]), length)
    moments = np.linspace(0, length - 1, min(6, length)).round().astype(int)
    Image.fromarray(strip(outcomes, videos, moments)).save(files["png"])
    # JSON has no infinity
    entries = [asdict(o) | {"psnr": o.psnr if o.psnr < math.inf else None} for o in outcomes]
    files["json"].write_text(json.dumps(entries, indent=1))
    log.info(f"TeaCache: side by side in {', '.join(str(f) for f in files.values() if f.exists())}")


def shrunk(video: np.ndarray) -> np.ndarray:
    """Frames [F, H, W, 3] at a width of 480 pixels or, if they are small, four times their own; of
    even sides."""
    height, width = video.shape[1:3]
    size = [2 * round(side * 240 / max(width, 120)) for side in (width, height)]
    return np.stack([Image.fromarray(frame).resize(size) for frame in video])


def heading(texts: Sequence[str], width: int) -> np.ndarray:
    """A line of text each, black on white, in letters that fit the width."""
    head = Image.new("RGB", (width, 28 * len(texts)), "white")
    draw = ImageDraw.Draw(head)
    longest = max(draw.textlength(text, font_size=20) for text in texts)
    for i, text in enumerate(texts):
        draw.text((8, 2 + 26 * i), text, "black", font_size=min(20, 20 * (width - 16) / longest))
    return np.asarray(head)


def strip(
    outcomes: Sequence[Outcome], videos: Sequence[np.ndarray], moments: Sequence[int]
) -> np.ndarray:
    """One video above the other, a column a moment, and over each which it is."""
    pictures = []
    for outcome, video in zip(outcomes, videos, strict=True):
        frames = np.hstack([video[moment] for moment in moments])
        pictures += [heading(["    ".join(outcome.texts).rstrip()], frames.shape[1]), frames]
    return np.vstack(pictures)


def comparison_table(by_line: Sequence[Sequence[Outcome]]) -> list[str]:
    """The mean over the lines of the jobs file; of several, with the standard deviation."""
    by_label: dict[str, list[Outcome]] = {}
    for outcomes in by_line:
        for outcome in outcomes:
            by_label.setdefault(outcome.label, []).append(outcome)
    with_ssim = by_line[0][0].ssim is not None
    head = ["", "computed", "sampling", "speed-up", "drift", "PSNR", "SSIM"]
    cells = [head, *(comparison_cells(outcomes) for outcomes in by_label.values())]
    if not with_ssim:
        cells = [texts[:-1] for texts in cells]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = []
    for label, *others in cells:
        aligned = [text.rjust(width) for text, width in zip(others, wide[1:], strict=True)]
        table.append("  ".join([label.ljust(wide[0]), *aligned]))
    table.append(what_is_at_the_floor(by_line))
    if not with_ssim:
        table.append("for the SSIM: pip install scikit-image")
    return table


def what_is_at_the_floor(by_line: Sequence[Sequence[Outcome]]) -> str:
    """Which entries are as near to stock as its video with noise is, in the mean over the lines."""
    floors, margins = [], dict[str, list[float]]()
    for outcomes in by_line:
        for floor in [one.psnr for one in outcomes if one.label == NOISE]:
            floors.append(floor)
            for one in outcomes:
                margin = 0.0 if one.psnr == floor else one.psnr - floor  # both may be infinite
                margins.setdefault(one.label, []).append(margin)
    if not floors:
        return "no floor: stock with noise of 1e-4 has failed"
    entries = [label for label in margins if label not in (STOCK, NOISE)]
    reached = [label for label in entries if np.mean(margins[label]) >= 0]
    return (
        f"the floor, stock with noise of 1e-4: {np.mean(floors):.1f} dB; at it or above: "
        f"{', '.join(reached) or 'none'}"
    )


def comparison_cells(outcomes: Sequence[Outcome]) -> list[str]:
    """What the table says of one label."""

    def mean(values: Sequence[float | None], digits: int, unit: str = "") -> str:
        known = [value for value in values if value is not None]
        if not known:
            return ""
        spread = len(known) > 1 and np.isfinite(known).all()
        deviation = f" ± {np.std(known):.{digits}f}" if spread else ""
        return f"{np.mean(known):.{digits}f}{deviation}{unit}"

    computed, steps = np.mean([(o.computed, o.steps) for o in outcomes], axis=0)
    return [
        outcomes[0].label,
        f"{computed:.0f}/{steps:.0f}",
        mean([o.seconds for o in outcomes], 1, " s"),
        mean([o.speedup for o in outcomes], 2, "x"),
        mean([o.drift and 100 * o.drift for o in outcomes], 1, " %"),
        mean([o.psnr for o in outcomes], 1),
        mean([o.ssim for o in outcomes], 3),
    ]


# ---------------------------------------------------------------------------------- command line
# Owns our flags, what becomes of them, and main. Everywhere here ``own`` are our flags and ``args``
# are generate.py's.

# fmt: off
FOR_ALL_LINES = (  # what the loaded model depends on
    "task", "ckpt_dir", "ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp", "t5_cpu",
    "convert_model_dtype", "prompt_extend_method", "prompt_extend_model",
)
# fmt: on
HOW_MUCH = ("teacache_thresh", "teacache_speedup")  # either
WHOSE = ("teacache_model", "teacache_coefficients")  # either
OF_A_LINE = (*HOW_MUCH, *WHOSE, "use_ret_steps", "teacache_order", "teacache_guide_until")


# Our flags


def at_least(low: float, allowed: str, high: float = math.inf) -> Callable[[str], float]:
    """The type of a flag: a finite number from ``low`` to ``high``."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text} must be {allowed}")

    return number


def own_parser() -> Parser:
    """The flags that generate.py does not have."""
    parser = Parser(allow_abbrev=False, add_help=False, description="TeaCache for generate.py")
    schedule = parser.add_argument_group("which steps are computed")
    how_much = schedule.add_mutually_exclusive_group().add_argument
    thresh, speedup = at_least(0, "0 (off) or more, such as 0.08"), at_least(1, "1 or more, as 2.0")
    how_much("--teacache_thresh", type=thresh, metavar="X", help="higher is faster, 0 is off")
    how_much("--teacache_speedup", type=speedup, metavar="X", help="or: a threshold that gives X")
    whose = schedule.add_mutually_exclusive_group().add_argument
    rows = (SIGMA, *ROWS)
    whose("--teacache_model", choices=rows, help="row of coefficients; default: as the task")
    whose("--teacache_coefficients", metavar="FILE", help="default: teacache.json in --ckpt_dir")
    add = schedule.add_argument
    add("--use_ret_steps", action="store_true", help="compare e0, always compute the first 5 steps")
    skipped = parser.add_argument_group("what the other steps do").add_argument
    orders = {"type": int, "nargs": "+", "choices": (0, 1), "metavar": "0|1"}
    skipped("--teacache_order", **orders, help="1: extrapolate residuals; default: 0")
    share = at_least(0, "from 0 to 1, such as 0.6", high=1)
    guide = "SHARE of the steps, the first ones, that are guided; default: 1"
    skipped("--teacache_guide_until", type=share, metavar="SHARE", help=guide)
    instead = parser.add_argument_group("instead of one video").add_mutually_exclusive_group()
    add = instead.add_argument
    add("--teacache_plan", action="store_true", help="print what thresholds do, and no more")
    entry = "stock, and each entry, such as 0.08, 2x or sigma:2x"
    add("--teacache_compare", nargs="+", metavar="ENTRY", help=entry)
    add("--teacache_decode", metavar="FILE", help="make the video of kept latents")
    add = parser.add_argument_group("files").add_argument
    add("--teacache_jobs", metavar="FILE", help="a video a line, each with its flags")
    add("--teacache_report", metavar="FILE", help="write what was decided and measured, as JSON")
    add("--wan_repo", metavar="DIR", help="Wan; default: this script's folder, else the current")
    return parser


# Whose coefficients


@dataclass(frozen=True)
class Choice:
    """Whose coefficients a run uses."""

    row: Row | None
    name: str
    why: str
    insisted: bool = False  # by --teacache_model: what would be refused is only warned of

    @property
    def text(self) -> str:
        return f"row {self.name} ({self.why})"


def choose_row(own: argparse.Namespace, args: argparse.Namespace) -> Choice:
    """As asked, the checkpoint's teacache.json, the task's published row, or "sigma"."""
    name, file = own.teacache_model, Path(args.ckpt_dir) / "teacache.json"
    if name:
        return Choice(ROWS.get(name), name, "as asked", insisted=True)
    if own.teacache_coefficients or file.is_file():
        file = Path(own.teacache_coefficients or file)
        return Choice(read_coefficients(file), file.name, f"of {file.absolute().parent.name}")
    rows = [name for name, row in ROWS.items() if args.task in row.tasks]
    if not rows:
        return Choice(None, SIGMA, f"nobody has fitted {args.task}")
    if len(rows) == 1:
        return Choice(ROWS[rows[0]], rows[0], f"task {args.task}")
    return choose_among(rows, args)


def choose_among(rows: Sequence[str], args: argparse.Namespace) -> Choice:
    """Of rows that are named for a size, such as i2v-14B-480P and -720P: by the name that the
    checkpoint was downloaded as, else by the size of the video."""
    by_size = {row.split("-")[-1].lower(): row for row in rows}
    for name in download_names(Path(args.ckpt_dir)):
        sizes = by_size.keys() & set(re.split("[^0-9a-z]+", name.lower()))
        if len(sizes) == 1:
            row = by_size[sizes.pop()]
            return Choice(ROWS[row], row, f"checkpoint {name}")
    size = "480p" if args.size in ("832*480", "480*832") else "720p"
    require(
        size in by_size,
        f"--task {args.task}: {' and '.join(rows)} are for it: name one by --teacache_model",
    )
    row = by_size[size]
    why = f"a guess from the size {args.size}: name it by --teacache_model"
    return Choice(ROWS[row], row, why)


def download_names(folder: Path) -> list[str]:
    """The names that may tell what a checkpoint folder holds: that of the folder itself, then those
    of the links to it, the last one first; for a hub's cache (NAME/snapshots/COMMIT) that above it
    too. No parents."""
    names, paths = [], [folder.absolute()]
    while paths[0].is_symlink():
        paths.insert(0, paths[0].parent / paths[0].readlink())
    for path in (folder.resolve(), *paths):
        names.append(path.name)
        if path.parent.name == "snapshots":
            names.append(path.parent.parent.name)
    return names


def read_coefficients(file: Path) -> Row:
    """A Row as JSON: {"steps", "shift", "solver", "plain": {"coefficients", "thresholds"},
    "retention": the same}."""
    cure = "give one as the README has it, or --teacache_model sigma"
    with refusing(f"--teacache_coefficients {file}: cannot be used", cure):
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        modes = {}
        for mode in (PLAIN, RETENTION):
            modes[mode] = Polynomial(**content.pop(mode))
            lists = {"coefficients": 5, "thresholds": None}
            for name, length in lists.items():
                values = getattr(modes[mode], name)
                if not values or length not in (None, len(values)):
                    raise ValueError(f"{mode}: {name} must be {length or 'some'} numbers")
                if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                    raise ValueError(f"{mode}: {name} must be finite numbers")
            if min(modes[mode].thresholds) < 0:
                raise ValueError(f"{mode}: a threshold is below 0")
        row = Row(**modes, **content)
        if not (isinstance(row.steps, int) and isinstance(row.shift, (int, float))):
            raise ValueError("steps and shift must be numbers")
        if not isinstance(row.solver, str):
            raise ValueError("solver must be a name")
        return row


# From flags to the settings of a run, and its plan


@dataclass(frozen=True)
class Outlook:
    """What the policy needs to know of a run, before a weight is loaded."""

    choice: Choice
    timesteps: Sequence[float]
    distances: Sequence[float | None]

    def plan(self, config: TeaCacheConfig) -> Schedule:
        return plan(config, self.timesteps, self.distances)

    def plan_speedup(self, config: TeaCacheConfig, speedup: float) -> Schedule:
        return plan_speedup(config, self.timesteps, self.distances, speedup)


def look_ahead(wan: Wan, own: argparse.Namespace, args: argparse.Namespace) -> Outlook:
    """The row of a run, its timesteps and, out of the weights, its distances."""
    choice, timesteps = choose_row(own, args), wan.timesteps(args)
    require(
        not (own.use_ret_steps and choice.row is None),
        f"--use_ret_steps: is not for {choice.text}: leave it out, or give --teacache_model, one "
        f"of {', '.join(ROWS)}",
    )
    mode = mode_of(choice.row, own.use_ret_steps)
    return Outlook(choice, timesteps, distances_of(wan, args, timesteps, mode))


def job_of(wan: Wan, own: argparse.Namespace, args: argparse.Namespace, outlook: Outlook) -> Job:
    """The settings of a run and its plan. Refused: they are no good."""
    config = config_of(wan, own, args, outlook)
    planned = outlook.plan(config)
    if not own.teacache_plan:
        check_plan(planned, own, args, outlook.choice)
    by_default = own.teacache_thresh is None and own.teacache_speedup is None
    return Job(args, config, outlook.choice.text, planned, by_default)


def config_of(
    wan: Wan, own: argparse.Namespace, args: argparse.Namespace, outlook: Outlook
) -> TeaCacheConfig:
    """The settings: as asked, else the row's default threshold, of "sigma" half of the steps."""
    thresh, speedup, row = own.teacache_thresh, own.teacache_speedup, outlook.choice.row
    steps, order = args.sample_steps, (own.teacache_order or [0])[0]
    config = TeaCacheConfig.from_row(row, steps, thresh, own.use_ret_steps, order=order)
    if row is None and thresh is None and speedup is None:
        config = outlook.plan_speedup(config, 2.0).config  # before guidance ends: half of the steps
    until = 1.0 if own.teacache_guide_until is None else own.teacache_guide_until
    # at threshold 0, as in stock, the unconditional branch runs at a scale of 1 too
    scale = None if thresh == 0 else args.sample_guide_scale
    of_first = steps_of_first(outlook.timesteps, wan.task_config(args.task))
    config = replace(config, guided_steps=count_guided_steps(scale, steps, of_first, until))
    return config if speedup is None else for_speedup(config, outlook, speedup)


def for_speedup(config: TeaCacheConfig, outlook: Outlook, speedup: float) -> TeaCacheConfig:
    """With the threshold for --teacache_speedup."""
    try:
        schedule = outlook.plan_speedup(config, speedup)
    except ValueError as error:
        raise Refused(
            f"--teacache_speedup {speedup:g}: with {outlook.choice.text} {error}, and no threshold "
            "can be trusted: take --teacache_model sigma"
        ) from error
    fewest = outlook.plan(replace(config, thresh=1e9))
    require(
        fewest.passes <= math.ceil(2 * config.steps / speedup - 1e-9),
        f"--teacache_speedup {speedup:g}: no threshold reaches it; the nearest is "
        f"{fewest.speedup:.3g}, at --teacache_thresh {schedule.config.thresh:.4g}",
    )
    return schedule.config


def check_plan(
    planned: Schedule, own: argparse.Namespace, args: argparse.Namespace, choice: Choice
) -> None:
    """Refuse a schedule that skips nearly everything, unless it is as published or insisted on.

    Half of the steps by "sigma", its default, are never that, though of a few steps a run of
    skipped ones is soon more than a quarter.
    """
    faults, row = planned.faults(), choice.row
    if not faults or (row is None and 2 * len(planned.computed_steps) >= len(planned.decisions)):
        return
    what = f"{choice.text} would compute {planned.summary()}: {' and '.join(faults)}"
    if choice.insisted or (row is not None and is_fitted(row, args)):
        log.warning(f"TeaCache: {what}")
        return
    if row is not None:
        what += f"; it was fitted at {row.steps} steps, shift {row.shift:g}, {row.solver}"
    instead = "a lower one" if row is None else "--teacache_model sigma"
    has_flag = choice.name in (SIGMA, *ROWS)
    insist = f", or insist by --teacache_model {choice.name}" if has_flag else ""
    asked = [f"--{name} {getattr(own, name):g}" for name in HOW_MUCH if getattr(own, name)]
    flag = asked[0] if asked else f"--sample_steps {args.sample_steps}"
    raise Refused(
        f"{flag}: {what}: take {instead}, another number of "
        f"--sample_steps, --teacache_thresh 0{insist}"
    )


def is_fitted(row: Row, args: argparse.Namespace) -> bool:
    """Whether a run has the settings that its row was fitted at."""
    now = (args.sample_steps, args.sample_shift, args.sample_solver)
    return now == (row.steps, row.shift, row.solver)


def announce(job: Job) -> None:
    """What will be computed, in one line, before anything is loaded."""
    if job.label in (STOCK, NOISE):
        return
    config, planned = job.config, job.planned
    if planned.passes == 2 * config.steps:
        does = f"computes all {config.steps} steps, as stock does: nothing is gained"
    else:
        does = f"will compute {planned.summary()}"
    default = " (default)" if job.by_default else ""
    order = ", order 1" if config.order else ""
    label = f"{job.label}: " if job.label else ""
    log.info(
        f"TeaCache: {label}{job.row_text}, thresh {config.thresh:.4g}{default}, "
        f"{config.mode}{order}: {does}"
    )


# Printing a plan


def plans_around(own: argparse.Namespace, job: Job, outlook: Outlook) -> list[Schedule]:
    """For the current threshold, those of the row, and some below and above the last of these."""
    config, row = job.config, outlook.choice.row
    tried = [config.thresh or 0.1]
    if row is not None:
        tried = list(row.polynomial(own.use_ret_steps).thresholds)
    ladder = [tried[-1] * factor for factor in (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)]
    # those that print alike are one; the current one is last, and so is that one
    by_text = {f"{thresh:.4g}": thresh for thresh in [*ladder, *tried, config.thresh]}
    return [outlook.plan(replace(config, thresh=thresh)) for thresh in sorted(by_text.values())]


def print_plan(own: argparse.Namespace, job: Job, outlook: Outlook) -> None:
    """For --teacache_plan, on rank 0; as JSON too, for --teacache_report."""
    schedules, current = plans_around(own, job, outlook), job.config.thresh
    print(f"TeaCache plan: {job.row_text}, {job.config.mode}, {job.config.steps} steps")
    print("   thresh  computed  skipped  speed-up  longest skip  schedule (# computed, . skipped)")
    for schedule in schedules:
        thresh, computed = schedule.config.thresh, len(schedule.computed_steps)
        mark = ">" if thresh == current else " "
        print(
            f"{mark} {thresh:7.4g}  {computed:8}  {job.config.steps - computed:7}  "
            f"{schedule.speedup:7.2f}x  {schedule.longest_skip:12}  {schedule.marks()}"
        )
    print("speed-up: of the transformer, if a skipped step took no time")
    for fault in job.planned.faults():
        print(f"warning: at {current:.4g} {fault}")
    if own.teacache_report:
        report = {"status": "planned", "row": job.row_text, "config": asdict(job.config)}
        report["computed"] = job.planned.computed_steps
        report["plan"] = [
            {
                "thresh": schedule.config.thresh,
                "computed": schedule.computed_steps,
                "passes": schedule.passes,
                "speedup": schedule.speedup,
                "longest_skip": schedule.longest_skip,
            }
            for schedule in schedules
        ]
        what = f"--teacache_report {own.teacache_report}: cannot be written"
        with refusing(what, "see its folder"):
            Path(own.teacache_report).write_text(json.dumps(report, indent=1))


# The lines of a jobs file


def read_jobs(file: str) -> list[tuple[int, list[str]]]:
    """The lines of a jobs file that have flags, with their numbers: read as the shell would."""
    with refusing(f"--teacache_jobs {file}: cannot be read", "give a file with a video a line"):
        text = Path(file).read_text(encoding="utf-8-sig")
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        with refusing(f"--teacache_jobs {file}: line {number}", "close the quotes"):
            flags = shlex.split(without_comment(line))
        if flags:
            lines.append((number, flags))
    require(lines, f"--teacache_jobs {file}: has no line with flags")
    return lines


def without_comment(line: str) -> str:
    """A line up to a # that begins a word, outside of quotes: shlex takes any # for one."""
    for match in re.finditer(r"(^|\s)#", line):
        with suppress(ValueError):
            shlex.split(line[: match.start()])  # ValueError: within quotes
            return line[: match.start()]
    return line


def own_of_line(
    own: argparse.Namespace, flags: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Our flags of a line over those of the command line, and what is left for generate.py."""
    line, rest = own_parser().parse_known_args(flags)
    # of this line: 0 is one too, so not by truth
    over = {name: v for name, v in vars(line).items() if v is not None and v is not False}
    for name, value in over.items():
        check_named(name, value)
        require(name in OF_A_LINE, f"--{name}: is for the command line, not for a line of the file")
    merged = dict(vars(own))
    for either in (HOW_MUCH, WHOSE):  # one of them takes the place of the other
        if over.keys() & set(either):
            merged |= dict.fromkeys(either)
    return argparse.Namespace(**{**merged, **over}), rest


# The jobs of a comparison


def jobs_of_comparison(wan: Wan, own: argparse.Namespace, args: argparse.Namespace) -> list[Job]:
    """Stock, stock with noise, and each entry by each order. Refused: what cannot be."""
    for name in HOW_MUCH:
        require(
            getattr(own, name) is None,
            f"--{name} {getattr(own, name)}: is an entry of --teacache_compare, as 0.08 or 2x",
        )
    stock = with_flags(own, thresh=0.0, order=[0], guide_until=None)
    asked = [(STOCK, stock), (NOISE, stock)]
    orders = own.teacache_order or [0]
    for entry in own.teacache_compare:
        for order in orders:
            label = f"{entry} order {order}" if len(orders) > 1 else entry
            asked.append((label, of_entry(own, entry, order)))
    jobs, target = [], Path(args.save_file)
    for label, flags in asked:
        try:
            job = job_of(wan, flags, named(args, label), look_ahead(wan, flags, args))
        except Refused as error:
            raise Refused(f"--teacache_compare {label}: {error}") from error
        noise = NOISE_STD if label == NOISE else 0.0
        jobs.append(replace(job, label=label, compared_in=target, noise=noise))
    files = [job.args.save_file for job in jobs]  # 0.08 and +0.08 would have the same
    entries = " ".join(own.teacache_compare)
    require(len(set(files)) == len(files), f"--teacache_compare {entries}: twice the same")
    return jobs


def with_flags(own: argparse.Namespace, **flags: Any) -> argparse.Namespace:
    """Our flags with other values; of thresh and speedup one only is set."""
    values = {"thresh": None, "speedup": None, **flags}
    return argparse.Namespace(
        **{**vars(own), **{f"teacache_{name}": value for name, value in values.items()}}
    )


def of_entry(own: argparse.Namespace, entry: str, order: int) -> argparse.Namespace:
    """Our flags for an entry of --teacache_compare: [ROW:]THRESHOLD or [ROW:]SPEEDUPx."""
    row, _, value = entry.rpartition(":")
    what = f"--teacache_compare {entry}"
    require(
        row in ("", SIGMA, *ROWS), f"{what}: no row {row}; there are {', '.join((SIGMA, *ROWS))}"
    )
    flag, lowest = ("speedup", 1) if value.endswith("x") else ("thresh", 0)
    with refusing(what, "give thresholds as 0.08, speed-ups as 2x, or ROW:2x"):
        number = at_least(lowest, f"{lowest} or more")(value.removesuffix("x"))
    chosen = {"model": row, "coefficients": None} if row else {}
    return with_flags(own, **{flag: number}, order=[order], **chosen)


def named(args: argparse.Namespace, label: str) -> argparse.Namespace:
    """generate.py's flags with a target for one video of a comparison: NAME.LABEL.mp4."""
    target = Path(args.save_file)
    words = "-".join(re.findall(r"[\w.]+", label))
    file = target.with_name(f"{target.stem}.{words}{target.suffix}")
    return argparse.Namespace(**{**vars(copy.deepcopy(args)), "save_file": str(file)})


# From flags to jobs


def parse_and_check(wan: Wan, own: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """generate.py's flags, and the checkpoint that they name, checked."""
    has_checkpoint = wan.parse(argv, whole=False).ckpt_dir is not None
    without_checkpoint = own.teacache_plan and not has_checkpoint
    args = wan.parse([*argv, "--ckpt_dir", "."] if without_checkpoint else argv)
    for name in ("ckpt_dir", "save_file", *INPUTS):
        check_named(name, getattr(args, name, None))
    check_numbers(wan, args)
    if without_checkpoint:
        require(
            choose_row(own, args).row is None,
            "--ckpt_dir: must be given for this plan, whose distances are in the weights; that of "
            "--teacache_model sigma needs none",
        )
    else:
        check_checkpoint(args, wan.task_config(args.task), all_files=not own.teacache_plan)
    return args


def prompt_of(wan: Wan, args: argparse.Namespace) -> str:
    return args.prompt or wan.examples(args.task).get("prompt", "")


def jobs_of_line(
    wan: Wan,
    own: argparse.Namespace,
    argv: list[str],
    common: argparse.Namespace,
    flags: list[str],
    targets: set[Path],
) -> list[Job]:
    """The jobs of one line of a jobs file. common: what the command line says, by itself.
    targets: of the lines before, and then of this too."""
    own, rest = own_of_line(own, flags)
    args = parse_and_check(wan, own, [*argv, *rest])
    for name in FOR_ALL_LINES:
        value, of_all = getattr(args, name, None), getattr(common, name, None)
        require(
            value == of_all,
            f"--{name} {value}: must be that of the command line, {of_all}, since the model is "
            "loaded once",
        )
    if args.save_file is None:  # the same one when the file is started again
        ours = [f"{name} {getattr(own, name)}" for name in OF_A_LINE]
        digest = hashlib.sha256("\0".join([*argv, *flags, *ours]).encode()).hexdigest()[:8]
        names = numbered(Path(default_target(args, prompt_of(wan, args), digest)))
        args.save_file = str(next(name for name in names if name.resolve() not in targets))
    target = Path(args.save_file).resolve()
    if own.teacache_compare:  # its pictures and table are named without the ending
        target = target.with_suffix("")
    require(target not in targets, f"--save_file {args.save_file}: is another line's too")
    targets.add(target)
    return jobs_of_video(wan, own, args)


def jobs_of_video(wan: Wan, own: argparse.Namespace, args: argparse.Namespace) -> list[Job]:
    """The jobs of one prompt and seed, whose inputs and target are checked here."""
    check_prompt_extension(wan, args)
    check_inputs(args, wan.examples(args.task))
    if is_rank_0():
        check_target(wan, args)
    if own.teacache_compare:
        return jobs_of_comparison(wan, own, args)
    several = own.teacache_order and len(own.teacache_order) > 1
    require(not several, "--teacache_order: several are for --teacache_compare")
    return [job_of(wan, own, args, look_ahead(wan, own, args))]


def jobs_of_command(wan: Wan, own: argparse.Namespace, argv: list[str]) -> list[list[Job]]:
    """The jobs of each prompt and seed that is asked for. Refused: one error a line."""
    if not own.teacache_jobs:
        args = parse_and_check(wan, own, argv)
        if args.save_file is None:
            mark = f"{args.base_seed}_{time.strftime('%Y%m%d_%H%M%S')}"
            name = default_target(args, prompt_of(wan, args), mark)
            args.save_file = str(next(p for p in numbered(Path(name)) if not p.exists()))
        return [jobs_of_video(wan, own, args)]
    common = wan.parse(argv, whole=False)
    by_line, errors, targets = [], [], set[Path]()
    for number, flags in read_jobs(own.teacache_jobs):
        try:
            by_line.append(jobs_of_line(wan, own, argv, common, flags, targets))
        except Refused as error:
            errors += [
                f"--teacache_jobs {own.teacache_jobs}: line {number}: {e}" for e in error.args
            ]
    if errors:
        raise Refused(*errors)
    return by_line


# Running them


def is_done(job: Job) -> bool:
    """Whether a video is there already, and whole."""
    file = job.args.save_file
    # VACE makes no more frames than its video has
    frames = 1 if getattr(job.args, "src_video", None) else job.args.frame_num
    try:
        if Path(file).is_file():
            check_written(file, frames)
            return True
    except OSError:
        pass
    return False


def without_done(jobs: Sequence[Job]) -> list[Job]:
    """Those whose video is not there yet: a batch goes on where it was.

    Each rank looks for itself: on several machines the videos must be in a shared folder.
    """
    waiting = []
    for job in jobs:
        if is_done(job):
            log.info(f"TeaCache: {job.args.save_file} is there: skipped")
        else:
            waiting.append(job)
    return waiting


def exit_status(session: Session) -> int:
    """1, with the list, if something failed."""
    for run in session.failed:
        log.error(f"TeaCache: not made: {run.job.args.save_file}: {run.status}")
    return 1 if session.failed or not session.all_written else 0


def run_comparison(session: Session, jobs_by_line: Sequence[Sequence[Job]]) -> int:
    """Compare on each line, and print the table."""
    session.videos = sum(map(len, jobs_by_line))
    log.info(f"TeaCache: {session.videos} videos, of which {2 * len(jobs_by_line)} stock")
    by_line = [outcomes for jobs in jobs_by_line if (outcomes := compare(session, jobs))]
    with suppress(BrokenPipeError):  # of `... | head`: a failure is in the exit status all the same
        for text in comparison_table(by_line) if by_line else ():
            print(text)
    return exit_status(session)


# Decoding kept latents


def decode_latents(own: argparse.Namespace, argv: Sequence[str]) -> None:
    """For --teacache_decode: the video (or image) of a file of latents, which is deleted then."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--save_file")
    parser.add_argument("--ckpt_dir")
    flags, file = parser.parse_args(argv), Path(own.teacache_decode)
    for name, value in vars(flags).items():
        check_named(name, value)
    with refusing(
        f"--teacache_decode {file}: cannot be used", "give a NAME.latents.pt that was kept"
    ):
        content = torch.load(file, map_location="cpu", weights_only=True)
        names = ("task", "ckpt_dir", "save_file")
        found = {name: getattr(flags, name, None) or content[name] for name in names}
        latents, fps = content["latents"], content["fps"]
        if not all(latent.isfinite().all() for latent in latents):
            raise ValueError("its latents are not finite, and a video of them would be black")
    wan = import_wan(own.wan_repo, generates=False)  # it can be done without a GPU, slowly
    args = argparse.Namespace(**found)
    require(
        args.task in wan.generate_py.WAN_CONFIGS,
        f"--teacache_decode {file}: is of --task {args.task}, which this --wan_repo does not have",
    )
    check_intact(args, Path(args.ckpt_dir) / wan.task_config(args.task)["vae_checkpoint"])
    check_target(wan, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        video = wan.vae(args, device).decode([latent.to(device) for latent in latents])[0]
    write_video(wan, video, args.save_file, fps, makes_image(args))
    file.unlink()
    log.info(f"TeaCache: wrote {args.save_file}; {file} is deleted")


# main


def command(argv: Sequence[str]) -> int:
    """The command line; the exit status. Refused: what is wrong, before a weight is loaded."""
    own, rest = own_parser().parse_known_args(argv)
    for name, value in vars(own).items():
        check_named(name, value)
    if {"-h", "--help"} & set(rest):
        print(own_parser().format_help())
        import_wan(own.wan_repo, generates=False).parse(rest)  # prints generate.py's, and leaves
    if own.teacache_decode:
        decode_latents(own, rest)
        return 0
    wan = import_wan(own.wan_repo, generates=not own.teacache_plan)
    if not own.teacache_plan:
        return make_videos(wan, own, rest)
    require(not own.teacache_jobs, "--teacache_plan, --teacache_jobs: give one of them")
    args = parse_and_check(wan, own, rest)
    outlook = look_ahead(wan, own, args)
    job = job_of(wan, own, args, outlook)
    if is_rank_0():
        print_plan(own, job, outlook)
    return 0


def make_videos(wan: Wan, own: argparse.Namespace, argv: list[str]) -> int:
    """All videos of a command; the exit status."""
    by_line = jobs_of_command(wan, own, argv)
    jobs = [job for line in by_line for job in line]
    if own.teacache_jobs and not own.teacache_compare:
        jobs = without_done(jobs)
    for job in jobs:
        announce(job)
    with refusing(f"--teacache_report {own.teacache_report}: cannot be written", "see its folder"):
        session = Session(wan, own.teacache_report, vars(own))
        if session.report_file:
            session.report_file.write_text('{"status": "started"}')
    with session.opened(uses_xfuser(by_line[0][0].args)):
        if own.teacache_compare:
            return run_comparison(session, by_line)
        session.make_all(jobs)
        return exit_status(session)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ``argv`` is what follows the program's name. Leaves by SystemExit, with 2
    for what was refused, 1 for what failed, 128 + its number for a signal; returns otherwise."""
    status = 0
    try:
        # a log line to a closed pipe is no reason for a traceback
        with stopped_by_signals(), shadow(logging, raiseExceptions=False):
            try:
                status = command(sys.argv[1:] if argv is None else argv)
            except SystemExit as leaving:  # of --help
                status = leaving.code or 0
            sys.stdout.flush()
    except Refused as error:
        alone = environment("LOCAL_WORLD_SIZE", 1) == 1  # then LOCAL_RANK is a left-over
        speaks = environment("LOCAL_RANK", 0) == 0 or alone  # once a machine
        for message in error.args if speaks else ():
            print(f"teacache_generate.py: error: {message}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # of `--help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        log.error(f"TeaCache: stopped by {error}")
        status = 128 + getattr(error, "number", signal.SIGINT)
    except Exception as error:
        log.error("TeaCache: here is where:", exc_info=error)
        status = 1
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
