"""Stock and its like beside each setting: --teacache_compare, on the stand-in ``wan_nano``."""

import json
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from nano import NANO, SCRIPT, attempt, frames, python
from PIL import Image

import teacache_generate
from teacache_generate import (
    Outcome,
    comparison_table,
    heading,
    main,
    psnr,
    shrunk,
    strip,
    write_comparison,
)

SIGMA = ["--teacache_model", "sigma"]
FEW = ["--frame_num", "5", "--sample_steps", "10", *SIGMA]
BALL = ["--prompt", "a red ball moves right", "--base_seed", "42"]


class Recorder:
    """What the pipeline gave the model and what the model saw, call by call; what the VAE made."""

    def __init__(self, patch: pytest.MonkeyPatch):
        from wan.modules.model import WanModel
        from wan.modules.vae import WanVAE

        self.given, self.seen, self.decoded = [], [], []
        self.fails = None
        predict, decode = WanModel.predict, WanVAE.decode

        def recorded_predict(model, x, *args, **kwargs):
            self.seen.append(x[0].clone())
            return predict(model, x, *args, **kwargs)

        def recorded_decode(vae, latents):
            self.decoded.append(None)
            if len(self.decoded) - 1 == self.fails:
                raise RuntimeError("a decoder")
            self.decoded[-1] = decode(vae, latents)[0]
            return self.decoded[-1:]

        def before_all_hooks(module, args):
            if isinstance(module, WanModel):
                self.given.append(args[0][0].clone())

        patch.setattr(WanModel, "predict", recorded_predict)
        patch.setattr(WanVAE, "decode", recorded_decode)
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(before_all_hooks)

    def bytes(self, video: int) -> np.ndarray:
        """A video as the stand-in's own writer turns it into bytes."""
        from wan.utils.utils import grid_frames

        return grid_frames(self.decoded[video][None], 1, True, (-1, 1))


def call(*argv: object) -> int:
    try:
        main(["--wan_repo", str(NANO), *map(str, argv)])
    except SystemExit as leaving:
        return leaving.code
    return 0


@pytest.fixture
def recorder(ckpt, wan, monkeypatch, caplog, tmp_path):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    recorder = Recorder(monkeypatch)
    yield recorder
    recorder.handle.remove()


@pytest.fixture(scope="module")
def made(ckpt, tmp_path_factory):
    """One comparison, looked at from all sides by the tests below."""
    if str(NANO) not in sys.path:
        sys.path.insert(0, str(NANO))
    folder, said = tmp_path_factory.mktemp("compare"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", folder / "video.mp4"]
    entries = ["--teacache_compare", "0.2", "1.25x", "t2v-1.3B:0.08", "--teacache_order", "0", "1"]
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        level = logging.root.level
        logging.root.setLevel(logging.INFO)  # not the attribute: loggers keep what it was
        logging.root.addHandler(handler)
        try:
            code = call(*argv, *entries, "--teacache_report", folder / "report.json")
        finally:
            logging.root.removeHandler(handler)
            logging.root.setLevel(level)
            recorder.handle.remove()
    table = json.loads((folder / "video.compare.json").read_text())
    return SimpleNamespace(folder=folder, code=code, said=said, table=table, record=recorder)


LABELS = [
    *("stock", "noise 1e-4", "0.2 order 0", "0.2 order 1", "1.25x order 0", "1.25x order 1"),
    *("t2v-1.3B:0.08 order 0", "t2v-1.3B:0.08 order 1"),
]


def test_each_entry_runs_by_each_order_after_two_of_stock_from_one_load(made):
    assert made.code == 0
    assert [row["label"] for row in made.table] == LABELS
    assert sum("Creating WanModel" in line for line in made.said) == 1
    told = json.loads((made.folder / "report.json").read_text())["videos"]
    assert [video["label"] for video in told] == LABELS
    assert [video["config"]["order"] for video in told] == [0, 0, 0, 1, 0, 1, 0, 1]
    assert [video["config"]["thresh"] for video in told][:4] == [0, 0, 0.2, 0.2]
    assert [video["config"]["mode"] for video in told] == ["sigma"] * 6 + ["plain"] * 2
    assert [len(video["computed"]) for video in told][4:6] == [8, 8]
    assert {video["settings"]["base_seed"] for video in told} == {42}


def test_the_cost_is_said_before_anything_is_loaded(made):
    said = made.said.index("TeaCache: 8 videos, of which 2 stock")
    load = next(i for i, line in enumerate(made.said) if "Creating WanModel" in line)
    assert said < load
    shown = [line for line in made.said if line.startswith("TeaCache: video ")]
    assert [line.split(",")[0].split(":")[1] for line in shown] == [
        f" video {i} of 8" for i in range(1, 9)
    ]


def test_the_first_row_is_stock_and_the_second_saw_noise_of_1e4_at_the_first_step_only(made):
    given, seen = made.record.given, made.record.seen
    assert len(seen) == len(given)
    noise = [b - a for a, b in zip(given, seen, strict=True)]
    assert all(not part.any() for part in noise[:20])  # stock: 10 steps, two calls
    assert torch.equal(noise[20], noise[21])  # both branches
    assert noise[20].std() == pytest.approx(1e-4, rel=0.05)
    assert abs(noise[20].mean()) < 1e-5
    assert all(not part.any() for part in noise[22:])
    assert torch.equal(given[0], given[20])  # one seed
    assert [row["computed"] for row in made.table][:2] == [10, 10]


def test_psnr_and_ssim_are_those_of_an_independent_computation(made):
    from skimage.metrics import structural_similarity

    stock = made.record.bytes(0)
    assert stock.shape == (5, 64, 64, 3)
    for i, row in enumerate(made.table[1:], 1):
        video = made.record.bytes(i)
        error = ((video.astype(np.float64) - stock) ** 2).mean()
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)
        one_by_one = [
            structural_similarity(a, b, channel_axis=-1) for a, b in zip(video, stock, strict=True)
        ]
        assert row["ssim"] == pytest.approx(np.mean(one_by_one), abs=1e-9)
    assert made.table[0]["psnr"] is None
    assert made.table[0]["ssim"] == 1
    assert 10 < made.table[2]["psnr"] < made.table[1]["psnr"]


def test_the_speedup_is_measured_against_the_faster_stock_run_of_this_process(made):
    told = json.loads((made.folder / "report.json").read_text())["videos"]
    seconds = [video["seconds"]["sampling"] for video in told]
    assert [row["seconds"] for row in made.table] == seconds
    for row in made.table:
        assert row["speedup"] * row["seconds"] == pytest.approx(min(seconds[:2]))


def test_each_video_and_three_files_of_them_all_are_beside_the_target(made):
    names = sorted(path.name for path in made.folder.iterdir())
    assert names == sorted(
        [
            *("report.json", "video.compare.json", "video.compare.mp4", "video.compare.png"),
            *("video.stock.mp4", "video.noise-1e-4.mp4"),
            *("video.0.2-order-0.mp4", "video.0.2-order-1.mp4"),
            *("video.1.25x-order-0.mp4", "video.1.25x-order-1.mp4"),
            *("video.t2v-1.3B-0.08-order-0.mp4", "video.t2v-1.3B-0.08-order-1.mp4"),
        ]
    )
    videos = [name for name in names if name.endswith(".mp4") and "compare" not in name]
    assert len(videos) == 8
    for name in videos:
        assert frames(made.folder / name).shape == (5, 64, 64, 3), name
    assert "NaN" not in (made.folder / "video.compare.json").read_text()
    assert "Infinity" not in (made.folder / "video.compare.json").read_text()


def test_all_play_side_by_side_in_one_picture(made):
    together = frames(made.folder / "video.compare.mp4")
    assert together.shape == (5, 84 + 256, 8 * 256, 3)
    for i in range(8):
        panel = together[:, 84:, 256 * i : 256 * (i + 1)]
        off = [np.abs(panel - shrunk(made.record.bytes(j))).mean() for j in range(8)]
        assert off[i] < 16  # of 255, for the codec
        assert int(np.argmin(off)) in ({0, 1} if i < 2 else {i})
    assert (together[0, :84] > 200).mean() > 0.8  # labels are black on white
    assert (together[0, :84] < 60).any()


def test_a_strip_of_frames_has_a_label_a_row(made):
    picture = np.asarray(Image.open(made.folder / "video.compare.png"))
    assert picture.shape == (8 * (28 + 256), 5 * 256, 3)
    for i in range(8):
        row = picture[284 * i : 284 * (i + 1)]
        assert (row[:28, :256] < 60).any()
        assert (row[:28, 640:] == 255).all()  # once a row, not over each frame
        assert np.array_equal(row[28:, 256:512], shrunk(made.record.bytes(i))[1])


def test_the_table_is_printed_last_with_the_floor_under_it(made):
    *rows, floor = made.said[-9:]
    assert [line[: len(label)] for line, label in zip(rows, LABELS, strict=True)] == LABELS
    assert re.match(r"stock +10/10 +[\d.]+ s +[01]\.\d\dx +inf +1\.000$", rows[0])
    assert re.match(
        r"0\.2 order 0 +\d/10 +[\d.]+ s +[\d.]+x +[\d.]+ % +[\d.]+ +[01]\.\d{3}$", rows[2]
    )
    db = made.table[1]["psnr"]
    assert floor.startswith(f"the floor, stock with noise of 1e-4: {db:.1f} dB; at it or above: ")


def test_comparisons_whose_files_would_have_one_name_are_refused(
    recorder, ckpt, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    lines = (f'--prompt "a red ball" --save_file a.{ending}' for ending in ("mp4", "mov"))
    Path("jobs.txt").write_text("\n".join(lines))
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", "--teacache_compare", "2x"]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert "line 2: --save_file a.mov: is another line's too" in said


# ------------------------------------------------------------------------------ the table


def row(label, psnr, ssim=0.9, drift=0.05, **others):
    values = {"computed": 25, "steps": 50, "seconds": 10.0, "speedup": 2.0, **others}
    return Outcome(label=label, psnr=psnr, ssim=ssim, drift=drift, **values)


def two_lines(with_ssim=True):
    stock = row("stock", math.inf, 1.0, None, computed=50, seconds=20.0, speedup=1.0)
    noise = row("noise 1e-4", 22.0, 0.7, None, computed=50, seconds=20.0, speedup=1.0)
    first = [stock, noise, row("0.08", 21.0), row("2x", 30.0)]
    noise = row("noise 1e-4", 24.0, 0.8, None, computed=50, seconds=21.0, speedup=1.0)
    second = [stock, noise, row("0.08", 24.9, speedup=2.5), row("2x", 30.0)]
    return first, second


def test_one_line_has_its_values_and_the_entries_at_the_floor_are_named():
    assert comparison_table(two_lines()[:1]) == [
        "            computed  sampling  speed-up  drift  PSNR   SSIM",
        "stock          50/50    20.0 s     1.00x          inf  1.000",
        "noise 1e-4     50/50    20.0 s     1.00x         22.0  0.700",
        "0.08           25/50    10.0 s     2.00x  5.0 %  21.0  0.900",
        "2x             25/50    10.0 s     2.00x  5.0 %  30.0  0.900",
        "the floor, stock with noise of 1e-4: 22.0 dB; at it or above: 2x",
    ]


def test_several_lines_have_mean_and_standard_deviation():
    table = [re.sub(" {2,}", "  ", line) for line in comparison_table(two_lines())]
    assert table == [
        "  computed  sampling  speed-up  drift  PSNR  SSIM",
        "stock  50/50  20.0 ± 0.0 s  1.00 ± 0.00x  inf  1.000 ± 0.000",
        "noise 1e-4  50/50  20.5 ± 0.5 s  1.00 ± 0.00x  23.0 ± 1.0  0.750 ± 0.050",
        "0.08  25/50  10.0 ± 0.0 s  2.25 ± 0.25x  5.0 ± 0.0 %  22.9 ± 1.9  0.900 ± 0.000",
        "2x  25/50  10.0 ± 0.0 s  2.00 ± 0.00x  5.0 ± 0.0 %  30.0 ± 0.0  0.900 ± 0.000",
        "the floor, stock with noise of 1e-4: 23.0 dB; at it or above: 2x",
    ]
    assert len({len(line) for line in comparison_table(two_lines())[:-1]}) == 1


def test_nothing_at_the_floor_is_said():
    stock, noise, below, _ = two_lines()[0]
    assert comparison_table([[stock, noise, below]])[-1].endswith("at it or above: none")


def test_a_row_that_one_line_lacks_is_the_mean_of_the_others():
    first, second = two_lines()
    table = comparison_table([first, second[:-1]])
    assert re.match(r"2x +25/50 +10\.0 s +2\.00x +5\.0 % +30\.0 +0\.900$", table[4])


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_without_scikit_image_the_column_is_left_out_with_the_command_that_installs_it(
    recorder, ckpt, capsys, tmp_path, monkeypatch, how
):
    for name in [name for name in sys.modules if name.split(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    if how == "missing":
        monkeypatch.setitem(sys.modules, "skimage", None)
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / "other/skimage.py").write_text("raise ValueError('built for another numpy')")
        monkeypatch.syspath_prepend(tmp_path / "other")
    argv = ["--ckpt_dir", ckpt, "--sample_steps", "3", "--frame_num", "1", *BALL]
    code, said = attempt(capsys, *argv, "--save_file", "a.mp4", "--teacache_compare", "1.2x")
    assert code == 0, said
    assert "SSIM\n" not in said
    table = said[said.index("computed  sampling") :].splitlines()
    assert "for the SSIM: pip install scikit-image" in table
    assert table[0].endswith("PSNR")
    assert re.search(r"x +inf$", table[1])


def test_psnr_of_written_out_frames():
    stock = np.zeros((2, 1, 1, 3), np.uint8)
    other = stock.copy()
    assert psnr(other, stock) == math.inf
    other[1, 0, 0, 0] = 6  # a mean square of 36 / 6
    assert psnr(other, stock) == pytest.approx(40.349, abs=1e-3)
    other[:] = 255
    assert psnr(other, stock) == pytest.approx(0)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["fast"], "fast: fast must be 0 or more"),
        (["x"], "x: must be 1 or more"),
        (["0.5x"], "0.5x: 0.5 must be 1 or more"),
        (["-0.1"], "-0.1: -0.1 must be 0 or more"),
        (["nan"], "nan: nan must be 0 or more"),
        (["infx"], "infx: inf must be 1 or more"),
        (["2X"], "2X: 2X must be 0 or more"),
        (["nobody:2x"], "nobody:2x: no row nobody; there are sigma, t2v-1.3B"),
        (["sigma:"], "sigma:: must be 0 or more"),
        (["2x", "0.1", "2x"], "2x 0.1 2x: twice the same"),
        (["0.1", "+0.1"], "0.1 +0.1: twice the same"),
        (["2x", "--teacache_order", "1", "1"], "2x: twice the same"),
        (["2x", "--teacache_order", "2"], "--teacache_order: invalid choice: 2"),
        ([], "--teacache_compare: expected at least one argument"),
        (["1.5x", "9x"], "--teacache_compare 9x: --teacache_speedup 9: no threshold reaches it"),
        (
            ["t2v-14B:2x"],
            "--teacache_compare t2v-14B:2x: --teacache_speedup 2: with row t2v-14B (as asked) the ",
        ),
    ],
)
def test_entries_that_are_no_good_are_refused_in_a_line(recorder, ckpt, capsys, entries, expected):
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    code, said = attempt(capsys, *argv, "--teacache_compare", *entries)
    assert code == 2
    assert said.count("\n") == 1
    assert expected in said
    assert recorder.decoded == []


# ---------------------------------------------------------------------- several lines, failures


def test_lines_of_a_file_are_each_compared_and_the_table_is_of_all(recorder, ckpt, capsys, caplog):
    Path("jobs.txt").write_text(
        '--prompt "a red ball" --base_seed 1 --save_file a.stock.b.mp4\n'
        '--prompt "a blue ball" --base_seed 2 --save_file b.mp4 --sample_steps 12\n'
    )
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", "--teacache_compare", "2x"]
    code, said = attempt(capsys, *argv)
    assert code == 0, said
    assert "TeaCache: 6 videos, of which 4 stock" in caplog.text
    assert caplog.text.count("Creating WanModel") == 1
    first, second = (
        json.loads(Path(f"{name}.compare.json").read_text()) for name in ("a.stock.b", "b")
    )
    assert [row["steps"] for row in first + second] == [10] * 3 + [12] * 3
    a, b = first[2]["psnr"], second[2]["psnr"]
    table = said[re.search("computed +sampling", said).start() :].splitlines()
    assert f"{(a + b) / 2:.1f} ± {abs(a - b) / 2:.1f}" in table[3]
    error = ((recorder.bytes(5).astype(float) - recorder.bytes(3)) ** 2).mean()
    assert b == pytest.approx(10 * np.log10(255**2 / error))  # each against its own stock
    for name in (
        "a.stock.b.2x",
        "a.stock.b.stock",
        "b.noise-1e-4",
        "b.compare",
        "a.stock.b.compare",
    ):
        assert len(frames(Path(f"{name}.mp4"))) == 5, name


def test_an_entry_that_fails_is_left_out_and_the_rest_is_compared(recorder, ckpt, capsys, caplog):
    recorder.fails = 2
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    code, said = attempt(capsys, *argv, "--teacache_compare", "2x", "1.25x")
    assert code == 1
    told = json.loads(Path("a.compare.json").read_text())
    assert [row["label"] for row in told] == ["stock", "noise 1e-4", "1.25x"]
    assert Path("a.2x.latents.pt").is_file()
    assert "the floor, stock with noise of 1e-4" in said
    assert "not made: a.2x.mp4: failed: RuntimeError('a decoder')" in caplog.text
    assert "nothing is gained" not in caplog.text  # as if that of stock had been the aim


def test_a_failure_is_in_the_exit_status_where_nobody_reads_the_table(
    recorder, ckpt, capsys, monkeypatch
):
    """As with ``| head``: printing to it raises."""

    def closed(*args):
        raise BrokenPipeError

    recorder.fails = 2
    monkeypatch.setattr(teacache_generate, "print", closed, raising=False)
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    assert attempt(capsys, *argv, "--teacache_compare", "2x")[0] == 1


def test_an_entry_that_is_not_written_is_not_compared(recorder, ckpt, capsys, monkeypatch):
    """Though its frames are known."""
    checked = teacache_generate.checked

    def full(write, *args, **kwargs):
        if "2x" in str(kwargs["save_file"]):
            raise OSError("the disk is full")
        return checked(write, *args, **kwargs)

    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    monkeypatch.setattr(teacache_generate, "checked", full)
    code, _ = attempt(capsys, *argv, "--teacache_compare", "2x", "1.25x")
    assert code == 1
    told = json.loads(Path("a.compare.json").read_text())
    assert [entry["label"] for entry in told] == ["stock", "noise 1e-4", "1.25x"]


def test_without_stock_there_is_no_comparison_and_it_is_said(recorder, ckpt, capsys, caplog):
    recorder.fails = 0
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    code, said = attempt(capsys, *argv, "--teacache_compare", "2x")
    assert code == 1
    assert "the floor" not in said
    assert "not made: a.stock.mp4" in caplog.text
    assert not Path("a.compare.json").exists()
    assert len(recorder.decoded) == 1  # nothing is made that there is nothing to compare with


def test_what_is_not_made_without_stock_is_not_counted(recorder, ckpt, capsys, caplog):
    recorder.fails = 0
    Path("jobs.txt").write_text("--prompt one --save_file a.mp4\n--prompt two --save_file b.mp4\n")
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", "--teacache_compare", "2x"]
    assert attempt(capsys, *argv)[0] == 1
    numbers = re.findall(r"video (\d of \d)", caplog.text)
    assert numbers == ["1 of 6", "2 of 4", "3 of 4", "4 of 4"]


def test_without_noise_there_is_no_floor_and_it_is_said(recorder, ckpt, capsys):
    recorder.fails = 1
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, "--save_file", "a.mp4"]
    code, said = attempt(capsys, *argv, "--teacache_compare", "2x")
    assert code == 1
    assert "no floor: stock with noise of 1e-4 has failed" in said
    assert "nan" not in said


def test_an_entry_is_held_against_the_floor_of_its_own_lines():
    """It is below that of the second line, the only one that it was made on."""
    stock = row("stock", math.inf, 1.0, None)
    first = [stock, row("noise 1e-4", 30.0)]
    second = [stock, row("noise 1e-4", 50.0), row("2x", 45.0)]
    assert comparison_table([first, second])[-1] == (
        "the floor, stock with noise of 1e-4: 40.0 dB; at it or above: none"
    )
    assert comparison_table([first, [*first, row("2x", 30.0)]])[-1].endswith("above: 2x")
    same = [stock, row("noise 1e-4", math.inf), row("2x", math.inf)]
    assert comparison_table([same])[-1].endswith("inf dB; at it or above: 2x")


def test_without_floor_and_ssim_both_are_said():
    stock = row("stock", math.inf, None, None, computed=50, seconds=20.0, speedup=1.0)
    table = comparison_table([[stock, row("2x", 30.0, None)]])
    assert table[-2:] == [
        "no floor: stock with noise of 1e-4 has failed",
        "for the SSIM: pip install scikit-image",
    ]


def test_a_comparison_that_cannot_be_written_is_said_and_the_next_line_runs(
    recorder, ckpt, capsys, caplog, monkeypatch
):
    write, calls = teacache_generate.write_comparison, []

    def full_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(teacache_generate, "write_comparison", full_at_first)
    lines = [f'--prompt "a ball" --base_seed {i} --save_file {i}.mp4' for i in (1, 2)]
    Path("jobs.txt").write_text("\n".join(lines))
    argv = ["--ckpt_dir", ckpt, *FEW, "--teacache_jobs", "jobs.txt", "--teacache_compare", "2x"]
    code, said = attempt(capsys, *argv)
    assert code == 1
    assert "No space left on device" in caplog.text
    assert not Path("1.compare.json").exists()
    assert Path("2.compare.json").is_file()
    assert "the floor" in said


@pytest.mark.parametrize("flag", ["--teacache_thresh", "--teacache_speedup"])
def test_a_threshold_beside_the_entries_is_refused_and_not_ignored(recorder, ckpt, capsys, flag):
    argv = ["--ckpt_dir", ckpt, *FEW, *BALL, flag, "1.5", "--teacache_compare", "2x"]
    code, said = attempt(capsys, *argv)
    assert code == 2
    assert f"{flag} 1.5: is an entry of --teacache_compare" in said


# ------------------------------------------------------------------------------ other tasks


def test_image_to_video_is_compared(recorder, i2v_ckpt, picture, capsys):
    argv = ["--task", "i2v-nano", "--ckpt_dir", i2v_ckpt, "--image", picture, *FEW, *BALL]
    code, said = attempt(capsys, *argv, "--save_file", "a.mp4", "--teacache_compare", "sigma:2x")
    assert code == 0, said
    told = json.loads(Path("a.compare.json").read_text())
    error = ((recorder.bytes(2).astype(float) - recorder.bytes(0)) ** 2).mean()
    assert told[2]["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    assert len(frames(Path("a.compare.mp4"))) == 5


def test_of_one_frame_there_is_a_picture_and_no_video(tmp_path):
    rows = [row("stock", math.inf), row("noise 1e-4", 60.0), row("2x", 40.0)]
    pictures = [np.full((1, 1280, 720, 3), 80 * i, np.uint8) for i in range(3)]
    write_comparison(rows, [shrunk(p) for p in pictures], tmp_path / "cat.png", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("cat.compare.json", "cat.compare.png")
    ]
    picture = np.asarray(Image.open(tmp_path / "cat.compare.png"))
    assert picture.shape == (3 * (28 + 854), 480, 3)
    assert [picture[882 * i + 400, 100, 0] for i in range(3)] == [0, 80, 160]


# ------------------------------------------------------------------------------ labels


def ink(label: np.ndarray) -> tuple[int, int]:
    """The first and the last column with a dark pixel."""
    columns = np.flatnonzero((label < 128).any(axis=(0, 2)))
    return columns[0], columns[-1]


@pytest.mark.parametrize("width", [256, 480])
@pytest.mark.parametrize("text", ["stock", "sigma:2x order 0", "i2v-14B-480P:0.125 order 1"])
def test_a_label_is_never_cut_off(text, width):
    first, last = ink(heading([text, "12345.6 s    12.34x", "38.2 dB"], width))
    assert 6 <= first <= 12
    assert last <= width - 6


def test_a_label_is_as_large_as_the_width_lets_it():
    short, wide = (ink(heading([text], 256)) for text in ("stock", "i2v-14B-480P:0.125 order 1"))
    assert 45 <= short[1] - short[0] <= 60  # at 20 pixels
    assert wide[1] >= 256 - 20


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 832, (276, 480)), (720, 1280, (270, 480)), (832, 480, (832, 480)), (64, 64, (256, 256))],
)
def test_frames_are_shown_at_about_480_pixels(height, width, expected):
    assert shrunk(np.zeros((2, height, width, 3), np.uint8)).shape == (2, *expected, 3)


def test_the_label_of_a_strip_says_seconds_speedup_and_psnr(monkeypatch):
    said = []
    monkeypatch.setattr(
        "teacache_generate.heading",
        lambda texts, width: (said.append(texts), np.zeros((28, width, 3), np.uint8))[1],
    )
    rows = [row("stock", math.inf), row("2x", 31.5)]
    strip(rows, [np.zeros((2, 64, 64, 3), np.uint8)] * 2, [0, 1])
    assert said == [["stock    10.0 s    2.00x"], ["2x    10.0 s    2.00x    31.5 dB"]]


# ------------------------------------------------------------------------------ two processes

RECORDING = """
import os, sys
sys.path[:0] = [{folder!r}, {nano!r}]
import torch
from wan.modules.model import WanModel
from teacache_generate import main
given, seen, predict = [], [], WanModel.predict
def recorded(model, x, *args, **kwargs):
    seen.append(x[0].clone())
    return predict(model, x, *args, **kwargs)
def before_all_hooks(module, args):
    if type(module) is WanModel or type(module).__name__.startswith("Fully"):
        if isinstance(args[0], list) and (not given or args[0][0] is not given[-1]):
            given.append(args[0][0])
WanModel.predict = recorded
torch.nn.modules.module.register_module_forward_pre_hook(before_all_hooks)
main(sys.argv[1:])
torch.save(seen, "seen." + os.environ["RANK"])
"""


@pytest.mark.parametrize("flags", [["--ulysses_size", "2"], ["--dit_fsdp"]], ids=" ".join)
def test_two_processes_compare_with_one_load_and_one_noise(recorder, ckpt, tmp_path, flags):
    program = tmp_path / "program.py"
    program.write_text(RECORDING.format(folder=str(SCRIPT.parent), nano=str(NANO)))
    (tmp_path / "xfuser/core").mkdir(parents=True)  # which the stand-in does without
    (tmp_path / "xfuser/core/distributed.py").write_text(
        "init_distributed_environment = initialize_model_parallel = None"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program]
    few = ["--frame_num", "5", "--sample_steps", "5", *SIGMA]
    argv = ["--wan_repo", NANO, "--ckpt_dir", ckpt, *few, *BALL, "--save_file", "a.mp4"]
    done = python(*torchrun, *argv, "--teacache_compare", "1.5x", *flags, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Creating WanModel") == 1  # rank 0's; the others say nothing
    assert done.stdout.count("the floor, stock with noise of 1e-4") == 1
    seen = [torch.load(f"seen.{rank}") for rank in (0, 1)]
    for mine, other in zip(*seen, strict=True):
        assert torch.equal(mine, other)
    noise = seen[0][10] - seen[0][0]  # at the first step all begin with the same latents
    assert noise.std() == pytest.approx(1e-4, rel=0.05)
    assert torch.equal(seen[0][11] - seen[0][1], noise)
    assert torch.equal(seen[0][20], seen[0][0])
    told = json.loads(Path("a.compare.json").read_text())
    assert [row["label"] for row in told] == ["stock", "noise 1e-4", "1.5x"]
    assert 10 < told[2]["psnr"] < told[1]["psnr"]
    with imageio.get_reader("a.compare.mp4") as reader:
        assert sum(1 for _ in reader) == 5
