"""What the tests on the real Wan2.1 and Wan2.2 share: cases, their jobs, and the check of a case.

A case is a command line on which the script is to do what ``harness.Reference`` does. It knows
nothing of the script but its flags and its report.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CATS = "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage."

LINES = (  # of a file of jobs, a video each; the first two differ in the prompt alone
    ["--prompt", CATS],
    ["--prompt", "A red ball moves right.", "--base_seed", "7"],
    ["--prompt", CATS, "--teacache_thresh", "0"],
)

# Rows as published, by mode: coefficients, highest power first, and the default threshold.
# fmt: off
PUBLISHED = {
    "plain": {
        "t2v-1.3B": ((2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), 0.08),
        "t2v-14B": (
            (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), 0.2),
        "i2v-14B-480P": ((-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289), 0.26),
        "i2v-14B-720P": (
            (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), 0.3),
    },
    "ret": {
        "t2v-1.3B": ((-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), 0.1),
        "t2v-14B": ((-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.2),
        "i2v-14B-480P": ((257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), 0.3),
        "i2v-14B-720P": ((8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401), 0.3),
    },
}
# fmt: on


@dataclass
class Case:
    """flags: of generate.py. ours: of the script. reference: settings of ``harness.Reference``;
    a thresh of None is the script's default, as its report tells it. float32: blocks too."""

    flags: list[str]
    ours: list[str]
    reference: dict[str, Any]
    float32: bool = False

    def jobs(self, name: str, out: Path) -> list[dict[str, Any]]:
        """The run with TeaCache, the reference and stock."""
        ending, report = "png" if "t2i-14B" in self.flags else "mp4", str(out / f"{name}.json")

        def job(mode: str, argv: list[str], **more: Any) -> dict[str, Any]:
            video = ["--save_file", str(out / f"{name}.{mode}.{ending}")]
            more |= {"name": f"{name}.{mode}", "mode": mode, "float32": self.float32}
            return {"argv": [*argv, *video], **more}

        reference = {**self.reference}
        if reference["thresh"] is None:
            reference["thresh"] = report
        return [
            job("teacache", [*self.flags, *self.ours, "--teacache_report", report]),
            job("reference", self.flags, **reference),
            job("stock", self.flags),
        ]


def with_row(row: str, flags: list[str], *ours: str, thresh: float | None = None) -> Case:
    """A case of a published row, at its default threshold if none is given."""
    method = "ret" if "--use_ret_steps" in ours else "plain"
    coefficients, default = PUBLISHED[method][row]
    given = [] if thresh is None else ["--teacache_thresh", str(thresh)]
    settings = {"method": method, "coefficients": coefficients, "thresh": thresh or default}
    return Case(flags, [*ours, *given], settings)


def with_sigma(flags: list[str], *ours: str, thresh: float | None = None) -> Case:
    """A case of the row without coefficients."""
    given = [] if thresh is None else ["--teacache_thresh", str(thresh)]
    return Case(flags, [*ours, *given], {"method": "sigma", "thresh": thresh})


def order_1(case: Case) -> Case:
    """In float32: the last bit of a residual depends on how the line is written down, and in 50
    steps of bfloat16 it grows to two thirds of what skipping does."""
    ours, reference = [*case.ours, "--teacache_order", "1"], {**case.reference, "order": 1}
    return Case(case.flags, ours, reference, float32=True)


def guided_until(case: Case, share: float, steps: int) -> Case:
    """steps: the number of the first step whose unconditional call is left out."""
    ours = [*case.ours, "--teacache_guide_until", str(share)]
    return Case(case.flags, ours, {**case.reference, "guided_steps": steps}, case.float32)


def stock_of(name: str, cases: dict[str, Case]) -> str:
    """The case whose stock run serves: the first with the same flags of generate.py."""

    def asked(name: str) -> tuple[list[str], bool]:
        return cases[name].flags, cases[name].float32

    return next(other for other in cases if asked(other) == asked(name))


def jobs_of_all(names: Iterable[str], cases: dict[str, Case], out: Path) -> list[dict[str, Any]]:
    jobs = [job for name in names for job in cases[name].jobs(name, out)]
    needed = {f"{stock_of(name, cases)}.stock" for name in names}
    return [job for job in jobs if job["mode"] != "stock" or job["name"] in needed]


def jobs_file(out: Path, name: str, ending: str = "mp4") -> Path:
    """A file for --teacache_jobs."""
    files = (str(out / f"{name}.{i}.{ending}") for i in range(len(LINES)))
    lines = ([*line, "--save_file", file] for line, file in zip(LINES, files, strict=True))
    file = out / f"{name}.txt"
    file.write_text("".join(f"{shlex.join(line)}\n" for line in lines))
    return file


def single_of(
    line: list[str], argv: list[str], out: Path, name: str, ending: str = "mp4"
) -> dict[str, Any]:
    """A line of a file of jobs, as a run of its own."""
    video = ["--save_file", str(out / f"{name}.{ending}")]
    return {"name": name, "mode": "teacache", "argv": [*argv, *line, *video]}


def run(repo: Path, jobs: list[dict[str, Any]], out: Path, processes: int = 1) -> str:
    """Run the jobs; what they printed."""
    (out / "jobs.json").write_text(json.dumps(jobs))
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*python, str(HERE / "harness.py"), "--repo", str(repo), str(out / "jobs.json"), str(out)],
        capture_output=True,
        text=True,
        cwd=out,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def left(out: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What was seen of a job."""
    return json.loads((out / f"{name}.rank{rank}.json").read_text())


def frames(out: Path, name: str) -> np.ndarray:
    return np.load(out / f"{name}.npy")


def printed(log: str, name: str) -> str:
    """What a job printed, on stdout and on stderr."""
    return "\n".join(part.split("\n=== ")[0] for part in log.split(f"=== {name}\n")[1:])


def agree(ours: np.ndarray, case: Case, reference: np.ndarray, stock: np.ndarray) -> bool:
    """To the bit; at order 1, see there, nearer than stock by far; in bfloat16 at least nearer."""
    if not case.reference.get("order"):
        return np.array_equal(ours, reference)
    allowed = 0.01 if case.float32 else 1.0
    return bool(np.abs(ours - reference).mean() < allowed * np.abs(reference - stock).mean())


def check(out: Path, name: str, cases: dict[str, Case]) -> None:
    """TeaCache did what the reference did, to the bit, and something else than stock."""
    ours, reference = left(out, f"{name}.teacache"), left(out, f"{name}.reference")
    settings = cases[name].reference
    assert (ours["exit"], ours["error"]) == (0, None)
    assert (reference["exit"], reference["error"]) == (0, None)
    assert [conditional for conditional, _ in ours["steps"]] == reference["computed"]
    guided = settings.get("guided_steps", len(ours["steps"]))
    for step, (conditional, unconditional) in enumerate(ours["steps"]):
        assert unconditional == (conditional and step < guided)
    if ours["vace_steps"] is not None:
        assert ours["vace_steps"] == ours["steps"]
    assert ours["models"] == reference["models"]
    assert ours["restored"]
    (video,) = (file for file in out.glob(f"{name}.teacache.*") if file.suffix in (".mp4", ".png"))
    assert video.stat().st_size > 0

    stock = frames(out, f"{stock_of(name, cases)}.stock")
    with_teacache = frames(out, f"{name}.teacache")
    assert agree(with_teacache, cases[name], frames(out, f"{name}.reference"), stock)
    skipped = reference["computed"].count(False)
    assert np.array_equal(with_teacache, stock) == (skipped == 0 and guided == len(ours["steps"]))
    assert skipped >= len(reference["computed"]) // 5 or name == "1-step"

    report = json.loads((out / f"{name}.json").read_text())
    assert report["status"] == "finished"
    assert [step["computed"] for step in report["steps"]] == reference["computed"]
    assert report["computed"] == [i for i, u in enumerate(reference["computed"]) if u]


def check_two_ranks(out: Path, name: str, cases: dict[str, Case]) -> None:
    """Both ranks did what the reference did, at the same steps."""
    check(out, name, cases)
    first, second = (left(out, f"{name}.teacache", rank) for rank in (0, 1))
    assert (second["exit"], second["error"], second["restored"]) == (0, None, True)
    assert second["steps"] == first["steps"]
    assert second["vace_steps"] == first["vace_steps"]


def check_jobs_of_two_ranks(out: Path, name: str) -> None:
    """A file of jobs with one load a rank: the first video is that of a case, the last is stock."""
    for rank in (0, 1):
        seen = left(out, "jobs", rank)
        assert (seen["exit"], seen["error"], seen["constructed"]) == (0, None, 1)
    assert np.array_equal(frames(out, "jobs"), frames(out, f"{name}.teacache"))
    assert np.array_equal(frames(out, "jobs.2"), frames(out, f"{name}.stock"))


def comparison(flags: list[str], out: Path, name: str) -> list[str]:
    """Stock, stock with noise and half of the steps, of one prompt and seed."""
    target = out / f"{name}.compared.{'png' if name == 't2i' else 'mp4'}"
    ours = ["--teacache_model", "sigma", "--teacache_compare", "2x"]
    return [*flags, *ours, "--save_file", str(target)]


def check_comparison(out: Path, job: str, name: str) -> None:
    """One load, three videos, and the PSNR of their bytes against stock's."""
    seen, table = left(out, job), json.loads((out / f"{name}.compared.compare.json").read_text())
    assert (seen["exit"], seen["error"]) == (0, None)
    assert (seen["constructed"], seen["restored"], len(seen["decoded"])) == (1, True, 3)
    assert [row["label"] for row in table] == ["stock", "noise 1e-4", "2x"]
    assert [row["computed"] for row in table] == [20, 20, 10]
    videos = [frames(out, f"{job}{n}") for n in ("", ".1", ".2")]
    as_bytes = [((v.clip(-1, 1) + 1) / 2 * 255).astype(np.uint8).astype(float) for v in videos]
    for row, video in zip(table[1:], as_bytes[1:], strict=True):
        error = ((video - as_bytes[0]) ** 2).mean()
        assert error > 0
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
    assert (out / f"{name}.compared.compare.png").stat().st_size > 0
    assert (out / f"{name}.compared.compare.mp4").is_file() == (name != "t2i")
