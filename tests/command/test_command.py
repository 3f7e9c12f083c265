"""The command line on the stand-in ``wan_nano``: the main job, which row, flags, messages."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from harness import Reference
from nano import NANO, PROMPT, ROW, SCRIPT, attempt, frames, python
from PIL import Image

import teacache_generate
from teacache_generate import ROWS, TeaCacheConfig, choose_row, teacache

# ------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize("mode", [[], ["--use_ret_steps"]], ids=["plain", "ret"])
def test_a_run_leaves_a_video_a_report_and_two_lines(capsys, caplog, ckpt, tmp_path, mode):
    video, report = tmp_path / "video.mp4", tmp_path / "report.json"
    files = ["--save_file", video, "--teacache_report", report]
    with caplog.at_level("INFO"):
        assert attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, *mode, *files)[0] == 0
    assert frames(video).shape == (17, 64, 64, 3)
    told = json.loads(report.read_text())
    computed = [i for i, step in enumerate(told["steps"]) if step["computed"]]
    assert told["status"] == "finished"
    assert told["row"] == "row t2v-1.3B (as asked)"
    assert told["computed"] == computed
    assert 15 <= len(computed) <= 40
    assert {"encode", "sampling", "decode", "cache_video"} == set(told["seconds"])
    thresh = "0.1" if mode else "0.08"
    said = caplog.text
    before, after = (
        said.index(f"TeaCache: row t2v-1.3B (as asked), thresh {thresh} (default)"),
        (
            said.index(
                f"TeaCache: computed {len(computed)} of 50 steps ({' '.join(map(str, computed))})"
            )
        ),
    )
    assert before < after
    assert "(estimated from the computed steps)" in said


def test_copied_beside_generate_py_it_gives_at_threshold_zero_the_video_of_stock(ckpt, tmp_path):
    """Both as a user starts them."""
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    shutil.copy(SCRIPT, repo)
    argv = ["--ckpt_dir", ckpt, *PROMPT, "--sample_steps", "6", "--save_file"]
    stock = python("generate.py", *argv, "stock.mp4", cwd=repo)
    off = [*ROW, "--teacache_thresh", "0"]
    ours = python("teacache_generate.py", *argv, "ours.mp4", *off, cwd=repo)
    assert (stock.returncode, ours.returncode) == (0, 0), stock.stderr + ours.stderr
    assert "TeaCache: computed 6 of 6 steps" in ours.stdout
    assert len(frames(repo / "ours.mp4")) == 17
    assert np.array_equal(frames(repo / "stock.mp4"), frames(repo / "ours.mp4"))


def pipelines(wan, ckpt, i2v_ckpt, picture, task):
    generate, package = wan
    config = generate.WAN_CONFIGS[task]
    if task == "t2v-nano":
        return package.WanT2V(config, str(ckpt)), ("a red ball moves right",), {"size": (64, 64)}
    image = Image.open(picture).convert("RGB")
    return package.WanI2V(config, str(i2v_ckpt)), ("a ball", image), {"max_area": 64 * 64}


@pytest.mark.parametrize(
    ("task", "use_ret_steps", "solver", "guide_scale"),
    [
        ("t2v-nano", False, "unipc", 5.0),
        ("t2v-nano", True, "unipc", 5.0),
        ("i2v-nano", False, "unipc", 5.0),
        ("i2v-nano", True, "unipc", 5.0),
        ("t2v-nano", False, "dpm++", 5.0),
        ("t2v-nano", True, "dpm++", 5.0),
        ("t2v-nano", False, "unipc", 1.0),
    ],
)
def test_the_video_is_that_of_the_method_written_plainly(
    wan, ckpt, i2v_ckpt, picture, task, use_ret_steps, solver, guide_scale
):
    row = ROWS["t2v-1.3B"].retention if use_ret_steps else ROWS["t2v-1.3B"].plain
    thresh, coefficients = row.thresholds[-1], row.coefficients
    steps = 50
    settings = dict(sampling_steps=steps, sample_solver=solver, guide_scale=guide_scale, seed=1)
    pipeline, inputs, size = pipelines(wan, ckpt, i2v_ckpt, picture, task)
    settings |= {**size, "frame_num": 5}
    mode = "retention" if use_ret_steps else "plain"
    guided = 0 if guide_scale == 1 else None
    config = TeaCacheConfig(steps, thresh, mode, coefficients, guided)
    with teacache(pipeline.model, config) as cache:
        ours = pipeline.generate(*inputs, **settings)
    stock = pipeline.generate(*inputs, **settings)
    method = {"thresh": thresh, "coefficients": coefficients}
    method |= {"method": "ret" if use_ret_steps else "plain"}
    method |= {"guided_steps": 0} if guide_scale == 1 else {}
    reference = Reference([pipeline.model], steps, method)
    expected = pipeline.generate(*inputs, **settings)
    assert [step.computed for step in cache.schedule.decisions] == reference.computed
    assert 10 < sum(reference.computed) < 45
    # At guidance scale 1 stock computes u + (c - u), which is c but for the rounding.
    assert (ours - expected).abs().max() <= (1e-5 if guide_scale == 1 else 0)
    assert not torch.equal(ours, stock)


EIGHT = [*ROW, *PROMPT, "--sample_steps", "8"]


@pytest.fixture(scope="module")
def by_one_process(ckpt, tmp_path_factory) -> tuple[Path, Path]:
    """A video and its report."""
    folder = tmp_path_factory.mktemp("one_process")
    video, report = folder / "alone.png", folder / "alone.json"  # animated, lossless
    files = ["--save_file", video, "--teacache_report", report]
    one = python(SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, *EIGHT, *files)
    assert one.returncode == 0, one.stderr
    return video, report


@pytest.mark.parametrize(
    "flags",
    [["--ulysses_size", "2"], ["--ring_size", "2", "--dit_fsdp", "--t5_fsdp"], ["--dit_fsdp"]],
    ids=" ".join,
)
def test_two_processes_give_the_video_of_one(ckpt, tmp_path, by_one_process, flags):
    common = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *EIGHT]
    alone, both = by_one_process[0], tmp_path / "both.png"
    reports = [by_one_process[1], tmp_path / "both.json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    out = ["--save_file", both, "--teacache_report", reports[1]]
    xfuser = tmp_path / "xfuser" / "core"  # which the stand-in does not need, but Wan2.1
    xfuser.mkdir(parents=True)
    names = ("init_distributed_environment", "initialize_model_parallel")
    (xfuser / "distributed.py").write_text("".join(f"def {name}(): ...\n" for name in names))
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    two = python(*torchrun, *common, *out, *flags, **env)
    assert two.returncode == 0, two.stderr
    steps = [json.loads(report.read_text())["computed"] for report in reports]
    assert steps[0] == steps[1]
    assert len(steps[0]) < 8
    assert two.stdout.count("TeaCache: computed") == 1
    assert np.abs(frames(alone) - frames(both)).max() <= 1  # of 255, for the rounding


# ------------------------------------------------------------------------------ which row


NONE = Namespace(teacache_model=None, teacache_coefficients=None)


def row(task, ckpt_dir, size="1280*720") -> str:
    return choose_row(NONE, Namespace(task=task, ckpt_dir=str(ckpt_dir), size=size)).name


GUESS = "a guess from the size {}: name it by --teacache_model"


@pytest.mark.parametrize(
    ("task", "ckpt_dir", "size", "expected"),
    [
        ("t2v-1.3B", "/models/14B/Wan2___1-T2V-1___3B", "832*480", "t2v-1.3B"),
        ("t2v-14B", "/models/1.3B/x", "1280*720", "t2v-14B"),
        ("t2i-14B", "x", "1024*1024", "t2v-14B"),
        ("i2v-14B", "Wan2.1-I2V-14B-480P", "1280*720", "i2v-14B-480P"),
        ("i2v-14B", "/480P/Wan2___1-I2V-14B-720p/", "832*480", "i2v-14B-720P"),
        ("i2v-14B", "./wan_i2v_480p_fp16", "1280*720", "i2v-14B-480P"),
        ("flf2v-14B", "Wan2.1-FLF2V-14B-720P", "832*480", "sigma"),
        ("vace-1.3B", "x", "832*480", "sigma"),
        ("vace-14B", "/t2v-14B/x", "832*480", "sigma"),
    ],
)
def test_the_row_follows_the_task_and_the_folders_own_name(task, ckpt_dir, size, expected):
    assert row(task, ckpt_dir, size) == expected


@pytest.mark.parametrize(
    ("ckpt_dir", "size", "expected"),
    [
        ("/data/14B/mine", "832*480", "i2v-14B-480P"),
        ("/480P/mine", "1280*720", "i2v-14B-720P"),
        ("/Wan2.1-I2V-14B-720P/mine", "480*832", "i2v-14B-480P"),
        ("/Wan2.1-I2V-14B-720P/files/mine", "480*832", "i2v-14B-480P"),
        ("/snapshots-480P/mine", "720*1280", "i2v-14B-720P"),
        ("480p-and-720p", "480*832", "i2v-14B-480P"),
        ("my1480px", "1280*720", "i2v-14B-720P"),
    ],
)
def test_where_only_the_size_speaks_the_row_is_said_to_be_a_guess(ckpt_dir, size, expected):
    choice = choose_row(NONE, Namespace(task="i2v-14B", ckpt_dir=ckpt_dir, size=size))
    assert (choice.name, choice.why) == (expected, GUESS.format(size))
    assert choice.text == f"row {expected} ({GUESS.format(size)})"


def test_where_rows_of_a_task_cannot_be_told_apart_it_is_asked_for_one(monkeypatch):
    again = teacache_generate.ROWS["t2v-14B"]
    monkeypatch.setitem(teacache_generate.ROWS, "t2v-14B-new", again)
    with pytest.raises(teacache_generate.Refused, match="name one by --teacache_model") as refused:
        row("t2v-14B", "mine")
    assert "--task t2v-14B: t2v-14B and t2v-14B-new are for it" in str(refused.value)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


COMMIT = "1b7d4f6b2d1a3c9e8f70e6d5c4b3a29180f7e6d5"


def test_a_folder_reached_by_a_link_has_the_row_of_the_name_it_was_downloaded_as(tmp_path):
    real = folder(tmp_path / "720P" / "Wan2.1-I2V-14B-480P")
    (tmp_path / "current").symlink_to(real)
    (tmp_path / "again").symlink_to(tmp_path / "current")
    (tmp_path / "is-not-720P").symlink_to(real)
    for name in ("current", "again", "is-not-720P"):
        assert row("i2v-14B", tmp_path / name) == "i2v-14B-480P"


def test_a_link_that_says_what_the_folder_does_not_is_heard(tmp_path):
    blob = folder(tmp_path / "blobs" / "4d7a")
    (tmp_path / "Wan2.1-I2V-14B-480P").symlink_to(blob)
    (tmp_path / "current").symlink_to("Wan2.1-I2V-14B-480P")
    assert row("i2v-14B", tmp_path / "Wan2.1-I2V-14B-480P") == "i2v-14B-480P"
    assert row("i2v-14B", tmp_path / "current") == "i2v-14B-480P"


def test_a_link_in_a_parent_does_not_change_the_row(tmp_path):
    real = folder(tmp_path / "disk" / "Wan2.1-I2V-14B-480P")
    (tmp_path / "720P").symlink_to(real.parent)
    assert row("i2v-14B", tmp_path / "720P" / "Wan2.1-I2V-14B-480P") == "i2v-14B-480P"


def test_the_current_folder_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "Wan2.1-I2V-14B-480P"))
    assert row("i2v-14B", ".") == "i2v-14B-480P"


@pytest.mark.parametrize("link", [False, True])
def test_a_hubs_cache_has_the_row_of_the_name_above_the_commit(tmp_path, link):
    cache = tmp_path / "720P" / "hub" / "models--Wan-AI--Wan2.1-I2V-14B-480P"
    commit = folder(cache / "snapshots" / COMMIT)
    if link:
        (tmp_path / "ckpt").symlink_to(commit)
        commit = tmp_path / "ckpt"
    assert row("i2v-14B", commit) == "i2v-14B-480P"


def test_the_guess_is_said_before_anything_is_loaded(caplog):
    choice = choose_row(NONE, Namespace(task="i2v-14B", ckpt_dir="mine", size="832*480"))
    config = TeaCacheConfig.from_row(choice.row, 2)
    planned = teacache_generate.plan(config, [1000, 500], [None, 0.1])
    with caplog.at_level("INFO"):
        teacache_generate.announce(
            teacache_generate.Job(Namespace(), config, choice.text, planned, by_default=True)
        )
    assert "name it by --teacache_model" in caplog.text


# ------------------------------------------------------------------------------- bad input


def test_help_shows_our_flags_and_wan_flags(capsys):
    code, said = attempt(capsys, "--help")
    assert code == 0
    assert "--teacache_thresh X" in said
    assert "--sample_guide_scale" in said


REFUSED = {
    "negative": (["--teacache_thresh", "-0.1"], "--teacache_thresh: -0.1 must be 0 (off) or"),
    "nan": (["--teacache_thresh", "nan"], "--teacache_thresh: nan must be 0 (off) or"),
    "infinite": (["--teacache_thresh", "inf"], "--teacache_thresh: inf must be 0 (off) or"),
    "no number": (["--teacache_thresh", "low"], "--teacache_thresh: low must be 0 (off) or"),
    "no row": (["--teacache_model", "14B"], "--teacache_model: invalid choice: '14B'"),
    "mistyped": (["--teacache_tresh", "0.1"], "unrecognized arguments: --teacache_tresh 0.1"),
    "abbreviated": (["--teacache_thres", "0.1"], "unrecognized arguments: --teacache_thres 0.1"),
    "task": (["--task", "t2v-5B"], "--task: invalid choice: 't2v-5B'"),
    "size": (["--size", "65*64"], "--size: invalid choice: '65*64'"),
    "frames": (["--frame_num", "16"], "--frame_num 16: must be 4n+1, such as 13 or 17"),
    "no frames": (["--frame_num", "-3"], "--frame_num -3: must be 4n+1, such as 1 or 5"),
    "steps": (["--sample_steps", "0"], "--sample_steps 0: must be 1 or more"),
    "shift": (["--sample_shift", "0"], "--sample_shift 0.0: must be positive"),
    "guidance": (["--sample_guide_scale", "nan"], "--sample_guide_scale nan: must be a number"),
    "seed": (["--base_seed", str(2**70)], f"--base_seed {2**70}: must be under 2**63"),
    "unipc": (["--sample_steps", "80", "--sample_shift", "16"], "first two timesteps are equal"),
    "none": (["--ulysses_size", "0"], "--ulysses_size 0 --ring_size 1: their product must"),
    "fsdp": (["--dit_fsdp"], "--dit_fsdp True: must be started by torchrun --nproc_per_node="),
    "t5 fsdp": (
        ["--t5_fsdp"],
        "--t5_fsdp True --dit_fsdp False: must be started by torchrun --nproc_per_node=",
    ),
    "ulysses": (["--ulysses_size", "2"], "torchrun --nproc_per_node=2"),
    "no folder": (["--ckpt_dir", "/none"], "--ckpt_dir /none: must be a folder"),
    "a file": (["--ckpt_dir", str(SCRIPT)], f"--ckpt_dir {SCRIPT}: must be a folder"),
    "save folder": (["--save_file", "/none/x.mp4"], "--save_file /none/x.mp4: cannot be written"),
    "read-only": (["--save_file", "/proc/x.mp4"], "--save_file /proc/x.mp4: cannot be written"),
    "no ending": (["--save_file", "x"], "cannot be written"),
    "text ending": (["--save_file", "x.txt"], "x.txt: cannot be written"),
    "webm": (["--save_file", "x.webm"], "x.webm: cannot be written"),
    "report folder": (["--teacache_report", "/none/r"], "--teacache_report /none/r: cannot be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_flags_are_refused_in_one_line_with_status_2(capsys, ckpt, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    flags, expected = REFUSED[name]
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, *flags)
    lines = [line for line in said.splitlines() if "error" in line]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("teacache_generate.py: error: ")
    assert expected in lines[0]
    assert "Traceback" not in said
    assert "Creating" not in said
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_is_refused(capsys):
    code, said = attempt(capsys, *ROW, *PROMPT)
    assert code == 2
    assert "heckpoint" in said


@pytest.mark.parametrize(
    ("ranks", "speaks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, True),  # left over in a shell: one process, and nobody else speaks
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, True),
        ({"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}, True),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "RANK": "2"}, True),  # another node
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}, False),
    ],
)
def test_a_refusal_is_said_once_a_node(capsys, monkeypatch, ranks, speaks):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    code, said = attempt(capsys, "--ckpt_dir", "/none", *ROW, *PROMPT)
    assert code == 2
    assert said.count("--ckpt_dir /none: must be a folder") == speaks


def test_ffmpeg_missing_is_refused(ckpt):
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *ROW, *PROMPT]
    done = python(SCRIPT, *argv, IMAGEIO_FFMPEG_EXE="/none/ffmpeg")
    assert done.returncode == 2
    assert "(pip install imageio-ffmpeg)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wan_not_found_says_where_it_looked_and_how_to_get_it(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, alone)
    done = python(alone / "teacache_generate.py", *PROMPT, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{alone} or {tmp_path}" in done.stderr
    assert "git clone https://github.com/Wan-Video/Wan2.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------- importing Wan


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A function that makes a checkout with this generate.py, which is then the one imported."""
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


WRAPPED = """
try:
    raise RuntimeError("operator torchvision::nms does not exist")
except RuntimeError as error:
    raise RuntimeError("Failed to import diffusers.loaders because of the following error "
                       "(look up to see its traceback):\\n" + str(error)) from error
"""


@pytest.mark.parametrize(
    ("generate_py", "expected"),
    [
        (no_module("einops"), "No module named 'einops': pip install einops"),
        (no_module("decord"), "No module named 'decord': pip install decord"),
        (no_module("xfuser.core.distributed"), "pip install xfuser"),
        (no_module("cv2"), "pip install opencv-python"),
        (no_module("PIL"), "pip install pillow"),
        ("import a_package_that_is_missing", "pip install a_package_that_is_missing"),
        (no_module("wan.modules.vae"), "this checkout lacks it: clone it again"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            f"install the torchvision that was built for torch {torch.__version__}",
        ),
        (WRAPPED, f"install the torchvision that was built for torch {torch.__version__}"),
        ("from PIL import NoSuchName", "cannot import name 'NoSuchName' from 'PIL'"),
        ("raise OSError('libcudart.so.12: cannot open')", "libcudart.so.12: cannot open"),
        ("def (", "SyntaxError"),
        ("raise KeyError", "KeyError"),
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
    ],
)
def test_wan_that_does_not_import_is_said_in_one_line_with_the_cure(
    capsys, fork, generate_py, expected
):
    said = refused_import(capsys, fork(generate_py))
    assert (
        said.startswith("teacache_generate.py: error: Wan cannot be imported: ") or "CUDA" in said
    )
    assert expected in said


@pytest.mark.parametrize(
    "generate_py",
    [
        "import torch\ntorch.zeros(1, device='cuda')",
        "import torch\ntorch.cuda.current_device()",  # as wan/modules/t5.py
        "raise RuntimeError('Found no NVIDIA driver on your system.')",
    ],
)
def test_a_missing_gpu_is_said(capsys, fork, monkeypatch, generate_py):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused_import(capsys, fork(generate_py))
    assert "no CUDA device, and Wan needs one (" in said
    assert f"whether torch {torch.__version__} is a CUDA build" in said


def test_a_torchvision_that_does_not_fit_is_no_missing_gpu(capsys, fork):
    said = refused_import(capsys, fork("raise RuntimeError('torchvision::nms on CUDA')"))
    assert "no CUDA device" not in said


@pytest.mark.parametrize(
    ("generate_py", "lacks"),
    [
        ("", "_parse_args, generate, WAN_CONFIGS, cache_video or save_video"),
        (
            "def generate(args): ...\ndef cache_video(): ...\nWAN_CONFIGS = {}",
            "its generate.py has no _parse_args: it is not",
        ),
        (
            "def generate(args): ...\ndef _parse_args(): ...\nWAN_CONFIGS = {}",
            "its generate.py has no cache_video or save_video: it is not",
        ),
    ],
)
def test_a_fork_without_what_the_script_needs_is_refused(capsys, fork, generate_py, lacks):
    said = refused_import(capsys, fork(generate_py))
    assert lacks in said


def test_a_fork_with_its_own_task_names_works(capsys, caplog, wan, ckpt, tmp_path, monkeypatch):
    """Whatever they are called: the checkpoint is one of t2v."""
    generate, _ = wan
    name = "anime-1.3B"
    monkeypatch.setitem(generate.WAN_CONFIGS, name, generate.WAN_CONFIGS["t2v-nano"])
    monkeypatch.setitem(generate.SUPPORTED_SIZES, name, ("64*64",))
    monkeypatch.setitem(generate.EXAMPLE_PROMPT, name, {"prompt": "a ball"})
    pipeline = generate._run_pipeline

    def run_pipeline(args, **load):
        return pipeline(Namespace(**{**vars(args), "task": "t2v-nano"}), **load)

    monkeypatch.setattr(generate, "_run_pipeline", run_pipeline)
    argv = ["--task", name, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "3"]
    code, said = attempt(capsys, *argv, "--save_file", tmp_path / "x.mp4")
    assert code == 0, said
    assert len(frames(tmp_path / "x.mp4")) == 17


@pytest.mark.parametrize("direction", ["a link in the checkout", "a link into the checkout"])
def test_a_script_that_is_a_link_works(ckpt, tmp_path, direction):
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    if direction == "a link in the checkout":
        script = repo / SCRIPT.name
        script.symlink_to(SCRIPT)
    else:
        shutil.copy(SCRIPT, repo)
        script = tmp_path / "teacache.py"
        script.symlink_to(repo / SCRIPT.name)
    done = python(script, "--ckpt_dir", ckpt, *ROW, "--teacache_plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TeaCache plan: row t2v-1.3B" in done.stdout


# ------------------------------------------------------------------------- prompt extension


EXTEND = ["--use_prompt_extend", "--prompt_extend_method"]


@pytest.mark.parametrize(
    ("flags", "package", "key", "expected"),
    [
        (["dashscope"], True, None, "dashscope: needs a key: export DASH_API_KEY=..., or"),
        (["dashscope"], True, "", "dashscope: needs a key: export DASH_API_KEY=..., or"),
        (["dashscope"], False, "x", "dashscope: pip install dashscope"),
        (
            ["local_qwen", "--prompt_extend_model", "/none/Qwen"],
            *(True, None, "--prompt_extend_model /none/Qwen: is neither a folder nor one of"),
        ),
        (
            ["local_qwen", "--prompt_extend_model", "./Qwen"],
            *(True, None, "--prompt_extend_model ./Qwen: is neither a folder nor one of"),
        ),
    ],
)
def test_a_prompt_extension_without_key_or_model_is_refused(
    capsys, ckpt, monkeypatch, flags, package, key, expected
):
    find_spec = teacache_generate.importlib.util.find_spec

    def found(name, *args):
        return package or None if name == "dashscope" else find_spec(name, *args)

    monkeypatch.setattr(teacache_generate.importlib.util, "find_spec", found)
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("DASH_API_KEY", key)
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, *EXTEND, *flags)
    assert code == 2
    assert expected in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("model", [None, "Qwen/Qwen2.5-3B-Instruct", "the folder"])
def test_a_prompt_extension_that_may_work_passes(wan, tmp_path, model):
    model = str(tmp_path) if model == "the folder" else model
    args = Namespace(
        use_prompt_extend=True, prompt_extend_method="local_qwen", prompt_extend_model=model
    )
    teacache_generate.check_prompt_extension(Namespace(generate_py=wan[0]), args)


# ------------------------------------------------------------------------------- output


@pytest.mark.parametrize("flag", ["--help", "--teacache_plan"])
def test_a_reader_that_goes_away_leaves_no_traceback(ckpt, flag):
    """As ``| head -1`` does, with a real pipe."""
    command = [sys.executable, SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, *ROW, flag]
    pipe = subprocess.PIPE
    with subprocess.Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert said == ""
    assert process.returncode == 0


def test_a_pipeline_that_never_calls_its_model_is_an_error(
    capsys, caplog, ckpt, tmp_path, wan, monkeypatch
):
    video = torch.zeros(3, 17, 64, 64)
    monkeypatch.setattr(wan[1].WanT2V, "generate", lambda *args, **kwargs: video)
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--save_file", tmp_path / "x.mp4"]
    report = tmp_path / "r.json"
    code, _ = attempt(capsys, *argv, "--teacache_report", report)
    assert code == 1
    assert "no model of this Wan's pipelines was run with TeaCache" in caplog.text
    assert json.loads(report.read_text())["status"].startswith("failed: RuntimeError")


def test_a_default_name_that_exists_is_not_written_over(capsys, ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacache_generate.time, "strftime", lambda *args: "NOW")
    name = "t2v-nano_64x64_a_red_ball_moves_right_42_NOW"
    Path(f"{name}.mp4").write_text("of yesterday")
    code, _ = attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "2")
    assert code == 0
    assert Path(f"{name}.mp4").read_text() == "of yesterday"
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}.2.mp4", f"{name}.mp4"]
    assert len(frames(tmp_path / f"{name}.2.mp4")) == 17


def test_runs_of_other_seeds_have_other_default_names(capsys, ckpt, tmp_path, monkeypatch):
    """Started in one second: the first one's file is not there yet."""
    names = set()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacache_generate.time, "strftime", lambda *args: "NOW")
    monkeypatch.setattr(
        teacache_generate.Session,
        "make_all",
        lambda self, jobs: names.add(jobs[0].args.save_file) or [],
    )
    for seed in ("1", "2"):
        argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT[:2], "--base_seed", seed]
        assert attempt(capsys, *argv)[0] == 0
    assert len(names) == 2


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


def test_a_plan_on_a_gpu_machine_touches_no_gpu(ckpt, tmp_path):
    """Although wan/modules/t5.py asks for the current device when it is imported."""
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    t5 = repo / "wan" / "modules" / "t5.py"
    t5.write_text(t5.read_text() + "\n\nDEVICE = torch.cuda.current_device()\n")
    argv = ["--wan_repo", repo, "--ckpt_dir", ckpt, *ROW, "--teacache_plan"]
    done = python("-c", NO_GPU, *argv, PYTHONPATH=str(SCRIPT.parent))
    assert done.returncode == 0, done.stderr
    assert "TeaCache plan: row t2v-1.3B" in done.stdout


def test_a_plan_is_written_as_json(capsys, ckpt, tmp_path):
    report = tmp_path / "r.json"
    argv = ["--ckpt_dir", ckpt, *ROW, "--teacache_plan", "--teacache_report", report]
    code, said = attempt(capsys, *argv)
    assert code == 0
    told = json.loads(report.read_text())
    assert told["status"] == "planned"
    assert told["row"] == "row t2v-1.3B (as asked)"
    assert (told["config"]["steps"], told["config"]["thresh"]) == (50, 0.08)
    at_default = [entry for entry in told["plan"] if entry["thresh"] == 0.08]
    assert [entry["computed"] for entry in at_default] == [told["computed"]]
    assert {"thresh", "computed", "passes", "speedup", "longest_skip"} == set(told["plan"][0])
    line = next(line for line in said.splitlines() if line.startswith(">"))
    computed = [i for i, mark in enumerate(line.split()[-1]) if mark == "#"]
    assert told["computed"] == computed


def test_a_plan_that_cannot_be_written_is_refused(capsys, ckpt):
    argv = ["--ckpt_dir", ckpt, *ROW, "--teacache_plan", "--teacache_report", "/none/r.json"]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert "--teacache_report /none/r.json: cannot be written" in said


@pytest.mark.parametrize(
    "flags",
    [
        *([], ["--use_ret_steps"], ["--teacache_thresh", "0.04"], ["--teacache_thresh", "0"]),
        *(["--teacache_thresh", "0.07999999"], ["--teacache_speedup", "2"]),
        *(["--teacache_model", "sigma"], ["--teacache_model", "t2v-14B"]),
    ],
    ids=" ".join,
)
def test_the_plans_table_has_no_threshold_twice_and_marks_one(capsys, ckpt, flags):
    row = [] if "--teacache_model" in flags else ROW
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *row, "--teacache_plan", *flags)
    assert code == 0
    lines = [line for line in said.splitlines() if line[-10:].strip("#.") == ""]
    thresholds = [line[1:].split()[0] for line in lines]
    assert len(set(thresholds)) == len(thresholds) >= 6
    assert thresholds == sorted(thresholds, key=float)
    assert sum(line.startswith(">") for line in lines) == 1


def test_files_that_begin_with_a_byte_order_mark_read_right(capsys, ckpt, tmp_path):
    """As editors on Windows save them: coefficients, and the jobs of --teacache_jobs."""
    shipped = SCRIPT.parent / "assets" / "wan_nano" / "teacache.json"
    plans = []
    for mark in (b"", b"\xef\xbb\xbf"):
        file = folder(tmp_path / str(len(mark)) / "folder") / "teacache.json"
        file.write_bytes(mark + shipped.read_bytes())
        plans.append(
            attempt(capsys, "--ckpt_dir", ckpt, "--teacache_plan", "--teacache_coefficients", file)
        )
    assert plans[0] == plans[1]
    assert plans[0][0] == 0
    jobs = tmp_path / "jobs.txt"
    jobs.write_bytes(b"\xef\xbb\xbf--prompt 'a ball'\r\n")
    assert teacache_generate.read_jobs(str(jobs)) == [(1, ["--prompt", "a ball"])]


# ------------------------------------------------------------------------------ attention


@pytest.fixture
def attention(wan, monkeypatch):
    """The stand-in's model and clip modules, with an attention that can be told from others."""
    from wan.modules import clip, model

    for module in (clip, model):
        monkeypatch.setattr(module, "flash_attention", "wan's own")
    return clip, model


@pytest.mark.parametrize(
    ("usable", "clip_own", "model_own"),
    [
        ([], False, False),
        (["flash_attn"], True, True),
        (["flash_attn_interface"], False, True),  # CLIP asks for flash-attn 2
        (["flash_attn", "flash_attn_interface"], True, True),
    ],
)
def test_attention_is_replaced_only_where_flash_attn_is_missing(
    attention, monkeypatch, usable, clip_own, model_own
):
    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_varlen_func = lambda: torch.ones(2)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    teacache_generate.install_attention(usable)
    own = [module.flash_attention == "wan's own" for module in attention]
    assert own == [clip_own, model_own]


@pytest.mark.parametrize("out", [torch.ones(2), (torch.ones(2), None)])
def test_flash_attn_3_gives_a_tuple_whatever_its_version(attention, monkeypatch, out):
    interface = ModuleType("flash_attn_interface")
    interface.flash_attn_varlen_func = lambda **kwargs: out
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    teacache_generate.install_attention(["flash_attn", "flash_attn_interface"])
    assert torch.equal(interface.flash_attn_varlen_func(q=1)[0], torch.ones(2))


@pytest.fixture
def flash(monkeypatch, tmp_path):
    """A function that puts flash-attn 2 and 3 on a machine with this GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # restored afterwards

    def make(capability, flash_2="", flash_3=""):
        for name, text in (("flash_attn", flash_2), ("flash_attn_interface", flash_3)):
            (tmp_path / f"{name}.py").write_text(f"flash_attn_varlen_func = print\n{text}\n")
            sys.modules.pop(name, None)
        available = capability is not None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return make


BOTH = ["flash_attn", "flash_attn_interface"]


@pytest.mark.parametrize(
    ("capability", "usable"),
    [
        (None, []),
        ((6, 1), []),  # P40
        ((7, 0), []),  # V100
        ((7, 5), []),  # T4, RTX 20
        ((8, 0), BOTH[:1]),
        ((8, 6), BOTH[:1]),
        ((8, 9), BOTH[:1]),  # RTX 40
        ((9, 0), BOTH),
        ((10, 0), BOTH[:1]),  # B200, for which flash-attn 3 has no kernels
        ((12, 0), BOTH[:1]),  # RTX 50
    ],
)
def test_flash_attn_is_used_only_on_gpus_that_it_can_compute_on(flash, capability, usable):
    flash(capability)
    assert teacache_generate.hide_unusable_flash_attention(capability) == usable
    for name in BOTH:
        if name in usable:
            assert __import__(name).flash_attn_varlen_func is print
        else:
            with pytest.raises(ModuleNotFoundError):  # all that Wan2.1 is ready for
                __import__(name)


def test_an_old_gpu_gets_pytorchs_attention_with_one_line(caplog, attention, flash):
    flash((7, 5))
    with caplog.at_level("INFO"):
        teacache_generate.import_wan(str(NANO), generates=True)
    line = "TeaCache: no usable flash-attn: scaled_dot_product_attention instead"
    assert caplog.text.count(line) == 1
    assert all(module.flash_attention is teacache_generate.sdpa_attention for module in attention)


def test_a_newer_gpu_keeps_flash_attn_without_a_line(caplog, attention, flash):
    flash((8, 6))
    with caplog.at_level("INFO"):
        teacache_generate.import_wan(str(NANO), generates=True)
    assert "attention" not in caplog.text
    assert [module.flash_attention for module in attention] == ["wan's own", "wan's own"]


def test_the_gpu_of_this_process_decides(flash, monkeypatch):
    flash((8, 6))
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert teacache_generate.compute_capability() == (7, 5)


def test_a_local_rank_without_a_gpu_is_refused(capsys, flash, monkeypatch, wan):
    flash((8, 6))
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, said = attempt(capsys, *PROMPT)
    assert code == 2
    assert "LOCAL_RANK 1: there are 1 GPUs: start by torchrun, or unset LOCAL_RANK" in said


def test_more_processes_than_gpus_are_refused_by_the_one_that_speaks(
    capsys, flash, monkeypatch, wan
):
    """Of four, two have a GPU: what the others said would be heard by nobody."""
    flash((8, 6))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    code, said = attempt(capsys, *PROMPT)
    assert code == 2
    assert "--nproc_per_node 4: must be 2 GPUs or fewer" in said


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('undefined symbol: _ZN3c105')",
        "raise RuntimeError('built for another CUDA')",
        "raise OSError('libcudart.so.11.0: cannot open shared object file')",
        "raise AttributeError('torch has no attribute')",
        "import a_package_that_is_missing",
        "def (",
    ],
)
def test_a_flash_attn_that_does_not_import_counts_as_missing(flash, text):
    flash((9, 0), flash_2=text)
    assert teacache_generate.hide_unusable_flash_attention((9, 0)) == ["flash_attn_interface"]
    with pytest.raises(ModuleNotFoundError):
        __import__("flash_attn")
    flash((9, 0), text, text)
    assert teacache_generate.hide_unusable_flash_attention((9, 0)) == []


def test_order_1_computes_the_same_steps_and_makes_another_video(capsys, caplog, ckpt, tmp_path):
    reports, videos = [], []
    for order in ("0", "1"):
        report, video = tmp_path / f"{order}.json", tmp_path / f"{order}.mp4"
        argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--teacache_order", order]
        files = ["--teacache_report", report, "--save_file", video]
        caplog.clear()
        with caplog.at_level("INFO"):
            assert attempt(capsys, *argv, *files)[0] == 0
        assert ("plain, order 1: will compute" in caplog.text) == (order == "1")
        reports.append(json.loads(report.read_text()))
        videos.append(frames(video))
    assert [report["config"]["order"] for report in reports] == [0, 1]
    assert reports[0]["computed"] == reports[1]["computed"] != list(range(50))
    assert not np.array_equal(*videos)
