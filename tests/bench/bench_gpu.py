"""Tries and measures the script on one GPU, with random weights: see gpu.sh, which starts it.

Each part is a process with a limit of its own. Its rows so far are in the JSON when it ends; if it
fails or takes too long the next part runs. Host synchronisations are those that torch warns of. A
step lasts from its conditional call to the next step's, by CUDA events; the table has medians over
the steps. "above stock" is the peak of the allocator during sampling minus stock's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parents[1]
SCRIPT, STAND_IN = TESTS.parent / "teacache_generate.py", TESTS / "wan_nano"
sys.path[:0] = [str(TESTS.parent), str(TESTS / "real_wan")]

from gpu_full_size import CUDA, DEVICE, WAN, measure_full_size, prepare_imports  # noqa: E402

from teacache_generate import prepare_flash_attention, sdpa_attention  # noqa: E402

TOTAL_SECONDS = 460
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
repo, script, *argv = sys.argv[1:]
sys.path[:0] = [repo, script]
from wan.modules.vae import WanVAE
def decode(*_):
    raise OSError("not decoded, for the test")
WanVAE.decode = decode
import teacache_generate
teacache_generate.main(argv)
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

CASES = {
    "WAN_REPO": ("20-steps", "t2v-1.3B-ret", "sigma-i2v", "order-1-ret", "vace-1.3B"),
    "WAN22_REPO": ("t2v", "ti2v-image-rule", "ti2v-image-order-1"),
}


def try_real_wan(folder: Path) -> Rows:
    """Frames of generate.py with TeaCache against those of the independent reference."""
    import cases

    releases = [(cases.WAN21, cases.CASES21), (cases.WAN22, cases.CASES22)]
    for (repo, of_release), names in zip(releases, CASES.values(), strict=True):
        out = folder / repo.name
        out.mkdir()
        chosen = {name: of_release[name] for name in (names if CUDA else names[:1])}
        (out / "jobs.json").write_text(json.dumps(cases.jobs_of_cases(chosen, out)))
        command = [Path(__file__), "--harness", "--repo", repo, out / "jobs.json", out]
        done = cases.Done(out, python(*command))
        for name in chosen:
            try:
                cases.check(done, name, chosen)
                yield f"{repo.name} {name}", True
            except AssertionError as error:
                ours, reference = (
                    done.frames(f"{name}.{mode}") for mode in ("teacache", "reference")
                )
                yield f"{repo.name} {name}", f"off by {abs(ours - reference).max():.2g}"
                print(f"{name}: {error}", file=sys.stderr)


def run_harness() -> None:
    """real_wan/harness.py; on CUDA with its models, stand-ins and inputs on the GPU."""
    import harness

    if CUDA:
        put_on_gpu(harness)
    harness.main()


def put_on_gpu(harness: Any) -> None:
    seeded, small_model = harness.seeded, harness.make_model

    class Run(harness.Run):
        def decode(self, decode: Callable) -> list[torch.Tensor]:
            return super().decode(lambda: [video.cpu() for video in decode()])

    class Reference(harness.Reference):
        def decide_by_signal(self, module: Any, args: Any, output: torch.Tensor) -> None:
            super().decide_by_signal(module, args, output.cpu())

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
    """Median of 5 calls, after one."""
    times = []
    for _ in range(6):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times[1:])[2]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------- parts

PARTS: dict[int, tuple[str, Callable[[Path], Rows], int]] = {  # name, function, limit in seconds
    1: ("the stand-in", try_stand_in, 150),
    2: ("the real Wan code, tiny models", try_real_wan, 150),
    3: ("t2v-1.3B at 480P", lambda folder: measure_full_size("t2v-1.3B", 10), 100),
    4: ("attention", measure_attention, 40),
    5: ("t2v-14B at 480P", lambda folder: measure_full_size("t2v-14B", 4), 200),
}


def machine() -> dict[str, Any]:
    """What the results depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.check_output(query, text=True).split()[0] if CUDA else None
    gpu = torch.cuda.get_device_name() if CUDA else "none: small sizes, nothing is measured"
    machine = {"gpu": gpu, "driver": driver, "torch": torch.__version__}
    return machine | {"platform": platform.machine(), "date": time.strftime("%Y-%m-%d")}


def run_part(number: int, limit: float) -> dict[str, Any]:
    """A part in a process of its own: status, seconds and rows."""
    began, result = time.perf_counter(), {"part": PARTS[number][0], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--part", str(number), "--rows", str(rows)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            status = "ended" if done.returncode == 0 else f"failed: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        if rows.is_file():
            result["rows"] = json.loads(rows.read_text())
    return result | {"status": status, "seconds": round(time.perf_counter() - began, 1)}


def write_rows(number: int, file: Path) -> None:
    """Run a part here; write its rows as they come."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in PARTS[number][1](Path(folder)):
            rows.append(row)
            file.write_text(json.dumps(rows))


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The table."""
    yield ", ".join(str(value) for value in report["machine"].values() if value)
    for number, part in report["parts"].items():
        yield f"{number}. {part['part']}: {part['status']} ({part['seconds']} s)"
        for name, value in part["rows"]:
            text = {True: "yes", False: "NO"}[value] if isinstance(value, bool) else value
            yield f"   {name:52} {text if not isinstance(text, float) else f'{text:.4g}'}"


def main() -> None:
    if "--harness" in sys.argv:
        sys.argv.remove("--harness")
        run_harness()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, choices=PARTS, help="a part's number")
    parser.add_argument("--out", type=Path, default=Path(os.getenv("OUT", ".")))
    parser.add_argument("--part", type=int, choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        write_rows(args.part, args.rows)
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
