"""Tries and measures the script on one GPU, with random weights: see gpu.sh, which starts it.

Each part is a process with a limit of its own, and writes its rows at once; if it fails or takes
too long the next part runs. A step lasts from its conditional call to the next step's, both after
the GPU's work; the table has medians over the steps. "above stock" is the allocator's peak minus
stock's.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

TESTS = Path(__file__).resolve().parents[1]
SCRIPT, STAND_IN = TESTS.parent / "teacache_generate.py", TESTS / "wan_nano"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "real_wan")]

import cases  # noqa: E402
import harness  # noqa: E402
from bench_scale import GIB, make_model, make_pipeline  # noqa: E402
from cases import WAN21, WAN22  # noqa: E402
from common import machine, scripted, text  # noqa: E402

from teacache_generate import (  # noqa: E402
    TeaCacheConfig,
    import_wan,
    prepare_flash_attention,
    sdpa_attention,
    teacache,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
TOTAL_SECONDS = 460
Rows = Iterator[tuple[str, Any]]


def python(*argv: object, check: bool = True) -> None:
    subprocess.run([sys.executable, *map(str, argv)], stdout=sys.stderr, check=check)


FAILING_VAE = """
import sys
sys.path[:0] = sys.argv[1:3]
from wan.modules.vae import WanVAE
import teacache_generate
WanVAE.decode = None
teacache_generate.main(sys.argv[3:])
"""


def try_stand_in(folder: Path) -> Rows:
    """The README's commands: stock, threshold 0, skipping, decode, compare."""
    flags = ["--ckpt_dir", TESTS.parent / "assets" / "wan_nano", "--base_seed", 42]
    flags += ["--prompt", "a red ball moves right", "--sample_steps", 50 if CUDA else 10]
    ours = [SCRIPT, "--wan_repo", STAND_IN]

    def make(name: str, command: list[Any], *more: object) -> bytes:
        python(*command, *flags, "--save_file", folder / f"{name}.mp4", *more)
        return (folder / f"{name}.mp4").read_bytes()

    stock = make("stock", [STAND_IN / "generate.py"])
    yield "threshold 0 is stock", make("off", ours, "--teacache_thresh", 0) == stock
    skipping = make("skipping", ours, "--teacache_thresh", 0.08)
    video = ["--save_file", folder / "kept.mp4", "--teacache_thresh", 0.08]
    failing = ["-c", FAILING_VAE, STAND_IN, TESTS.parent, "--wan_repo", STAND_IN, *flags, *video]
    python(*failing, check=False)
    python(*ours, "--teacache_decode", folder / "kept.latents.pt")
    yield "decoded latents give the same video", (folder / "kept.mp4").read_bytes() == skipping
    compared = ["--teacache_compare", 0.08, "0.08@1", "sigma:1.5x@1"]
    python(*ours, *flags, "--save_file", folder / "x.mp4", *compared)
    for row in json.loads((folder / "x.compare.json").read_text()):
        yield f"{row['label']}: computed steps", len(row["computed"])
        yield f"{row['label']}: drift", row["drift"]
        yield f"{row['label']}: PSNR, dB", row["psnr"] or "infinite"


TINY = [
    (WAN21, cases.CASES21, ["20-steps", "t2v-1.3B-ret", "sigma-i2v", "order-1-ret", "vace-1.3B"]),
    (WAN22, cases.CASES22, ["t2v", "ti2v-image-rule", "ti2v-image-order-1"]),
]


def try_real_wan(folder: Path) -> Rows:
    """Compare frames of generate.py with TeaCache with the frames of the reference."""
    for repo, known, names in TINY:
        out = folder / repo.name
        out.mkdir()
        chosen = {name: known[name] for name in (names if CUDA else names[:1])}
        done = cases.run(repo, cases.jobs_of_cases(chosen, out), out, script=Path(__file__))
        for name in chosen:
            try:
                cases.check(done, name, chosen)
                yield f"{repo.name} {name}", True
            except AssertionError as error:
                print(f"{name}: {error}", file=sys.stderr)
                off = done.frames(f"{name}.teacache") - done.frames(f"{name}.reference")
                yield f"{repo.name} {name}", f"off by {abs(off).max():.2g}"


def put_harness_on_gpu() -> None:
    """Let real_wan/harness.py have its models, stand-ins and inputs on the GPU."""

    class Autocast(torch.autocast):
        """Wan's own, unless the job is in float32."""

        def __init__(self, device_type: str = "cuda", *, dtype: Any = None, enabled: bool = True):
            float32 = harness.Autocast.float32
            super().__init__("cuda", dtype=dtype, enabled=enabled and not float32)

    torch.amp.autocast = torch.cuda.amp.autocast = Autocast
    harness.prepare, harness.DEVICE = harness.prepare_imports, DEVICE


SIZE, FRAMES = (832, 480) if CUDA else (160, 96), 81
MODEL = {} if CUDA else {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2}


class Run(NamedTuple):
    """What one ``generate`` took."""

    seconds: np.ndarray  # of each step
    computed: list[int]  # steps
    peak: int  # bytes
    at_vae: int  # bytes alive as the VAE begins


def observe(pipeline: Any, config: TeaCacheConfig) -> Run:
    marks, memory, calls = [], [0, 0], itertools.count()

    def mark() -> None:
        torch.cuda.synchronize()  # harness.py replaces it where there is no GPU
        marks.append(time.perf_counter())

    def called(*_: Any) -> None:
        if next(calls) % 2 == 0:  # a step has two calls
            mark()

    def decode(latents: list[Tensor]) -> list[Tensor]:
        mark()
        memory[:] = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return latents

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pipeline.vae.decode = decode
    hook = pipeline.model.register_forward_pre_hook(called)
    options = {"sampling_steps": config.steps, "seed": 0, "offload_model": False}
    with teacache(pipeline.model, config) as cache:
        pipeline.generate("a prompt", SIZE, FRAMES, **options)
    hook.remove()
    return Run(np.diff(marks), cache.schedule.computed_steps, *memory)


def measure_full_size(task: str, steps: int) -> Rows:
    """Measure stock, then half of the steps with orders 0 and 1. bench_scale.py predicts these."""
    harness.prepare_imports(WAN21) if CUDA else harness.prepare(WAN21)
    import_wan(str(WAN21), generates=True)
    torch.manual_seed(0)
    model = make_model(task, DEVICE, **MODEL)
    nn.init.normal_(model.head.head.weight, std=model.dim**-0.5)  # zero in a new model
    pipeline = make_pipeline(task, DEVICE, {"model": model})
    observe(pipeline, TeaCacheConfig(2, 0.0))  # warms up
    stock = observe(pipeline, TeaCacheConfig(steps, 0.0))
    yield "stock: a step, s", float(np.median(stock.seconds))
    yield "stock: sampling, s", float(stock.seconds.sum())
    yield "stock: peak, GiB", stock.peak / GIB
    for order in (0, 1):
        half = observe(pipeline, scripted(steps, range(0, steps, 2), order))
        for name, value in compare(half, stock):
            yield f"order {order}: {name}", value


def compare(run: Run, stock: Run) -> Rows:
    seconds, count = run.seconds, len(run.computed)
    computed, skipped = seconds[run.computed], np.delete(seconds, run.computed)
    ratio = float(np.median(skipped) / np.median(computed))
    yield f"{count} of {len(seconds)} steps, speed-up", float(stock.seconds.sum() / seconds.sum())
    yield "skipped by computed step, %", 100 * ratio
    yield "peak above stock, GiB", (run.peak - stock.peak) / GIB
    yield "above stock as the VAE begins, GiB", (run.at_vae - stock.at_vae) / GIB


def measure_attention(folder: Path) -> Rows:
    """PyTorch's attention beside flash-attn's, for t2v-1.3B at 480P (bfloat16)."""
    tokens = 32760 if CUDA else 128
    q, k, v = torch.randn(3, 1, tokens, 12, 128, device=DEVICE).bfloat16()
    lens = torch.tensor([tokens], device=DEVICE)
    kernel = torch._fused_sdp_choice(*(u.transpose(1, 2) for u in (q, k, v)))
    yield "PyTorch's kernel", torch.nn.attention.SDPBackend(kernel).name
    yield "PyTorch's, ms", milliseconds(lambda: sdpa_attention(q, k, v, k_lens=lens))
    harness.prepare_imports(WAN21)
    prepare_flash_attention()
    try:
        from wan.modules.attention import flash_attention

        theirs = flash_attention(q, k, v, k_lens=lens)
    except Exception as error:  # each build has its own
        yield "flash-attn", f"cannot run: {str(error).splitlines()[0]:.60}"
        return
    yield "flash-attn's, ms", milliseconds(lambda: flash_attention(q, k, v, k_lens=lens))
    ours = sdpa_attention(q, k, v, k_lens=lens)
    yield "PyTorch's off flash-attn's by", float((ours - theirs).abs().max())


def milliseconds(call: Callable[[], Any]) -> float:
    return 1000 * Timer("call()", globals={"call": call}).blocked_autorange().median


PARTS: dict[int, tuple[str, Callable[[Path], Rows], int]] = {  # name, function, limit in seconds
    1: ("the stand-in", try_stand_in, 150),
    2: ("the real Wan code, tiny models", try_real_wan, 150),
    3: ("t2v-1.3B at 480P", lambda folder: measure_full_size("t2v-1.3B", 10), 100),
    4: ("attention", measure_attention, 40),
    5: ("t2v-14B at 480P", lambda folder: measure_full_size("t2v-14B", 4), 200),
}


def run_part(number: int, limit: float, out: Path) -> None:
    """A part in a process of its own: adds its rows to gpu.txt, what else it prints to gpu.log."""
    command = [sys.executable, __file__, "--part", str(number)]
    with (out / "gpu.txt").open("a") as table, (out / "gpu.log").open("a") as log:
        print(f"{number}. {PARTS[number][0]}", file=table, flush=True)
        try:
            subprocess.run(command, stdout=table, stderr=log, timeout=limit, check=True)
        except subprocess.SubprocessError as error:
            print(f"   {error}: see gpu.log", file=table)


def print_rows(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # what Wan prints
        for name, value in PARTS[number][1](Path(folder)):
            print(f"   {name:52} {text(value)}", file=sys.__stdout__, flush=True)


def main() -> None:
    if "--repo" in sys.argv:  # in place of harness.py
        if CUDA:
            put_harness_on_gpu()
        harness.main()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, choices=PARTS, help="a part's number")
    parser.add_argument("--out", type=Path, default=Path(os.getenv("OUT", ".")))
    parser.add_argument("--part", type=int, choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print_rows(args.part)
        return
    ends = time.monotonic() + TOTAL_SECONDS
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = "" if CUDA else "; no GPU: small sizes, nothing is measured"
    (args.out / "gpu.txt").write_text(f"{machine()}{sizes}\n")
    for number in [args.only] if args.only else PARTS:
        run_part(number, min(PARTS[number][2], max(ends - time.monotonic(), 1)), args.out)
    print((args.out / "gpu.txt").read_text(), end="")


if __name__ == "__main__":
    main()
