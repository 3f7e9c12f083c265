"""Cases on the real Wan2.1 and Wan2.2: command lines on which the script must give the frames of
``harness.Reference``, how they are run, and the check of one.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
HARNESS, Jobs = HERE / "harness.py", list[dict[str, Any]]
WAN21 = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
WAN22 = Path(os.getenv("WAN22_REPO", "~/.cache/teacache4wan/Wan2.2")).expanduser()
CATS = "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage."
RET = "--use_ret_steps"
SIGMA = ("--teacache_rule", "sigma")

# As published: method, rule, thresholds (the last is the default), coefficients from the highest
# power on.
PUBLISHED = """
plain t2v-1.3B .05/.07/.08 2396.76752 -1311.10545 201.331979 -8.29855975 0.137887774
plain t2v-14B .14/.15/.2 -5784.54975374 5449.50911966 -1811.16591783 256.27178429 -13.02252404
plain i2v-14B-480P .13/.19/.26 -302.331670 223.948934 -52.5463970 5.87348440 -0.201973289
plain i2v-14B-720P .18/.2/.3 -114.36346466 65.26524496 -18.82220707 4.91518089 -0.23412683
ret t2v-1.3B .05/.1 -52186.2437 9230.41404 -528.275948 13.6987616 -0.0499875664
ret t2v-14B .1/.2 -303318.725 49053.7029 -2655.30556 58.7365115 -0.315583525
ret i2v-14B-480P .2/.3 257151.496 -35422.9917 1402.86849 -13.5890334 0.132517977
ret i2v-14B-720P .2/.3 8107.05460 2133.93892 -372.934672 16.6203073 -0.0417769401
"""


def published(method: str, rule: str) -> tuple[list[float], list[float]]:
    """Thresholds and coefficients."""
    (line,) = [u for u in PUBLISHED.splitlines() if u.startswith(f"{method} {rule} ")]
    thresholds, *coefficients = line.split()[2:]
    return [*map(float, thresholds.split("/"))], [*map(float, coefficients)]


def teacache(name: str, argv: list[str], **more: Any) -> dict[str, Any]:
    """A job of harness.py that runs the script."""
    return {"name": name, "mode": "teacache", "argv": argv, **more}


@dataclass(frozen=True)
class Case:
    """A command line: ``flags`` of generate.py and ``ours``.

    reference: settings of ``harness.Reference``. A thresh of None is the script's default, which is
    read from its record.
    """

    flags: list[str]
    ours: list[str]
    reference: dict[str, Any]

    @property
    def ending(self) -> str:
        return ".png" if "t2i-14B" in self.flags else ".mp4"

    def job(self, mode: str, name: str, out: Path) -> dict[str, Any]:
        """The job of harness.py for a mode: teacache, reference or stock."""
        ours = self.ours if mode == "teacache" else []
        argv = [*self.flags, *ours, "--save_file", str(out / f"{name}.{mode}{self.ending}")]
        # with order 1, bfloat16 would enlarge the rounding error of the line
        float32 = bool(self.reference["order"])
        job = {**teacache(f"{name}.{mode}", argv), "mode": mode, "float32": float32}
        if mode == "reference":
            job |= self.reference
            if job["thresh"] is None:
                job["thresh"] = str(out / f"{name}.teacache.json")
        return job


def by_sigma(
    flags: list[str], *ours: str, thresh: float | None = None, default: float | None = None,
    order: int = 0, until: float = 1, **reference: Any,
) -> Case:  # fmt: skip
    """A case of rule "sigma". default: the threshold that the script must take without a flag."""
    argv = [*ours, "--teacache_order", str(order), "--teacache_guide_until", str(until)]
    argv += [] if thresh is None else ["--teacache_thresh", str(thresh)]
    thresh = default if thresh is None else thresh
    return Case(flags, argv, {"method": "sigma", "thresh": thresh, "order": order, **reference})


def by_rule(rule: str, flags: list[str], *ours: str, **settings: Any) -> Case:
    """A case of a published polynomial, at its default threshold if none is given."""
    settings["method"] = "ret" if RET in ours else "plain"
    (*_, settings["default"]), settings["coefficients"] = published(settings["method"], rule)
    return by_sigma(flags, *ours, **settings)


def command(task: str, size: str, *flags: str) -> list[str]:
    common = ["--task", task, "--size", size, "--ckpt_dir", "AUTO", "--prompt", CATS]
    return [*common, "--base_seed", "42", *flags]


# ------------------------------------------------------------------------------------- Wan2.1

SHORT = ("--sample_steps", "20", "--frame_num", "17")  # where a case needs no more
T2V_FULL = command("t2v-1.3B", "832*480", "--frame_num", "17")
T2V = [*T2V_FULL, "--sample_steps", "20"]
T2V_14B = command("t2v-14B", "1280*720", "--t5_cpu", *SHORT)
IMAGE = str(WAN21 / "examples" / "i2v_input.JPG")
I2V_480P = command("i2v-14B", "832*480", "--image", IMAGE, *SHORT)
I2V_720P = command("i2v-14B", "1280*720", "--image", IMAGE, *SHORT)
T2I = command("t2i-14B", "1024*1024", "--sample_steps", "20")
FRAMES = ("--first_frame", IMAGE, "--last_frame", IMAGE)
FLF2V = command("flf2v-14B", "832*480", *FRAMES, "--sample_steps", "10")  # always 81 frames
VACE = command("vace-1.3B", "832*480", "--src_ref_images", f"{IMAGE},{IMAGE}", *SHORT)
VIDEO = "t2v-14B.teacache.mp4"  # of an earlier job
VACE_VIDEO = ("--src_video", VIDEO, "--src_mask", VIDEO)
DPM = [*T2V, "--sample_solver", "dpm++"]
UNIPC_FAILS = [*T2V_FULL, "--sample_steps", "80", "--sample_shift", "16"]
MANY_TOKENS = [*T2V_14B, "--frame_num", "281", "--sample_steps", "8"]
CASES21 = {  # the first four are README's
    "t2v-1.3B": by_rule("t2v-1.3B", T2V_FULL, thresh=0.08),
    "t2v-14B": by_rule("t2v-14B", T2V_14B, thresh=0.2),
    "i2v-480P": by_rule("i2v-14B-480P", I2V_480P, thresh=0.26),
    "i2v-720P": by_rule("i2v-14B-720P", I2V_720P, thresh=0.3),
    "20-steps": by_rule("t2v-1.3B", T2V),
    "t2v-1.3B-ret": by_rule("t2v-1.3B", T2V, RET),
    "i2v-480P-ret": by_rule("i2v-14B-480P", I2V_480P, RET),
    "t2i-14B": by_rule("t2v-14B", T2I),
    "1-step": by_rule("t2v-1.3B", [*T2V, "--sample_steps", "1"]),
    "sigma": by_sigma(T2V, *SIGMA),
    "sigma-i2v": by_sigma(I2V_720P, *SIGMA, thresh=0.5),  # the limit binds
    "sigma-dpm-speedup": by_sigma(DPM, *SIGMA, "--teacache_speedup", "1.7"),
    "order-1-ret": by_rule("t2v-1.3B", T2V, RET, order=1),
    "order-1-dpm": by_sigma(DPM, *SIGMA, order=1),  # its first t is 1000
    "equal-timesteps": by_sigma([*DPM, "--sample_shift", "200"], *SIGMA, order=1),
    # of 1,065 tokens every second one is measured
    "order-1-many-tokens": by_sigma(MANY_TOKENS, *SIGMA, thresh=0.2, order=1),
    "guide-until": by_rule("t2v-1.3B", T2V, until=0.5, guided_steps=10),
    "guidance-1": by_rule("t2v-1.3B", [*T2V, "--sample_guide_scale", "1"], RET, guided_steps=0),
    "flf2v": by_sigma(FLF2V),
    "vace-1.3B": by_sigma(VACE),
    "vace-14B": by_sigma(command("vace-14B", "832*480", *VACE_VIDEO, *SHORT)),
    "vace-borrowed": by_rule("t2v-1.3B", VACE, "--teacache_rule", "t2v-1.3B"),
    "vace-order-1-guide-until": by_sigma(VACE, order=1, until=0.5, guided_steps=10),
    "off": by_sigma(T2V, thresh=0),
    "off-i2v": by_sigma(I2V_480P, thresh=0),
    "off-vace": by_sigma(VACE, thresh=0),
    "off-t2i-14B": by_sigma(T2I, thresh=0),
}
# the first release has no other tasks, and hard-codes the 81 frames of i2v
FIRST = {
    **{name: CASES21[name] for name in ("20-steps", "t2i-14B", "sigma-dpm-speedup")},
    "i2v": by_sigma([*I2V_480P, "--frame_num", "81"], *SIGMA),
}
FORK = {  # see fork.patch
    "plain": by_rule("t2v-1.3B", T2V),
    "ret": by_rule("t2v-1.3B", T2V, RET),
    "order-1": by_sigma(T2V, *SIGMA, order=1),
    "off": by_sigma(T2V, thresh=0),
}

# ------------------------------------------------------------------------------------- Wan2.2

IMAGE22 = ("--image", str(WAN22 / "examples" / "i2v_input.JPG"))
T2V_A14B = command("t2v-A14B", "832*480", *SHORT)
# step 10 is at the boundary, which is high noise
T2V_AT_875 = [*T2V_A14B, "--sample_solver", "dpm++", "--sample_shift", "7"]
I2V_A14B_40 = command("i2v-A14B", "832*480", *IMAGE22, "--frame_num", "17")
I2V_A14B = [*I2V_A14B_40, "--sample_steps", "20"]
TI2V = command("ti2v-5B", "1280*704", *SHORT)  # 5 x 15 tokens: two ranks pad it
TI2V_IMAGE = [*TI2V, *IMAGE22]
# forced: t2v 40 % of each model's steps, i2v all high-noise steps and a tenth of the others
T2V_13 = {"forced": [*range(6), 13, 14, 15, 19], "in_a_row": 2}  # of 20 steps 13 are high-noise
T2V_11 = {"forced": [*range(5), 11, 12, 13, 14, 19], "in_a_row": 2}
I2V_8 = {"forced": [*range(8), 8, 9, 19], "in_a_row": 2}
I2V_15 = {"forced": [*range(15), 15, 16, 17, 39], "in_a_row": 2}  # of 40
CASES22 = {
    "t2v": by_sigma(T2V_A14B, **T2V_13),
    "i2v": by_sigma(I2V_A14B, **I2V_8),
    "i2v-40": by_sigma(I2V_A14B_40, **I2V_15),
    "ti2v": by_sigma(TI2V),
    "ti2v-image": by_sigma(TI2V_IMAGE),
    "t2v-boundary": by_sigma(T2V_AT_875, **T2V_11),
    "t2v-order-1": by_sigma(T2V_A14B, **T2V_13, thresh=0.1, order=1),
    "i2v-order-1": by_sigma(I2V_A14B, **I2V_8, thresh=0.1, order=1),
    "ti2v-image-order-1": by_sigma(TI2V_IMAGE, thresh=0.1, order=1),
    "t2v-bfloat16": by_sigma([*T2V_A14B, "--convert_model_dtype"], **T2V_13, thresh=0.1),
    "ti2v-guide-until": by_sigma(TI2V, thresh=0.1, until=0.6, guided_steps=12),
    "t2v-guide-until": by_sigma(T2V_A14B, **T2V_13, thresh=0.1, until=0.75, guided_steps=15),
    # borrowed rules, which look at the last token's e: that of ti2v's first frame does not move
    "t2v-rule": by_rule("t2v-14B", T2V_A14B, "--teacache_rule", "t2v-14B"),
    "i2v-rule-ret": by_rule("i2v-14B-480P", I2V_A14B, RET, "--teacache_rule", "i2v-14B-480P"),
    "ti2v-image-rule": by_rule("t2v-14B", TI2V_IMAGE, "--teacache_rule", "t2v-14B"),
    "off-i2v": by_sigma(I2V_A14B, thresh=0),
    "off-ti2v-image": by_sigma(TI2V_IMAGE, thresh=0),
}

# ------------------------------------------------------------------------------- two processes

PARALLEL = {
    "ulysses": ["--ulysses_size", "2"],
    "ring": ["--ring_size", "2"],
    "fsdp": ["--dit_fsdp"],
    "all": ["--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp"],
}


def in_two_processes(cases: dict[str, Case], **names: str) -> dict[str, Case]:
    """Cases by the way in which two processes share them."""
    return {
        f"{name}.{way}": replace(cases[name], flags=[*cases[name].flags, *PARALLEL[way]])
        for way, of_way in names.items()
        for name in of_way.split()
    }


TWO21 = in_two_processes(
    CASES21,
    ulysses="20-steps vace-1.3B order-1-ret guide-until",
    ring="order-1-dpm",
    fsdp="t2v-1.3B-ret vace-1.3B",
    all="20-steps vace-borrowed",
)
TWO22 = in_two_processes(
    CASES22,
    ulysses="t2v i2v-order-1 ti2v-image t2v-guide-until",
    fsdp="ti2v-image-order-1",  # casts the timesteps of ti2v, which are floats
    all="t2v ti2v-image-rule",
)
TABLES = {  # by run: one checkout, in one process or two
    "w21": CASES21, "w22": CASES22, "first": FIRST, "two21": TWO21, "two22": TWO22, "fork": FORK,
}  # fmt: skip

# ------------------------------------------------------------------------ running, and checking


@dataclass(frozen=True)
class Done:
    """The files and the output that the jobs of a run have left."""

    out: Path
    log: str
    processes: int = 1

    def seen(self, name: str, rank: int = 0) -> dict[str, Any]:
        """What ``harness.Run`` saw of a job."""
        return json.loads((self.out / f"{name}.rank{rank}.json").read_text())

    def succeeded(self, name: str) -> dict[str, Any]:
        """What it saw on rank 0. All ranks succeeded, and ran the same passes."""
        ranks = [self.seen(name, rank) for rank in range(self.processes)]
        for seen in ranks:
            assert (seen["exit"], seen["error"], seen["restored"]) == (0, None, True)
            assert (seen["ran"], seen["vace_ran"]) == (ranks[0]["ran"], ranks[0]["vace_ran"])
        return ranks[0]

    def frames(self, name: str, video: int = 0, rank: int = 0) -> np.ndarray:
        return np.load(self.out / f"{name}.rank{rank}.{video}.npy")

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())

    def printed(self, name: str) -> str:
        """What a job printed to stdout and stderr."""
        return "\n".join(part.split("\n=== ")[0] for part in self.log.split(f"=== {name}\n")[1:])


def run(repo: Path, jobs: Jobs, out: Path, processes: int = 1, script: Path = HARNESS) -> Done:
    """Run jobs with harness.py, or another script in its place."""
    file = out / "jobs.json"
    file.write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun * (processes > 1), script, "--repo", repo, file, out]
    python = [sys.executable, *command]
    done = subprocess.run(python, capture_output=True, text=True, cwd=out, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return Done(out, done.stdout + done.stderr, processes)


def stock_of(name: str, cases: dict[str, Case]) -> str:
    """The case of the stock run: the first one with the same flags of generate.py and order."""
    keys = {n: (case.flags, case.reference["order"]) for n, case in cases.items()}
    return next(n for n in keys if keys[n] == keys[name])


def jobs_of_cases(cases: dict[str, Case], out: Path) -> Jobs:
    """Each case with TeaCache, as reference and, once for equal flags, as stock."""
    jobs = []
    for name, case in cases.items():
        modes = ["teacache", "reference", *["stock"] * (stock_of(name, cases) == name)]
        jobs += [case.job(mode, name, out) for mode in modes]
    return jobs


def check(done: Done, name: str, cases: dict[str, Case]) -> None:
    """The passes and frames equal the reference's, and differ from stock's if a step is skipped.
    At threshold 0 nothing is patched, and the file is stock's to the byte."""
    mine, stock = f"{name}.teacache", f"{stock_of(name, cases)}.stock"
    settings = cases[name].reference
    ours, reference = done.succeeded(mine), done.succeeded(f"{name}.reference")
    computed, off = reference["computed"], settings["thresh"] == 0
    guided = settings.get("guided_steps", len(computed))
    passes = [[runs, runs and step < guided] for step, runs in enumerate(computed)]
    assert ours["ran"] == [runs for step in passes for runs in step]
    assert ours["vace_ran"] == ours["ran"]
    assert off or computed.count(False) >= len(computed) // 5  # none of 1

    frames, expected = done.frames(mine), done.frames(f"{name}.reference")
    # with order 1 the sum may be rounded otherwise
    largest = np.abs(expected - done.frames(stock)).max()
    assert np.abs(frames - expected).max() <= 1e-4 * largest * settings["order"]
    assert np.array_equal(frames, done.frames(stock)) == all(ours["ran"])

    record, log = done.record(mine), done.printed(mine)
    assert (record["status"], record["frames"]) == ("finished", frames.shape[1])
    assert record["computed"] == [step for step, runs in enumerate(computed) if runs]
    assert log.count(f"computed {sum(computed)} of {len(computed)} steps") == 1  # by one rank
    if "--dit_fsdp" not in cases[name].flags:  # in bfloat16 distances differ from the plan's
        assert "other steps than planned" not in log
    if off:
        assert ours["patched"] == [False]
        files = (done.out / f"{file}{cases[name].ending}" for file in (mine, stock))
        assert len({file.read_bytes() for file in files}) == 1
