"""The script on the stand-in ``wan_nano``: what the tests of it share."""

import os
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np

from teacache_generate import main

HERE = Path(__file__).resolve().parent
SCRIPT, NANO = HERE.parent / "teacache_generate.py", HERE / "wan_nano"
RULE = ["--teacache_rule", "t2v-1.3B"]
PROMPT = ["--prompt", "a red ball moves right", "--base_seed", "42"]


def python(*argv: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """A command as a user gives it."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=600,
    )


def attempt(capsys, *argv: object) -> tuple[int, str]:
    """Exit status of the script in this process, and all that it said."""
    code = 0
    try:
        main(["--wan_repo", str(NANO), *map(str, argv)])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def frames(video: Path) -> np.ndarray:
    with imageio.get_reader(video) as reader:
        return np.stack([np.asarray(frame) for frame in reader]).astype(int)
