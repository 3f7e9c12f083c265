"""What fails after the sampling, on the stand-in: told once, and no sampled latents are lost."""

import itertools
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nano import NANO, PROMPT, SCRIPT, frames, python
from stand_in import RunsCode, after, first, out_of_memory, record, wrap

from teacache_generate import write_record

SHORT = [*PROMPT, "--teacache_rule", "sigma", "--sample_steps", "4", "--frame_num", "5"]
DECODER, NOISE = "wan.modules.vae.WanVAE.decode", "wan.text2video.WanT2V.noise"
PIPELINE, GENERATE_PY = "wan.text2video.WanT2V.generate", "generate._run_pipeline"
WRITER, PREDICT = "imageio.get_writer", "wan.modules.model.WanModel.predict"
STATE = ("wan.WanT2V", "generate.cache_video", "generate.cache_image", "generate.argparse",
         "generate.generate")  # fmt: skip


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """A function of flags: exit status, and all that is logged and printed."""
    for folder in ("out", "temporary"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir("out")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def call(*argv: object, target: object = "x.mp4") -> tuple[int, str]:
        if "--teacache_decode" not in argv:
            argv = (*SHORT, "--save_file", target, *argv)
        before = [pkgutil.resolve_name(name) for name in STATE]
        found = script(*argv)
        assert [pkgutil.resolve_name(name) for name in STATE] == before  # whatever happened
        return found

    return call


@pytest.fixture(scope="module")
def undisturbed(ckpt, tmp_path_factory) -> np.ndarray:
    video = tmp_path_factory.mktemp("undisturbed") / "x.mp4"
    done = python(SCRIPT, "--wan_repo", NANO, "--ckpt_dir", ckpt, *SHORT, "--save_file", video)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in video.parent.iterdir()) == ["x.json", "x.mp4"]
    return frames(video)


@pytest.fixture
def failed(run, monkeypatch) -> Path:
    """The latents of a run that failed."""
    with monkeypatch.context() as patch:
        patch.setattr(DECODER, out_of_memory)
        assert run()[0] == 1
    return Path("x.latents.pt")


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def decoded_equals(run, latents: Path, target: Path, expected: np.ndarray) -> bool:
    """Whether --teacache_decode makes the video, and deletes the latents."""
    code, _ = run("--teacache_decode", latents)
    return code == 0 and not latents.exists() and np.array_equal(frames(target), expected)


# ------------------------------------------------------------------------------ errors


def full_disk():
    raise OSError(28, "No space left on device")


# what fails, how; the reason that is told, and tracebacks
# fmt: off
ERRORS = {
    "memory in the decoder": (DECODER, first(out_of_memory), "CUDA out of memory", 0),
    "decoder": (DECODER, lambda stock, vae, latents: stock(vae, None), "'NoneType' object is", 1),
    "after the decoder": (PIPELINE, after(out_of_memory), "CUDA out of memory", 0),
    "before the writer": (GENERATE_PY, after(out_of_memory), "CUDA out of memory", 0),
    "writer": (WRITER, first(full_disk), "[Errno 28] No space left on device", 0),
    "folder gone": (NOISE, first(lambda: shutil.rmtree(Path().absolute())), "does not exist", 0),
}
# fmt: on


@pytest.mark.parametrize("what", ERRORS)
def test_error_is_told_once_and_the_latents_make_the_video(
    run, ckpt, tmp_path, monkeypatch, undisturbed, what
):
    name, act, reason, tracebacks = ERRORS[what]
    target, gone = tmp_path / "out/x.mp4", what == "folder gone"
    with monkeypatch.context() as patch:
        wrap(patch, name, act)
        code, said = run(target=target)
    kept = (tmp_path / "temporary" if gone else target.parent) / "x.latents.pt"
    assert (code, said.count("Traceback"), said.count("Finished.")) == (1, tracebacks, 0), said
    told = re.findall(r"x\.mp4 failed: (.*)\n.*latents are in (.*); this makes the video:\n", said)
    assert (len(told), reason in told[0][0], told[0][1]) == (1, True, str(kept))
    content = torch.load(kept, weights_only=True)
    assert [latent.shape for latent in content.pop("latents")] == [(16, 2, 8, 8)]
    expected = {"task": "t2v-nano", "ckpt_dir": str(ckpt), "save_file": str(target), "fps": 8}
    assert content == expected | {"seed": 42, "prompt": PROMPT[1]}
    if not gone:
        assert (record()["status"][:8], record()["latents"]) == ("failed: ", str(kept))
        assert (len(record()["computed"]), files()) == (3, ["x.json", "x.latents.pt"])
    target.parent.mkdir(exist_ok=True)
    monkeypatch.chdir(target.parent)
    command = shlex.split(said.split("this makes the video:\n")[1].split("\n")[0])
    assert command[:4] == [sys.executable, str(SCRIPT), "--wan_repo", str(NANO)]
    assert command[4:] == ["--teacache_decode", str(kept)]
    assert decoded_equals(run, kept, target, undisturbed)
    if not gone:
        done = record()
        assert (done["status"], done["latents"], done["frames"]) == ("finished", None, 5)
        assert "sampling" in done["seconds"]  # the first run's


def test_decode_command_works_in_a_shell_whatever_the_paths(
    run, tmp_path, monkeypatch, undisturbed
):
    folder = tmp_path / 'it\'s a "test" \\ of $HOME; `ls` (é)'
    shutil.copytree(NANO, folder)
    with monkeypatch.context() as patch:
        patch.setattr(DECODER, out_of_memory)
        patch.setattr("teacache_generate.__file__", shutil.copy(SCRIPT, folder))
        patch.setattr("generate.__file__", str(folder / "generate.py"))
        said = run(target=folder / "the video.mp4")[1]
    command = said.split("this makes the video:\n")[1].split("\n")[0]
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(frames(folder / "the video.mp4"), undisturbed)
    assert not list(folder.glob("*.pt"))


def test_first_error_is_told_where_later_lines_stumble(run, monkeypatch):
    """A fork that reads a frame, of which there is none after the failure."""
    monkeypatch.setattr(DECODER, out_of_memory)
    wrap(monkeypatch, PIPELINE, after(lambda video: video[:, 4]))
    code, said = run()
    assert (code, said.count("failed: ")) == (1, 1)
    assert "x.mp4 failed: CUDA out of memory" in said
    assert "OutOfMemoryError" in record()["status"]


def test_latents_lost_with_their_folder_are_not_told(run, monkeypatch):
    target = Path("x.mp4").absolute()
    wrap(monkeypatch, GENERATE_PY, after(lambda video: shutil.rmtree(target.parent)))
    code, said = run(target=target)
    assert (code, f"{target} failed: " in said, "--teacache_decode" in said) == (1, True, False)


def test_record_says_that_a_model_cannot_be_patched(run, monkeypatch):
    monkeypatch.setattr("teacache_generate.find_transformer", Mock(side_effect=TypeError("other")))
    assert (run()[0], record()["status"]) == (1, "failed: TypeError('other')")


def test_name_that_is_not_utf_8_has_a_record(run):
    name = os.fsdecode(b"caf\xe9.mp4")
    write_record(Path(name), {"file": name})
    assert record("caf\udce9") == {"file": name}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_not_kept(run, monkeypatch, value):
    decoded = []
    wrap(monkeypatch, NOISE, after(lambda latents: latents + value))
    monkeypatch.setattr(DECODER, lambda *args: decoded.append(args))
    code, said = run()
    assert (code, decoded, files()) == (1, [], ["x.json"])
    assert said.count("not finite") == 1
    assert not re.search("Traceback|--teacache_decode", said)
    assert "not finite" in record()["status"]


def test_unwritable_record_hides_nothing(run, monkeypatch, undisturbed):
    """A folder in its place is as good as a full disk."""
    file = Path("x.json")
    wrap(monkeypatch, NOISE, first(lambda: (file.unlink(), file.mkdir())))
    code, said = run()
    assert "the record of x.mp4 cannot be written" in said
    assert np.array_equal(frames(Path("x.mp4")), undisturbed)
    assert code == 0


def test_generate_without_a_video_is_an_error(run, wan, monkeypatch):
    generate, package = wan
    config = generate.WAN_CONFIGS["t2v-nano"]
    monkeypatch.setattr(generate, "generate", lambda args: package.WanT2V(config, args.ckpt_dir))
    code, said = run()
    assert (code, said.count("failed: generate.py made no video with a pipeline")) == (1, 1), said


@pytest.mark.parametrize("where", [DECODER, PREDICT, WRITER])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_ends_the_run_and_latents_make_the_video(run, monkeypatch, undisturbed, name, where):
    number, handlers = signal.Signals[name], [signal.getsignal(n) for n in (2, 15, 1)]
    calls = itertools.count()

    def stop():
        if where != PREDICT or next(calls) == 4:  # in step 2: two calls a step
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        wrap(patch, where, first(stop))
        code, said = run()
    assert (code, record()["status"]) == (128 + number, "stopped")
    assert f"stopped by {name}" in said
    assert not re.search("Traceback|failed", said)
    assert [signal.getsignal(n) for n in (2, 15, 1)] == handlers
    if where == PREDICT:
        assert (record()["latents"], record()["computed"][0], files()) == (None, 0, ["x.json"])
    else:
        assert decoded_equals(run, Path("x.latents.pt"), Path("x.mp4"), undisturbed)
        assert files() == ["x.json", "x.mp4"]


def test_hangup_that_nohup_ignores_stays_ignored(run, monkeypatch):
    wrap(monkeypatch, DECODER, first(lambda: os.kill(os.getpid(), signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert (run()[0], record()["status"]) == (0, "finished")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("where", [DECODER, "teacache_generate.check_written"])
def test_kill_9_leaves_latents_that_make_the_video(run, monkeypatch, undisturbed, where):
    """In the decoder, and where the video is half written."""

    def die():
        if Path("x.mp4").exists():
            os.truncate("x.mp4", 100)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        wrap(monkeypatch, where, first(die))
        try:
            run()
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert files() == ["x.json", "x.latents.pt", *["x.mp4"] * (where != DECODER)]
    latents = str(Path("x.latents.pt").absolute())
    assert (record()["status"], record()["latents"]) == ("started", latents)
    assert decoded_equals(run, Path("x.latents.pt"), Path("x.mp4"), undisturbed)
    assert (record()["status"], files()) == ("finished", ["x.json", "x.mp4"])


def test_two_failures_keep_two_files_and_one_record(run, failed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DECODER, out_of_memory)
        assert run("--base_seed", "1")[0] == 1
    kept = [torch.load(f"x.{n}latents.pt", weights_only=True)["seed"] for n in ("", "2.")]
    assert kept == [42, 1]
    assert run("--teacache_decode", failed, "--save_file", "first.mp4")[0] == 0
    assert (record()["status"][:6], record()["seed"]) == ("failed", 1)  # of the second
    assert run("--teacache_decode", "x.2.latents.pt")[0] == 0
    assert (record()["status"], files()) == ("finished", ["first.mp4", "x.json", "x.mp4"])


@pytest.mark.parametrize(
    ("ending", "size"), [("mp4", 0), ("mp4", 1000), ("gif", 1000), ("webp", 0), ("png", 1000)]
)
def test_unreadable_video_counts_as_not_written(run, monkeypatch, ending, size):
    """ffmpeg hides that the disk is full."""
    cut = first(lambda: os.truncate(f"x.{ending}", size))
    wrap(monkeypatch, "teacache_generate.check_written", cut)
    code, said = run(target=f"x.{ending}")
    assert (code, "5 frames" in said, record()["status"][:6]) == (1, True, "failed")
    assert Path("x.latents.pt").exists()


def test_latents_that_can_be_kept_nowhere_stop_no_video(run, tmp_path, monkeypatch, undisturbed):
    def save(content, file):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", save)
    code, said = run()
    assert (code, said.count("disk full"), record()["latents"]) == (0, 2, None)
    assert not list(tmp_path.rglob("*.pt"))
    assert np.array_equal(frames(Path("x.mp4")), undisturbed)
    wrap(monkeypatch, NOISE, after(lambda latents: latents + float("nan")))
    code, said = run()
    assert (code, "the latents are in" in said, record()["latents"]) == (1, False, None)


@pytest.mark.parametrize("still", [False, True], ids=["moving", "still"])
@pytest.mark.parametrize("ending", ["mp4", "MP4", "mkv", "mpeg", "gif", "png", "webp"])
def test_good_file_is_never_called_a_failure(run, monkeypatch, ending, still):
    video = torch.rand(3, 1 if still else 81, 16, 16, generator=torch.Generator().manual_seed(0))
    video = (2 * video - 1).expand(3, 81, 16, 16).repeat(1, 1, 4, 4)
    monkeypatch.setattr(DECODER, lambda vae, latents: [video])
    code, said = run(target=f"x.{ending}")
    assert (code, record()["status"], record()["frames"]) == (0, "finished", 81), said
    assert Path(f"x.{ending}").stat().st_size > 0


# ------------------------------------------------------------------------------ --teacache_decode


def test_flags_override_what_the_latents_say(run, failed, ckpt, tmp_path, undisturbed):
    vae = "Wan2.1_VAE_nano.pth"
    shutil.copy(ckpt / vae, tmp_path / vae)  # alone: no more is loaded
    torch.save({**torch.load(failed, weights_only=True), "ckpt_dir": "/none"}, failed)
    argv = ["--teacache_decode", failed, "--save_file", "y.mkv", "--ckpt_dir", tmp_path]
    assert run(*argv)[0] == 0
    assert np.array_equal(frames(Path("y.mkv")), undisturbed)
    assert (record()["status"], record()["file"]) == ("finished", "y.mkv")
    assert files() == ["x.json", "y.mkv"]


def test_decoding_after_a_move_finishes_the_record(run, failed):
    Path("moved").mkdir()
    for file in (failed, "x.json"):
        shutil.move(file, "moved")
    argv = ["--teacache_decode", "moved/../moved/x.latents.pt", "--save_file", "moved/x.mp4"]
    assert run(*argv)[0] == 0
    found = record("moved/x")
    assert (found["status"], found["latents"], found["file"]) == ("finished", None, "moved/x.mp4")


def test_another_finished_video_is_not_decoded_over(run, failed):
    assert run("--base_seed", "1")[0] == 0
    before = Path("x.mp4").read_bytes()
    code, said = run("--teacache_decode", failed)
    assert (code, Path("x.mp4").read_bytes(), failed.exists()) == (2, before, True)
    assert "x.mp4: is a finished video: give another name" in said
    Path("x.json").write_text("{}")  # no record, but of another target
    assert run("--teacache_decode", failed, "--save_file", "y.mp4")[0] == 0


@pytest.mark.parametrize(
    ("change", "argv", "expected"),
    [
        (None, ["--teacache_thresh", "0.1"], "needs no other flags"),
        (None, ["--save_file", "/none/x.mp4"], "--save_file /none/x.mp4: cannot be written"),
        (None, ["--save_file", "x.txt"], "x.txt: cannot be written"),
        (None, ["--ckpt_dir", "/none"], "Wan2.1_VAE_nano.pth is missing"),
        (None, ["--save_file", ""], '--save_file "": is empty'),
        (None, ["--prompt", "cats"], "--prompt cats"),
        (None, ["--base_seed", "1"], "--base_seed 1"),
        (None, ["--teacache_jobs", "x.txt"], "needs no other flags"),
        (None, ["--teacache_decode", "none.pt"], "--teacache_decode none.pt: cannot be used"),
        (lambda kept: {**kept, "task": "t2v-14B"}, [], "--task t2v-14B"),
        (lambda kept: {**kept, "task": RunsCode(Path("ran"))}, [], "x.latents.pt: cannot be used"),
        (lambda kept: {"latents": kept["latents"]}, [], "cannot be used"),
        (lambda kept: [1, 2], [], "cannot be used"),
        (lambda kept: b"", [], "cannot be used"),
    ],
)
def test_what_cannot_be_decoded_is_refused(run, failed, change, argv, expected):
    if change and (content := change(torch.load(failed, weights_only=True))):
        torch.save(content, failed)
    elif change:
        failed.write_bytes(content)
    before = failed.read_bytes(), files()
    code, said = run("--teacache_decode", failed, *argv)
    assert (code, said.count("error:"), (failed.read_bytes(), files())) == (2, 1, before), said
    assert expected in said


def test_latents_are_decoded_by_one_process(run, failed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = run("--teacache_decode", failed)
    assert (code, "start one process" in said, failed.exists()) == (2, True, True)


@pytest.mark.parametrize("what", ["writer", "memory in the decoder"])
def test_latents_stay_until_their_video_is_read_back(run, failed, monkeypatch, what):
    wrap(monkeypatch, *ERRORS[what][:2])
    code, said = run("--teacache_decode", failed)
    assert (code, record()["status"][:6], failed.exists()) == (1, "failed", True)
    assert "Traceback" not in said


# ------------------------------------------------------------------------------ forks


def two_videos(patch, names=("{}", "{}")) -> None:
    """Make one generate() make two videos, and write them under names of its own."""

    def generate(stock, args):
        asked = args.save_file
        for prompt, name in zip(("a red ball", "a blue ball"), names, strict=True):
            args.prompt, args.save_file = prompt, name.format(asked)
            stock(args)

    wrap(patch, "generate.generate", generate)


@pytest.mark.parametrize("number", [0, 1])
def test_failure_belongs_to_its_video(run, monkeypatch, number):
    calls = iter(range(9))
    two_videos(monkeypatch)
    wrap(monkeypatch, DECODER, first(lambda: next(calls) == number and out_of_memory()))
    code, said = run()
    assert (code, said.count("failed: ")) == (1, 1), said
    endings = ["latents.pt" if i == number else "mp4" for i in (0, 1)]
    assert files() == sorted(["x.json", "x.2.json", f"x.{endings[0]}", f"x.2.{endings[1]}"])
    for i, (name, prompt) in enumerate((("x", "a red ball"), ("x.2", "a blue ball"))):
        latents = str(Path(f"{name}.latents.pt").absolute()) if i == number else None
        assert (record(name)["prompt"], record(name)["latents"]) == (prompt, latents)
        assert (f"{name}.mp4 failed: CUDA out of memory" in said) == (i == number)


def test_failed_sampling_after_a_failed_decode_is_told_too(run, monkeypatch):
    two_videos(monkeypatch)
    wrap(monkeypatch, DECODER, first(out_of_memory))
    wrap(monkeypatch, NOISE, first(Mock(side_effect=[None, ZeroDivisionError])))
    code, said = run()
    assert (code, said.count("failed: "), record("x.2")["status"][:6]) == (1, 2, "failed")


@pytest.mark.parametrize("fails", [False, True])
def test_fork_that_renames_moves_record_and_latents(run, monkeypatch, fails):
    two_videos(monkeypatch, names=("fork-0.mp4", "fork-1.mp4"))
    if fails:
        wrap(monkeypatch, *ERRORS["writer"][:2])
    code, said = run()
    ending = "latents.pt" if fails else "mp4"
    expected = sorted(f"fork-{i}.{e}" for i in (0, 1) for e in ("json", ending))
    assert (code, files()) == (int(fails), expected), said
    for name in ("fork-0", "fork-1"):
        latents = str(Path(f"{name}.latents.pt").absolute()) if fails else None
        assert (record(name)["file"], record(name)["latents"]) == (f"{name}.mp4", latents)


def test_writer_called_by_position_works(run, monkeypatch, undisturbed):
    def run_pipeline(stock, args, **load):
        video, write = stock(args, **load), pkgutil.resolve_name("generate.cache_video")
        write(video[None], args.save_file, 8, ".mp4", 1, True, (-1, 1))
        return video

    wrap(monkeypatch, GENERATE_PY, run_pipeline)
    assert run()[0] == 0
    assert np.array_equal(frames(Path("x.mp4")), undisturbed)
