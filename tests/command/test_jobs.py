"""A batch, --teacache_jobs, on the stand-in: lines, names, restarts, failing lines."""

import itertools
import json
import logging
import os
import re
import shutil
import signal
import weakref
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from nano import NANO, frames
from stand_in import Made, first, out_of_memory, record, run_two, wrap

from teacache_generate import main, our_flags

FEW = ["--sample_steps", "5", "--frame_num", "5", "--teacache_rule", "sigma"]
THREE = [
    '--prompt "a red ball moves right" --base_seed 1 --save_file one.mp4',
    '--prompt "a blue ball moves left" --base_seed 2 --save_file two.mp4',
    '--prompt "a green box moves up" --base_seed 3 --save_file three.mp4',
]


@pytest.fixture
def batch(script):
    """A function of a jobs file's lines and more flags: exit status, and all that is logged."""

    def run(lines, *flags):
        if lines is not None:
            Path("jobs.txt").write_text("\n".join(lines), encoding="utf-8")
            flags = ("--teacache_jobs", "jobs.txt", *flags)
        return script(*FEW, *flags)

    return run


@pytest.fixture
def asked(wan, monkeypatch):
    """The flags that Wan's generate() is called with, in place of its videos."""
    calls = []
    monkeypatch.setattr(wan[0], "generate", calls.append)
    return calls


def videos() -> list[str]:
    return sorted(path.name for path in Path().glob("*.mp4"))


# ------------------------------------------------------------------------------ the jobs file

MIXED = (
    "# a comment\r"
    'He said "no", it\'s $HOME & 50% off #1 \\n `ls`\r\n'
    "\r\n \t \r\n"
    "   - a cat, indented  \r\n"
    "  --prompt \"Two cats' box.\" --save_file 'take #1.mp4'\r\n"
    " # --prompt no\r\n"
    "-1 é\u2028猫"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_lines_are_prompts_or_flags(batch, asked, encoding):
    mark = "\ufeff" * (encoding == "utf-16-be")  # the others write their own, if any
    Path("lines.txt").write_bytes((mark + MIXED).encode(encoding))
    batch(None, "--teacache_jobs", "lines.txt")
    assert [args.prompt for args in asked] == [
        'He said "no", it\'s $HOME & 50% off #1 \\n `ls`',
        "- a cat, indented",
        "Two cats' box.",
        "-1 é\u2028猫",
    ]
    assert asked[2].save_file == "take #1.mp4"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("jobs.txt", b"", ["has no line with a prompt or flags"]),
        ("jobs.txt", b"# nothing\n\n", ["has no line with a prompt or flags"]),
        ("jobs.txt", b"a cat\n--prompt 'open\n", ["line 2: No closing quotation", "quotes"]),
        ("jobs.txt", "a cat\ncafé".encode("latin-1"), ["line 2", "save as UTF-8"]),
        ("jobs.txt", "a cat\na dog".encode("utf-16-le"), ["line 1", "save as UTF-8"]),
        ("none.txt", None, ["none.txt: cannot be read"]),
        ("Jobs.CSV", b"prompt\na cat", ["Jobs.CSV: must be plain text", "a prompt, or flags"]),
        ("jobs.json", b'["a cat"]', ["jobs.json: must be plain text"]),
        ("jobs.jsonl", b'{"prompt": "a cat"}', ["jobs.jsonl: must be plain text"]),
    ],
)
def test_unreadable_jobs_file_is_refused(refusal, tmp_path, monkeypatch, name, content, parts):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    line = refusal("--teacache_jobs", name)
    assert all(part in line for part in parts), line


def test_every_line_is_checked_before_loading(batch, asked):
    expected = {
        THREE[0]: None,
        '--prompt "a ball" --base_seed 7': None,
        '--base 7 --prompt "a ball"': "line 2 has this name too",  # the default name
        "--sample_steps 0": "--sample_steps 0: must be 1 or more",
        "--frame_num 6 --sample_steps 0": "--frame_num 6: must be 4n+1",
        "--nonsense 1": "--nonsense 1",
        "--ckpt_dir elsewhere": "--ckpt_dir elsewhere: must be a folder",
        "--save_file one.mp4": "line 1 has this name too",
        "--save_file x/../one.gif": "line 1 has this name too",
        "--save_file nowhere/two.mp4": "nowhere/two.mp4: cannot be written",
        "--teacache_jobs others.txt": "--teacache_jobs: give it on the command line",
        "--teacache_compare 2x": "--teacache_compare: give it on the command line",
        "--wan_repo .": "--wan_repo: give it on the command line",
        "--help": "--help: give it on the command line",
        "--teacache_plan": "--teacache_plan: give it on the command line",
        "--teacache_decode x.pt": "--teacache_decode: give it on the command line",
        "--teacache_thresh 0.1 --teacache_speedup 2": "not allowed with --teacache_thresh",
        "--teacache_speedup 5": "--teacache_speedup 5: no threshold reaches it",
    }
    code, said = batch(expected)
    errors = re.findall("error: .*: line ([0-9]+): (.*)", said)
    assert (code, len(errors), asked, videos()) == (2, said.count("error:"), [], [])
    assert [int(line) for line, _ in errors] == list(range(3, len(expected) + 1))  # one a line
    for (_, error), part in zip(errors, list(expected.values())[2:], strict=True):
        assert part in error.replace("argument ", "")


def test_fault_of_the_command_line_is_told_once(batch, asked):
    code, said = batch(THREE, "--sample_steps", "many")
    assert (code, said.count("error: "), asked) == (2, 1, [])
    assert "line" not in said.split("error: ")[1].replace("--sample_steps", "")


# fmt: off
MODEL_FLAGS = ["--task t2v-nano-2", "--ckpt_dir copy", "--ulysses_size 2", "--ring_size 2",
               "--t5_fsdp", "--t5_cpu", "--convert_model_dtype", "--prompt_extend_model other",
               "--prompt_extend_method local_qwen"]
# fmt: on


def test_flags_of_the_loaded_model_cannot_differ(batch, asked, ckpt, wan, monkeypatch):
    """Not even where a line has the default; with --convert_model_dtype, of Wan2.2."""

    def parse_args(stock, parser):
        parser.add_argument("--convert_model_dtype", action="store_true")
        return stock(parser)

    wrap(monkeypatch, "argparse.ArgumentParser.parse_args", parse_args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for table in (wan[0].WAN_CONFIGS, wan[0].SUPPORTED_SIZES, wan[0].EXAMPLE_PROMPT):
        monkeypatch.setitem(table, "t2v-nano-2", table["t2v-nano"])
    Path("copy").symlink_to(ckpt)
    of_all = ["--prompt_extend_method", "dashscope", "--dit_fsdp"]
    code, said = batch([THREE[0], *MODEL_FLAGS], *of_all)
    assert (code, asked, said.count("must be the same in all lines")) == (2, [], len(MODEL_FLAGS))
    for line, flag in enumerate(MODEL_FLAGS, 2):
        assert f"jobs.txt: line {line}: {flag.split()[0]} " in said


def test_entry_of_a_comparison_may_have_a_space():
    ours, _ = our_flags(["--teacache_compare=my rule.json:0.3", "--prompt=a ball"])
    assert ours.teacache_compare == ["my rule.json:0.3"]


def test_equal_plans_are_announced_once(batch, asked):
    """A line's threshold replaces the command line's speed-up."""
    lines = ["a ball", "a cube", "--save_file x.mp4 --sample_steps 6", "--teacache_thresh 0"]
    said = batch(lines, "--teacache_speedup", "1.25")[1]
    announced = re.findall("TeaCache: (.*)rule sigma.*: computes (.*) steps", said)
    assert announced == [("2 videos: ", "4 of 5"), ("", "5 of 6"), ("", "all 5")]


def test_default_names_and_seeds_survive_a_restart(batch, made, ckpt):
    lines = ["a ball", "a ball", '--prompt "a ball" --base_seed 7', "a cube"]
    code, said = batch(lines)
    names = videos()
    assert (code, len(names), len(made.sampled)) == (0, 4, 4), said
    assert sum(name.startswith("t2v-nano_64x64_a_ball_") for name in names) == 3
    assert sum(".2." in name for name in names) == 1  # of two equal lines without a seed
    seeds = {name: record(Path(name).stem)["seed"] for name in names}
    assert len(set(seeds.values())) == 4
    cube = next(name for name in names if "cube" in name)
    Path(cube).unlink()
    Path("again").symlink_to(ckpt)
    other = ["--offload_model", "False", "--t5_cpu", "--ckpt_dir", "./again"]
    code, said = batch(lines, *other)  # the same videos, so the same names
    assert (code, said.count("is finished: skipped"), videos()) == (0, 3, names)
    assert made.sampled[4:] == [seeds[cube]]
    assert {name: record(Path(name).stem)["seed"] for name in names} == seeds
    assert batch(["a ball"], "--teacache_thresh", "0")[0] == 0  # another video
    assert len(videos()) == 5


def test_default_name_is_taken_when_sampling_begins(batch, made, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *args: "now")
    name, seen = "t2v-nano_64x64_a_ball_0.3_5_now", []
    other = '{"status": "started", "settings": {}}'  # of another run, meanwhile
    begin = first(lambda: Path(f"{name}.json").write_text(other))
    wrap(monkeypatch, "wan.text2video.WanT2V.__init__", begin)
    made.then = {0: lambda: seen.extend(path.name for path in Path().iterdir())}
    argv = ["--prompt", "a ball", "--base_seed", "5", "--teacache_thresh"]
    assert batch(None, *argv, "0.3")[0] == 0
    assert {f"{name}.2.json", f"{name}.2.latents.pt"} < set(seen)
    assert (Path(f"{name}.json").read_text(), videos()) == (other, [f"{name}.2.mp4"])
    assert batch(None, *argv, "0.2")[0] == 0
    assert videos()[0] == "t2v-nano_64x64_a_ball_0.2_5_now.mp4"


def test_batch_loads_once_and_equals_single_runs(batch, made):
    lines = [
        f"{THREE[0]} --sample_steps 10",
        f"{THREE[1]} --frame_num 9 --teacache_order 1 --sample_steps 12 --sample_solver dpm++",
        f"{THREE[2]} --teacache_guide_until 0 --size 64*96",
    ]
    code, said = batch(lines, "--teacache_speedup", "1.5")
    assert (code, said.count("Creating WanModel")) == (0, 1), said
    records = map(record, ("one", "two", "three"))
    made_so = [(r["steps"], len(r["computed"]), r["order"]) for r in records]
    assert made_so == [(10, 7, 0), (12, 8, 1), (5, 5, 0)]
    for line in lines:
        _, prompt, rest = line.split('"')
        argv = ["--prompt", prompt, "--teacache_speedup", "1.5", *rest.split()]
        assert batch(None, *argv)[0] == 0
    together, alone = made.decoded[:3], made.decoded[3:]
    assert [video.shape for video in alone] == [(3, 5, 64, 64), (3, 9, 64, 64), (3, 5, 96, 64)]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


# ------------------------------------------------------------------------------ failing lines


def test_failing_line_is_told_and_the_batch_goes_on(batch, made, monkeypatch):
    """In the decoder, then before the sampling."""
    calls = itertools.count()
    begin = first(lambda: next(calls) == 2 and out_of_memory())
    wrap(monkeypatch, "wan.text2video.WanT2V.noise", begin)
    made.then = {1: out_of_memory}
    last = '--prompt "a cube" --save_file last.mp4 --teacache_thresh 0'
    code, said = batch([*THREE, last])
    assert (code, said.count("Creating WanModel"), said.count("Finished.")) == (1, 1, 2)
    assert (said.count("failed: CUDA out of memory"), "Traceback" in said) == (2, False)
    names = ["one", "two", "three", "last"]
    assert re.findall(r"TeaCache: video (\d of 4): (\w+)\.mp4", said) == [
        (f"{i} of 4", name) for i, name in enumerate(names, 1)
    ]
    one, two, three, last = map(record, names)
    assert [r["status"][:3] for r in (one, two, three, last)] == ["fin", "fai", "fai", "fin"]
    assert (two["latents"], three["latents"]) == (str(Path("two.latents.pt").absolute()), None)
    assert (videos(), Path("two.latents.pt").is_file()) == (["last.mp4", "one.mp4"], True)
    table = said[said.index("computed  sampling   drift  file") :].splitlines()[1:5]
    failed = "failed: OutOfMemoryError('"
    assert [" ".join(row.split("TeaCache:")[1].split()) for row in table] == [
        f"3/5 {one['seconds']['sampling']:.1f} s {100 * one['drift']:.1f} % one.mp4",
        f"{failed} two.mp4",
        f"{failed} three.mp4",
        f"5/5 {last['seconds']['sampling']:.1f} s last.mp4",
    ]
    assert len({row.rindex("  ") for row in table}) == 1  # the names are aligned


def test_model_that_cannot_be_loaded_ends_the_batch(batch, wan, monkeypatch):
    load = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr("wan.text2video.WanModel.from_pretrained", load)
    code, said = batch(THREE)
    assert (code, load.call_count, said.count("not made")) == (1, 1, 2)
    assert said.count("failed: CUDA out of memory") == 1
    assert (record("one")["status"][:7], Path("two.json").exists()) == ("failed:", False)


def test_record_of_a_lost_video_says_how_the_next_run_failed(batch, made, monkeypatch):
    assert batch(THREE[:1])[0] == 0
    Path("one.mp4").unlink()
    monkeypatch.setattr("generate.generate", Mock(side_effect=RuntimeError("down")))
    assert (batch(THREE[:1])[0], record("one")["status"][:6]) == (1, "failed")


def test_line_that_wan_refuses_ends_no_batch(batch, made):
    code, said = batch(["--use_prompt_extend --save_file x.mp4", THREE[0]])
    assert (code, record("one")["status"], "x.mp4 failed: " in said) == (1, "finished", True)
    assert not re.search("Traceback|Refused: ", said)
    lines = ["--use_prompt_extend --save_file y.mp4", "--save_file z.mp4"]
    code, _ = batch(lines, "--teacache_compare", "1x")
    assert (code, record("z.1x")["status"]) == (1, "finished")


def test_failure_frees_its_tensors_before_the_next_line(batch, made, monkeypatch):
    held, alive = [], []

    def fail_with_a_tensor():
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        out_of_memory()

    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's keep what they are given
    made.then = {0: fail_with_a_tensor, 1: lambda: alive.append(held[0]())}
    assert batch(THREE[:2])[0] == 1
    assert alive == [None]


@pytest.mark.parametrize("offload", ["True", "False"])
def test_pipeline_is_put_back_after_a_failed_decode(batch, made, wan, monkeypatch, offload):
    events = []
    vae = "wan.modules.vae.VAE.clear_cache"
    monkeypatch.setattr(vae, lambda vae: events.append("clear"), raising=False)
    for name in ("model.WanModel", "t5.WordEncoder"):
        cpu = lambda stock, model, name=name: (events.append(name), stock(model))[1]  # noqa: E731
        wrap(monkeypatch, f"wan.modules.{name}.cpu", cpu)
    wrap(monkeypatch, "wan.text2video.WanT2V.generate", first(lambda: events.append("next")))
    made.then = {0: lambda: (events.clear(), out_of_memory())}
    assert batch(THREE[:2], "--offload_model", offload)[0] == 1
    moved = ["model.WanModel", "t5.WordEncoder"] * (offload == "True")
    assert events[: 2 + len(moved)] == ["clear", *moved, "next"]


def test_peak_memory_is_of_one_video_and_the_cache_is_emptied(batch, made, monkeypatch):
    """torch.cuda is a stand-in, which the script alone sees: Wan stays on the CPU."""
    seen = ModuleType("torch")
    seen.cuda, seen.__getattr__ = MagicMock(), lambda name: getattr(torch, name)
    seen.cuda.device_count.return_value = 1
    seen.cuda.get_device_capability.return_value = (9, 0)
    peak = seen.cuda.max_memory_allocated = Mock(return_value=0)
    monkeypatch.setattr("teacache_generate.torch", seen)
    monkeypatch.setattr("teacache_generate.device_of_run", lambda: torch.device("cpu"))
    made.then = {i: lambda i=i: setattr(peak, "return_value", (900, 7)[i]) for i in (0, 1)}
    assert batch(THREE[:2])[0] == 0
    assert [record(name)["peak_bytes"] for name in ("one", "two")] == [900, 7]
    each = ["reset_peak_memory_stats", "empty_cache"]
    assert [call[0] for call in seen.cuda.mock_calls if call[0] in each] == each * 2


# ------------------------------------------------------------------------------ started again


def test_stopped_batch_continues_where_it_was(batch, made):
    made.then = {1: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    code, said = batch(THREE)
    assert (code, "video 3 of 3" in said) == (128 + signal.SIGTERM, False)
    assert [record(x)["status"] for x in ("one", "two")] == ["finished", "stopped"]
    before = Path("one.mp4").stat().st_mtime_ns
    code, said = batch(THREE)
    assert (code, made.sampled) == (0, [1, 2, 3]), said  # two is decoded only
    assert "one.mp4 is finished: skipped" in said
    assert videos() == ["one.mp4", "three.mp4", "two.mp4"]
    assert Path("one.mp4").stat().st_mtime_ns == before
    assert (record("two")["status"], record("two")["latents"]) == ("finished", None)
    assert list(Path().glob("*.pt")) == []
    assert batch(THREE)[1].count("Creating WanModel") == 0


@pytest.fixture(scope="module")
def leftovers(ckpt, tmp_path_factory):
    """A folder with x.mp4, its record and, as if decoding had failed, its latents."""
    folder = tmp_path_factory.mktemp("leftovers")
    argv = ["--wan_repo", str(NANO), "--ckpt_dir", str(ckpt), *FEW, *SAME, "--save_file"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(NANO)
        Made(patch).then = {0: out_of_memory}
        with pytest.raises(SystemExit):
            main([*argv, str(folder / "kept.mp4")])
        main([*argv, str(folder / "x.mp4")])
    return folder


SAME = ["--prompt", "a ball", "--base_seed", "1", "--teacache_thresh", "0.3"]
RUNS = {
    "batch": ("x", ["--teacache_jobs", "line.txt"]),
    "comparison": ("x.0.3", [*SAME[:4], "--teacache_compare", "0.3", "--save_file", "x.mp4"]),
    "single": ("x", [*SAME, "--save_file", "x.mp4"]),
}


def change(target: Path, **values) -> None:
    target.with_suffix(".json").write_text(json.dumps(record(target.stem) | values))


def keep_latents(target: Path) -> None:
    target.unlink()
    latents = target.with_name(f"{target.stem}.latents.pt").absolute()
    content = torch.load("kept.pt", weights_only=True)
    torch.save({**content, "save_file": str(target.absolute())}, latents)
    change(target, status="stopped", latents=str(latents))


def ask_another_prompt(target: Path) -> None:
    change(target, settings=record(target.stem)["settings"] | {"prompt": "a cube"})


# How many videos a batch, a comparison (with its stock) and a single run then sample; None: refused
# fmt: off
FOUND = {
    "finished": (lambda target: None, 0, 2, 1),
    "cut short": (lambda target: target.write_bytes(target.read_bytes()[:3000]), 1, 3, 1),
    "a frame too few": (lambda target: change(target, frames=6), 1, 3, 1),
    "latents": (keep_latents, 0, 2, 1),
    "lost latents": (lambda target: change(target, status="stopped", latents="none.pt"), 1, 3, 1),
    "other settings": (ask_another_prompt, None, None, 1),
    "another seed": (lambda target: change(target, seed=2), None, None, 1),
    "no record": (lambda target: target.with_suffix(".json").unlink(), None, None, 1),
    "nonsense": (lambda target: change(target, frames="five"), None, None, None),
    "foreign": (lambda target: target.with_suffix(".json").write_text("{}"), None, None, None),
}
# fmt: on


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("found", FOUND)
def test_files_beside_the_target_decide(batch, made, leftovers, found, run):
    act, expected = FOUND[found][0], FOUND[found][1 + list(RUNS).index(run)]
    name, argv = RUNS[run]
    for ending in ("mp4", "json"):
        shutil.copy(leftovers / f"x.{ending}", f"{name}.{ending}")
    shutil.copy(leftovers / "kept.latents.pt", "kept.pt")
    Path("line.txt").write_text(
        "--prompt 'a ball' --base_seed 1 --teacache_thresh 0.3 --save_file x.mp4"
    )
    act(Path(f"{name}.mp4"))
    before = {path.name: path.read_bytes() for path in Path().glob(f"{name}.*")}
    code, said = batch(None, *argv)
    if expected is None:
        assert (code, made.sampled, said.count("error:")) == (2, [], 1), said
        assert f"--save_file {name}.mp4" in said
        assert {path.name: path.read_bytes() for path in Path().glob(f"{name}.*")} == before
        return
    assert (code, len(made.sampled)) == (0, expected), said
    done = record(name)
    assert (done["status"], done["latents"], done["prompt"]) == ("finished", None, "a ball")
    assert np.array_equal(frames(Path(f"{name}.mp4")), frames(leftovers / "x.mp4"))
    assert ("made with other settings" in said) == (found in ("other settings", "another seed"))


def test_record_knows_how_many_frames_are_whole(batch, made, monkeypatch):
    """A short source video makes fewer frames than asked for (VACE)."""
    short = [torch.zeros(3, 3, 64, 64)]
    monkeypatch.setattr("wan.modules.vae.WanVAE.decode", lambda vae, latents: short)
    for _ in range(2):
        assert batch(THREE[:1])[0] == 0
        assert (record("one")["frames"], made.sampled) == (3, [1])


FAILS_AT_FIRST = """
from wan.modules.vae import WanVAE
decode, count = WanVAE.decode, iter(range(9))
def failing(self, latents):
    return decode(self, latents if next(count) else None)
WanVAE.decode = failing
"""


@pytest.mark.parametrize("flags", ["--ulysses_size 2", "--ring_size 2 --dit_fsdp --t5_fsdp"])
def test_processes_sharing_a_video_go_on_after_a_failure(batch, made, ckpt, tmp_path, flags):
    Path("jobs.txt").write_text("\n".join(THREE))
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", *flags.split()]
    done = run_two(tmp_path, FAILS_AT_FIRST, *argv)
    assert (done.returncode, done.stdout.count("Creating WanModel")) == (1, 1), done.stderr
    assert done.stdout.count("one.mp4 failed: 'NoneType'") == 1
    assert done.stdout.count("TeaCache: video 3 of 3") == 1
    assert (videos(), Path("one.latents.pt").is_file()) == (["three.mp4", "two.mp4"], True)
    assert done.stdout.count("three.mp4: computed 3 of 5 steps") == 1
    code, said = batch(THREE)  # by one process, the same names and videos
    assert (code, made.sampled, said.count("skipped")) == (0, [], 2), said
