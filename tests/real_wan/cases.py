"""The cases on the real Wan2.1 and Wan2.2: command lines on which the script must do what
``harness.Reference`` does, how they are run, and the check of one.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
WAN21 = Path(os.getenv("WAN_REPO", "~/.cache/teacache4wan/Wan2.1")).expanduser()
WAN22 = Path(os.getenv("WAN22_REPO", "~/.cache/teacache4wan/Wan2.2")).expanduser()
CATS = "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage."
RET = "--use_ret_steps"
SIGMA = ("--teacache_rule", "sigma")

# As published: mode, rule, default threshold, coefficients, highest power first.
PUBLISHED = """
plain t2v-1.3B .08 2396.76752 -1311.10545 201.331979 -8.29855975 0.137887774
plain t2v-14B .2 -5784.54975374 5449.50911966 -1811.16591783 256.27178429 -13.02252404
plain i2v-14B-480P .26 -302.331670 223.948934 -52.5463970 5.87348440 -0.201973289
plain i2v-14B-720P .3 -114.36346466 65.26524496 -18.82220707 4.91518089 -0.23412683
ret t2v-1.3B .1 -52186.2437 9230.41404 -528.275948 13.6987616 -0.0499875664
ret t2v-14B .2 -303318.725 49053.7029 -2655.30556 58.7365115 -0.315583525
ret i2v-14B-480P .3 257151.496 -35422.9917 1402.86849 -13.5890334 0.132517977
ret i2v-14B-720P .3 8107.05460 2133.93892 -372.934672 16.6203073 -0.0417769401
"""


@dataclass(frozen=True)
class Case:
    """flags: of generate.py. ours: of the script. reference: settings of ``harness.Reference``; a
    thresh of None is the script's default, as its record has it. float32: autocast to that."""

    flags: list[str]
    ours: list[str]
    reference: dict[str, Any]
    float32: bool = False

    def job(self, mode: str, name: str, out: Path) -> dict[str, Any]:
        """What harness.py does in a mode: teacache, reference or stock."""
        video = out / f"{name}.{mode}.{'png' if 't2i-14B' in self.flags else 'mp4'}"
        argv = [*self.flags, *(self.ours if mode == "teacache" else []), "--save_file", str(video)]
        job = {"name": f"{name}.{mode}", "mode": mode, "float32": self.float32, "argv": argv}
        if mode == "reference":
            thresh = self.reference["thresh"]
            record = str(out / f"{name}.teacache.json")
            job |= {**self.reference, "thresh": record if thresh is None else thresh}
        return job


def by_rule(rule: str, flags: list[str], *ours: str, thresh: float | None = None) -> Case:
    """A case of a published polynomial, at its default threshold if none is given."""
    method = "ret" if RET in ours else "plain"
    (line,) = [u for u in PUBLISHED.splitlines() if u.startswith(f"{method} {rule} ")]
    default, *coefficients = map(float, line.split()[2:])
    given = [] if thresh is None else ["--teacache_thresh", str(thresh)]
    settings = {"method": method, "coefficients": coefficients, "thresh": thresh or default}
    return Case(flags, [*ours, *given], settings)


def by_sigma(flags: list[str], *ours: str, thresh: float | None = None, **limits: Any) -> Case:
    """A case of the rule without polynomials."""
    given = [] if thresh is None else ["--teacache_thresh", str(thresh)]
    return Case(flags, [*ours, *given], {"method": "sigma", "thresh": thresh, **limits})


def by_pair(flags: list[str], high: int, steps: int = 20, **settings: Any) -> Case:
    """A case of "sigma" on one of Wan2.2's A14B, of whose steps ``high`` are high-noise: at most
    two steps are skipped in a row, and the first of each model are computed: of t2v 40 % each, of
    i2v all high-noise ones and a tenth of the others."""
    of_high, of_low = (1, 0.1) if "i2v-A14B" in flags else (0.4, 0.4)
    first_low = range(high, high + math.ceil(of_low * (steps - high)))
    forced = [*range(math.ceil(of_high * high)), *first_low, steps - 1]
    return by_sigma(flags, **settings, forced=forced, in_a_row=2)


def order_1(case: Case) -> Case:
    """In float32: the last bit of a residual depends on how the line is written down, and
    bfloat16 would make more of it."""
    ours, reference = [*case.ours, "--teacache_order", "1"], {**case.reference, "order": 1}
    return Case(case.flags, ours, reference, float32=True)


def guided_until(case: Case, share: float, steps: int) -> Case:
    """steps: the number of the first step whose unconditional call is left out."""
    ours = [*case.ours, "--teacache_guide_until", str(share)]
    return replace(case, ours=ours, reference={**case.reference, "guided_steps": steps})


def command(task: str, size: str, *flags: str) -> list[str]:
    common = ["--task", task, "--size", size, "--ckpt_dir", "AUTO", "--prompt", CATS]
    return [*common, "--base_seed", "42", "--offload_model", "True", *flags]


# ------------------------------------------------------------------------------------- Wan2.1

SHORT = ("--sample_steps", "20", "--frame_num", "17")  # where a case needs no more
T2V_FULL = command("t2v-1.3B", "832*480", "--t5_cpu", "--frame_num", "17")
T2V = [*T2V_FULL, "--sample_steps", "20"]
T2V_14B = command("t2v-14B", "1280*720", "--t5_cpu", *SHORT)
IMAGE = str(WAN21 / "examples" / "i2v_input.JPG")
I2V_480P = command("i2v-14B", "832*480", "--image", IMAGE, *SHORT)
I2V_720P = command("i2v-14B", "1280*720", "--image", IMAGE, *SHORT)
T2I = command("t2i-14B", "1024*1024", "--sample_steps", "20")
FRAMES = ("--first_frame", IMAGE, "--last_frame", IMAGE)
FLF2V = command("flf2v-14B", "832*480", *FRAMES, "--sample_steps", "10")  # always 81 frames
VACE = command("vace-1.3B", "832*480", "--src_ref_images", f"{IMAGE},{IMAGE}", *SHORT)
VACE_VIDEO = ("--src_video", "VIDEO", "--src_mask", "VIDEO")  # a file of an earlier job
DPM = [*T2V, "--sample_solver", "dpm++"]
UNIPC_FAILS = [*T2V_FULL, "--sample_steps", "80", "--sample_shift", "16"]
MANY_TOKENS = [*T2V_14B, "--frame_num", "281", "--sample_steps", "8"]
CASES21 = {  # the first five are README's
    "t2v-1.3B": by_rule("t2v-1.3B", T2V_FULL, thresh=0.08),
    "t2v-14B": by_rule("t2v-14B", T2V_14B, thresh=0.2),
    "i2v-480P": by_rule("i2v-14B-480P", I2V_480P, thresh=0.26),
    "i2v-720P": by_rule("i2v-14B-720P", I2V_720P, thresh=0.3),
    "t2v-14B-ret": by_rule("t2v-14B", T2V_14B, RET, thresh=0.3),
    "20-steps": by_rule("t2v-1.3B", T2V),
    "t2v-1.3B-ret": by_rule("t2v-1.3B", T2V, RET),
    "i2v-480P-ret": by_rule("i2v-14B-480P", I2V_480P, RET),
    "i2v-720P-ret": by_rule("i2v-14B-720P", I2V_720P, RET),
    "t2i-14B": by_rule("t2v-14B", T2I),
    "equal-timesteps": order_1(by_sigma([*DPM, "--sample_shift", "200"], *SIGMA)),
    "1-step": by_rule("t2v-1.3B", [*T2V, "--sample_steps", "1"]),
    "sigma": by_sigma(T2V, *SIGMA),
    "sigma-i2v": by_sigma(I2V_720P, *SIGMA, thresh=0.5),  # the limit binds
    "sigma-dpm-speedup": by_sigma(DPM, *SIGMA, "--teacache_speedup", "1.7"),
    "order-1": order_1(by_rule("t2v-1.3B", T2V, thresh=0.1)),
    "order-1-ret": order_1(by_rule("t2v-1.3B", T2V, RET)),
    "order-1-dpm": order_1(by_sigma(DPM, *SIGMA)),  # its first t is 1000
    # of 1,065 tokens every second one is measured
    "order-1-many-tokens": order_1(by_sigma(MANY_TOKENS, *SIGMA, thresh=0.2)),
    "guide-until": guided_until(by_rule("t2v-1.3B", T2V), 0.5, 10),
    "guidance-1": guided_until(
        by_rule("t2v-1.3B", [*T2V, "--sample_guide_scale", "1"], RET), share=1, steps=0
    ),
    "flf2v": by_sigma(FLF2V),
    "vace-1.3B": by_sigma(VACE),
    "vace-14B": by_sigma(command("vace-14B", "832*480", *VACE_VIDEO, *SHORT)),
    "vace-borrowed": by_rule("t2v-1.3B", VACE, "--teacache_rule", "t2v-1.3B"),
    "vace-order-1-guide-until": guided_until(order_1(by_sigma(VACE)), 0.5, 10),
}
# the first release has no other tasks, and hard-codes the 81 frames of i2v
FIRST = {
    **{name: CASES21[name] for name in ("20-steps", "t2i-14B", "sigma-dpm-speedup")},
    "i2v": by_sigma([*I2V_480P, "--frame_num", "81"], *SIGMA),
}

# ------------------------------------------------------------------------------------- Wan2.2

IMAGE22 = ("--image", str(WAN22 / "examples" / "i2v_input.JPG"))
T2V_A14B = command("t2v-A14B", "832*480", *SHORT)
I2V_A14B_40 = command("i2v-A14B", "832*480", *IMAGE22, "--frame_num", "17")
I2V_A14B = [*I2V_A14B_40, "--sample_steps", "20"]
TI2V = command("ti2v-5B", "1280*704", *SHORT)  # 5 x 15 tokens: two ranks pad it
TI2V_IMAGE = [*TI2V, *IMAGE22]
CASES22 = {
    "t2v": by_pair(T2V_A14B, high=13),
    "i2v": by_pair(I2V_A14B, high=8),
    "i2v-40": by_pair(I2V_A14B_40, high=15, steps=40),
    "ti2v": by_sigma(TI2V),
    "ti2v-image": by_sigma(TI2V_IMAGE),
    "t2v-dpm": by_pair([*T2V_A14B, "--sample_solver", "dpm++"], high=13),
    "t2v-order-1": order_1(by_pair(T2V_A14B, high=13, thresh=0.1)),
    "i2v-order-1": order_1(by_pair(I2V_A14B, high=8, thresh=0.1)),
    "ti2v-image-order-1": order_1(by_sigma(TI2V_IMAGE, thresh=0.1)),
    "t2v-shift": by_pair([*T2V_A14B, "--sample_shift", "5"], high=9),
    "t2v-bfloat16": by_pair([*T2V_A14B, "--convert_model_dtype"], high=13, thresh=0.1),
    "ti2v-guide-until": guided_until(by_sigma(TI2V, thresh=0.1), 0.6, 12),
    "t2v-guide-until": guided_until(by_pair(T2V_A14B, high=13, thresh=0.1), 0.75, 15),
    # borrowed rules, which look at the last token's e: that of ti2v's first frame does not move
    "t2v-rule": by_rule("t2v-14B", T2V_A14B, "--teacache_rule", "t2v-14B"),
    "i2v-rule-ret": by_rule("i2v-14B-480P", I2V_A14B, RET, "--teacache_rule", "i2v-14B-480P"),
    "ti2v-image-rule": by_rule("t2v-14B", TI2V_IMAGE, "--teacache_rule", "t2v-14B"),
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
    found = {}
    for way, of_way in names.items():
        for name in of_way.split():
            flags = [flag for flag in cases[name].flags if flag != "--t5_cpu"]
            flags += ["--offload_model", "False", *PARALLEL[way]]
            found[f"{name}.{way}"] = replace(cases[name], flags=flags)
    return found


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
TABLES = {"w21": CASES21, "w22": CASES22, "first": FIRST, "two21": TWO21, "two22": TWO22}

# ------------------------------------------------------------------------ running, and checking


@dataclass(frozen=True)
class Done:
    """What the jobs of one process, or of two, have left in a folder, and have printed."""

    out: Path
    log: str
    processes: int = 1

    def seen(self, name: str, rank: int = 0) -> dict[str, Any]:
        """What was seen of a job from outside: see ``harness.Run``."""
        return json.loads((self.out / f"{name}.rank{rank}.json").read_text())

    def succeeded(self, name: str) -> dict[str, Any]:
        """The same, of rank 0. All ranks succeeded, and ran the same passes."""
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
        """What a job printed, on stdout and on stderr."""
        return "\n".join(part.split("\n=== ")[0] for part in self.log.split(f"=== {name}\n")[1:])


def run(repo: Path, jobs: list[dict[str, Any]], out: Path, processes: int = 1) -> Done:
    """Run jobs with harness.py."""
    file = out / "jobs.json"
    file.write_text(json.dumps(jobs))
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*python, HERE / "harness.py", "--repo", repo, file, out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return Done(out, done.stdout + done.stderr, processes)


def stock_of(name: str, cases: dict[str, Case]) -> str:
    """The case whose stock run serves: the first with the same flags of generate.py."""
    flags, float32 = cases[name].flags, cases[name].float32
    return next(n for n, case in cases.items() if (case.flags, case.float32) == (flags, float32))


def jobs_of_cases(cases: dict[str, Case], out: Path) -> list[dict[str, Any]]:
    """Each case with TeaCache, as reference and, where no other's serves, as stock."""
    jobs = []
    for name, case in cases.items():
        jobs += [case.job(mode, name, out) for mode in ("teacache", "reference")]
        jobs += [case.job("stock", name, out)] * (stock_of(name, cases) == name)
    return jobs


def threshold_0(name: str, cases: dict[str, Case], out: Path) -> dict[str, Any]:
    case = replace(cases[name], ours=["--teacache_thresh", "0"])
    return case.job("teacache", f"{name}.off", out)


def check(done: Done, name: str, cases: dict[str, Case]) -> None:
    """TeaCache did what the reference did, to the bit, and something else than stock."""
    ours, reference = (done.succeeded(f"{name}.{mode}") for mode in ("teacache", "reference"))
    settings, computed = cases[name].reference, reference["computed"]
    guided = settings.get("guided_steps", len(computed))
    passes = [[runs, runs and step < guided] for step, runs in enumerate(computed)]
    assert ours["ran"] == [runs for step in passes for runs in step]
    assert ours["vace_ran"] == ours["ran"]
    assert ours["which"] == reference["which"]
    assert computed.count(False) >= len(computed) // 5  # none of 1

    stock, frames = done.frames(f"{stock_of(name, cases)}.stock"), done.frames(f"{name}.teacache")
    expected = done.frames(f"{name}.reference")
    # of order 1 the sum may be rounded otherwise
    away = 1e-4 * np.abs(expected - stock).max() if settings.get("order") else 0
    assert np.abs(frames - expected).max() <= away
    assert np.array_equal(frames, stock) == all(ours["ran"])

    record, said = done.record(f"{name}.teacache"), done.printed(f"{name}.teacache")
    assert (record["status"], record["frames"]) == ("finished", frames.shape[1])
    assert record["computed"] == [step for step, runs in enumerate(computed) if runs]
    assert said.count(f"computed {sum(computed)} of {len(computed)} steps") == 1  # by one rank
    if "--dit_fsdp" not in cases[name].flags:  # in bfloat16 distances differ from those of the plan
        assert "other steps than planned" not in said


def check_threshold_0(done: Done, name: str, cases: dict[str, Case]) -> None:
    """Nothing was patched, and the file is stock's to the byte."""
    off, stock = f"{name}.off.teacache", f"{stock_of(name, cases)}.stock"
    seen = done.succeeded(off)
    assert (seen["ran"], seen["patched"]) == (done.seen(stock)["ran"], [False])
    assert np.array_equal(done.frames(off), done.frames(stock))
    ours, stocks = (next(done.out.glob(f"{file}.[mp][pn][4g]")) for file in (off, stock))
    assert ours.read_bytes() == stocks.read_bytes()
    assert done.record(off)["computed"] == list(range(len(seen["ran"]) // 2))
