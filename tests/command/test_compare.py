"""A comparison, --teacache_compare, on the stand-in: stock, stock with noise, and each entry."""

import json
import logging
import math
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from nano import NANO, frames
from PIL import Image
from skimage.metrics import structural_similarity
from stand_in import Made, out_of_memory, record, wrap

from teacache_generate import Row, caption, comparison_table, main, write_side_by_side

FEW = ["--frame_num", "5", "--sample_steps", "10", "--teacache_rule", "sigma"]
BALL = ["--prompt", "a red ball moves right", "--base_seed", "42"]
ONE = [*BALL, "--save_file", "x.mp4"]
ENTRIES = ["0.2", "0.2@0", "1.25x", "t2v-1.3B:0.08"]
LABELS = ["stock", "noise 1e-4", *ENTRIES]


def psnr_of(video: Path | str, stock: Path | str) -> float:
    error = ((frames(Path(video)).astype(np.float64) - frames(Path(stock))) ** 2).mean()
    return 10 * np.log10(255**2 / error)


def rows(name: str = "x") -> list[dict]:
    return json.loads(Path(f"{name}.compare.json").read_text())


@pytest.fixture
def compare(script, made):
    """A function of entries and more flags: exit status, and all that is logged and printed."""

    def run(entries: str, *flags: object, lines=(), one=ONE) -> tuple[int, str]:
        if lines:
            Path("jobs.txt").write_text("\n".join(lines))
            one = ["--teacache_jobs", "jobs.txt"]
        return script(*FEW, *one, *flags, "--teacache_compare", *entries.split())

    return run


@pytest.fixture(scope="module")
def whole(ckpt, tmp_path_factory):
    """One comparison: several tests look at its files, log and model calls."""
    folder = tmp_path_factory.mktemp("compare")
    seen = SimpleNamespace(folder=folder, said=[], given=[], got=[])
    handler = logging.Handler()
    handler.emit = lambda line: seen.said.append(line.getMessage())
    flags = ["--teacache_order", "1", "--teacache_guide_until", "0.5"]  # not for stock
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, *flags, "--save_file", folder / "x.mp4"]

    def predict(stock, model, x, *args, **kwargs):
        seen.got.append(x[0].clone())
        return stock(model, x, *args, **kwargs)

    def note_given(module, args):
        if type(module).__name__ == "WanModel":
            seen.given.append(args[0][0].clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(NANO)
        seen.made = Made(patch)
        wrap(patch, "wan.modules.model.WanModel.predict", predict)
        patch.setattr("builtins.print", lambda text: seen.said.extend(text.splitlines()))
        patch.setattr(logging.root, "handlers", [handler])
        logging.root.setLevel(logging.INFO)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(note_given)
        main(["--wan_repo", str(NANO), *map(str, argv), "--teacache_compare", *ENTRIES])
        hook.remove()
    seen.rows = json.loads((folder / "x.compare.json").read_text())
    seen.records = [json.loads(Path(folder, f"x.{name}.json").read_text()) for name in NAMES]
    return seen


NAMES = ["stock", "noise-1e-4", "0.2", "0.2-0", "1.25x", "t2v-1.3B-0.08"]


def test_entries_follow_two_stock_videos_from_one_load(whole):
    assert [row["label"] for row in whole.rows] == LABELS
    assert [video["order"] for video in whole.records] == [0, 0, 1, 0, 1, 1]
    assert [video["settings"]["teacache"]["guided_steps"] for video in whole.records] == [
        None
    ] * 2 + [5] * 4
    assert [video["thresh"] for video in whole.records][:4] == [0, 0, 0.2, 0.2]
    assert [video["rule"] for video in whole.records] == ["sigma"] * 5 + ["t2v-1.3B"]
    assert whole.made.sampled == [42] * 6
    load = next(i for i, line in enumerate(whole.said) if "Creating WanModel" in line)
    assert sum("Creating WanModel" in line for line in whole.said) == 1
    assert whole.said.index("TeaCache: 6 videos, 2 of them stock") < load


def test_stock_is_stock_and_the_floor_has_noise_at_step_0(whole):
    assert [row["computed"] for row in whole.rows[:2]] == [list(range(10))] * 2
    given, got = whole.given[:40], whole.got[:40]  # 10 steps, two calls, two videos
    noise = [b - a for a, b in zip(given, got, strict=True)]
    assert all(not part.any() for part in noise[:20] + noise[22:])
    assert torch.equal(noise[20], noise[21])  # both branches
    assert noise[20].std() == pytest.approx(1e-4, rel=0.05)
    assert abs(noise[20].mean()) < 1e-5
    assert torch.equal(given[0], given[20])  # one seed
    assert len(whole.got) == 40 + 4 * 15  # the entries' guidance ends


def test_psnr_and_ssim_equal_an_independent_computation(whole):
    stock, *others = [whole.folder / f"x.{name}.mp4" for name in NAMES]
    assert (whole.rows[0]["psnr"], whole.rows[0]["ssim"]) == (None, 1)
    for video, row in zip(others, whole.rows[1:], strict=True):
        assert row["psnr"] == pytest.approx(psnr_of(video, stock), abs=1e-9)
        pairs = zip(*(frames(file).astype(np.uint8) for file in (video, stock)), strict=True)
        ssim = np.mean([structural_similarity(a, b, channel_axis=-1) for a, b in pairs])
        assert row["ssim"] == pytest.approx(ssim, abs=1e-9)
    assert 10 < whole.rows[2]["psnr"] < whole.rows[1]["psnr"]


def test_speedup_is_over_the_faster_stock_run(whole):
    seconds = [video["seconds"]["sampling"] for video in whole.records]
    assert [row["seconds"] for row in whole.rows] == seconds
    for row in whole.rows:
        assert row["speedup"] * row["seconds"] == pytest.approx(min(seconds[:2]))


def test_comparison_leaves_its_videos_and_three_files(whole):
    expected = {f"x.{name}.{ending}" for name in NAMES for ending in ("json", "mp4")}
    expected |= {"x.compare.json", "x.compare.mp4", "x.compare.png"}
    assert {path.name for path in whole.folder.iterdir()} == expected  # no frames of stock
    assert not re.search("NaN|Infinity", (whole.folder / "x.compare.json").read_text())


def test_table_is_printed_last_with_the_floor(whole):
    *lines, floor = whole.said[-7:]
    assert [line.split()[0] for line in lines] == ["stock", "noise", *ENTRIES]
    assert re.match(r"stock +10/10 +[\d.]+ s +[01]\.\d\dx +inf +1\.000$", lines[0])
    assert re.match(r"0\.2 +\d/10 +[\d.]+ s +[\d.]+x +[\d.]+% +[\d.]+ +[01]\.\d{3}$", lines[2])
    assert floor.startswith("The floor is the PSNR of noise 1e-4: ")


def test_picture_shows_schedule_frame_and_difference(whole):
    picture = np.asarray(Image.open(whole.folder / "x.compare.png")).astype(int)
    middle = [frames(whole.folder / f"x.{name}.mp4")[2] for name in NAMES]
    height = picture.shape[0] // 6
    for i, row in enumerate(whole.rows):
        line = picture[i * height : (i + 1) * height]
        left = line.shape[1] - 2 * 192  # two frames, three times their size
        side = (left - 16) / 10
        centres = [round(8 + (step + 0.37) * side) for step in range(10)]
        boxes = [line[92, x].max() < 128 for x in centres]
        assert [step for step in range(10) if boxes[step]] == row["computed"]
        assert (line[4:30, :left] < 128).any()  # a label
        expected = [middle[i], np.minimum(8 * abs(middle[i] - middle[0]), 255)]
        for x, frame in zip((left, left + 192), expected, strict=True):
            image = Image.fromarray(frame.astype(np.uint8)).resize((192, 192))
            assert np.array_equal(line[:192, x : x + 192], np.asarray(image))


def row(label, psnr, ssim=0.9, drift=0.05, computed=25, **others) -> Row:
    values = {"steps": 50, "seconds": 10.0, "speedup": 2.0, **others}
    computed = list(range(computed))
    return Row(label=label, psnr=psnr, ssim=ssim, drift=drift, computed=computed, **values)


def test_table_of_several_lines_has_means():
    stock = row("stock", math.inf, 1.0, None, 50, seconds=20.0, speedup=1.0)
    noise = replace(stock, label="noise 1e-4", psnr=22.0, ssim=0.7)
    first = [stock, noise, row("0.08", 21.0), row("2x", 30.0, None, computed=24)]
    noise = replace(noise, psnr=24.0, ssim=0.8, seconds=21.0)
    second = [stock, noise, row("0.08", 24.9, drift=0.06, speedup=2.5)]
    table = comparison_table([first, second])
    assert len({len(line) for line in table[:-1]}) == 1  # aligned
    assert [re.sub(" {2,}", "  ", line).rstrip() for line in table[:-1]] == [
        "  computed  sampling  speed-up  drift  PSNR  SSIM",
        "stock  50/50  20.0 s  1.00x  inf  1.000",
        "noise 1e-4  50/50  20.5 s  1.00x  23.0  0.750",
        "0.08  25/50  10.0 s  2.25x  5.5%  22.9  0.900",
        "2x  24/50  10.0 s  2.00x  5.0%  30.0",
    ]


@pytest.mark.parametrize("width", [192, 480])
@pytest.mark.parametrize("label", ["stock", "i2v-14B-480P:0.125@1"])
def test_label_is_never_cut_off(label, width):
    ink = np.flatnonzero((caption(row(label, 38.2, computed=0), width, 110) < 128).any((0, 2)))
    assert (6 <= ink[0] <= 12, ink[-1] <= width - 6) == (True, True)


def test_side_by_side_is_at_most_4096_wide(tmp_path):
    videos = [np.full((2, 480, 832, 3), 25 * i, np.uint8) for i in range(9)]
    write_side_by_side([row("2x", 30.0)] * 9, videos, tmp_path / "x.mp4", 16)
    together = frames(tmp_path / "x.mp4")
    assert together.shape == (2, 2 * (276 + 110), 8 * 480, 3)
    grey = [int(together[0, y, 240 + 480 * x, 0]) for y in (300, 686) for x in range(8)]
    assert np.allclose(grey[:9], [25 * i for i in range(9)], atol=6)
    assert min(grey[9:]) > 245


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_without_scikit_image_the_ssim_is_left_out(compare, tmp_path, monkeypatch, how):
    for name in [name for name in sys.modules if name.split(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    if how == "missing":
        monkeypatch.setitem(sys.modules, "skimage", None)
    else:
        (tmp_path / "skimage.py").write_text("raise ValueError('built for another numpy')")
        monkeypatch.syspath_prepend(tmp_path)
    code, said = compare("1.2x", "--frame_num", "1", "--sample_steps", "5")
    table = said[said.index("computed  sampling") :].splitlines()
    assert (code, table[1].split()[-1]) == (0, "inf")
    assert "for the SSIM: pip install scikit-image" in table
    assert not Path("x.compare.mp4").exists()  # of one frame a picture alone
    assert Path("x.compare.png").is_file()


WRONG = {
    "fast": "fast must be 0 (stock)",
    "x": "--teacache_compare x",
    "0.5x": "0.5 must be 1 or more",
    "infx": "inf must be 1 or more",
    "2x@2": "--teacache_compare 2x@2",
    "nobody:2x": "--teacache_rule nobody: cannot be used",
    "1.2x 0.1 1.2x": "entry 1.2x",
    "": "--teacache_compare: expected at least one argument",
    "1.5x 9x": "--teacache_compare 9x: --teacache_speedup 9: no threshold reaches it",
    "t2v-14B:2x": "--teacache_compare t2v-14B:2x: --teacache_speedup 2: with rule t2v-14B",
    "1.5x --save_file x.gif": "--save_file x.gif: loses frames that repeat: compare .mp4 files",
    "1.5x --frame_num 6": "error: --frame_num 6: must be 4n+1",
    "1.5x --teacache_thresh 0.1": "--teacache_thresh",
    "1.5x --teacache_speedup 1.5": "--teacache_speedup",
}


@pytest.mark.parametrize("entries", WRONG)
def test_wrong_entries_are_refused_in_a_line(compare, made, entries):
    code, said = compare(entries)
    assert (code, said.count("error:"), made.sampled, os.listdir()) == (2, 1, [], []), said
    assert WRONG[entries] in said


def test_old_pillow_is_found_before_loading(compare, made, monkeypatch):
    """Before 10.1 its text had no font_size."""

    def text(stock, draw, *args, font_size=None, **options):
        if font_size is not None:
            raise TypeError("unexpected keyword argument 'font_size'")

    wrap(monkeypatch, "PIL.ImageDraw.ImageDraw.textlength", text)
    code, said = compare("1.5x")
    assert (code, made.sampled, "pillow" in said) == (2, [], True)


def test_each_line_is_compared_with_its_own_stock(compare, made):
    lines = [
        '--prompt "a red ball" --base_seed 1 --save_file a.stock.b.mp4',
        '--prompt "a blue ball" --base_seed 2 --save_file b.mp4 --sample_steps 12',
    ]
    code, said = compare("1.5x", lines=lines)
    assert (code, said.count("Creating WanModel")) == (0, 1), said
    assert "TeaCache: 6 videos, 4 of them stock" in said
    first, second = rows("a.stock.b"), rows("b")
    assert [row["steps"] for row in first + second] == [10] * 3 + [12] * 3
    a, b = first[2]["psnr"], second[2]["psnr"]
    assert b == pytest.approx(psnr_of("b.1.5x.mp4", "b.stock.mp4"))
    assert re.search(f"\n1.5x .* {(a + b) / 2:.1f} ", said)
    for name in ("a.stock.b.1.5x", "a.stock.b.stock", "b.noise-1e-4", "b.compare"):
        assert len(frames(Path(f"{name}.mp4"))) == 5, name
    code, said = compare("1.5x", lines=["--teacache_thresh 0.1"])
    assert (code, "--teacache_thresh 0.1 beside --teacache_compare" in said) == (2, True)
    code, said = compare("1.5x", lines=["--save_file c.mp4", "--save_file c.mov"])
    assert (code, len(made.sampled)) == (2, 6)
    assert "line 2: --save_file c" in said


def test_unwritable_comparison_is_told_and_the_next_line_runs(compare, monkeypatch):
    Path("1.compare.png").mkdir()
    lines = [f'--prompt "a ball" --base_seed {i} --save_file {i}.mp4' for i in (1, 2)]
    code, said = compare("1.5x", lines=lines)
    assert (code, len(rows("2"))) == (1, 3)
    assert "1.mp4: the comparison cannot be written" in said
    assert "The floor" in said


# ------------------------------------------------------------------------------ failures, restarts


def test_failed_entry_is_decoded_when_started_again(compare, made):
    made.then = {2: out_of_memory}
    code, said = compare("1.5x 1.25x")
    assert (code, [row["label"] for row in rows()]) == (1, ["stock", "noise 1e-4", "1.25x"])
    assert said.count("x.1.5x.mp4 failed: ") == 1
    assert "The floor" in said  # the table of the others
    assert Path("x.1.5x.latents.pt").is_file()
    code, said = compare("1.5x 1.25x")
    assert (code, len(made.sampled)) == (0, 4), said  # nothing is sampled again
    assert [row["label"] for row in rows()] == ["stock", "noise 1e-4", "1.5x", "1.25x"]
    assert rows()[2]["psnr"] == pytest.approx(psnr_of("x.1.5x.mp4", "x.stock.mp4"))


def test_stopped_comparison_continues_where_it_was(compare, made):
    made.then = {3: lambda: os.kill(os.getpid(), signal.SIGINT)}
    assert compare("1.5x 1.25x")[0] == 128 + signal.SIGINT
    Path("x.1.25x.latents.pt").unlink()
    code, said = compare("1.5x 1.25x 1.2x")  # one that was stopped, one that is new
    assert (code, len(made.sampled)) == (0, 4 + 2), said
    names = ["1.5x", "1.25x", "1.2x"]
    assert [row["label"] for row in rows()] == ["stock", "noise 1e-4", *names]
    expected = [psnr_of(f"x.{name}.mp4", "x.stock.mp4") for name in names]
    assert [row["psnr"] for row in rows()[2:]] == pytest.approx(expected)
    stock = record("x.stock")  # the faster one of two
    Path("x.stock.json").write_text(json.dumps(stock | {"seconds": {"sampling": 1e-9}}))
    assert compare(" ".join(names))[0] == 0
    assert [row["speedup"] * row["seconds"] for row in rows()] == pytest.approx([1e-9] * 5)
    before = rows()
    Path("x.compare.json").unlink()  # as if killed before it was written
    assert (compare(" ".join(names))[0], len(made.sampled), rows()) == (0, 6, before)


def test_comparison_without_a_seed_keeps_its_seed(compare, made, monkeypatch):
    prompts = []  # not the example's, given to the others
    wrap(monkeypatch, "generate.generate", lambda go, args: go(prompts.append(args.prompt) or args))
    assert compare("1.5x", one=[])[0] == 0
    assert compare("1.5x 1.25x", one=[])[0] == 0
    assert prompts == [None] * 4
    assert len(made.sampled) == 4
    assert len(set(made.sampled)) == 1
    (file,) = Path().glob("*1.25x.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 1}))
    code, said = compare("1.5x 1.25x", one=[])
    assert (code, "have several seeds: give --base_seed" in said) == (2, True)


@pytest.mark.parametrize("fails", [None, 0, 2])
def test_prompt_is_extended_once(compare, made, monkeypatch, fails):
    """Also when run again, where stock or the entry has failed and is decoded."""
    asked, loads = [], []

    def load(*args):
        loads.append(args)
        return lambda prompt: asked.append(prompt) or f"{prompt} {len(asked)}"

    def generate(stock, args):
        if args.use_prompt_extend:
            expand = sys.modules["generate"].QwenPromptExpander("model")
            args.prompt, args.use_prompt_extend = expand(args.prompt), False
        stock(args)

    monkeypatch.setattr("generate.QwenPromptExpander", load, raising=False)
    wrap(monkeypatch, "generate.generate", generate)
    made.then = {fails: out_of_memory}
    assert compare("1.5x", "--use_prompt_extend")[0] == (fails is not None)
    Path("x.stock.mp4").unlink(missing_ok=True)  # it is sampled again, with the same prompt
    assert compare("1.5x 1.25x", "--use_prompt_extend")[0] == 0
    records = [record(f"x.{name}") for name in ("stock", "noise-1e-4", "1.5x", "1.25x")]
    assert {video["prompt"] for video in records} == {f"{BALL[1]} 1"}
    assert {video["asked_prompt"] for video in records} == {BALL[1]}
    assert (asked, len(loads)) == ([BALL[1]], 1)
    assert rows()[3]["psnr"] > 10


def test_comparison_needs_stock_and_does_without_noise(compare, made):
    made.then = {0: out_of_memory, 1: out_of_memory, 4: out_of_memory}
    code, said = compare("1.5x")
    assert (code, len(made.sampled), "floor" in said) == (1, 3, False)
    assert "without stock nothing can be compared" in said
    code, said = compare("1.5x")  # decodes stock and noise
    assert (code, "no floor: noise 1e-4 has failed" in said) == (1, True)
    assert [row["label"] for row in rows()] == ["stock", "1.5x"]


def test_model_that_cannot_be_loaded_ends_the_comparison(compare, monkeypatch):
    load = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr("wan.text2video.WanModel.from_pretrained", load)
    code, said = compare("1.5x", lines=["--save_file a.mp4", "--save_file b.mp4"])
    assert (code, load.call_count, said.count("failed: CUDA out of memory")) == (1, 1, 1)


def test_failure_is_in_the_exit_status_behind_a_closed_pipe(compare, made, monkeypatch):
    made.then = {2: out_of_memory}
    closed = Mock(side_effect=BrokenPipeError)
    monkeypatch.setattr("teacache_generate.print", closed, raising=False)
    assert compare("1.5x")[0] == 1
