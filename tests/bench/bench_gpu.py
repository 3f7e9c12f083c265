"""Times and memory of TeaCache at Wan2.1's full sizes, with no checkpoint: random weights.

    python tests/bench/bench_gpu.py [--model 14B-720P] [--order 1] [--steps 10] [--rounds 1]
        [--json FILE]

Stock and TeaCache take turns in one process, in the stock ``WanT2V.generate`` on the real WanModel
with stand-ins for T5 and VAE. Random weights have no distances that a threshold could be held to,
so a script says which steps are computed; all that TeaCache does to decide is done nevertheless.
Without CUDA model and video are small ones, which show that this file works and nothing else.

A step lasts from its conditional call of the model to that of the next step, the last one to the
VAE: by CUDA events, which wait for nothing, and of which medians are shown. Host synchronisations
are those that torch warns of, counted in the same runs; a warning takes some microseconds, which is
in the times. Reserved memory is what the allocator holds, which is more than what is allocated in
it; before each run it gives back what the run before has left.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_wan"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import make_model, prepare, seeded
from scripted import scripted, spaced

from teacache_generate import import_wan, teacache

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
NOTE = "random weights: times, not pictures"
OF_50, FRAMES, WARM_UP = (25, 20, 17), 81, 2


@dataclass(frozen=True)
class Model:
    """A model of Wan2.1 at one of its sizes."""

    task: str
    size: tuple[int, int]  # width, height
    skipped_share: float | None = None  # goal: a skipped step's time by a computed one's, at most


MODELS = {
    "1.3B": Model("t2v-1.3B", (832, 480), 0.01),
    "14B-480P": Model("t2v-14B", (832, 480)),
    "14B-720P": Model("t2v-14B", (1280, 720), 0.005),
}


def counts(steps: int) -> list[int]:
    """How many steps are computed: 25, 20 and 17 of 50, or their like; never fewer than 2."""
    return list(dict.fromkeys(max(2, steps * count // 50) for count in OF_50))


# -------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Run:
    """What was seen of one ``generate``; all but the first two on CUDA only."""

    computed: list[int]
    step_seconds: list[float]
    peak_bytes: int | None = None  # allocated, at most, during sampling
    reserved_bytes: int | None = None  # held by the allocator, at most, during sampling
    vae_bytes: int | None = None  # when the VAE begins
    syncs: list[int] | None = None  # of the host, by step


class Probe:
    """Looks at one ``generate`` from outside: as a hook of the model, and in the VAE's place."""

    def __init__(self, syncs: list[warnings.WarningMessage], bar: tqdm):
        self.syncs, self.bar = syncs, bar
        self.calls = 0
        self.marks: list[Any] = []  # begin of each step and end of the last: seconds or CUDA events
        self.syncs_at: list[int] = []  # synchronisations before each mark
        self.memory: dict[str, int] = {}

    def mark(self) -> None:
        if CUDA:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        self.syncs_at.append(len(self.syncs))
        self.bar.update(len(self.marks) > 1)

    def called(self, *_: Any) -> None:
        """Forward pre-hook of the model: every other call begins a step."""
        if self.calls == 0 and CUDA:
            torch.cuda.reset_peak_memory_stats()
        if self.calls % 2 == 0:
            self.mark()
        self.calls += 1

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """In place of the VAE's: the sampling is over, once the GPU has come to the last mark."""
        self.mark()
        if CUDA:
            torch.cuda.synchronize()
            self.memory["peak_bytes"] = torch.cuda.max_memory_allocated()
            self.memory["reserved_bytes"] = torch.cuda.max_memory_reserved()
            self.memory["vae_bytes"] = torch.cuda.memory_allocated()
        return latents

    def result(self, computed: list[int]) -> Run:
        if not CUDA:
            return Run(computed, np.diff(self.marks).tolist())
        pairs = itertools.pairwise(self.marks)
        seconds = [begin.elapsed_time(end) / 1000 for begin, end in pairs]
        return Run(computed, seconds, **self.memory, syncs=np.diff(self.syncs_at).tolist())


@contextmanager
def host_syncs() -> Iterator[list[warnings.WarningMessage]]:
    """A list that grows with each synchronisation of the host with the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")


def forget() -> None:
    """Give back what the run before has left, so that its peak is not this one's."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def run(
    pipeline: Any, size: tuple[int, int], steps: int, script: list[int], order: int, bar: tqdm
) -> Run:
    """One ``generate``: with TeaCache where the script leaves steps out, else stock."""
    config, stock = scripted(steps, script, order), len(script) == steps
    forget()
    with host_syncs() as syncs:
        probe = Probe(syncs, bar)
        pipeline.vae.decode = probe.decode
        hook = pipeline.model.register_forward_pre_hook(probe.called)
        with nullcontext() if stock else teacache(pipeline.model, config) as cache:
            pipeline.generate(
                *("a prompt", size, FRAMES), sampling_steps=steps, seed=0, offload_model=False
            )
        hook.remove()
    return probe.result(script if cache is None else cache.schedule.computed_steps)


def in_turns(
    pipeline: Any, size: tuple[int, int], steps: int, order: int, rounds: int
) -> Iterator[dict[str, list[Run]]]:
    """After each round the runs so far, stock first; a few steps of stock go before, unmeasured."""
    scripts = {"stock": list(range(steps))}
    scripts |= {f"{count} of {steps}": spaced(count, steps) for count in counts(steps)}
    runs: dict[str, list[Run]] = {name: [] for name in scripts}
    with tqdm(total=WARM_UP + rounds * len(scripts) * steps, desc="warm-up", unit="step") as bar:
        run(pipeline, size, WARM_UP, list(range(WARM_UP)), order, bar)
        for _ in range(rounds):
            for name, script in scripts.items():
                bar.set_description(name)
                runs[name].append(run(pipeline, size, steps, script, order, bar))
            yield runs


# ----------------------------------------------------------------------------- Wan2.1 and torch


def build_model(config: Any) -> nn.Module:
    """Wan2.1's WanModel, held as WanT2V holds it: float32, which autocast makes bfloat16 of."""
    if not CUDA:
        return make_model({**config, "model_type": "t2v", "in_dim": 16, "out_dim": 16}, seed=0)
    names = ("patch_size", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "window_size")
    sizes = {name: config[name] for name in (*names, "qk_norm", "cross_attn_norm", "eps")}
    torch.manual_seed(0)
    with DEVICE:
        model = sys.modules["wan"].modules.WanModel(model_type="t2v", **sizes)
        nn.init.normal_(model.head.head.weight, std=config.dim**-0.5)  # zero in a new model
    return model.eval().requires_grad_(False)


def build_pipeline(config: Any) -> Any:
    """A WanT2V that has loaded nothing: stand-ins, and a model with random weights."""
    wan = sys.modules["wan"]
    wan.text2video.tqdm = iter  # there is one progress bar, and it is ours
    pipeline, model = object.__new__(wan.WanT2V), build_model(config)
    names = ("num_train_timesteps", "param_dtype", "vae_stride", "patch_size", "sample_neg_prompt")
    vars(pipeline).update({name: config[name] for name in names}, config=config, rank=0, sp_size=1)
    vars(pipeline).update(t5_cpu=True, device=DEVICE, model=model)
    pipeline.vae = SimpleNamespace(model=SimpleNamespace(z_dim=16))
    context = seeded(min(100, model.text_len), model.text_dim).to(config.t5_dtype)
    pipeline.text_encoder = lambda texts, device: [context.to(device)]
    return pipeline


def attention_of(model: nn.Module, tokens: int) -> str:
    """What computes the attention of Wan2.1 here."""
    here = sys.modules["wan.modules.attention"]
    if here.FLASH_ATTN_3_AVAILABLE or here.FLASH_ATTN_2_AVAILABLE:
        return f"flash-attn {3 if here.FLASH_ATTN_3_AVAILABLE else 2}"
    shape = (1, tokens, model.num_heads, model.dim // model.num_heads)
    q = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    return f"scaled_dot_product_attention ({SDPBackend(torch._fused_sdp_choice(q, q, q)).name})"


def machine() -> dict[str, str | None]:
    """What the times depend on, but for the attention."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.check_output(asked, text=True).split()[0] if CUDA else None
    return {
        "gpu": torch.cuda.get_device_name(DEVICE) if CUDA else None,
        "driver": driver,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# ----------------------------------------------------------------------------- figures and goals

FIGURES = (  # line of the table, key of a row, format
    ("computed", "name", "{}"),
    ("computed step, ms", "computed_ms", "{:.1f}"),
    ("skipped step, ms", "skipped_ms", "{:.2f}"),
    ("skipped step/computed step", "skipped_share", "{:.2%}"),
    ("sampling, s", "sampling_seconds", "{:.1f}"),
    ("speed-up", "speedup", "{:.2f}"),
    ("speed-up/(steps/computed)", "of_ideal", "{:.3f}"),
    ("allocated above stock, GiB", "peak_gib", "{:.2f}"),
    ("reserved above stock, GiB", "reserved_gib", "{:.2f}"),
    ("allocated above stock at the VAE, GiB", "vae_gib", "{:.2f}"),
    ("host syncs a step above stock", "syncs", "{}"),
    ("... at the last step", "last_syncs", "{}"),
)
MEMORY = (
    ("peak_gib", "peak_bytes"),
    ("reserved_gib", "reserved_bytes"),
    ("vae_gib", "vae_bytes"),
)


def figures(name: str, runs: list[Run], stock: list[Run]) -> dict[str, Any]:
    """A row of the report: medians over steps and rounds, and the runs that they are made of."""
    seconds = np.array([run.step_seconds for run in runs])  # [rounds, steps]
    is_computed = np.isin(np.arange(seconds.shape[1]), runs[0].computed)
    sampling = float(np.median(seconds.sum(axis=1)))
    row: dict[str, Any] = dict.fromkeys(key for _, key, _ in FIGURES)
    row |= {
        "name": name,
        "computed_ms": 1000 * float(np.median(seconds[:, is_computed])),
        "sampling_seconds": sampling,
        "runs": [vars(run) for run in runs],
    }
    if runs is stock:
        return row
    stock_sampling = np.median([sum(run.step_seconds) for run in stock])
    row["skipped_ms"] = 1000 * float(np.median(seconds[:, ~is_computed]))
    row["skipped_share"] = row["skipped_ms"] / row["computed_ms"]
    row["speedup"] = float(stock_sampling) / sampling
    row["of_ideal"] = row["speedup"] * float(is_computed.mean())
    if CUDA:
        for key, field in MEMORY:
            above = [vars(u)[field] - vars(v)[field] for u, v in zip(runs, stock, strict=True)]
            row[key] = max(above) / 2**30
        syncs = np.subtract([u.syncs for u in runs], [u.syncs for u in stock])
        row["syncs"], row["last_syncs"] = int(syncs[:, :-1].max()), int(syncs[:, -1].max())
    return row


def goals(row: dict[str, Any], model: Model, residual_gib: float, order: int) -> dict[str, float]:
    """What a row of the report is held against on CUDA: of_ideal at least, all others at most.

    Two residuals are kept, four at order 1; the allocator may hold one more, whose place was too
    small for what came next. At the last step the drifts are read, too.
    """
    if not CUDA or row["name"] == "stock":
        return {}
    kept = 2 * (1 + order)
    found = {"peak_gib": kept * residual_gib, "reserved_gib": (kept + 1) * residual_gib}
    found |= {"vae_gib": 0.0, "syncs": 1, "last_syncs": 2}
    if model.skipped_share:
        found["skipped_share"] = model.skipped_share
    run = row["runs"][0]
    if 2 * len(run["computed"]) == len(run["step_seconds"]):
        found["of_ideal"] = 0.98
    return found


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """A figure with its goal, or nothing."""
    if row[key] is None:
        return ""
    sign, goal = ">=" if key == "of_ideal" else "<=", row["goals"].get(key)
    return form.format(row[key]) + ("" if goal is None else f" ({sign} {form.format(goal)})")


def table(report: dict[str, Any]) -> str:
    """What was measured, on what, and how it compares with the goals."""
    cells = [
        [line, *(cell(row, key, form) for row in report["rows"])] for line, key, form in FIGURES
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    on = [report["gpu"] or "no GPU: small sizes", report["driver"] and f"driver {report['driver']}"]
    on += [f"torch {report['torch']}", report["attention"], report["date"]]
    of = "{model}: dim {dim}, {layers} layers, {weights}, {size[0]}x{size[1]}x{frames}, {tokens} "
    of += "tokens, order {order}, {steps} steps, rounds: {rounds}"
    return "\n".join([NOTE, ", ".join(filter(None, on)), of.format(**report), *lines])


# ----------------------------------------------------------------------------------------- main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="1.3B")
    parser.add_argument("--order", type=int, choices=(0, 1), default=0)
    parser.add_argument("--steps", type=int, default=50, help="4 or more; 10 do for a step's time")
    parser.add_argument("--rounds", type=int, default=2, help="of stock and each schedule")
    parser.add_argument("--json", type=Path, default=Path("bench_gpu.json"), metavar="FILE")
    parser.add_argument("--wan_repo", type=Path, default=WAN, help="Wan2.1's folder")
    args = parser.parse_args()
    if args.steps < 4 or args.rounds < 1:
        parser.error("--steps must be 4 or more, --rounds 1 or more")
    if not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    return args


def import_everywhere(repo: Path) -> ModuleType:
    """Wan2.1's generate.py, also without CUDA, with an attention that works here."""
    if not CUDA:
        prepare(repo)
    return import_wan(str(repo), generates=True).generate_py


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore")
    model = MODELS[args.model]
    pipeline = build_pipeline(import_everywhere(args.wan_repo).WAN_CONFIGS[model.task])
    made, size = pipeline.model, model.size
    if not CUDA:
        size = (round(size[0] / 128) * 16, round(size[1] / 128) * 16)
    tokens = ((FRAMES - 1) // 4 + 1) * math.prod(size) // 16**2
    report: dict[str, Any] = {"note": NOTE, **machine(), "attention": attention_of(made, tokens)}
    report |= {"model": args.model, "dim": made.dim, "layers": made.num_layers}
    report |= {"weights": str(made.dtype).removeprefix("torch."), "size": size, "frames": FRAMES}
    report |= {"tokens": tokens, "order": args.order, "steps": args.steps}
    residual_gib = tokens * made.dim * 4 / 2**30
    for runs in in_turns(pipeline, size, args.steps, args.order, args.rounds):
        report["rounds"] = len(runs["stock"])
        report["rows"] = [figures(name, runs[name], runs["stock"]) for name in runs]
        for row in report["rows"]:
            row["goals"] = goals(row, model, residual_gib, args.order)
        args.json.write_text(json.dumps(report, indent=1))  # a run that is cut short leaves rounds
    print(table(report))


if __name__ == "__main__":
    main()
