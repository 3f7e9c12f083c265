"""The whole command line, on the stand-in ``wan_nano``."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from nano import NANO, PROMPT, ROW, SCRIPT, attempt, frames, python
from PIL import Image
from real_wan import Reference

import teacache_generate
from teacache_generate import FITS, TeaCacheConfig, choose_row, main, teacache

# ------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize("mode", [[], ["--use_ret_steps"]], ids=["plain", "ret"])
def test_a_run_leaves_a_video_a_report_and_two_lines(ckpt, tmp_path, mode):
    video, report = tmp_path / "video.mp4", tmp_path / "report.json"
    files = ["--save_file", video, "--teacache_report", report]
    done = python(SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, *ROW, *PROMPT, *mode, *files)
    assert done.returncode == 0, done.stderr
    assert frames(video).shape == (17, 64, 64, 3)
    told = json.loads(report.read_text())
    computed = [i for i, step in enumerate(told["steps"]) if step["computed"]]
    assert told["status"] == "finished"
    assert told["fit"] == "row t2v-1.3B (as asked)"
    assert told["computed"] == computed
    assert 15 <= len(computed) <= 40
    assert {"encode", "sampling", "decode", "cache_video"} == set(told["seconds"])
    thresh = "0.1" if mode else "0.08"
    said = done.stdout
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


def test_the_script_works_copied_beside_generate_py(ckpt, tmp_path):
    repo = tmp_path / "Wan2.1"
    shutil.copytree(NANO, repo)
    shutil.copy(SCRIPT, repo)
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "3", "--save_file", "video.mp4"]
    done = python("teacache_generate.py", *argv, cwd=repo)
    assert done.returncode == 0, done.stderr
    assert frames(repo / "video.mp4").shape[0] == 17


def test_threshold_zero_gives_the_video_of_stock_generate_py(ckpt, tmp_path):
    argv = ["--ckpt_dir", ckpt, *PROMPT, "--save_file"]
    stock = python(NANO / "generate.py", *argv, tmp_path / "stock.mp4")
    off = ["--wan_repo", NANO, *ROW, "--teacache_thresh", "0"]
    ours = python(SCRIPT, *argv, tmp_path / "ours.mp4", *off)
    assert (stock.returncode, ours.returncode) == (0, 0), stock.stderr + ours.stderr
    assert np.array_equal(frames(tmp_path / "stock.mp4"), frames(tmp_path / "ours.mp4"))


def pipelines(wan, ckpt, i2v_ckpt, picture, task):
    generate, package = wan
    config = generate.WAN_CONFIGS[task]
    if task == "t2v-nano":
        return package.WanT2V(config, str(ckpt)), ("a red ball moves right",), {"size": (64, 64)}
    image = Image.open(picture).convert("RGB")
    return package.WanI2V(config, str(i2v_ckpt)), ("a ball", image), {"max_area": 64 * 64}


@pytest.mark.parametrize("task", ["t2v-nano", "i2v-nano"])
@pytest.mark.parametrize("use_ret_steps", [False, True], ids=["plain", "ret"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("guide_scale", [5.0, 1.0])
def test_the_video_is_that_of_the_method_written_plainly(
    wan, ckpt, i2v_ckpt, picture, task, use_ret_steps, solver, guide_scale
):
    row = FITS[use_ret_steps]["t2v-1.3B"]
    thresh, coefficients = row.thresholds[-1], row.coefficients
    steps = 50
    settings = dict(sampling_steps=steps, sample_solver=solver, guide_scale=guide_scale, seed=1)
    pipeline, inputs, size = pipelines(wan, ckpt, i2v_ckpt, picture, task)
    settings |= {**size, "frame_num": 17}
    config = TeaCacheConfig(steps, thresh, coefficients, use_ret_steps, guide_scale)
    with teacache(pipeline.model, config) as cache:
        ours = pipeline.generate(*inputs, **settings)
    assert cache.residuals == {}
    stock = pipeline.generate(*inputs, **settings)
    method = "ret" if use_ret_steps else "plain"
    settings_of_it = {"thresh": thresh, "coefficients": coefficients, "method": method}
    reference = Reference([pipeline.model], steps, settings_of_it)
    expected = pipeline.generate(*inputs, **settings)
    assert [step.computed for step in cache.schedule.steps] == reference.computed
    assert 10 < sum(reference.computed) < 45
    # At guidance scale 1 stock computes u + (c - u), which is c but for the rounding.
    assert (ours - expected).abs().max() <= (1e-5 if guide_scale == 1 else 0)
    assert not torch.equal(ours, stock)


@pytest.mark.parametrize(
    "flags",
    [["--ulysses_size", "2"], ["--ring_size", "2", "--dit_fsdp", "--t5_fsdp"], ["--dit_fsdp"]],
    ids=" ".join,
)
def test_two_processes_give_the_video_of_one(ckpt, tmp_path, flags):
    common = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "8"]
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"  # animated, lossless
    reports = [tmp_path / "alone.json", tmp_path / "both.json"]
    one = python(SCRIPT, *common, "--save_file", alone, "--teacache_report", reports[0])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    out = ["--save_file", both, "--teacache_report", reports[1]]
    two = python(*torchrun, *common, *out, *flags, CUDA_VISIBLE_DEVICES="")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    steps = [json.loads(report.read_text())["computed"] for report in reports]
    assert steps[0] == steps[1]
    assert len(steps[0]) < 8
    assert two.stdout.count("TeaCache: computed") == 1
    assert np.abs(frames(alone) - frames(both)).max() <= 1  # of 255, for the rounding


# ------------------------------------------------------------------------------ which row


def row(**flags):
    return choose_row(teacache_generate.argparse.Namespace(**flags))[0]


@pytest.mark.parametrize(
    ("task", "ckpt_dir", "size", "expected"),
    [
        ("t2v-1.3B", "/models/14B/Wan2___1-T2V-1___3B", "832*480", "t2v-1.3B"),
        ("t2v-14B", "/models/1.3B/x", "1280*720", "t2v-14B"),
        ("t2i-14B", "x", "1024*1024", "t2v-14B"),
        ("i2v-14B", "Wan2.1-I2V-14B-480P", "1280*720", "i2v-14B-480P"),
        ("i2v-14B", "/480P/Wan2___1-I2V-14B-720p/", "832*480", "i2v-14B-720P"),
        ("i2v-14B", "/480P/mine", "1280*720", "i2v-14B-720P"),
        ("i2v-14B", "/720P/mine", "480*832", "i2v-14B-480P"),
        ("i2v-14B", "480p-and-720p", "480*832", "i2v-14B-480P"),
        ("i2v-14B", "my1480px", "1280*720", "i2v-14B-720P"),
        ("flf2v-14B", "x", "832*480", "i2v-14B-720P"),
        ("vace-1.3B", "x", "832*480", "t2v-1.3B"),
        ("vace-14B", "x", "832*480", "t2v-14B"),
    ],
)
def test_the_row_follows_the_task_and_the_folders_own_name(task, ckpt_dir, size, expected):
    assert row(task=task, ckpt_dir=ckpt_dir, size=size) == expected


# ------------------------------------------------------------------------------- bad input


def broken(folder: Path, tmp_path: Path, change) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


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


def test_an_unknown_task_needs_its_row_named(capsys, ckpt):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *PROMPT)
    assert code == 2
    assert "--task t2v-nano: no row is known for it; add --teacache_model" in said


WEIGHTS = "diffusion_pytorch_model.safetensors"


def shard(folder: Path) -> None:
    """The transformer in two files with an index, the second one missing."""
    (folder / WEIGHTS).rename(folder / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
        (
            lambda folder: (folder / "Wan2.1_VAE_nano.pth").unlink(),
            "Wan2.1_VAE_nano.pth is missing",
        ),
        (shard, "part-2.safetensors is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "has dim None"),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"dim": 1536}'),
            "its transformer has dim 1536, that of --task t2v-nano 128",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "i2v"}'),
            "a i2v transformer, which --task t2v-nano cannot use",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_refused_and_the_file_named(
    capsys, ckpt, tmp_path, change, expected
):
    code, said = attempt(capsys, "--ckpt_dir", broken(ckpt, tmp_path, change), *ROW, *PROMPT)
    assert code == 2
    assert expected in said
    assert "Creating" not in said


def test_the_task_needs_the_parts_that_its_config_names(capsys, ckpt, picture):
    argv = ["--task", "i2v-nano", "--image", picture, "--ckpt_dir", ckpt]
    code, said = attempt(capsys, *argv, *ROW, *PROMPT)
    assert code == 2
    assert "is missing, and --task i2v-nano needs it" in said


@pytest.mark.parametrize("image", ["none.png", SCRIPT])
def test_an_image_that_cannot_be_read_is_refused(capsys, i2v_ckpt, image):
    argv = ["--task", "i2v-nano", "--image", image, "--ckpt_dir", i2v_ckpt]
    code, said = attempt(capsys, *argv, *ROW, *PROMPT)
    assert code == 2
    assert f"--image {image}: cannot be read" in said


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


@pytest.mark.parametrize(
    ("generate_py", "expected"),
    [
        (
            "import torch\ntorch.zeros(1, device='cuda')\n",
            "no CUDA",
        ),
        ("import a_package_that_is_missing\n", "cannot be imported: No module named 'a_package"),
    ],
)
def test_wan_that_does_not_import_is_said_in_one_line(tmp_path, generate_py, expected):
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "__init__.py").touch()
    (tmp_path / "generate.py").write_text(generate_py)
    done = python(SCRIPT, "--wan_repo", tmp_path, *PROMPT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------- failures later on


def rescued(said: str) -> tuple[Path, str]:
    """The tensor file that was kept, and the command that was told."""
    path = re.search(r"What it was given is in (\S+);", said).group(1)
    return Path(path), said[said.index("\ncd ") + 1 :].splitlines()[0]


def follow(command: str) -> Path:
    """Run the command that was told; the video it makes."""
    folder, command = re.fullmatch(r"cd (\S+) && (.*)", command).groups()
    argv = shlex.split(command)
    assert argv[0] == "python"
    done = python(*argv[1:], cwd=folder)
    assert done.returncode == 0, done.stderr
    return Path(re.search(r'"([^"]*\.mp4)"', argv[2]).group(1))


def test_frames_are_kept_when_the_video_cannot_be_written(caplog, wan, ckpt, tmp_path, monkeypatch):
    """Its folder goes away during the run, so the frames go elsewhere, and the reason is said."""
    folder = tmp_path / "out"
    folder.mkdir()
    pipeline = wan[1].WanT2V
    stock, made = pipeline.generate, []

    def generate(self, *args, **kwargs):
        made.append(stock(self, *args, **kwargs))
        shutil.rmtree(folder)
        return made[-1]

    monkeypatch.setattr(pipeline, "generate", generate)
    monkeypatch.setattr(teacache_generate.tempfile, "tempdir", str(tmp_path))
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "3"]
    with pytest.raises(OSError, match="cache_video failed"):
        main(["--wan_repo", str(NANO), *map(str, argv), "--save_file", str(folder / "x.mp4")])
    kept, command = rescued(caplog.text)
    assert torch.equal(torch.load(kept)[0], made[0])
    assert frames(follow(command)).shape == (17, 64, 64, 3)


@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "cut"])
def test_a_video_that_cannot_be_read_back_counts_as_not_written(
    caplog, wan, ckpt, tmp_path, monkeypatch, size
):
    """imageio does not tell when ffmpeg finds the disk full."""
    generate, _ = wan
    write = generate.cache_video

    def cache_video(tensor, save_file, **options):
        written = write(tensor, save_file, **options)
        if "retry" not in options:  # not the try before the run
            os.truncate(save_file, size)
        return written

    monkeypatch.setattr(generate, "cache_video", cache_video)
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "2"]
    with pytest.raises(OSError, match="does not hold 17 frames"):
        main(["--wan_repo", str(NANO), *map(str, argv), "--save_file", str(tmp_path / "x.mp4")])
    kept, _ = rescued(caplog.text)
    assert kept.parent == tmp_path
    assert torch.load(kept).shape == (1, 3, 17, 64, 64)


def test_a_report_that_cannot_be_written_at_the_end_hides_nothing(
    caplog, wan, ckpt, tmp_path, monkeypatch
):
    write_report, calls = teacache_generate.Job.write_report, []

    def full(self, status):
        calls.append(status)
        if status != "started":
            raise OSError("no space left")
        write_report(self, status)

    monkeypatch.setattr(teacache_generate.Job, "write_report", full)
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "2"]
    argv += ["--save_file", tmp_path / "x.mp4", "--teacache_report", tmp_path / "r.json"]
    main(["--wan_repo", str(NANO), *map(str, argv)])
    assert calls == ["started", "finished"]
    assert "no space left" in caplog.text
    assert len(frames(tmp_path / "x.mp4")) == 17


def test_frames_that_can_be_kept_nowhere_leave_the_first_error(
    caplog, wan, ckpt, monkeypatch, tmp_path
):
    from wan.modules.vae import WanVAE

    def decode(self, latents):
        raise torch.OutOfMemoryError("out of memory")

    def save(tensors, path):
        Path(path).touch()
        raise RuntimeError("disk full")

    monkeypatch.setattr(WanVAE, "decode", decode)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(teacache_generate.tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "2"]
    with pytest.raises(torch.OutOfMemoryError):
        main(["--wan_repo", str(NANO), *map(str, argv), "--save_file", str(tmp_path / "x.mp4")])
    assert "disk full" in caplog.text
    assert "is lost" in caplog.text
    assert not list(tmp_path.rglob("*.pt"))


def test_latents_are_kept_when_decoding_fails(caplog, wan, ckpt, tmp_path, monkeypatch):
    from wan.modules.vae import WanVAE

    def decode(self, latents):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(WanVAE, "decode", decode)
    report = tmp_path / "report.json"
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "3", "--teacache_report", report]
    with pytest.raises(torch.OutOfMemoryError):
        main(["--wan_repo", str(NANO), *map(str, argv), "--save_file", str(tmp_path / "x.mp4")])
    kept, command = rescued(caplog.text)
    assert kept.parent == tmp_path
    assert [u.shape for u in torch.load(kept)] == [(16, 5, 8, 8)]
    assert frames(follow(command)).shape == (17, 64, 64, 3)
    told = json.loads(report.read_text())
    assert told["status"].startswith("failed: OutOfMemoryError")
    assert len(told["steps"]) == 3


def test_ctrl_c_ends_with_130_and_leaves_a_report(ckpt, tmp_path):
    report = tmp_path / "report.json"
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--sample_steps", "900"]
    argv += ["--sample_solver", "dpm++"]
    argv += ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if "TeaCache: row" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    told = json.loads(report.read_text())
    assert told["status"] == "failed: KeyboardInterrupt()"
    assert 0 < len(told["steps"]) < 900


def test_an_interrupted_run_leaves_wan_as_it_was(wan, ckpt, tmp_path, monkeypatch):
    generate, package = wan
    before = package.WanT2V, generate.cache_video, generate.cache_image, generate.argparse
    pipeline = package.WanT2V

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", interrupt)
    with pytest.raises(SystemExit) as leaving:
        argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--save_file", tmp_path / "x.mp4"]
        main(["--wan_repo", str(NANO), *map(str, argv)])
    assert leaving.value.code == 130
    after = package.WanT2V, generate.cache_video, generate.cache_image, generate.argparse
    assert after == before


def test_a_pipeline_that_is_made_and_never_generates_is_an_error(wan, ckpt, tmp_path, monkeypatch):
    generate, package = wan
    config = generate.WAN_CONFIGS["t2v-nano"]
    monkeypatch.setattr(generate, "generate", lambda args: package.WanT2V(config, args.ckpt_dir))
    argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--save_file", tmp_path / "x.mp4"]
    with pytest.raises(RuntimeError, match="no pipeline of this"):
        main(["--wan_repo", str(NANO), *map(str, argv)])


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


def test_a_flash_attn_of_another_torch_counts_as_missing(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert teacache_generate.usable_flash_attention() == []
    with pytest.raises(ModuleNotFoundError):  # all that Wan2.1 is ready for
        __import__("flash_attn")


def test_order_1_computes_the_same_steps_and_makes_another_video(ckpt, tmp_path):
    reports, videos = [], []
    for order in ("0", "1"):
        report, video = tmp_path / f"{order}.json", tmp_path / f"{order}.mp4"
        argv = ["--ckpt_dir", ckpt, *ROW, *PROMPT, "--teacache_order", order]
        files = ["--teacache_report", report, "--save_file", video]
        done = python(SCRIPT, "--wan_repo", NANO, *argv, *files)
        assert done.returncode == 0, done.stderr
        assert ("plain, order 1, 50 steps" in done.stdout) == (order == "1")
        reports.append(json.loads(report.read_text()))
        videos.append(frames(video))
    assert [report["config"]["order"] for report in reports] == [0, 1]
    assert reports[0]["computed"] == reports[1]["computed"] != list(range(50))
    assert not np.array_equal(*videos)
