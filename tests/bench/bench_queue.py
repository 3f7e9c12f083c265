"""Videos a minute of a batch on the stand-in: one process, two with the queue, two with Ulysses.

    python tests/bench/bench_queue.py [--videos 8] [--rounds 2]

One thread a process. The three take turns. A rate counts from the beginning of the first video's
sampling, so that loading, the same for all, is left out, to the end of the last video. The table
has medians over the rounds; "whole command" includes Python's start and loading.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sampling import NANO, TESTS, machine, table

SCRIPT, STAND_IN = TESTS.parent / "teacache_generate.py", TESTS / "wan_nano"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
WAYS = {  # how Python is started, flags
    "1 process": ([], []),
    "2 processes, queue": (TORCHRUN, []),
    "2 processes, Ulysses": (TORCHRUN, ["--ulysses_size", "2"]),
}


def run(way: str, folder: Path, videos: int) -> tuple[float, float]:
    """Seconds of a batch of stock videos: from the first one's beginning, and of the command."""
    start, flags = WAYS[way]
    lines = (f"--prompt 'a red ball moves right' --base_seed {i}" for i in range(videos))
    jobs = [f"{line} --save_file {folder / f'{i}.mp4'}" for i, line in enumerate(lines)]
    (folder / "jobs.txt").write_text("\n".join(jobs))
    argv = [*start, SCRIPT, "--wan_repo", STAND_IN, "--ckpt_dir", NANO, *flags]
    argv += ["--teacache_jobs", folder / "jobs.txt", "--teacache_thresh", 0]
    began, first = time.time(), 0.0
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, argv)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            if not first and list(folder.glob("*.json")):
                first = time.time()
            time.sleep(0.02)
    ended, files = time.time(), list(folder.glob("*.mp4"))
    if process.returncode or len(files) != videos:
        sys.exit((folder / "log.txt").read_text()[-3000:])
    return max(file.stat().st_mtime for file in files) - first, ended - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                seconds[way].append(run(way, Path(folder), args.videos))
    rows = []
    for way, found in seconds.items():
        rate, whole = (60 * args.videos / np.median(found, axis=0)).tolist()
        rows.append({"": way, "videos a minute": rate, "whole command": whole})
    print(f"{machine()}, {args.videos} videos of 50 steps, {args.rounds} rounds")
    print(table(rows))


if __name__ == "__main__":
    main()
