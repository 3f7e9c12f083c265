"""Seconds and memory of a plan for a checkpoint of 14B size, made in a temporary folder.

    python tests/bench/bench_plan.py [--wan_repo tests/wan_nano] [--folder FOLDER]

The checkpoint is sharded as the published one is (7 files, float32, 53 GiB). Its time embedding and
projection are random; all other tensors are holes in sparse files, which a plan must not read.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1]
DIM, FFN, LAYERS, FREQ, SHARDS = 5120, 13824, 40, 256, 7
WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAN = """
import runpy, sys
repo, *sys.argv = sys.argv[1:]
sys.path.insert(0, repo)
from wan.configs import WAN_CONFIGS
for config in WAN_CONFIGS.values():
    config.dim = {dim}  # the stand-in has no task of the size of 14B
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Wan2.1 t2v-14B transformer that have most of its size, and the time ones."""
    found: dict[str, tuple[int, ...]] = {
        "time_embedding.0.weight": (DIM, FREQ),
        "time_embedding.0.bias": (DIM,),
        "time_embedding.2.weight": (DIM, DIM),
        "time_embedding.2.bias": (DIM,),
        "time_projection.1.weight": (6 * DIM, DIM),
        "time_projection.1.bias": (6 * DIM,),
    }
    for i in range(LAYERS):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                found[f"blocks.{i}.{attention}.{part}.weight"] = (DIM, DIM)
        found[f"blocks.{i}.ffn.0.weight"] = (FFN, DIM)
        found[f"blocks.{i}.ffn.2.weight"] = (DIM, FFN)
    return found


def make_checkpoint(folder: Path) -> int:
    """Write the shards, their index and config.json; the size of all in bytes."""
    generator, total, weight_map = torch.Generator().manual_seed(0), 0, {}
    names = list(shapes())
    for i in tqdm(range(SHARDS), desc="shards"):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        header, offset = {}, 0
        for name in names[i::SHARDS]:
            size = 4 * math.prod(shapes()[name])
            header[name] = {
                "dtype": "F32",
                "shape": shapes()[name],
                "data_offsets": [offset, offset + size],
            }
            offset, weight_map[name] = offset + size, file
        head = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name in header:
                if name.startswith("time_"):
                    values = torch.randn(shapes()[name], generator=generator) * 0.03
                    out.seek(8 + len(head) + header[name]["data_offsets"][0])
                    out.write(values.numpy().tobytes())
            out.truncate(8 + len(head) + offset)
        total += offset
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"dim": DIM}))
    return total


def measure(repo: Path, folder: Path, flags: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of one plan, from Python's start to its end; needs Linux's /proc."""
    code = PLAN.format(dim=DIM)
    script = [TESTS.parent / "teacache_generate.py", "--wan_repo", repo, "--ckpt_dir", folder]
    asked = [*script, "--teacache_model", "t2v-14B", "--teacache_plan", *flags]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, [repo, *asked])], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    return seconds, int(done.stdout.rsplit("peak ", 1)[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan_repo", type=Path, default=TESTS / "wan_nano")
    parser.add_argument("--folder", help="where to make the checkpoint; needs 1 GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = make_checkpoint(Path(folder))
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"checkpoint of {size / 2**30:.0f} GiB in {SHARDS} shards")
        print("mode             seconds  peak GiB")
        for mode, flags in (("plain", []), ("retention steps", ["--use_ret_steps"])):
            runs = [measure(args.wan_repo.resolve(), Path(folder), flags) for _ in range(3)]
            print(f"{mode:15}  {max(s for s, _ in runs):7.1f}  {max(g for _, g in runs):8.2f}")
    print("the largest of 3 runs each, from the start of Python to its end")


if __name__ == "__main__":
    main()
