"""The miniature's world, its training cut to a few steps, and the checkpoint that is shipped."""

import importlib

import pytest
import torch
from nano import SCRIPT, attempt, frames
from torch import nn

ASSETS = SCRIPT.parent / "assets" / "wan_nano"


@pytest.fixture
def clips(wan):
    return importlib.import_module("clips")


@pytest.fixture
def train(wan):
    return importlib.import_module("train")


def test_what_is_drawn_is_what_the_arithmetic_sees(clips):
    generator = torch.Generator().manual_seed(0)
    for scene in clips.pick(60, generator):
        assert clips.seen(clips.draw(scene, generator)) == (scene.colour, scene.motion), scene


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("moves right", "moves left"), ("moves down", "moves up"), ("grows", "shrinks")],
)
def test_a_clip_played_backwards_is_seen_to_go_the_other_way(clips, motion, backwards):
    clip = clips.draw(clips.Scene("red", "square", motion), torch.Generator().manual_seed(1))
    assert clips.seen(clip) == ("red", motion)
    assert clips.seen(clip.flip(1)) == ("red", backwards)


def test_nothing_is_seen_where_nothing_is(clips):
    assert clips.seen(torch.full((3, 17, 64, 64), -1.0)) == ("nothing", "stays")


def test_a_still_shape_is_seen_to_stay(clips):
    clip = clips.draw(clips.Scene("blue", "ball", "grows"), torch.Generator().manual_seed(1))
    assert clips.seen(clip[:, -1:].expand(3, 17, 64, 64)) == ("blue", "stays")


def test_a_prompt_is_for_training_or_for_the_check_never_for_both(clips):
    generator = torch.Generator().manual_seed(0)
    trained, unseen = (
        {scene.prompt for scene in clips.pick(2000, generator, unseen)} for unseen in (False, True)
    )
    assert len(trained) > 500 and len(unseen) > 50 and not trained & unseen


def test_training_that_was_stopped_goes_on_where_it_was(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)

    def trained(stops_at: int) -> torch.Tensor:
        calls = []

        def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
            calls.append(1)
            if len(calls) == stops_at:
                raise KeyboardInterrupt
            return model(torch.randn(4, 3, generator=generator)).square().mean()

        torch.manual_seed(0)
        return train.minimise("x", nn.Linear(3, 1), loss, 8, 0.1, tmp_path / "state").weight

    straight = trained(stops_at=0)
    with pytest.raises(KeyboardInterrupt):
        trained(stops_at=6)  # after five steps, four of which are saved
    assert (tmp_path / "state").is_file()
    torch.testing.assert_close(trained(stops_at=0), straight)
    assert not (tmp_path / "state").exists()


def test_training_cut_to_a_few_steps_leaves_a_checkpoint_that_generates(
    train, tmp_path, monkeypatch, capsys
):
    for name, few in {"VAE_BATCH": 1, "MEASURED": 4, "CHECK_STEPS": 2}.items():
        monkeypatch.setattr(train, name, few)
    short = ["--vae_steps", "1", "--clips", "16", "--steps", "3", "--check", "2"]
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "ckpt"), *short])
    train.main()
    said = capsys.readouterr().out
    assert '"shown": 0.0' in said and '"chance"' in said
    assert not list((tmp_path / "ckpt").glob("training*"))
    command = ["--ckpt_dir", tmp_path / "ckpt", "--teacache_thresh", 0, "--sample_steps", 2]
    command += ["--prompt", "a red ball moves right", "--save_file", tmp_path / "x.mp4"]
    code, said = attempt(capsys, *command, "--teacache_model", "t2v-1.3B")
    assert code == 0, said
    assert frames(tmp_path / "x.mp4").shape == (17, 64, 64, 3)


def test_the_shipped_checkpoint_is_small_and_whole():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {"README.md", "config.json", "teacache.json"} <= {file.name for file in files}


def test_the_shipped_checkpoint_shows_what_prompts_say_that_it_was_not_trained_on(train):
    """With 100 videos: see assets/wan_nano/README.md."""
    found = train.check(ASSETS, count=8, steps=50)
    assert found["shown"] >= 0.75
    assert found["vae_psnr_db"] >= 30
