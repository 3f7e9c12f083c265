"""Tries and measures the script on one GPU, with random weights: see gpu.sh, which starts it.

Each part is a process with a limit of its own. Its rows so far are in the JSON when it ends; if it
fails or takes too long the next part runs. A step lasts from its conditional call to the next
step's, both after the GPU's work; the table has medians over the steps. "above stock" is the
allocator's peak minus stock's.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

TESTS = Path(__file__).resolve().parents[1]
SCRIPT, STAND_IN = TESTS.parent / "teacache_generate.py", TESTS / "wan_nano"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "real_wan")]

import harness  # noqa: E402
from bench_scale import GIB, WAN, make_model, make_pipeline, prepare_imports  # noqa: E402

from teacache_generate import (  # noqa: E402
    TeaCacheConfig,
    import_wan,
    prepare_flash_attention,
    sdpa_attention,
    teacache,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
TOTAL_SECONDS, ROW = 460, "row of the table: "
Rows = Iterator[tuple[str, Any]]


def python(*argv: object) -> str:
    """Run Python; its output. RuntimeError: it failed."""
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr[-2000:] or done.stdout[-2000:]}")
    return done.stdout


# ------------------------------------------------------------------------------ 1: the stand-in

FAILING_VAE = """
import sys
sys.path[:0] = sys.argv[1:3]
from wan.modules.vae import WanVAE
import teacache_generate
WanVAE.decode = None
teacache_generate.main(sys.argv[3:])
"""


def try_stand_in(folder: Path) -> Rows:
    """The README's commands: stock, threshold 0, skipping, order 1, decode, compare."""
    flags = ["--ckpt_dir", TESTS.parent / "assets" / "wan_nano", "--base_seed", 42]
    flags += ["--prompt", "a red ball moves right", "--sample_steps", 50 if CUDA else 10]
    ours = [SCRIPT, "--wan_repo", STAND_IN]

    def make(name: str, command: list[Any], *more: object) -> bytes:
        python(*command, *flags, "--save_file", folder / f"{name}.mp4", *more)
        return (folder / f"{name}.mp4").read_bytes()

    stock = make("stock", [STAND_IN / "generate.py"])
    yield "threshold 0 is stock", make("off", ours, "--teacache_thresh", 0) == stock
    skipping = make("skipping", ours, "--teacache_thresh", 0.08)
    yield "skipping changes the video", skipping != stock
    record = json.loads((folder / "skipping.json").read_text())
    yield "computed at 0.08", f"{len(record['computed'])} of {record['steps']}"
    yield "drift at 0.08", record["drift"]
    order_1 = make("order1", ours, "--teacache_thresh", 0.08, "--teacache_order", 1)
    yield "order 1 changes it again", order_1 != skipping
    video = ["--save_file", folder / "kept.mp4", "--teacache_thresh", 0.08]
    failing = ["-c", FAILING_VAE, STAND_IN, TESTS.parent, "--wan_repo", STAND_IN, *flags, *video]
    subprocess.run([sys.executable, *map(str, failing)], capture_output=True)
    python(*ours, "--teacache_decode", folder / "kept.latents.pt")
    yield "decoded latents give the same video", (folder / "kept.mp4").read_bytes() == skipping
    compared = ["--teacache_compare", 0.08, "sigma:1.5x@1"]
    python(*ours, *flags, "--save_file", folder / "x.mp4", *compared)
    for row in json.loads((folder / "x.compare.json").read_text()):
        yield f"compare: PSNR of {row['label']}, dB", row["psnr"] or "infinite"


# --------------------------------------------------------- 2: the real Wan code with tiny models

CASES21 = ("20-steps", "t2v-1.3B-ret", "sigma-i2v", "order-1-ret", "vace-1.3B")
CASES22 = ("t2v", "ti2v-image-rule", "ti2v-image-order-1")


def try_real_wan(folder: Path) -> Rows:
    """Compare frames of generate.py with TeaCache with the frames of the reference."""
    import cases

    releases = [(cases.WAN21, cases.CASES21, CASES21), (cases.WAN22, cases.CASES22, CASES22)]
    for repo, known, names in releases:
        out = folder / repo.name
        out.mkdir()
        chosen = {name: known[name] for name in (names if CUDA else names[:1])}
        (out / "jobs.json").write_text(json.dumps(cases.jobs_of_cases(chosen, out)))
        command = [Path(__file__), "--harness", "--repo", repo, out / "jobs.json", out]
        done = cases.Done(out, python(*command))
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
    seeded, small_model = harness.seeded, harness.make_model

    class Run(harness.Run):
        def decode(self, decode: Callable) -> list[Tensor]:
            return super().decode(lambda: [video.cpu() for video in decode()])

    class Reference(harness.Reference):
        def decide_by_embedding(self, module: Any, args: Any, output: Tensor) -> None:
            super().decide_by_embedding(module, args, output.cpu())

    class Autocast(torch.autocast):
        """Wan's own, unless the job is in float32."""

        def __init__(self, device_type: str = "cuda", *, dtype: Any = None, enabled: bool = True):
            float32 = harness.Autocast.float32
            super().__init__("cuda", dtype=dtype, enabled=enabled and not float32)

    torch.amp.autocast = torch.cuda.amp.autocast = Autocast
    harness.prepare, harness.CPU = prepare_imports, DEVICE
    harness.seeded = lambda *shape: seeded(*shape).to(DEVICE)
    harness.make_model = lambda *args, **kwargs: small_model(*args, **kwargs).to(DEVICE)
    harness.Run, harness.Reference = Run, Reference


# ---------------------------------------------------------------------- 3, 5: models of full size

SIZE, FRAMES = (832, 480) if CUDA else (160, 96), 81
MODEL = {} if CUDA else {"dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2}
# What bench_scale.py predicts: seconds of a stock step on an A800; GiB at stock's peak; with orders
# 0 and 1 the GiB above that, and the cost of a skipped step in % of a computed one
SIMULATED = {
    "t2v-1.3B": (3.43, 7.35, ((0.31, 0.13), (0.69, 0.19))),
    "t2v-14B": (18.9, 59.9, ((1.04, 0.08), (2.29, 0.12))),
}


class Run(NamedTuple):
    """What one ``generate`` took."""

    seconds: np.ndarray  # of each step
    computed: list[int]  # steps
    peak: int  # bytes
    at_vae: int  # bytes alive as the VAE begins


def observe(pipeline: Any, config: TeaCacheConfig) -> Run:
    marks, memory, calls = [], [0, 0], itertools.count()

    def mark() -> None:
        if CUDA:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    def called(*_: Any) -> None:
        if next(calls) % 2 == 0:  # a step has two calls
            mark()

    def decode(latents: list[Tensor]) -> list[Tensor]:
        mark()
        if CUDA:
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
    return Run(np.diff(marks), cache.computed_steps, *memory)


def measure_full_size(task: str, steps: int) -> Rows:
    """Measure stock, then half of the steps with orders 0 and 1."""
    prepare_imports(WAN) if CUDA else harness.prepare(WAN)
    import_wan(str(WAN), generates=True)
    torch.manual_seed(0)
    model = make_model(task, DEVICE, **MODEL)
    nn.init.normal_(model.head.head.weight, std=model.dim**-0.5)  # zero in a new model
    pipeline = make_pipeline(task, DEVICE, {"model": model})
    observe(pipeline, TeaCacheConfig(2, 0.0))  # warms up
    stock = observe(pipeline, TeaCacheConfig(steps, 0.0))
    step_seconds, peak, of_orders = SIMULATED[task]
    a_step = float(np.median(stock.seconds))
    yield f"stock: a step, s (simulated {step_seconds} on an A800)", a_step
    yield "stock: sampling, s", float(stock.seconds.sum())
    yield f"stock: peak, GiB (simulated {peak})", stock.peak / GIB
    for order in (0, 1):
        # increments of 0: only the forced steps are computed
        script = tuple(range(0, steps, 2))
        config = TeaCacheConfig(steps, 1.0, (0.0,), order=order, forced_steps=script)
        for name, value in compare(observe(pipeline, config), stock, *of_orders[order]):
            yield f"order {order}: {name}", value


def compare(run: Run, stock: Run, above: float, share: float) -> Rows:
    """Compare a run with stock.

    above, share: simulated GiB above stock, and cost of a skipped step in % of a computed one.
    """
    seconds, count = run.seconds, len(run.computed)
    computed, skipped = seconds[run.computed], np.delete(seconds, run.computed)
    ratio = float(np.median(skipped) / np.median(computed))
    yield f"{count} of {len(seconds)} steps, speed-up", float(stock.seconds.sum() / seconds.sum())
    yield f"skipped by computed step, % (simulated {share})", 100 * ratio
    yield f"peak above stock, GiB (simulated {above})", (run.peak - stock.peak) / GIB
    yield "above stock as the VAE begins, GiB", (run.at_vae - stock.at_vae) / GIB


# ----------------------------------------------------------------------------------- 4: attention


def measure_attention(folder: Path) -> Rows:
    """PyTorch's attention beside flash-attn's, for t2v-1.3B at 480P (bfloat16)."""
    tokens = 32760 if CUDA else 128
    q, k, v = torch.randn(3, 1, tokens, 12, 128, device=DEVICE).bfloat16()
    lens = torch.tensor([tokens], device=DEVICE)
    kernel = torch._fused_sdp_choice(*(u.transpose(1, 2) for u in (q, k, v)))
    yield "PyTorch's kernel", torch.nn.attention.SDPBackend(kernel).name
    yield "PyTorch's, ms", milliseconds(lambda: sdpa_attention(q, k, v, k_lens=lens))
    one_head = (u[:, :, :1].transpose(1, 2).float() for u in (q, k, v))
    exact = F.scaled_dot_product_attention(*one_head).transpose(1, 2)
    ours = sdpa_attention(q, k, v, k_lens=lens)
    yield "PyTorch's off float32 by", float((ours[:, :, :1] - exact).abs().max())
    prepare_imports(WAN)
    prepare_flash_attention()
    try:
        from wan.modules.attention import flash_attention

        theirs = flash_attention(q, k, v, k_lens=lens)
    except Exception as error:  # each build has its own
        yield "flash-attn", f"cannot run: {str(error).splitlines()[0]:.60}"
        return
    yield "flash-attn's, ms", milliseconds(lambda: flash_attention(q, k, v, k_lens=lens))
    yield "PyTorch's off flash-attn's by", float((ours - theirs).abs().max())


def milliseconds(call: Callable[[], Any]) -> float:
    return 1000 * Timer("call()", globals={"call": call}).blocked_autorange().median


# ----------------------------------------------------------------------------------------- parts

PARTS: dict[int, tuple[str, Callable[[Path], Rows], int]] = {  # name, function, limit in seconds
    1: ("the stand-in", try_stand_in, 150),
    2: ("the real Wan code, tiny models", try_real_wan, 150),
    3: ("t2v-1.3B at 480P", lambda folder: measure_full_size("t2v-1.3B", 10), 100),
    4: ("attention", measure_attention, 40),
    5: ("t2v-14B at 480P", lambda folder: measure_full_size("t2v-14B", 4), 200),
}


def machine() -> str:
    """What the results depend on."""
    name = torch.cuda.get_device_name() if CUDA else "no GPU: small sizes, nothing is measured"
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"{name}, {build}, {platform.machine()}, {time.strftime('%Y-%m-%d')}"


def run_part(number: int, limit: float) -> dict[str, Any]:
    """A part in a process of its own: status, seconds and rows."""
    command, began = [sys.executable, __file__, "--part", str(number)], time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit)
        output, failed = done.stdout, f"failed: {done.stderr[-2000:].decode()}"
        status = failed if done.returncode else "ended"
    except subprocess.TimeoutExpired as error:
        output, status = error.stdout or b"", f"stopped after {limit:.0f} s"
    seconds, rows = round(time.perf_counter() - began, 1), rows_in(output.decode(errors="replace"))
    return {"part": PARTS[number][0], "status": status, "seconds": seconds, "rows": rows}


def print_rows(number: int) -> None:
    """Run a part here; print its rows as they come, among what Wan prints."""
    with tempfile.TemporaryDirectory() as folder:
        for row in PARTS[number][1](Path(folder)):
            print(ROW + json.dumps(row), flush=True)


def rows_in(output: str) -> list[Any]:
    lines = [line for line in output.splitlines() if line.startswith(ROW)]
    return [json.loads(line.removeprefix(ROW)) for line in lines]


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The table."""
    yield report["machine"]
    for number, part in report["parts"].items():
        yield f"{number}. {part['part']}: {part['status']} ({part['seconds']} s)"
        for name, value in part["rows"]:
            text = {True: "yes", False: "NO"}[value] if isinstance(value, bool) else value
            yield f"   {name:52} {text if not isinstance(text, float) else f'{text:.4g}'}"


def main() -> None:
    if "--harness" in sys.argv:
        sys.argv.remove("--harness")
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
    began, report = time.perf_counter(), {"machine": machine(), "parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for number in [args.only] if args.only else PARTS:
        left = TOTAL_SECONDS - (time.perf_counter() - began)
        report["parts"][number] = run_part(number, min(PARTS[number][2], max(left, 1)))
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1))
    print("\n".join(lines(report)))


if __name__ == "__main__":
    main()
