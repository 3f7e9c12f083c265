"""The queue: each process of torchrun makes videos of its own, on the stand-in."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in import run_two

FEW = ["--sample_steps", "4", "--frame_num", "5", "--teacache_rule", "sigma"]
LINES = [
    "a red ball",
    "a red ball",
    '--prompt "a blue ball" --base_seed 7 --save_file blue.mp4',
    "a green box, which fails",
    '--prompt "a cube" --save_file cube.mp4 --teacache_order 1',
    "a ball and a box",
]
# Runs in each process when the script imports Wan. ROLE_RANK is torchrun's own name for the rank.
FORK = """
import json, os, time
from pathlib import Path
from wan.text2video import WanModel
from wan.text2video import WanT2V
from wan.modules.vae import WanVAE

RANK = os.environ["ROLE_RANK"]
NAMES = ("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE")
Path(f"environment.{RANK}").write_text(json.dumps([os.environ.get(name) for name in NAMES]))
load, sample, decode = WanModel.from_pretrained, WanT2V.generate, WanVAE.decode

def note(file, text):
    with open(file, "a") as opened:
        opened.write(f"{RANK} {text}\\n")

def noted_load(*args, **kwargs):
    note("loaded", "")
    if RANK in os.getenv("CANNOT_LOAD", ""):
        raise MemoryError("the model is too large")
    return load(*args, **kwargs)

def noted_sample(self, prompt, **options):
    note("sampled", prompt)
    WanVAE.prompt = prompt
    time.sleep(9 if RANK == "1" else 1)  # each process gets some, and rank 1 ends last
    return sample(self, prompt, **options)

def disturbed_decode(self, latents):
    disturbed = Path("disturbed")
    if "fails" in getattr(self, "prompt", "") and not disturbed.exists():
        disturbed.touch()
        raise RuntimeError("a decoder")
    if os.getenv("KILLED") == RANK and not disturbed.exists():
        disturbed.touch()
        os.kill(os.getpid(), 9)
    return decode(self, latents)

WanModel.from_pretrained, WanT2V.generate = noted_load, noted_sample
WanVAE.decode = disturbed_decode
"""


def run_queue(folder: Path, ckpt: Path, lines: list[str], **environment: str):
    """A batch of two processes in a folder of its own."""
    (folder / "jobs.txt").write_text("\n".join(lines))
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt"]
    done = run_two(folder, FORK, *argv, **environment)
    sampled = [line.split(" ", 1) for line in noted(folder, "sampled")]
    return SimpleNamespace(folder=folder, sampled=sampled, **vars(done))


def noted(folder: Path, file: str) -> list[str]:
    return (folder / file).read_text().splitlines() if (folder / file).exists() else []


def records(folder: Path) -> dict[str, dict]:
    """By the name of the video."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def first(ckpt, tmp_path_factory):
    """A batch with a failing line."""
    return run_queue(tmp_path_factory.mktemp("queue"), ckpt, LINES)


def test_queue_makes_every_line_once(first):
    assert first.returncode == 1  # of torchrun: a line failed
    # the others leave with 0, or torchrun would stop a video in the making
    assert set(re.findall(r"rank +: (\d)", first.stderr)) == {"0"}, first.stderr
    prompts = [prompt for _, prompt in first.sampled]
    asked = ["a red ball"] * 2 + ["a blue ball", "a green box, which fails", "a cube"]
    assert Counter(prompts) == Counter([*asked, "a ball and a box"])
    assert {rank for rank, _ in first.sampled} == {"0", "1"}
    assert sorted(noted(first.folder, "loaded")) == ["0 ", "1 "]
    statuses = Counter(record["status"] for record in records(first.folder).values())
    assert statuses == {"finished": 5, "failed: RuntimeError('a decoder')": 1}
    blue, cube = (records(first.folder)[name] for name in ("blue", "cube"))
    assert (blue["seed"], blue["order"], cube["order"]) == (7, 0, 1)


def test_queue_gives_each_process_its_gpu(first):
    """What Wan sees when it is imported."""
    seen = [json.loads((first.folder / f"environment.{rank}").read_text()) for rank in (0, 1)]
    assert seen == [["4", "0", "0", "1"], ["7", "0", "0", "1"]]


def test_queue_prints_one_table_of_all_videos(first):
    said = first.stdout
    assert said.count("computed  sampling   drift  file") == 1
    rows = said[said.index("computed  sampling   drift  file") :].splitlines()[1:]
    finished = sum(bool(re.search(r" [34]/4 +[\d.]+ s ", row)) for row in rows)
    assert (finished, sum("failed: RuntimeError(" in row for row in rows)) == (5, 1)
    assert {row.split()[-1] for row in rows} == {f"{x}.mp4" for x in records(first.folder)}
    announced = re.findall(r"([\d,]+) videos: rule sigma|TeaCache: (rule sigma.*order 1)", said)
    assert len(announced) == 2  # by rank 0 alone


def test_queue_log_lines_name_their_video(first):
    by_rank = Counter(rank for rank, _ in first.sampled)
    said = first.stdout + first.stderr
    assert len(re.findall(r"TeaCache: \S+\.mp4: computed \d of 4 steps", said)) == 5
    assert len(re.findall(r"TeaCache: video \d of 6.*: \S+\.mp4", said)) == 6
    ends = re.findall(r"TeaCache: \S+\.mp4: (finished|failed: R)", said)
    assert len(ends) == by_rank["1"]  # rank 0 has Wan's log and bar
    assert said.count("  0%|") == by_rank["0"]
    assert said.count(".mp4 failed: a decoder") == 1
    assert said.count("RuntimeError: a decoder\n") == 1  # one traceback


def test_queue_started_again_decodes_the_failed_video(first, ckpt):
    again = run_queue(first.folder, ckpt, LINES)
    assert again.returncode == 0, again.stderr
    assert again.sampled == first.sampled  # decoded only
    assert len(noted(again.folder, "loaded")) == 2  # nobody needed a model
    assert all(record["status"] == "finished" for record in records(again.folder).values())
    assert again.stdout.count("is finished: skipped") == 5


def test_queue_survives_kill_9_of_a_process(ckpt, tmp_path):
    lines = LINES[:3] + LINES[4:]
    killed = run_queue(tmp_path, ckpt, lines, KILLED="1")
    assert killed.returncode == 1
    assert "SIGKILL" in killed.stderr
    before = {name: record["status"] for name, record in records(tmp_path).items()}
    assert set(before.values()) & {"started", "stopped"}
    assert len(list(tmp_path.glob("*.latents.pt"))) >= 1
    done = run_queue(tmp_path, ckpt, lines)
    assert done.returncode == 0, done.stderr
    assert [record["status"] for record in records(tmp_path).values()] == ["finished"] * 5
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(("ranks", "failed", "finished"), [("1", 1, 2), ("0 1", 2, 0)])
def test_process_that_cannot_load_takes_no_further_line(ckpt, tmp_path, ranks, failed, finished):
    done = run_queue(tmp_path, ckpt, LINES[:3], CANNOT_LOAD=ranks)
    assert done.returncode == 1
    statuses = [record["status"].split(":")[0] for record in records(tmp_path).values()]
    assert Counter(statuses) == Counter({"failed": failed, "finished": finished})
    assert len(noted(tmp_path, "loaded")) == 2
    assert done.stdout.count("computed  sampling   drift  file") == 1
    assert done.stdout.count("not made") == 3 - failed - finished


def test_queue_is_refused_once_for_all(ckpt, tmp_path):
    done = run_queue(tmp_path, ckpt, [*LINES, "--frame_num 6"])
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("teacache_generate.py: error: ") == 1
    assert "line 7: --frame_num 6: must be 4n+1" in done.stderr
    assert (done.sampled, list(tmp_path.glob("*.json"))) == ([], [])


@pytest.mark.parametrize(
    ("flags", "calls", "told"),
    [
        ([], 1, ["--ulysses_size 2", "--teacache_jobs"]),  # a warning
        (["--dit_fsdp"], 1, []),
        (["--teacache_jobs", "x.txt"], 0, ["unset WORLD_SIZE"]),
        (["--teacache_compare", "1.5x"], 0, ["error: --teacache_compare", "--ulysses_size 2"]),
    ],
)
def test_several_processes_without_jobs_are_told(wan, script, monkeypatch, flags, calls, told):
    made = []
    monkeypatch.setattr(wan[0], "generate", made.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = script(*FEW, "--save_file", "x.mp4", *flags)
    assert (len(made), code) == (calls, 1 if calls else 2)  # 1: nothing was made here
    assert all(text in said for text in told)
    assert told or "--ulysses_size" not in said
