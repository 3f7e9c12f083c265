"""What goes wrong after the sampling: nothing is lost, and it is said. On the stand-in."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from nano import NANO, PROMPT, ROW, SCRIPT, frames

import teacache_generate
from teacache_generate import main

SHORT = [*ROW, *PROMPT, "--sample_steps", "4"]


def status(*argv: object) -> int:
    """Exit status of the script in this process."""
    try:
        main(["--wan_repo", str(NANO), *map(str, argv)])
    except SystemExit as leaving:
        return leaving.code
    return 0


def in_a_child(*argv: object) -> int:
    """The same in a child; negative: the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            code = status(*argv)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command_of(said: str) -> str:
    """The command that was told."""
    return re.search(r"this makes the video of them:\n(.+)", said).group(1)


@pytest.fixture(scope="module")
def undisturbed(ckpt, tmp_path_factory) -> np.ndarray:
    video = tmp_path_factory.mktemp("undisturbed") / "x.mp4"
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", video) == 0
    assert [file.name for file in video.parent.iterdir()] == ["x.mp4"]  # no latents
    return frames(video)


# ------------------------------------------------------------------ each thing that can happen


def disturb_decoder(monkeypatch, act):
    from wan.modules.vae import WanVAE

    monkeypatch.setattr(WanVAE, "decode", act)


def raises(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def kill(number):
    return lambda *args, **kwargs: os.kill(os.getpid(), number)


def error_in_the_decoder(monkeypatch, wan, folder):
    disturb_decoder(monkeypatch, raises)


def error_in_the_pipeline_after_the_decoder(monkeypatch, wan, folder):
    stock = wan[1].WanT2V.generate

    def generate(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(wan[1].WanT2V, "generate", generate)


def error_in_generate_py_before_the_writer(monkeypatch, wan, folder):
    stock = wan[0]._run_pipeline
    monkeypatch.setattr(wan[0], "_run_pipeline", lambda *a, **k: raises(stock(*a, **k)))


def error_in_the_writer(monkeypatch, wan, folder):
    stock = wan[0].cache_video

    def cache_video(tensor, save_file, **options):
        return raises() if tensor.size(2) > 2 else stock(tensor, save_file, **options)  # the try

    monkeypatch.setattr(wan[0], "cache_video", cache_video)


def error_that_the_writer_prints(monkeypatch, wan, folder):
    stock = imageio.get_writer

    def get_writer(file, **options):
        return raises() if "probe" not in str(file) else stock(file, **options)

    monkeypatch.setattr(imageio, "get_writer", get_writer)


def folder_gone_before_the_decoder(monkeypatch, wan, folder):
    stock = wan[1].WanT2V.noise

    def noise(self, *args):
        shutil.rmtree(folder)
        return stock(self, *args)

    monkeypatch.setattr(wan[1].WanT2V, "noise", noise)


ERRORS = [
    (error_in_the_decoder, "CUDA out of memory"),
    (error_in_the_pipeline_after_the_decoder, "CUDA out of memory"),
    (error_in_generate_py_before_the_writer, "CUDA out of memory"),
    (error_in_the_writer, "CUDA out of memory"),
    (error_that_the_writer_prints, "CUDA out of memory"),  # not what a second try stumbles on
    (folder_gone_before_the_decoder, "out/x.mp4"),
]


@pytest.mark.parametrize(("disturb", "reason"), ERRORS, ids=[e[0].__name__ for e in ERRORS])
def test_after_an_error_the_latents_are_there_and_make_the_video(
    caplog, capsys, wan, ckpt, tmp_path, monkeypatch, undisturbed, disturb, reason
):
    folder, report, temporary = tmp_path / "out", tmp_path / "r.json", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(teacache_generate.tempfile, "tempdir", str(temporary))
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", folder / "x.mp4"]
    with monkeypatch.context() as patch:
        disturb(patch, wan, folder)
        assert status(*argv, "--teacache_report", report) == 1
    gone = disturb is folder_gone_before_the_decoder
    kept = (temporary if gone else folder) / "x.latents.pt"
    told = json.loads(report.read_text())
    assert told["status"].startswith("failed: ")
    assert reason in told["status"]
    assert [len(told["steps"]), told["latents"]] == [4, str(kept)]
    assert f"its latents are in {kept}; this makes the video of them:\n" in caplog.text
    assert f"{folder / 'x.mp4'}: failed: " in caplog.text
    assert reason in caplog.text
    content = torch.load(kept, weights_only=True)
    assert [latent.shape for latent in content.pop("latents")] == [(16, 5, 8, 8)]
    assert content == {
        "task": "t2v-nano",
        "ckpt_dir": str(ckpt),
        "save_file": str(folder / "x.mp4"),
        "fps": 8,
        "seed": 42,
        "prompt": PROMPT[1],
    }
    folder.mkdir(exist_ok=True)
    *start, flag, file = shlex.split(command_of(caplog.text))
    assert start == [sys.executable, str(SCRIPT), "--wan_repo", str(NANO)]
    assert status(flag, file) == 0
    assert np.array_equal(frames(folder / "x.mp4"), undisturbed)
    assert [file.name for file in folder.iterdir()] == ["x.mp4"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("where", ["decoder", "writer"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_and_the_latents_make_the_video(
    caplog, wan, ckpt, tmp_path, monkeypatch, undisturbed, name, where
):
    number, report = signal.Signals[name], tmp_path / "r.json"
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]
    with monkeypatch.context() as patch:
        if where == "decoder":
            disturb_decoder(patch, kill(number))
        else:
            stock = wan[0].cache_video

            def cache_video(tensor, *args, **kwargs):
                return stock(tensor, *args, **kwargs) if tensor.size(2) == 2 else kill(number)()

            patch.setattr(wan[0], "cache_video", cache_video)
        assert status(*argv, "--teacache_report", report) == 128 + number
    told = json.loads(report.read_text())
    assert told["status"] == f"failed: Stopped('{name}')"
    assert len(told["steps"]) == 4
    assert f"stopped by {name}" in caplog.text
    assert "Traceback" not in caplog.text
    assert status("--teacache_decode", tmp_path / "x.latents.pt") == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)


def test_after_kill_9_in_the_decoder_the_latents_make_the_video(
    wan, ckpt, tmp_path, monkeypatch, undisturbed
):
    with monkeypatch.context() as patch:
        disturb_decoder(patch, kill(signal.SIGKILL))
        argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]
        assert in_a_child(*argv) == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == ["x.latents.pt"]
    assert status("--teacache_decode", tmp_path / "x.latents.pt") == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]


def test_after_kill_9_in_the_writer_the_latents_make_the_video(
    wan, ckpt, tmp_path, monkeypatch, undisturbed
):
    stock = wan[0].cache_video

    def cache_video(tensor, save_file, **options):
        stock(tensor, save_file, **options)
        if tensor.size(2) > 2:
            os.truncate(save_file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(wan[0], "cache_video", cache_video)
        argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]
        assert in_a_child(*argv) == -signal.SIGKILL
    assert (tmp_path / "x.mp4").stat().st_size == 100
    assert status("--teacache_decode", tmp_path / "x.latents.pt") == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)


def test_the_latents_are_on_disk_before_the_decoder_begins(wan, ckpt, tmp_path, monkeypatch):
    from wan.modules.vae import WanVAE

    stock, seen = WanVAE.decode, []

    def decode(self, latents):
        seen.append([file.name for file in tmp_path.iterdir()])
        content = torch.load(tmp_path / "x.latents.pt", weights_only=True)
        assert torch.equal(content["latents"][0], latents[0])
        return stock(self, latents)

    monkeypatch.setattr(WanVAE, "decode", decode)
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 0
    assert seen == [["x.latents.pt"]]
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]


# -------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_called_a_full_disk(
    caplog, wan, ckpt, small_disk, tmp_path, monkeypatch, undisturbed
):
    """It fills up during the run: latents go elsewhere, and the writer's reason is that."""
    stock, others = wan[1].WanT2V.noise, small_disk / "others"

    def noise(self, *args):
        others.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 12288))
        return stock(self, *args)

    monkeypatch.setattr(teacache_generate.tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(wan[1].WanT2V, "noise", noise)
        argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", small_disk / "x.mp4"]
        assert status(*argv) == 1
    assert "the disk is full (No space left on device)" in caplog.text
    assert f"latents cannot be kept in {small_disk}: " in caplog.text
    assert not (small_disk / "x.latents.pt").exists()
    others.unlink()
    assert status("--teacache_decode", tmp_path / "x.latents.pt") == 0
    assert np.array_equal(frames(small_disk / "x.mp4"), undisturbed)


@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "cut"])
@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png"])
def test_a_video_that_cannot_be_read_back_counts_as_not_written(
    caplog, wan, ckpt, tmp_path, monkeypatch, size, ending
):
    """imageio does not tell when ffmpeg finds the disk full."""
    stock = wan[0].cache_video

    def cache_video(tensor, save_file, **options):
        stock(tensor, save_file, **options)
        if tensor.size(2) > 2:
            os.truncate(save_file, size)

    monkeypatch.setattr(wan[0], "cache_video", cache_video)
    target = tmp_path / f"x.{ending}"
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", target) == 1
    assert "does not hold 17 frames" in caplog.text
    assert (tmp_path / "x.latents.pt").exists()


def test_latents_that_can_be_kept_nowhere_do_not_stop_the_video(
    caplog, wan, ckpt, tmp_path, monkeypatch, undisturbed
):
    def save(content, file):
        file.write(b"half of it")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(teacache_generate.tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]
    assert status(*argv) == 0
    assert "latents cannot be kept in" in caplog.text
    assert "disk full" in caplog.text
    assert not list(tmp_path.rglob("*.pt"))
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)


def test_latents_that_went_with_their_folder_are_not_said_to_be_there(
    caplog, wan, ckpt, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    folder.mkdir()
    stock = wan[0]._run_pipeline

    def run_pipeline(*args, **kwargs):
        video = stock(*args, **kwargs)
        shutil.rmtree(folder)
        return video

    monkeypatch.setattr(wan[0], "_run_pipeline", run_pipeline)
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", folder / "x.mp4") == 1
    assert f"{folder / 'x.mp4'}: failed: " in caplog.text
    assert "this makes the video of them" not in caplog.text


def test_a_writer_that_fails_leaves_no_empty_file_in_the_place_of_the_video(
    wan, ckpt, tmp_path, monkeypatch
):
    error_that_the_writer_prints(monkeypatch, wan, tmp_path)
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.latents.pt"]


def test_a_report_that_cannot_be_written_at_the_end_hides_nothing(
    caplog, wan, ckpt, tmp_path, monkeypatch
):
    stock = wan[0]._run_pipeline
    report = tmp_path / "r.json"

    def run_pipeline(*args, **kwargs):
        report.unlink()
        report.mkdir()  # as good as a full disk
        return stock(*args, **kwargs)

    monkeypatch.setattr(wan[0], "_run_pipeline", run_pipeline)
    argv = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    assert status("--ckpt_dir", ckpt, *SHORT, *argv) == 0
    assert f"--teacache_report {report}: " in caplog.text
    assert len(frames(tmp_path / "x.mp4")) == 17


def test_the_first_error_is_told_where_later_lines_stumble_over_it(
    caplog, wan, ckpt, tmp_path, monkeypatch
):
    """A fork that does something with the frames, of which there are none."""
    stock = wan[1].WanT2V.generate

    def generate(self, *args, **kwargs):
        return stock(self, *args, **kwargs)[:, 16]

    monkeypatch.setattr(wan[1].WanT2V, "generate", generate)
    error_in_the_decoder(monkeypatch, wan, tmp_path)
    report = tmp_path / "r.json"
    argv = ["--save_file", tmp_path / "x.mp4", "--teacache_report", report]
    assert status("--ckpt_dir", ckpt, *SHORT, *argv) == 1
    assert "x.mp4: failed: OutOfMemoryError('CUDA out of memory')" in caplog.text
    assert "OutOfMemoryError" in json.loads(report.read_text())["status"]


# ---------------------------------------------------------------------------- names


def test_two_runs_that_fail_at_once_keep_two_files(wan, ckpt, tmp_path, monkeypatch):
    error_in_the_decoder(monkeypatch, wan, tmp_path)
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]
    children = []
    for seed in ("1", "2"):
        children.append(os.fork())
        if not children[-1]:
            with contextlib.suppress(BaseException):
                status(*argv, "--base_seed", seed)
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == ["x.2.latents.pt", "x.latents.pt"]
    contents = [torch.load(tmp_path / name, weights_only=True) for name in kept]
    assert {content["seed"] for content in contents} == {1, 2}


def test_a_name_that_is_taken_is_never_written_over(tmp_path):
    names = [teacache_generate.write_exclusively({"n": n}, tmp_path / "a.b.pt") for n in range(3)]
    assert [torch.load(name)["n"] for name in names] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("x.mp4", "x.2.mp4"),
        ("t2v-1.3B_832x480_cats_2026.mp4", "t2v-1.3B_832x480_cats_2026.2.mp4"),
        ("v1.5.latents.pt", "v1.5.2.latents.pt"),
        ("x", "x.2"),
    ],
)
def test_the_number_stands_before_the_ending(name, second):
    names = teacache_generate.numbered(Path("/out") / name)
    assert [next(names), next(names)] == [Path("/out") / name, Path("/out") / second]


def test_a_run_that_succeeds_takes_its_own_latents_away_and_nobody_elses(ckpt, tmp_path):
    (tmp_path / "x.latents.pt").write_text("of the run before")
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.latents.pt", "x.mp4"]
    assert (tmp_path / "x.latents.pt").read_text() == "of the run before"


def test_the_command_that_is_told_works_in_the_shell_whatever_the_paths(
    caplog, wan, ckpt, tmp_path, monkeypatch, undisturbed
):
    folder = tmp_path / 'it\'s a "test" \\ of $HOME; `ls` (é)'
    shutil.copytree(NANO, folder)
    script = folder / SCRIPT.name
    shutil.copy(SCRIPT, script)
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", folder / "the video.mp4"]
    with monkeypatch.context() as patch:
        error_in_the_decoder(patch, wan, folder)
        patch.setattr(teacache_generate, "__file__", str(script))
        patch.setattr(wan[0], "__file__", str(folder / "generate.py"))
        assert status(*argv) == 1
    done = subprocess.run(command_of(caplog.text), shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(frames(folder / "the video.mp4"), undisturbed)
    assert not list(folder.glob("*.pt"))


# ------------------------------------------------------------------------- --teacache_decode


@pytest.fixture
def kept(wan, ckpt, tmp_path, monkeypatch) -> Path:
    """Latents of a run that failed, in a folder of their own."""
    (tmp_path / "kept").mkdir()
    with monkeypatch.context() as patch:
        error_in_the_decoder(patch, wan, tmp_path)
        argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "kept" / "x.mp4"]
        assert status(*argv) == 1
    return tmp_path / "kept" / "x.latents.pt"


def test_save_file_and_ckpt_dir_override_what_the_latents_say(
    ckpt, kept, tmp_path, monkeypatch, undisturbed
):
    (tmp_path / "ckpt").mkdir()
    vae = "Wan2.1_VAE_nano.pth"
    shutil.copy(ckpt / vae, tmp_path / "ckpt" / vae)  # alone: no more is loaded
    content = torch.load(kept, weights_only=True)
    torch.save({**content, "ckpt_dir": "/none"}, kept)
    monkeypatch.chdir(tmp_path)
    argv = ["--teacache_decode", "kept/x.latents.pt", "--save_file", "y.mkv", "--ckpt_dir", "ckpt"]
    assert status(*argv) == 0
    assert np.abs(frames(tmp_path / "y.mkv") - undisturbed).max() == 0
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "argv", "expected"),
    [
        (None, ["--save_file", "/none/x.mp4"], "--save_file /none/x.mp4: cannot be written"),
        (None, ["--save_file", "x.txt"], "x.txt: cannot be written"),
        (None, ["--ckpt_dir", "/none"], "/none: Wan2.1_VAE_nano.pth is missing"),
        (None, ["--save_file", ""], '--save_file "": is empty'),
        (None, ["--prompt", "cats"], "unrecognized arguments: --prompt cats"),
        (lambda kept: {**kept, "task": "t2v-14B"}, [], "is of --task t2v-14B, which this"),
        (lambda kept: {"latents": kept["latents"]}, [], "cannot be used: 'task': give a NAME"),
        (lambda kept: [1, 2], [], "cannot be used: "),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_stays(
    capsys, kept, tmp_path, monkeypatch, change, argv, expected
):
    monkeypatch.chdir(tmp_path)
    if change:
        torch.save(change(torch.load(kept, weights_only=True)), kept)
    capsys.readouterr()
    assert status("--teacache_decode", kept, *argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert expected in said[0]
    assert kept.exists()
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize("content", [None, b"", b"no latents"])
def test_latents_that_are_not_there_or_no_latents_are_refused(capsys, tmp_path, content):
    file = tmp_path / "x.latents.pt"
    if content is not None:
        file.write_bytes(content)
    assert status("--teacache_decode", file) == 2
    said = capsys.readouterr().err
    assert f"--teacache_decode {file}: cannot be used" in said
    assert len(said.splitlines()) == 1


def test_latents_stay_until_their_video_is_written_and_read_back(
    caplog, wan, kept, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        error_in_the_writer(patch, wan, tmp_path)
        assert status("--teacache_decode", kept) == 1
    assert kept.exists()
    with monkeypatch.context() as patch:
        error_in_the_decoder(patch, wan, tmp_path)
        assert status("--teacache_decode", kept) == 1
    assert kept.exists()


def test_latents_of_image_to_video_are_decoded_too(wan, i2v_ckpt, picture, tmp_path, monkeypatch):
    argv = ["--task", "i2v-nano", "--ckpt_dir", i2v_ckpt, "--image", picture, *SHORT]
    assert status(*argv, "--save_file", tmp_path / "whole.mp4") == 0
    with monkeypatch.context() as patch:
        error_in_the_writer(patch, wan, tmp_path)
        assert status(*argv, "--save_file", tmp_path / "x.mp4") == 1
    assert status("--teacache_decode", tmp_path / "x.latents.pt") == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), frames(tmp_path / "whole.mp4"))


# ------------------------------------------------------------------ signals during the sampling


def start(*argv: object, nohup: bool = False) -> subprocess.Popen:
    """A long run that has sampled some steps by now, as its bar says."""
    command = [*(["nohup"] if nohup else []), sys.executable, str(SCRIPT), "--wan_repo", str(NANO)]
    process = subprocess.Popen(
        [*command, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if re.search(r"\b[1-9]\d*/\d+ \[", line):
            return process
    raise AssertionError("it has ended without a step")


def long(ckpt, tmp_path, steps) -> list[object]:
    argv = ["--ckpt_dir", ckpt, *PROMPT, "--teacache_model", "sigma", "--sample_steps", steps]
    files = ["--save_file", tmp_path / "x.mp4", "--teacache_report", tmp_path / "r.json"]
    return [*argv, "--sample_solver", "dpm++", *files]


@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_signal_during_the_sampling_leaves_the_steps_so_far(ckpt, tmp_path, name):
    process = start(*long(ckpt, tmp_path, 900))
    process.send_signal(signal.Signals[name])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert f"stopped by {name}" in said
    assert "Traceback" not in said
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["status"] == f"failed: Stopped('{name}')"
    assert 0 < len(told["steps"]) < 900
    assert told["computed"] == [i for i, step in enumerate(told["steps"]) if step["computed"]]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_a_hangup_that_nohup_ignores_stays_ignored(ckpt, tmp_path):
    process = start(*long(ckpt, tmp_path, 150), nohup=True)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads((tmp_path / "r.json").read_text())["status"] == "finished"


def test_signals_are_handled_as_before_when_the_run_is_over(ckpt, tmp_path, monkeypatch):
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(name) for name in names]
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 0
    assert [signal.getsignal(name) for name in names] == before


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    """It is told as None, and could not be put back."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(teacache_generate.signal, "getsignal", lambda number: None)
    with teacache_generate.stopped_by_signals():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_said_at_once_and_kept(
    caplog, capsys, wan, ckpt, tmp_path, monkeypatch, value
):
    from wan.modules.vae import WanVAE

    stock, decoded = wan[1].WanT2V.noise, []

    def noise(self, *args):
        latents = stock(self, *args)
        latents[0, 0, 0, 0] = value
        return latents

    monkeypatch.setattr(wan[1].WanT2V, "noise", noise)
    monkeypatch.setattr(WanVAE, "decode", lambda *args: decoded.append(args))
    report = tmp_path / "r.json"
    argv = ["--ckpt_dir", ckpt, *SHORT, "--teacache_report", report]
    with caplog.at_level("INFO"):
        assert status(*argv, "--save_file", tmp_path / "x.mp4") == 1
    assert decoded == []
    assert caplog.text.index("not finite") < caplog.text.index("Saving generated video")
    assert "not finite" in json.loads(report.read_text())["status"]
    kept = tmp_path / "x.latents.pt"
    assert not torch.load(kept)["latents"][0].isfinite().all()
    assert not (tmp_path / "x.mp4").exists()
    assert "--teacache_decode" not in caplog.text.split("its latents are in")[1]
    assert status("--teacache_decode", kept) == 2
    assert "are not finite" in capsys.readouterr().err
    assert kept.is_file()


# ----------------------------------------------------------------- good files, never failures


@pytest.mark.parametrize("still", [False, True], ids=["moving", "still"])
@pytest.mark.parametrize("ending", ["mp4", "MP4", "mkv", "mpeg", "gif", "png", "webp"])
def test_a_good_file_is_never_called_a_failure(wan, tmp_path, ending, still):
    torch.manual_seed(0)
    video = torch.rand(1, 3, 1 if still else 81, 16, 16) * 2 - 1
    video = video.expand(1, 3, 81, 16, 16).repeat(1, 1, 1, 4, 4)
    file = tmp_path / f"x.{ending}"
    written = teacache_generate.checked(wan[0].cache_video, video, str(file), 16, nrow=1)
    assert written == str(file)
    assert file.stat().st_size > 0


def test_a_fork_that_passes_the_writers_arguments_by_position_works(
    wan, ckpt, tmp_path, monkeypatch, undisturbed
):
    stock = wan[0]._run_pipeline
    argv = ["--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4"]

    def run_pipeline(args, **load):
        video = stock(args, **load)
        wan[0].cache_video(video[None], args.save_file, 8, ".mp4", 1, True, (-1, 1))
        raise SystemExit(0)  # before generate.py's own call

    with monkeypatch.context() as patch:
        patch.setattr(wan[0], "_run_pipeline", run_pipeline)
        assert status(*argv) == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize("kind", ["without retry", "wrapped"])
def test_a_fork_whose_writer_has_no_retry_works(
    wan, ckpt, tmp_path, monkeypatch, undisturbed, kind
):
    stock = wan[0].cache_video

    def without_retry(tensor, save_file, fps=16, nrow=1, normalize=True, value_range=(-1, 1)):
        return stock(tensor, save_file, fps, nrow=nrow, value_range=value_range)

    def wrapped(*args, **kwargs):
        return stock(*args, **kwargs)

    monkeypatch.setattr(wan[0], "cache_video", {"wrapped": wrapped}.get(kind, without_retry))
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 0
    assert np.array_equal(frames(tmp_path / "x.mp4"), undisturbed)


# ------------------------------------------------------------------------ Wan is left as it was


@pytest.mark.parametrize(
    "act", [raises, kill(signal.SIGTERM), kill(signal.SIGINT)], ids=["error", "term", "int"]
)
def test_a_run_that_failed_leaves_wan_as_it_was(wan, ckpt, tmp_path, monkeypatch, act):
    generate, package = wan

    def state():
        names = ("cache_video", "cache_image", "argparse", "generate")
        return [package.WanT2V, package.WanI2V, *(getattr(generate, name) for name in names)]

    before = state()
    disturb_decoder(monkeypatch, act)
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") > 0
    assert state() == before


def test_a_pipeline_that_is_made_and_never_generates_is_an_error(
    caplog, wan, ckpt, tmp_path, monkeypatch
):
    generate, package = wan
    config = generate.WAN_CONFIGS["t2v-nano"]
    monkeypatch.setattr(generate, "generate", lambda args: package.WanT2V(config, args.ckpt_dir))
    assert status("--ckpt_dir", ckpt, *SHORT, "--save_file", tmp_path / "x.mp4") == 1
    assert "no model of this Wan's pipelines was run" in caplog.text
