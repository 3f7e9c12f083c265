"""Many videos from one load: --teacache_jobs, on the stand-in ``wan_nano``."""

import argparse
import json
import logging
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from nano import NANO, SCRIPT, attempt, frames, python

import teacache_generate
from teacache_generate import Job, is_done, read_jobs

FEW = ["--sample_steps", "5", "--frame_num", "5", "--teacache_model", "sigma"]
THREE = [
    '--prompt "a red ball moves right" --base_seed 1 --save_file one.mp4',
    '--prompt "a blue ball moves left" --base_seed 2 --save_file two.mp4',
    '--prompt "a green box moves up" --base_seed 3 --save_file three.mp4',
]


@pytest.fixture
def batch(wan, ckpt, tmp_path, monkeypatch, capsys, caplog):
    """A function of a jobs file's lines and of more flags: exit status, and all that was said."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)

    def run(lines, *flags):
        Path("jobs.txt").write_text("\n".join(lines), encoding="utf-8")
        caplog.clear()
        argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", *flags]
        code, said = attempt(capsys, *argv)
        return code, caplog.text + said

    return run


@pytest.fixture
def decoded(wan, monkeypatch):
    """What the VAE made, call by call; an entry of ``decoded.then`` is called in place of one."""
    from wan.modules.vae import WanVAE

    class Decoded(list):
        then: dict = {}  # noqa: RUF012

    made, decode = Decoded(), WanVAE.decode
    made.then, count = {}, iter(range(100))

    def recorded(self, latents):
        number = next(count)
        if number in made.then:
            made.then[number]()
        made.append(decode(self, latents)[0])
        return made[-1:]

    monkeypatch.setattr(WanVAE, "decode", recorded)
    return made


def fail():
    raise torch.OutOfMemoryError("CUDA out of memory")


def not_made(said: str) -> list[str]:
    """The list at the end, which comes after the table."""
    return re.findall(r"TeaCache: not made: (.*)", said[said.index("sampling  speed-up") :])


def videos() -> list[str]:
    return sorted(path.name for path in Path().glob("*.mp4"))


# ------------------------------------------------------------------------------- the file of lines


def test_a_line_is_read_as_the_shell_would(tmp_path):
    file = tmp_path / "jobs.txt"
    file.write_bytes(
        b"\xef\xbb\xbf# a comment\r\n"
        b"--prompt \"Two cats' box.\" --save_file take#1.mp4 # the rest is none's\r\n"
        b"\r\n"
        b"   \t\r\n"
        b"--prompt 'a \"#1\" dog # surfs' --save_file a\\ b.mp4\r\n"
        b"  # --prompt no\r\n" + "--prompt 'é\u2028猫'".encode()
    )
    assert read_jobs(str(file)) == [
        (2, ["--prompt", "Two cats' box.", "--save_file", "take#1.mp4"]),
        (5, ["--prompt", 'a "#1" dog # surfs', "--save_file", "a b.mp4"]),
        (7, ["--prompt", "é\u2028猫"]),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "jobs.txt: has no line with flags"),
        (b"# nothing\n\n", "jobs.txt: has no line with flags"),
        (b"--base_seed 1\n--prompt 'open\n", "jobs.txt: line 2: No closing quotation: close the"),
        ("--prompt é".encode("utf-16"), "jobs.txt: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(batch, capsys, ckpt, content, expected):
    Path("jobs.txt").write_bytes(content)
    code, said = attempt(capsys, "--ckpt_dir", ckpt, "--teacache_jobs", "jobs.txt")
    assert code == 2
    assert expected in said
    assert said.count("error:") == 1


def test_a_file_that_is_not_there_is_refused(batch, capsys, ckpt):
    code, said = attempt(capsys, "--ckpt_dir", ckpt, "--teacache_jobs", "none.txt")
    assert (code, said.count("\n")) == (2, 1)
    assert "--teacache_jobs none.txt: cannot be read" in said


# ------------------------------------------------------------------------ checked before loading


def test_every_line_is_checked_before_anything_is_loaded_one_error_a_line(batch, decoded):
    other = "--save_file x/../one.mp4"
    code, said = batch(
        [
            THREE[0],
            "--sample_steps 0",
            "",
            "--frame_num 6 --sample_steps 0",
            "--nonsense 1",
            "two words",
            "--ckpt_dir elsewhere",
            "--task i2v-nano --image a.png",
            "--ulysses_size 2",
            "--t5_cpu",
            "--save_file one.mp4",
            other,
            "--save_file nowhere/two.mp4",
            "--teacache_jobs others.txt",
            "--teacache_compare 2x",
            "--wan_repo .",
            "--teacache_order 0 1",
            "--teacache_thresh 0.1 --teacache_speedup 2",
            "--teacache_speedup 5",
            "--teacache_model t2v-14B --sample_steps 20 --teacache_speedup 3",
        ]
    )
    assert code == 2
    lines = [line for line in said.splitlines() if "error: " in line]
    told = {int(line.split("line ")[1].split(":")[0]): line.split(": ", 4)[4] for line in lines}
    assert len(lines) == len(told)  # one a line
    assert list(told) == [2, *range(4, 21)]
    for number, beginning in {
        2: "--sample_steps 0: must be 1 or more",
        4: "--frame_num 6: must be 4n+1",
        5: "unrecognized arguments: --nonsense 1",
        6: "unrecognized arguments: two words",
        7: "--ckpt_dir elsewhere: ",
        8: "--ckpt_dir ",  # of another kind of transformer, or --task: see the next test
        9: "--ulysses_size 2 --ring_size 1: their product must be the number of processes",
        10: "--t5_cpu True: must be that of the command line, False",
        11: "--save_file one.mp4: is another line's too",
        12: "--save_file x/../one.mp4: is another line's too",
        13: "--save_file ",
        14: "--teacache_jobs: is for the command line",
        15: "--teacache_compare: is for the command line",
        16: "--wan_repo: is for the command line",
        17: "--teacache_order: several are for --teacache_compare",
        18: "--teacache_speedup: not allowed with argument --teacache_thresh",
        19: "--teacache_speedup 5: no threshold reaches it",
        20: "--teacache_speedup 3: with row t2v-14B (as asked) the increments are negative",
    }.items():
        assert told[number].startswith(beginning), (number, told[number])
    assert "Creating WanModel" not in said
    assert decoded == []
    assert videos() == []


def test_a_fault_of_the_command_line_is_said_once(batch):
    code, said = batch(THREE, "--sample_steps", "many")
    assert code == 2
    assert said.count("error: ") == 1
    assert "line" not in said


@pytest.mark.parametrize(
    "flag",
    [
        *("--task t2v-nano-2", "--ckpt_dir copy", "--ring_size 2", "--t5_fsdp", "--dit_fsdp"),
        *("--t5_cpu", "--prompt_extend_method dashscope", "--prompt_extend_model other"),
    ],
)
def test_what_the_loaded_model_depends_on_cannot_differ(batch, ckpt, wan, monkeypatch, flag):
    generate, _ = wan
    monkeypatch.setitem(generate.WAN_CONFIGS, "t2v-nano-2", generate.WAN_CONFIGS["t2v-nano"])
    monkeypatch.setitem(generate.SUPPORTED_SIZES, "t2v-nano-2", ("64*64",))
    monkeypatch.setitem(generate.EXAMPLE_PROMPT, "t2v-nano-2", {"prompt": "a ball"})
    monkeypatch.setattr("teacache_generate.check_numbers", lambda wan, args: None)
    Path("copy").symlink_to(ckpt)
    code, said = batch([THREE[0], "", flag])
    name = flag.split()[0]
    assert code == 2
    assert f"jobs.txt: line 3: {name} " in said
    assert "must be that of the command line" in said


def test_lines_may_give_what_the_command_line_alone_lacks(wan, monkeypatch, batch):
    generate, _ = wan
    monkeypatch.setitem(generate.SUPPORTED_SIZES, "t2v-nano", ("64*96",))  # not the default 64*64
    monkeypatch.setitem(generate.SIZE_CONFIGS, "64*96", (64, 96))
    code, said = batch([f"{THREE[0]} --size 64*96"], "--size", "64*64")
    assert code == 0, said
    assert frames(Path("one.mp4")).shape == (5, 96, 64, 3)


# --------------------------------------------------------------------------------- flags of a line


def test_flags_of_a_line_are_over_those_of_the_command_line(batch):
    code, said = batch(
        [
            f"{THREE[0]} --teacache_thresh 0",
            f"{THREE[1]} --sample_steps 12 --teacache_speedup 1.5 --frame_num 9",
            f"{THREE[2]} --teacache_order 1 --sample_solver dpm++",
            '--prompt "a cube" --teacache_guide_until 0 --save_file four.mp4',
        ],
        *("--teacache_speedup", "2", "--sample_steps", "10", "--teacache_report", "r.json"),
    )
    assert code == 0, said
    told = json.loads(Path("r.json").read_text())["videos"]
    assert [len(video["computed"]) for video in told] == [10, 8, 5, 10]
    assert [video["passes"] for video in told] == [20, 16, 10, 10]
    assert [len(video["steps"]) for video in told] == [10, 12, 10, 10]
    assert [video["config"]["order"] for video in told] == [0, 0, 1, 0]
    assert [video["settings"]["sample_solver"] for video in told][1:3] == ["unipc", "dpm++"]
    assert [len(frames(Path(video["file"]))) for video in told] == [5, 9, 5, 5]


def test_a_threshold_of_a_line_replaces_a_speedup_and_the_other_way_round(batch):
    _, said = batch([f"{THREE[0]} --teacache_speedup 1"], "--teacache_thresh", "0.3")
    assert "thresh 0, sigma: computes all 5 steps, as stock does" in said
    _, said = batch([f"{THREE[1]} --teacache_thresh 0.3"], "--teacache_speedup", "1")
    assert "thresh 0.3, sigma: will compute" in said


def test_a_row_of_a_line_replaces_a_file_of_coefficients(batch):
    argv = ["--teacache_coefficients", "none.json", "--teacache_model", "sigma"]
    code, said = batch(THREE, *argv)
    assert code == 2  # both at once
    code, said = batch([f"{THREE[0]} --teacache_coefficients none.json"])
    assert code == 2
    assert "line 1: --teacache_coefficients none.json: cannot be used" in said
    code, said = batch([f'{THREE[0]} --teacache_coefficients ""'])
    assert code == 2
    assert 'line 1: --teacache_coefficients "": is empty' in said


def test_names_without_save_file_differ_and_are_those_of_the_last_time(batch):
    lines = ['--prompt "a ball" --base_seed 1', '--prompt "a ball" --base_seed 2'] * 2
    code, said = batch(lines)
    assert code == 0, said
    made = videos()
    assert len(made) == 4
    assert all(name.startswith("t2v-nano_64x64_a_ball_") for name in made)
    assert sum(".2." in name for name in made) == 2  # the lines that are there twice
    code, said = batch(lines)
    assert code == 0
    assert said.count("is there: skipped") == 4
    assert "will compute" not in said
    assert videos() == made
    code, said = batch(lines[:1], "--teacache_thresh", "0")  # another video
    assert "skipped" not in said
    assert len(videos()) == 5


# ------------------------------------------------------------------------------------ one load


def test_one_load_makes_all_videos_and_each_is_that_of_a_single_run_to_the_bit(
    batch, decoded, capsys, ckpt, caplog
):
    lines = [
        f"{THREE[0]} --sample_steps 10",
        f"{THREE[1]} --frame_num 9 --teacache_order 1 --sample_steps 12 --sample_solver dpm++",
        f"{THREE[2]} --teacache_guide_until 0.5",
    ]
    code, said = batch(lines)
    assert code == 0, said
    assert said.count("Creating WanModel") == 1
    assert videos() == ["one.mp4", "three.mp4", "two.mp4"]
    together = list(decoded)
    for line in lines:
        words = line.replace('"', "").split()
        flags = [*words[:1], " ".join(words[1:6]), *words[6:]]
        assert attempt(capsys, "--ckpt_dir", ckpt, *FEW, *flags)[0] == 0
    alone = decoded[3:]
    assert [video.shape[1] for video in alone] == [5, 9, 5]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_a_prompt_expander_is_made_once(batch, wan, monkeypatch):
    generate, _ = wan
    made = []

    class QwenPromptExpander:
        def __init__(self, name):
            made.append(name)

    monkeypatch.setattr(generate, "QwenPromptExpander", QwenPromptExpander, raising=False)
    inner = generate.generate

    def expanding(args):
        generate.QwenPromptExpander("model")
        inner(args)

    monkeypatch.setattr(generate, "generate", expanding)
    code, said = batch(THREE)
    assert code == 0, said
    assert made == ["model"]
    generate.QwenPromptExpander("after")  # and what was put in its way is gone
    assert made == ["model", "after"]


@pytest.mark.parametrize(("kind", "expected"), [(AssertionError, 2), (RuntimeError, 1)])
def test_an_objection_of_wan_before_the_load_is_a_refusal_and_a_breakdown_is_not(
    batch, wan, monkeypatch, kind, expected
):
    def objecting(args):
        raise kind("of a prompt expander")

    monkeypatch.setattr(wan[0], "generate", objecting)
    code, said = batch(THREE[:1])
    assert code == expected
    assert said.count("of a prompt expander") >= 1


def test_before_each_video_is_said_which_it_is_and_how_long_all_will_take(
    batch, monkeypatch, decoded
):
    code, said = batch(THREE)
    assert code == 0
    numbers = re.findall(r"TeaCache: video (\d of 3)(.*): (\w+\.mp4)", said)
    assert numbers == [
        ("1 of 3", "", "one.mp4"),
        ("2 of 3", ", about 1 min to go", "two.mp4"),
        ("3 of 3", ", about 1 min to go", "three.mp4"),
    ]


def test_the_time_to_go_is_that_of_the_videos_that_are_made():
    from types import SimpleNamespace

    from teacache_generate import Session

    def run(status, **seconds):
        return SimpleNamespace(status=status, seconds=seconds)

    session = Session(SimpleNamespace(pipelines=dict), None, {})
    session.videos = 12
    session.runs = [run("finished", encode=20, sampling=200, decode=20), run("failed: x", encode=1)]
    assert session.progress() == "video 3 of 12, about 40 min to go"
    session.runs = [run("failed: x", encode=1)]
    assert session.progress() == "video 2 of 12"


def test_a_table_ends_a_batch_and_is_in_the_report(batch):
    line = f"{THREE[1]} --teacache_speedup 1"
    code, said = batch([THREE[0], line], "--sample_steps", "10", "--teacache_report", "r.json")
    assert code == 0
    told = json.loads(Path("r.json").read_text())["videos"]
    table = said[said.index("TeaCache: computed  sampling  speed-up   drift  file") :]
    rows = re.findall(
        r"TeaCache: +(\d+)/(\d+) +([\d.]+) s +([\d.]+)x +(?:([\d.]+) %)? +(\S+)", table
    )
    assert [row[:2] + row[-1:] for row in rows] == [("5", "10", "one.mp4"), ("10", "10", "two.mp4")]
    for row, video in zip(rows, told, strict=True):
        assert row[2] == f"{video['seconds']['sampling']:.1f}"
        assert row[3] == f"{video['speedup']:.2f}"
    assert rows[0][4] == f"{100 * told[0]['drift']['order 0']:.1f}"
    assert rows[1][4] == ""
    assert told[1]["drift"]["order 0"] is None
    assert [video["status"] for video in told] == ["finished"] * 2


def test_the_report_of_a_batch_does_not_call_it_finished_after_its_first_video(batch, monkeypatch):
    write, seen = teacache_generate.Session.write_report, []

    def looking(self):
        write(self)
        seen.append(json.loads(Path("r.json").read_text()))

    monkeypatch.setattr(teacache_generate.Session, "write_report", looking)
    assert batch(THREE[:2], "--teacache_report", "r.json")[0] == 0
    assert [len(report["videos"]) for report in seen] == [1, 2]
    assert all("status" not in report for report in seen)


# ------------------------------------------------------------------------------ what goes wrong


def test_a_table_stays_a_table_whatever_failed(batch):
    runs = []
    for status in ("failed: " + "x" * 60, "failed: y"):
        run = SimpleNamespace(status=status, cache=None)
        run.job = SimpleNamespace(args=SimpleNamespace(save_file="a.mp4"))
        runs.append(run)
    _, first, second = teacache_generate.batch_table(runs)
    assert first.index("a.mp4") == second.index("a.mp4")


def test_a_line_whose_decoder_fails_keeps_its_latents_and_the_next_one_runs(batch, decoded):
    decoded.then = {1: fail}
    code, said = batch(THREE, "--teacache_report", "r.json")
    assert code == 1
    assert said.count("Creating WanModel") == 1
    assert videos() == ["one.mp4", "three.mp4"]
    assert [path.name for path in Path().glob("*.latents.pt")] == ["two.latents.pt"]
    assert "TeaCache: two.mp4: failed: OutOfMemoryError('CUDA out of memory')" in said
    assert "--teacache_decode" in said
    assert not_made(said) == ["two.mp4: failed: OutOfMemoryError('CUDA out of memory')"]
    told = json.loads(Path("r.json").read_text())["videos"]
    assert [video["status"][:8] for video in told] == ["finished", "failed: ", "finished"]
    assert told[1]["latents"].endswith("two.latents.pt")


def test_a_line_that_runs_out_of_memory_before_its_latents_is_said_and_the_next_one_runs(
    batch, wan, monkeypatch
):
    from wan.pipeline import WanPipeline

    encode = WanPipeline.encode_prompts

    def encode_prompts(self, prompt, *others):
        if "blue" in prompt:
            fail()
        return encode(self, prompt, *others)

    monkeypatch.setattr(WanPipeline, "encode_prompts", encode_prompts)
    code, said = batch(THREE)
    assert code == 1
    assert said.count("Creating WanModel") == 1
    assert videos() == ["one.mp4", "three.mp4"]
    assert list(Path().glob("*.latents.pt")) == []
    assert not_made(said) == ["two.mp4: failed: OutOfMemoryError('CUDA out of memory')"]


def test_a_video_that_cannot_be_written_keeps_its_latents_and_the_next_one_runs(
    batch, wan, monkeypatch
):
    generate, _ = wan
    write = generate.cache_video

    def cache_video(tensor, save_file=None, **options):
        return None if save_file == "two.mp4" else write(tensor, save_file, **options)

    monkeypatch.setattr(generate, "cache_video", cache_video)
    code, said = batch(THREE)
    assert code == 1, said
    assert videos() == ["one.mp4", "three.mp4"]
    assert [path.name for path in Path().glob("*.latents.pt")] == ["two.latents.pt"]


def test_what_a_failure_held_is_free_before_the_next_line(batch, decoded, monkeypatch):
    import weakref

    held, alive = [], []

    def fail_with_a_tensor():
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        fail()

    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's keep what they were told
    decoded.then = {0: fail_with_a_tensor, 1: lambda: alive.append(held[0]())}
    code, _ = batch(THREE[:2])
    assert code == 1
    assert alive == [None]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_what_is_done_is_done(batch, decoded, number):
    decoded.then = {1: lambda: os.kill(os.getpid(), number)}
    code, said = batch(THREE, "--teacache_report", "r.json")
    assert code == 128 + number
    assert f"stopped by {number.name}" in said
    assert "video 3 of 3" not in said
    assert videos() == ["one.mp4"]
    told = json.loads(Path("r.json").read_text())["videos"]
    assert [video["status"].split(":")[0] for video in told] == ["finished", "failed"]
    decoded.then = {}
    before = Path("one.mp4").stat().st_mtime_ns
    code, said = batch(THREE)
    assert code == 0
    assert "one.mp4 is there: skipped" in said
    assert re.findall(r"video \d of \d", said) == ["video 1 of 2", "video 2 of 2"]
    assert videos() == ["one.mp4", "three.mp4", "two.mp4"]
    assert Path("one.mp4").stat().st_mtime_ns == before


def test_a_half_written_video_is_made_again_and_a_whole_one_is_not(batch, decoded):
    assert batch(THREE)[0] == 0
    whole = Path("two.mp4").read_bytes()
    Path("two.mp4").write_bytes(whole[: len(whole) // 2])
    Path("three.mp4").write_bytes(b"")
    code, said = batch(THREE)
    assert code == 0
    assert said.count("skipped") == 1
    assert "one.mp4 is there: skipped" in said
    assert Path("two.mp4").read_bytes() == whole
    assert len(frames(Path("three.mp4"))) == 5


@pytest.mark.parametrize(("src_video", "done"), [(None, False), ("in.mp4", True)])
def test_a_video_made_of_another_may_be_shorter_than_asked_for(tmp_path, src_video, done):
    """VACE makes no more frames than its video has."""
    file = tmp_path / "five.mp4"
    imageio.mimwrite(file, np.zeros((5, 64, 64, 3), np.uint8))
    args = argparse.Namespace(save_file=str(file), frame_num=81, src_video=src_video)
    assert is_done(Job(args, None, "", None)) == done


def test_nothing_is_loaded_where_all_videos_are_there(batch):
    assert batch(THREE[:1])[0] == 0
    code, said = batch(THREE[:1], "--teacache_report", "report.json")
    assert code == 0
    assert "Creating WanModel" not in said
    assert json.loads(Path("report.json").read_text())["videos"] == []


def test_a_single_video_that_is_there_is_made_again(capsys, ckpt, batch, decoded):
    argv = ["--ckpt_dir", ckpt, *FEW, "--base_seed", "1", "--save_file", "one.mp4"]
    assert attempt(capsys, *argv)[0] == 0
    assert attempt(capsys, *argv)[0] == 0
    assert len(decoded) == 2


KILLED = """
import os, sys
sys.path[:0] = [{folder!r}, {nano!r}]
from wan.modules.vae import WanVAE
from teacache_generate import main
decode, count = WanVAE.decode, iter(range(9))
def dying(self, latents):
    number = next(count)
    if number == 1:
        raise RuntimeError("a decoder")
    if number == 2:
        os.kill(os.getpid(), 9)
    return decode(self, latents)
WanVAE.decode = dying
main(sys.argv[1:])
"""


def test_a_batch_with_a_failing_line_killed_and_started_again_ends_with_all_videos(batch, ckpt):
    Path("jobs.txt").write_text("\n".join(THREE))
    program = KILLED.format(folder=str(SCRIPT.parent), nano=str(NANO))
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt"]
    killed = python("-c", program, *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert videos() == ["one.mp4"]
    kept = sorted(path.name for path in Path().glob("*.latents.pt"))
    assert kept == ["three.latents.pt", "two.latents.pt"]
    code, said = batch(THREE)
    assert code == 0, said
    assert said.count("skipped") == 1
    assert videos() == ["one.mp4", "three.mp4", "two.mp4"]
    assert all(len(frames(Path(name))) == 5 for name in videos())


# -------------------------------------------------------------------------------- two processes

FAILS_ON_RANK_0 = """
import sys
sys.path[:0] = [{folder!r}, {nano!r}]
from wan.modules.vae import WanVAE
from teacache_generate import main
decode, count = WanVAE.decode, iter(range(9))
def failing(self, latents):
    if next(count) == 0:
        raise RuntimeError("a decoder")
    return decode(self, latents)
WanVAE.decode = failing
main(sys.argv[1:])
"""
XFUSER = "init_distributed_environment = initialize_model_parallel = None"


@pytest.mark.parametrize("flags", [["--ulysses_size", "2"], ["--dit_fsdp"]], ids=" ".join)
def test_two_processes_load_once_and_go_on_after_a_failure(ckpt, batch, capsys, tmp_path, flags):
    png = [line.replace(".mp4", ".png") for line in THREE]  # animated, lossless
    Path("jobs.txt").write_text("\n".join(png))
    program = tmp_path / "program.py"
    program.write_text(FAILS_ON_RANK_0.format(folder=str(SCRIPT.parent), nano=str(NANO)))
    (tmp_path / "xfuser/core").mkdir(parents=True)  # which the stand-in does without
    (tmp_path / "xfuser/core/distributed.py").write_text(XFUSER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", *flags]
    done = python(*torchrun, *argv, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout.count("Creating WanModel") == 1  # rank 0's; the others say nothing
    assert "not made: one.png: failed: RuntimeError('a decoder')" in done.stdout
    assert sorted(path.name for path in Path().glob("*.p*")) == [
        *("one.latents.pt", "program.py", "three.png", "two.png")
    ]
    assert done.stdout.count("TeaCache: video 3 of 3") == 1
    both = frames(Path("three.png"))
    alone = ["--ckpt_dir", ckpt, *FEW, "--prompt", "a green box moves up", "--base_seed", "3"]
    assert attempt(capsys, *alone, "--save_file", "alone.png")[0] == 0
    assert np.abs(both - frames(Path("alone.png"))).max() <= 1  # of 255, for the rounding
