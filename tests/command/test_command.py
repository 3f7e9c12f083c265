"""One video on the stand-in: the main job, refusals, importing Wan, attention, files."""

import json
import logging
import pkgutil
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from harness import Reference
from nano import NANO, PROMPT, RULE, SCRIPT, attempt, frames, python

from teacache_generate import RULES, TeaCacheConfig, import_wan, main, sdpa_attention, teacache

RECORD = """status file prompt asked_prompt seed rule thresh order frames computed steps drift
seconds peak_bytes versions latents settings"""

# ----------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize(("flags", "thresh"), [([], 0.08), (["--use_ret_steps"], 0.1)])
def test_run_leaves_a_video_and_its_record(run, tmp_path, flags, thresh):
    code, log, record = run(*RULE, *flags)
    assert code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.mp4"]
    assert frames(Path("x.mp4")).shape == (17, 64, 64, 3)
    assert record.keys() == set(RECORD.split())
    values = {"status": "finished", "file": "x.mp4", "seed": 42, "latents": None}
    values |= {"prompt": PROMPT[1], "asked_prompt": PROMPT[1]}
    values |= {"thresh": thresh, "order": 0, "frames": 17, "steps": 50}
    assert {name: record[name] for name in values} == values
    assert record["rule"].split()[0] == "t2v-1.3B"
    assert record["seconds"].keys() == {"load", "encode", "sampling", "decode", "write"}
    computed = record["computed"]
    assert 15 <= len(computed) <= 40
    before, loading, after = log.partition("Creating WanModel")
    assert loading
    assert f"rule t2v-1.3B (as asked), threshold {thresh} (default): computes" in before
    assert f"computed {len(computed)} of 50 steps ({' '.join(map(str, computed))})" in after
    assert f"mean drift {100 * record['drift']:.1f} %" in after


def test_threshold_0_equals_stock_generate_py_to_the_byte(ckpt, tmp_path):
    """Both started as a user starts them, the script copied beside generate.py."""
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    shutil.copy(SCRIPT, repo)
    argv = ["--ckpt_dir", ckpt, *PROMPT, "--sample_steps", "6", "--save_file"]
    stock = python("generate.py", *argv, "stock.mp4", cwd=repo)
    off = ["--teacache_thresh", "0", "--teacache_order", "1"]
    ours = python("teacache_generate.py", *argv, "ours.mp4", *off, cwd=repo)
    assert (stock.returncode, ours.returncode) == (0, 0), stock.stderr + ours.stderr
    assert "computed 6 of 6 steps" in ours.stdout
    assert len(frames(repo / "ours.mp4")) == 17
    assert (repo / "ours.mp4").read_bytes() == (repo / "stock.mp4").read_bytes()
    record = json.loads((repo / "ours.json").read_text())
    assert (record["computed"], record["drift"]) == ([0, 1, 2, 3, 4, 5], None)


@pytest.mark.parametrize(
    ("method", "order", "options"),
    [
        ("plain", 0, {}),
        ("ret", 0, {"guide_scale": 1.0}),
        ("plain", 1, {}),
        ("sigma", 1, {"sample_solver": "dpm++", "shift": 200.0}),  # the first timesteps are equal
    ],
)
def test_video_equals_the_method_written_plainly(wan, ckpt, method, order, options):
    pipeline = wan[1].WanT2V(wan[0].WAN_CONFIGS["t2v-nano"], ckpt)
    settings = {"frame_num": 5, "seed": 1, "sampling_steps": 50, **options}
    rule, guided = RULES["sigma" if method == "sigma" else "t2v-1.3B"], 50 * (method != "ret")
    others = {"order": order, "guided_steps": guided}
    config = TeaCacheConfig.from_rule(rule, 50, 0.08, ret=method == "ret", **others)
    with teacache(pipeline.model, config) as cache:
        ours = pipeline.generate("a red ball", **settings)
    job = {"method": method, "thresh": 0.08, "coefficients": config.coefficients, **others}
    plainly = Reference([pipeline.model], 50, job)
    expected = pipeline.generate("a red ball", **settings)
    assert [decision.computed for decision in cache.schedule.decisions] == plainly.computed
    assert 10 < sum(plainly.computed) < 45
    # order 1 may be rounded otherwise; at scale 1 stock computes u + (c - u), which is nearly c
    assert (ours - expected).abs().max() <= (0 if order == 0 and guided else 1e-4)


# ---------------------------------------------------------------------------------------- refusals


REFUSED = {
    "negative": ("--teacache_thresh -0.1", "--teacache_thresh: -0.1 must be 0 (stock) or more"),
    "slower": ("--teacache_speedup 0.5", "--teacache_speedup: 0.5 must be 1 or more"),
    "two amounts": ("--teacache_speedup 2 --teacache_thresh 0.1", "not allowed with argument"),
    "share": ("--teacache_guide_until 1.1", "--teacache_guide_until: 1.1 must be from 0 to 1"),
    "order": ("--teacache_order 2", "--teacache_order: invalid choice: 2"),
    "no rule": ("--teacache_rule 14B", "--teacache_rule 14B: cannot be used"),
    "sigma": ("--teacache_rule sigma --use_ret_steps", "--use_ret_steps: rule sigma (as asked)"),
    "two kinds": ("--teacache_plan --teacache_compare 2x", "not allowed with argument"),
    "old model": ("--teacache_model x", "--teacache_model: is gone: use --teacache_rule NAME"),
    "old report": ("--teacache_report=x", "--teacache_report: is gone: leave it out: every video"),
    "frames": ("--frame_num 16", "--frame_num 16: must be 4n+1, such as 13 or 17"),
    "shift": ("--sample_shift 0", "--sample_shift 0.0: must be positive"),
    "guidance": ("--sample_guide_scale nan", "--sample_guide_scale nan: must be a number"),
    "seed": (f"--base_seed {2**70}", f"--base_seed {2**70}: must be under 2**63"),
    "no parts": ("--ulysses_size 0", "--ulysses_size 0 --ring_size 1: their product must"),
    "fsdp": ("--dit_fsdp", "--dit_fsdp True: must be started with torchrun --nproc_per_node="),
    "ulysses": ("--ulysses_size 2", "torchrun --nproc_per_node=2"),
    "no target": ("--save_file /none/x.mp4", "--save_file /none/x.mp4: cannot be written"),
    "read-only": ("--save_file /proc/x.mp4", "--save_file /proc/x.mp4: cannot be written"),
    "no ending": ("--save_file x", "x: cannot be written: no file with an ending: give a .mp4"),
    "long name": (f"--save_file {'x' * 230}.mp4", "too long, for NAME.latents.pt beside it"),
    "webm": ("--save_file x.webm", "x.webm: cannot be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_in_one_line(refusal, tmp_path, monkeypatch, no_loading, name):
    monkeypatch.chdir(tmp_path)
    flags, expected = REFUSED[name]
    assert expected in refusal(*flags.split())
    assert list(tmp_path.iterdir()) == []


def test_help_has_all_flags_and_a_missing_checkpoint_is_refused(capsys):
    code, said = attempt(capsys, "--help")
    assert (code, "--teacache_thresh X" in said, "--sample_guide_scale" in said) == (0, True, True)
    code, said = attempt(capsys, *RULE, *PROMPT)
    assert (code, "--ckpt_dir" in said) == (2, True)


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ("LOCAL_RANK=1", True),  # left over in a shell: one process, and nobody else speaks
        ("LOCAL_RANK= LOCAL_WORLD_SIZE=", True),
        ("LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 RANK=1", False),
        ("LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 RANK=2 WORLD_SIZE=4", True),  # another machine
    ],
)
def test_refusal_is_printed_once_a_machine(capsys, monkeypatch, variables, speaks):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    code, said = attempt(capsys, "--ckpt_dir", "/none", *PROMPT)
    assert (code, said.count("--ckpt_dir /none: must be a folder")) == (2, speaks)


def test_missing_ffmpeg_and_missing_wan_are_refused(ckpt, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, alone)
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *PROMPT]
    no_ffmpeg = python(SCRIPT, *argv, IMAGEIO_FFMPEG_EXE="/none/ffmpeg")
    no_wan = python(alone / "teacache_generate.py", *PROMPT, cwd=tmp_path)
    assert (no_ffmpeg.returncode, no_wan.returncode) == (2, 2)
    assert "pip install imageio-ffmpeg" in no_ffmpeg.stderr
    assert f"{alone} or {tmp_path}" in no_wan.stderr
    assert "git clone https://github.com/Wan-Video/Wan2.1" in no_wan.stderr
    assert len((no_ffmpeg.stderr + no_wan.stderr).splitlines()) == 2


# ---------------------------------------------------------------------------------- importing Wan


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A function that makes a checkout with this generate.py, to be imported instead."""
    monkeypatch.delitem(sys.modules, "generate", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(generate_py: str) -> Path:
        repo = tmp_path / "fork"
        (repo / "wan").mkdir(parents=True)
        (repo / "wan" / "__init__.py").touch()
        (repo / "generate.py").write_text(generate_py)
        return repo

    return make


def no_module(name):
    return f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})"


BUILT_FOR = f"install what Wan lists, built for torch {torch.__version__}, which finds no GPU"


@pytest.mark.parametrize(
    ("generate_py", "expected"),
    [
        (no_module("xfuser.core.distributed"), "'xfuser.core.distributed': pip install xfuser"),
        (no_module("cv2"), "No module named 'cv2': pip install opencv-python"),
        (no_module("wan.modules.vae"), "this checkout lacks it: clone it again"),
        ("raise ImportError('x' * 500 + 'torchvision::nms')", f"torchvision::nms: {BUILT_FOR}"),
        ("import torch\ntorch.zeros(1, device='cuda')", f"{BUILT_FOR} (Wan needs one: see nvidia"),
        ("from PIL import NoSuchName", "cannot import name 'NoSuchName' from 'PIL'"),
        ("def (", "SyntaxError"),
        ("raise ValueError('first\\nsecond')", "first second"),
        ("", "has no _parse_args, generate, WAN_CONFIGS, cache_video or save_video: use Wan2.1's"),
        (
            "def generate(args): ...\ndef cache_video(): ...\nWAN_CONFIGS = {}",
            "its generate.py has no _parse_args: use Wan2.1's or Wan2.2's",
        ),
    ],
)
def test_failed_import_is_one_line_with_the_cure(refusal, fork, monkeypatch, generate_py, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expected in refusal("--wan_repo", fork(generate_py))


@pytest.mark.parametrize("flag", ["ckpt_dir", "sample_steps", "save_file", "base_seed"])
def test_parser_of_a_fork_without_a_needed_flag_is_refused(refusal, wan, monkeypatch, flag):
    parse = wan[0]._parse_args

    def parse_fewer() -> Namespace:
        args = parse()
        delattr(args, flag)
        return args

    monkeypatch.setattr(wan[0], "_parse_args", parse_fewer)
    text = f"--{flag}: TeaCache reads this flag, and {NANO / 'generate.py'} has none"
    assert text in refusal()


def test_script_that_is_a_link_finds_wan(ckpt, tmp_path):
    shutil.copytree(NANO, tmp_path / "Wan2.1")
    shutil.copy(SCRIPT, tmp_path / "Wan2.1")
    (tmp_path / "teacache.py").symlink_to(tmp_path / "Wan2.1" / SCRIPT.name)
    done = python(tmp_path / "teacache.py", "--ckpt_dir", ckpt, "--teacache_plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TeaCache plan: rule sigma" in done.stdout


# -------------------------------------------------------------------------------------- attention

FLASH_ATTN_2_AVAILABLE = False


@pytest.mark.parametrize(
    ("runs", "line"),
    [
        (["model", "clip"], "attention: test_command.flash_attention"),
        (["model"], "attention in wan.modules.clip: PyTorch's"),  # with flash-attn 3 alone
        (["clip"], "attention: PyTorch's (Wan's cannot run here: it needs flash-attn"),
        ([], "attention: PyTorch's (Wan's cannot run here: it needs flash-attn"),
    ],
)
def test_attention_is_replaced_only_where_it_cannot_run(wan, caplog, monkeypatch, runs, line):
    """Of an attention like Wan's, which looks whether flash-attn was imported."""
    caplog.set_level("INFO")
    calls, clip = [], ModuleType("wan.modules.clip")  # which the stand-in does not have
    monkeypatch.setitem(sys.modules, clip.__name__, clip)
    monkeypatch.setattr(wan[1].modules, "clip", clip, raising=False)
    for name in ("model", "clip"):

        def flash_attention(q, k, v, version=None, name=name):
            calls.append((name, tuple(q.shape), q.dtype, q.device.type, version))
            if FLASH_ATTN_2_AVAILABLE or name in runs:
                return q
            raise AssertionError

        module = f"wan.modules.{name}"
        monkeypatch.setattr(f"{module}.flash_attention", flash_attention, raising=False)
    import_wan(str(NANO), generates=True)
    shape = ((1, 16, 1, 128), torch.bfloat16, "cpu")
    assert sorted(calls) == [("clip", *shape, 2), ("model", *shape, None)]
    for name in ("model", "clip"):
        used = pkgutil.resolve_name(f"wan.modules.{name}.flash_attention")
        assert (used is sdpa_attention) == (name not in runs)
    (logged,) = [text for text in caplog.messages if "attention" in text]
    assert line in logged


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize(
    "broken",
    [
        "raise ImportError('undefined symbol: _ZN3c105')",
        "raise RuntimeError('built for another CUDA')",
        "import a_package_that_is_missing",
        "def (",
        "flash_attn_func = print",
    ],
)
def test_broken_flash_attn_counts_as_missing(refusal, tmp_path, monkeypatch, fork, name, broken):
    """Before Wan's attention.py tries to import both; it expects ModuleNotFoundError."""
    monkeypatch.syspath_prepend(tmp_path)
    (other,) = {"flash_attn", "flash_attn_interface"} - {name}
    for package, text in ((name, broken), (other, "flash_attn_varlen_func = print")):
        monkeypatch.setitem(sys.modules, package, None)  # restored afterwards
        del sys.modules[package]
        (tmp_path / f"{package}.py").write_text(text)
    found = refusal("--wan_repo", fork(f"import {other}\nimport {name}"))
    assert f"ModuleNotFoundError: import of {name} halted" in found


@pytest.mark.parametrize("out", [torch.ones(2), (torch.ones(2), None)], ids=["tensor", "tuple"])
def test_flash_attn_3_returns_a_tuple_whatever_its_version(monkeypatch, wan, out):
    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_varlen_func = lambda **kwargs: out
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    import_wan(str(NANO), generates=True)
    assert torch.equal(interface.flash_attn_varlen_func(q=1)[0], torch.ones(2))


# ------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("count", "variable", "expected"),
    [
        (1, "RANK=1", "RANK 1: there are 1 processes: start with torchrun, or unset RANK"),
        (1, "LOCAL_RANK=1", "LOCAL_RANK 1: there are 1 GPUs: start with torchrun, or unset"),
        (2, "LOCAL_WORLD_SIZE=4", "--nproc_per_node 4: must be 2 GPUs or fewer"),
    ],
)
def test_process_without_a_gpu_is_refused(refusal, monkeypatch, count, variable, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv(*variable.split("="))
    assert expected in refusal()


NO_GPU = """
import sys, torch
torch.cuda.is_available = lambda: True
for name in ("_lazy_init", "current_device", "get_device_capability", "get_device_properties",
             "set_device", "synchronize", "mem_get_info", "empty_cache", "get_device_name"):
    setattr(torch.cuda, name, lambda *args, name=name: sys.exit(f"a GPU was touched: {name}"))
sys.argv = ["teacache_generate.py", *sys.argv[1:]]
import teacache_generate
teacache_generate.main()
"""


def test_plan_touches_no_gpu(ckpt, tmp_path):
    """Although wan/modules/t5.py asks for the current device when it is imported."""
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    t5 = repo / "wan" / "modules" / "t5.py"
    t5.write_text(t5.read_text() + "\n\nDEVICE = torch.cuda.current_device()\n")
    argv = ["--wan_repo", repo, "--ckpt_dir", ckpt, *RULE, "--teacache_plan"]
    done = python("-c", NO_GPU, *argv, PYTHONPATH=str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr
    assert "TeaCache plan: rule t2v-1.3B" in done.stdout


# ------------------------------------------------------------------------------ prompts and files


def test_empty_prompt_is_no_example(run):
    code, _, record = run("--prompt", "", "--sample_steps", "2")
    assert (code, record["prompt"], record["asked_prompt"]) == (0, "", "")


def test_prompt_that_is_a_file_brings_a_warning(run, no_loading):
    Path("prompts.txt").write_text("a cat\na dog\n")
    in_chinese = "猫在舞台上打拳击。" * 12  # longer than a file's name may be
    for prompt, warned in (("prompts.txt", True), ("no_file.txt", False), (in_chinese, False)):
        code, log, _ = run("--prompt", prompt)
        assert code == 1
        assert "the pipeline is loaded" in log
        assert ("--prompt prompts.txt" in log and "--teacache_jobs" in log) == warned


def test_reader_that_closes_the_pipe_leaves_no_traceback(ckpt):
    """As ``| head -1`` does."""
    command = [sys.executable, SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, "--teacache_plan"]
    pipe = subprocess.PIPE
    with subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_last_log_line_of_a_stop_may_meet_a_closed_pipe(monkeypatch):
    """As in ``| tee log.txt``: the terminal's Ctrl-C ends tee first."""
    seen = []
    monkeypatch.setattr("teacache_generate.command", Mock(side_effect=KeyboardInterrupt))
    error = lambda *_, **__: seen.append(logging.raiseExceptions)  # noqa: E731
    monkeypatch.setattr("teacache_generate.log.error", error)
    with pytest.raises(SystemExit, match="130"):
        main([])
    assert seen == [False]


def test_closed_stdout_is_no_failure(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    code, _, found = run("--frame_num", "5", "--sample_steps", "4", "--teacache_thresh", "0")
    assert (code, found["status"]) == (0, "finished")
