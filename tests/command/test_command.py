"""One video on the stand-in: the main job, refusals, importing Wan, attention, files."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import imageio
import numpy as np
import pytest
import torch
from harness import Reference
from nano import NANO, PROMPT, SCRIPT, attempt, frames, python
from PIL import Image

from teacache_generate import RULES, TeaCacheConfig, import_wan, sdpa_attention, teacache

RULE = ["--teacache_rule", "t2v-1.3B"]
RECORD = """status file prompt asked_prompt seed rule thresh order frames computed steps drift
seconds peak_bytes versions latents settings"""

# ----------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize(("flags", "thresh"), [([], 0.08), (["--use_ret_steps"], 0.1)])
def test_run_leaves_a_video_and_its_record(run, tmp_path, flags, thresh):
    code, log, record = run(*RULE, *flags)
    assert code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.mp4"]
    assert frames(tmp_path / "x.mp4").shape == (17, 64, 64, 3)
    assert record.keys() == set(RECORD.split())
    values = {"status": "finished", "file": str(tmp_path / "x.mp4"), "seed": 42, "latents": None}
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


def test_log_tells_order_and_passes(run):
    flags = ["--sample_steps", "10", "--teacache_order", "1", "--teacache_guide_until", "0.5"]
    code, log, record = run(*flags)
    computed = record["computed"]
    passes = len(computed) + sum(step < 5 for step in computed)
    assert (code, record["order"]) == (0, 1)
    assert f"order 1: computes {len(computed)} of 10 steps, {passes} of 20 passes" in log
    assert f"{passes} of 20 passes, mean drift {100 * record['drift']:.1f} % (max" in log


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
    ("task", "method", "solver", "scale"),
    [
        ("t2v-nano", "plain", "unipc", 5.0),
        ("t2v-nano", "ret", "dpm++", 5.0),
        ("i2v-nano", "plain", "dpm++", 5.0),
        ("i2v-nano", "ret", "unipc", 5.0),
        ("t2v-nano", "plain", "unipc", 1.0),
    ],
)
def test_video_equals_the_method_written_plainly(
    wan, ckpt, i2v_ckpt, picture, task, method, solver, scale
):
    rule = RULES["t2v-1.3B"]
    polynomial = rule.retention if method == "ret" else rule.plain
    if task == "t2v-nano":
        pipeline = wan[1].WanT2V(wan[0].WAN_CONFIGS[task], ckpt)
        inputs, settings = ("a red ball",), {"size": (64, 64)}
    else:
        pipeline = wan[1].WanI2V(wan[0].WAN_CONFIGS[task], i2v_ckpt)
        inputs, settings = ("a red ball", Image.open(picture)), {"max_area": 64 * 64}
    settings |= {"frame_num": 5, "sampling_steps": 50, "sample_solver": solver, "seed": 1}
    settings["guide_scale"], guided = scale, 0 if scale == 1 else None
    config = TeaCacheConfig.from_rule(rule, 50, ret=method == "ret", guided_steps=guided)
    with teacache(pipeline.model, config) as cache:
        ours = pipeline.generate(*inputs, **settings)
    job = {"method": method, "thresh": polynomial.thresholds[-1]}
    job |= {"coefficients": polynomial.coefficients, "guided_steps": 0 if scale == 1 else 50}
    plainly = Reference([pipeline.model], 50, job)
    expected = pipeline.generate(*inputs, **settings)
    assert [decision.computed for decision in cache.schedule.decisions] == plainly.computed
    assert 10 < sum(plainly.computed) < 45
    # at scale 1 stock computes u + (c - u), which is c but for the rounding
    assert (ours - expected).abs().max() <= (1e-5 if scale == 1 else 0)


@pytest.mark.parametrize(
    "flags",
    [["--ulysses_size", "2"], ["--ring_size", "2", "--dit_fsdp", "--t5_fsdp"], ["--dit_fsdp"]],
    ids=" ".join,
)
def test_two_processes_give_the_video_of_one(run, ckpt, tmp_path, flags):
    one, two = tmp_path / "one.png", tmp_path / "two.png"  # animated, lossless
    argv = [*RULE, *PROMPT, "--sample_steps", "8", "--save_file"]
    assert run(*argv, one)[0] == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    common = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *flags]
    done = python(*torchrun, *common, *argv, two, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(file.with_suffix(".json").read_text())["computed"] for file in (one, two)]
    assert steps[0] == steps[1]
    assert len(steps[0]) < 8
    assert done.stdout.count(f"computed {len(steps[0])} of 8 steps") == 1
    assert np.abs(frames(one) - frames(two)).max() <= 1  # of 255, by rounding


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
    "old file": ("--teacache_coefficients=x", "--teacache_coefficients: is gone: use"),
    "old report": ("--teacache_report x", "--teacache_report: is gone: leave it out: every video"),
    "frames": ("--frame_num 16", "--frame_num 16: must be 4n+1, such as 13 or 17"),
    "shift": ("--sample_shift 0", "--sample_shift 0.0: must be positive"),
    "guidance": ("--sample_guide_scale nan", "--sample_guide_scale nan: must be a number"),
    "seed": (f"--base_seed {2**70}", f"--base_seed {2**70}: must be under 2**63"),
    "unipc": ("--sample_steps 80 --sample_shift 16", "first two timesteps are equal"),
    "no parts": ("--ulysses_size 0", "--ulysses_size 0 --ring_size 1: their product must"),
    "fsdp": ("--dit_fsdp", "--dit_fsdp True: must be started with torchrun --nproc_per_node="),
    "ulysses": ("--ulysses_size 2", "torchrun --nproc_per_node=2"),
    "no folder": ("--ckpt_dir /none", "--ckpt_dir /none: must be a folder"),
    "no target": ("--save_file /none/x.mp4", "--save_file /none/x.mp4: cannot be written"),
    "read-only": ("--save_file /proc/x.mp4", "--save_file /proc/x.mp4: cannot be written"),
    "no ending": ("--save_file x", "x: cannot be written: no file with an ending: give a .mp4"),
    "webm": ("--save_file x.webm", "x.webm: cannot be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_in_one_line(capsys, ckpt, tmp_path, monkeypatch, no_loading, name):
    monkeypatch.chdir(tmp_path)
    flags, expected = REFUSED[name]
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT, *flags.split())
    (line,) = said.splitlines()
    assert code == 2
    assert line.startswith("teacache_generate.py: error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_help_has_all_flags_and_a_missing_checkpoint_is_refused(capsys):
    code, said = attempt(capsys, "--help")
    assert (code, "--teacache_thresh X" in said, "--sample_guide_scale" in said) == (0, True, True)
    code, said = attempt(capsys, *RULE, *PROMPT)
    assert (code, "--ckpt_dir" in said) == (2, True)


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({"LOCAL_RANK": "1"}, True),  # left over in a shell: one process, and nobody else speaks
        ({"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}, True),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "RANK": "2"}, True),  # another machine
    ],
)
def test_refusal_is_printed_once_a_machine(capsys, monkeypatch, variables, speaks):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, said = attempt(capsys, "--ckpt_dir", "/none", *PROMPT)
    assert code == 2
    assert said.count("--ckpt_dir /none: must be a folder") == speaks


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


@pytest.mark.parametrize(
    ("has_flf2v", "task", "frame_num", "code"),
    [
        (True, "i2v-14B", "17", 0),
        (False, "i2v-14B", "17", 2),
        (False, "i2v-14B", "81", 0),
        (True, "flf2v-14B", "17", 2),
        (True, "flf2v-14B", "81", 0),
    ],
)
def test_frames_other_than_81_are_refused_where_hard_coded(
    capsys, wan, i2v_ckpt, monkeypatch, has_flf2v, task, frame_num, code
):
    """In FLF2V, and in the I2V of a Wan2.1 that does not have WanFLF2V yet."""
    for table in (wan[0].WAN_CONFIGS, wan[0].SUPPORTED_SIZES, wan[0].EXAMPLE_PROMPT):
        monkeypatch.setitem(table, task, table["i2v-nano"])
    if not has_flf2v:
        monkeypatch.delattr(wan[1], "WanFLF2V")
    argv = ["--task", task, "--ckpt_dir", i2v_ckpt, "--frame_num", frame_num, "--teacache_plan"]
    found, said = attempt(capsys, *argv)
    assert found == code, said
    assert (f"--frame_num {frame_num}: must be 81 for {task}" in said) == (code == 2)


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


def refused_import(capsys, repo) -> str:
    code, said = attempt(capsys, "--wan_repo", repo, *PROMPT)
    assert code == 2
    assert len(said.splitlines()) == 1
    return said


def no_module(name):
    return f"raise ModuleNotFoundError(\"No module named '{name}'\", name={name!r})"


TORCHVISION = f"install the torchvision built for torch {torch.__version__}"
NO_GPU_HERE = f"see nvidia-smi, and whether torch {torch.__version__} is a CUDA build"


@pytest.mark.parametrize(
    ("generate_py", "expected"),
    [
        (no_module("einops"), "No module named 'einops': pip install einops"),
        (no_module("xfuser.core.distributed"), "pip install xfuser"),
        (no_module("cv2"), "pip install opencv-python"),
        ("import a_package_that_is_missing", "pip install a_package_that_is_missing"),
        (no_module("wan.modules.vae"), "this checkout lacks it: clone it again"),
        ("raise ImportError('x' * 500 + 'torchvision::nms does not exist')", TORCHVISION),
        ("raise RuntimeError('operator torchvision::nms on CUDA')", TORCHVISION),
        ("import torch\ntorch.zeros(1, device='cuda')", NO_GPU_HERE),
        ("import torch\ntorch.cuda.current_device()", NO_GPU_HERE),  # as wan/modules/t5.py
        ("raise RuntimeError('Found no NVIDIA driver on your system.')", NO_GPU_HERE),
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
def test_failed_import_is_one_line_with_the_cure(capsys, fork, monkeypatch, generate_py, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expected in refused_import(capsys, fork(generate_py))


@pytest.mark.parametrize(
    ("removed", "refused"),
    [
        (["t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size", "src_video", "last_frame"], False),
        *(([flag], True) for flag in ("ckpt_dir", "sample_steps", "save_file", "base_seed")),
    ],
)
def test_parser_of_a_fork_needs_the_essential_flags_only(run, wan, monkeypatch, removed, refused):
    parse = wan[0]._parse_args

    def parse_fewer() -> Namespace:
        return Namespace(**{k: v for k, v in vars(parse()).items() if k not in removed})

    monkeypatch.setattr(wan[0], "_parse_args", parse_fewer)
    code, said, _ = run("--sample_steps", "2")
    assert code == (2 if refused else 0), said
    text = f"--{removed[0]}: TeaCache reads this flag, and {NANO / 'generate.py'} has none"
    assert (text in said) == refused


def test_script_that_is_a_link_finds_wan(ckpt, tmp_path):
    shutil.copytree(NANO, tmp_path / "Wan2.1")
    shutil.copy(SCRIPT, tmp_path / "Wan2.1")
    (tmp_path / "teacache.py").symlink_to(tmp_path / "Wan2.1" / SCRIPT.name)
    done = python(tmp_path / "teacache.py", "--ckpt_dir", ckpt, "--teacache_plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TeaCache plan: rule sigma" in done.stdout


# -------------------------------------------------------------------------------------- attention

FLASH_ATTN_2_AVAILABLE = False


@pytest.fixture
def wans_attention(wan, monkeypatch):
    """A function that gives the stand-in an attention like Wan's, which looks whether flash-attn
    was imported, and runs for some modules only. Returns its calls."""
    from wan.modules import clip, model

    def install(*runs: str) -> list[tuple]:
        calls = []

        def attention_of(name: str):
            def flash_attention(q, k, v, version=None, **others):
                calls.append((name, tuple(q.shape), q.dtype, q.device.type, version))
                if FLASH_ATTN_2_AVAILABLE or name in runs:
                    return q
                raise AssertionError

            return flash_attention

        monkeypatch.setattr(model, "flash_attention", attention_of("model"))
        monkeypatch.setattr(clip, "flash_attention", attention_of("clip"))
        return calls

    return install


@pytest.mark.parametrize(
    ("runs", "line"),
    [
        (["model", "clip"], "attention: test_command.flash_attention"),
        (["model"], "attention in wan.modules.clip: PyTorch's"),  # with flash-attn 3 alone
        (["clip"], "attention: PyTorch's (Wan's cannot run here: it needs flash-attn"),
        ([], "attention: PyTorch's (Wan's cannot run here: it needs flash-attn"),
    ],
)
def test_attention_is_replaced_only_where_it_cannot_run(caplog, wans_attention, runs, line):
    from wan.modules import clip, model

    caplog.set_level("INFO")
    calls = wans_attention(*runs)
    import_wan(str(NANO), generates=True)
    shape = ((1, 16, 1, 128), torch.bfloat16, "cpu")
    assert sorted(calls) == [("clip", *shape, 2), ("model", *shape, None)]
    replaced = {"model": model, "clip": clip}
    for name, module in replaced.items():
        assert (module.flash_attention is sdpa_attention) == (name not in runs)
    (logged,) = [text for text in caplog.messages if "attention" in text]
    assert line in logged


def test_attention_of_pytorch_gives_the_same_video(run, tmp_path, wans_attention):
    videos = []
    for prepare in (lambda: None, wans_attention):
        prepare()
        assert run("--sample_steps", "2")[0] == 0
        videos.append(frames(tmp_path / "x.mp4"))
    assert np.abs(videos[0] - videos[1]).max() <= 1


def test_attention_of_the_users_own_is_used(run, wan, monkeypatch):
    """Written into wan/modules/attention.py; it need not run on the 16 tokens."""
    from wan.modules import attention, model

    stock, shapes = attention.flash_attention, []

    def sage(q, k, v, **others):
        shapes.append(q.shape)
        assert q.dtype == torch.float32
        return stock(q, k, v, **others)

    for module in (attention, model):
        monkeypatch.setattr(module, "flash_attention", sage)
    code, log, _ = run("--sample_steps", "2")
    assert code == 0
    assert len(shapes) == 2 * 2 * 6 * 2  # steps, branches, blocks, self- and cross-attention
    assert "TeaCache: attention: test_command.sage\n" in log


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A function that puts modules with these texts on the path."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # restored afterwards

    def make(**texts: str) -> None:
        (tmp_path / "packages").mkdir()
        for name, text in texts.items():
            (tmp_path / "packages" / f"{name}.py").write_text(text)
            del sys.modules[name]

    return make


TRIES_BOTH = """
found = []
for name in ("flash_attn", "flash_attn_interface"):
    try:
        __import__(name)
        found.append(name)
    except ModuleNotFoundError:  # all that Wan's attention.py expects
        pass
raise ValueError(f"found {found}")
"""


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
def test_broken_flash_attn_counts_as_missing(capsys, packages, fork, name, broken):
    works = dict.fromkeys(["flash_attn", "flash_attn_interface"], "flash_attn_varlen_func = print")
    packages(**works | {name: broken})
    (other,) = works.keys() - {name}
    assert f"found ['{other}']" in refused_import(capsys, fork(TRIES_BOTH))


@pytest.mark.parametrize("out", [torch.ones(2), (torch.ones(2), None)], ids=["tensor", "tuple"])
def test_flash_attn_3_returns_a_tuple_whatever_its_version(monkeypatch, wan, out):
    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_varlen_func = lambda **kwargs: out
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    import_wan(str(NANO), generates=True)
    assert torch.equal(interface.flash_attn_varlen_func(q=1)[0], torch.ones(2))


# ------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def gpus(monkeypatch):
    """A function that puts GPUs of these capabilities into the machine."""

    def plug(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index]
        )

    return plug


@pytest.mark.parametrize(("capability", "warned"), [((7, 5), True), ((8, 0), False)])
def test_old_gpu_is_warned_of_the_memory_of_scores(run, wan, monkeypatch, gpus, capability, warned):
    """Of t2v-1.3B at 480P: 21 * 30 * 52 tokens, 12 heads, 2 bytes a score."""
    from wan.modules import model

    generate = wan[0]
    gpus((9, 0), capability)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(model, "flash_attention", sdpa_attention)
    config = {**generate.WAN_CONFIGS["t2v-nano"], "num_heads": 12}
    monkeypatch.setitem(generate.WAN_CONFIGS, "t2v-nano", config)
    monkeypatch.setitem(generate.SIZE_CONFIGS, "832*480", (832, 480))
    monkeypatch.setitem(generate.SUPPORTED_SIZES, "t2v-nano", ("832*480",))
    code, log, _ = run("--size", "832*480", "--frame_num", "81", "--save_file", "/none/x.mp4")
    assert code == 2
    text = "capability {}.{}) stores all scores in bfloat16: about 24 GiB for 32,760 tokens"
    assert (text.format(*capability) in log) == warned


@pytest.mark.parametrize(
    ("count", "variables", "expected"),
    [
        (1, {"LOCAL_RANK": "1"}, "LOCAL_RANK 1: there are 1 GPUs: start with torchrun, or unset"),
        (2, {"LOCAL_WORLD_SIZE": "4"}, "--nproc_per_node 4: must be 2 GPUs or fewer"),
    ],
)
def test_process_without_a_gpu_is_refused(capsys, monkeypatch, gpus, count, variables, expected):
    gpus(*[(9, 0)] * count)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, said = attempt(capsys, *PROMPT)
    assert code == 2
    assert expected in said


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


def test_prompt_that_is_a_file_brings_a_warning(run, tmp_path, monkeypatch, no_loading):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    in_chinese = "猫在舞台上打拳击。" * 12  # longer than a file's name may be
    for prompt, warned in (("prompts.txt", True), ("no_file.txt", False), (in_chinese, False)):
        code, log, _ = run("--prompt", prompt)
        assert code == 1
        assert "the pipeline is loaded" in log
        assert ("--prompt prompts.txt" in log and "--teacache_jobs" in log) == warned


def test_write_error_is_told_as_itself(run, tmp_path, monkeypatch):
    """Wan's own writer tries again, and tells the error of its last try."""
    get_writer = imageio.get_writer

    def full_disk(file, *args, **kwargs):
        if Path(file).name == "x.mp4":
            raise OSError(28, "No space left on device")
        return get_writer(file, *args, **kwargs)

    monkeypatch.setattr(imageio, "get_writer", full_disk)
    code, log, record = run("--sample_steps", "2")
    assert code == 1
    assert "x.mp4 failed: [Errno 28] No space left on device" in log
    assert "Finished." not in log
    assert "No space left on device" in record["status"]
    assert record["latents"] == str(tmp_path / "x.latents.pt")


def test_reader_that_closes_the_pipe_leaves_no_traceback(ckpt):
    """As ``| head -1`` does."""
    command = [sys.executable, SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, "--teacache_plan"]
    pipe = subprocess.PIPE
    with subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
