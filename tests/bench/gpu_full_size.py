"""Stock Wan2.1's ``WanT2V.generate`` on a WanModel of full size with random weights: times, memory
and host synchronisations of stock and of TeaCache at half of the steps, orders 0 and 1."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_wan"))

import harness  # noqa: E402

from teacache_generate import TeaCacheConfig, import_wan, teacache  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
WAN = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
SIZE, FRAMES, GIB = (832, 480), 81, 2**30
# by bench_scale.py, a simulation: a step of stock in seconds on an A800, its peak in GiB, and of
# order 0 and 1 the GiB above that and the cost of a skipped step in % of a computed one
SIMULATED = {
    "t2v-1.3B": (3.43, 7.35, ((0.31, 0.13), (0.69, 0.19))),
    "t2v-14B": (18.9, 59.9, ((1.04, 0.08), (2.29, 0.12))),
}
# imported by Wan for what is not run here
ABSENT = ("dashscope", "decord", "ftfy", "librosa", "peft")


def prepare_imports(repo: Path) -> None:
    """Let ``import wan`` of the folder ``repo`` work without packages that are not used here."""
    harness.prepare_torchvision()
    for name in ABSENT:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = harness.Absent(name)
    sys.path.insert(0, str(repo))


class Probe:
    """Observes one ``generate`` with a hook of the model and in place of the VAE's decode."""

    def __init__(self, syncs: list[Any]):
        self.syncs, self.calls = syncs, 0
        self.marks: list[Any] = []  # begin of each step and end of the last: seconds or CUDA events
        self.syncs_at: list[int] = []  # synchronisations before each mark
        self.memory = (0, 0)  # bytes: at the peak of sampling, and as the VAE begins

    def mark(self) -> None:
        if CUDA:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        self.syncs_at.append(len(self.syncs))

    def called(self, *_: Any) -> None:
        """Forward pre-hook of the model: every other call begins a step."""
        if self.calls == 0 and CUDA:
            torch.cuda.reset_peak_memory_stats()
        if self.calls % 2 == 0:
            self.mark()
        self.calls += 1

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """Replaces the VAE's: the sampling has ended once the GPU has reached the last mark."""
        self.mark()
        if CUDA:
            torch.cuda.synchronize()
            self.memory = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())
        return latents

    def seconds(self) -> np.ndarray:
        """Of each step."""
        if not CUDA:
            return np.diff(self.marks)
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        return np.array([begin.elapsed_time(end) / 1000 for begin, end in pairs])


@contextmanager
def host_syncs() -> Iterator[list[Any]]:
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


def build_pipeline(config: Any) -> Any:
    """A WanT2V that has loaded nothing: stand-ins for T5 and VAE, and random weights."""
    wan = sys.modules["wan"]
    wan.text2video.tqdm = iter
    pipeline = object.__new__(wan.WanT2V)
    names = ("num_train_timesteps", "param_dtype", "vae_stride", "patch_size", "sample_neg_prompt")
    vars(pipeline).update({name: config[name] for name in names}, config=config, rank=0, sp_size=1)
    vars(pipeline).update(t5_cpu=True, device=DEVICE, model=build_model(config))
    pipeline.vae = SimpleNamespace(model=SimpleNamespace(z_dim=16))
    tokens = min(100, pipeline.model.text_len)
    context = harness.seeded(tokens, pipeline.model.text_dim).to(config.t5_dtype)
    pipeline.text_encoder = lambda texts, device: [context.to(device)]
    return pipeline


def build_model(config: Any) -> nn.Module:
    """In float32, as WanT2V holds it; without a GPU a tiny one."""
    if not CUDA:
        return harness.make_model({**config, "model_type": "t2v", "in_dim": 16, "out_dim": 16}, 0)
    names = ("patch_size", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "window_size")
    sizes = {name: config[name] for name in (*names, "qk_norm", "cross_attn_norm", "eps")}
    torch.manual_seed(0)
    with DEVICE:
        model = sys.modules["wan"].modules.WanModel(model_type="t2v", **sizes)
        nn.init.normal_(model.head.head.weight, std=config.dim**-0.5)  # zero in a new model
    return model.eval().requires_grad_(False)


def run(pipeline: Any, steps: int, config: TeaCacheConfig) -> tuple[Probe, list[int]]:
    """One ``generate``; the steps that were computed."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    size = SIZE if CUDA else (160, 96)
    with host_syncs() as syncs:
        probe = Probe(syncs)
        pipeline.vae.decode = probe.decode
        hook = pipeline.model.register_forward_pre_hook(probe.called)
        with teacache(pipeline.model, config) as cache:
            pipeline.generate(
                "a prompt", size, FRAMES, sampling_steps=steps, seed=0, offload_model=False
            )
        hook.remove()
    return probe, cache.computed_steps


def measure_full_size(task: str, steps: int) -> Iterator[tuple[str, Any]]:
    """Stock, then half of the steps with orders 0 and 1."""
    prepare_imports(WAN) if CUDA else harness.prepare(WAN)
    pipeline = build_pipeline(import_wan(str(WAN), generates=True).generate_py.WAN_CONFIGS[task])
    run(pipeline, 2, TeaCacheConfig(2, 0.0))  # warms up
    stock, _ = run(pipeline, steps, TeaCacheConfig(steps, 0.0))
    step_seconds, peak, of_orders = SIMULATED[task]
    a_step = float(np.median(stock.seconds()))
    yield f"stock: a step, s (simulated {step_seconds} on an A800)", a_step
    yield "stock: sampling, s", float(stock.seconds().sum())
    yield f"stock: peak, GiB (simulated {peak})", stock.memory[0] / GIB
    script = tuple(range(0, steps, 2))
    for order in (0, 1):
        # every increment is 0: the script alone says which steps are computed
        config = TeaCacheConfig(steps, 1.0, (0.0,), order=order, forced_steps=script)
        probe, computed = run(pipeline, steps, config)
        yield from compare(f"order {order}", probe, stock, computed, of_orders[order])


def compare(
    name: str, probe: Probe, stock: Probe, computed: list[int], simulated: tuple[float, float]
) -> list[tuple[str, Any]]:
    """Rows for a run beside stock's. simulated: GiB above stock, % of a skipped step."""
    seconds = probe.seconds()
    is_computed = np.isin(np.arange(len(seconds)), computed)
    skipped = float(np.median(seconds[~is_computed]) / np.median(seconds[is_computed]))
    speedup = float(stock.seconds().sum() / seconds.sum())
    peak, vae = (a - b for a, b in zip(probe.memory, stock.memory, strict=True))
    syncs = np.diff(probe.syncs_at) - np.diff(stock.syncs_at)
    return [
        (f"{name}: {len(computed)} of {len(seconds)} steps, speed-up", speedup),
        (f"{name}: skipped by computed step, % (simulated {simulated[1]})", 100 * skipped),
        (f"{name}: peak above stock, GiB (simulated {simulated[0]})", peak / GIB),
        (f"{name}: above stock as the VAE begins, GiB", vae / GIB),
        (f"{name}: host waits a step above stock, at most", int(syncs.max())),
    ]
