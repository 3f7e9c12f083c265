"""The miniature's clips, its training cut to a few steps, and the shipped checkpoint."""

import clips
import pytest
import torch
import train
from nano import SCRIPT, attempt, frames
from torch import nn

ASSETS = SCRIPT.parent / "assets" / "wan_nano"


def test_a_drawn_scene_is_recognised():
    generator = torch.Generator().manual_seed(0)
    for scene in clips.pick(24, generator):
        clip = clips.draw(scene, generator)
        assert clips.seen(clip) == (scene.colour, scene.motion), scene
        shape, overlap = clips.kind(clip)
        assert (shape, overlap > 0.85) == (scene.shape, True), scene


def test_half_a_shape_overlaps_by_less():
    clip = clips.draw(clips.Scene("red", "ball", "turns"), torch.Generator().manual_seed(1))
    clip[..., : clips.SIZE // 2, :] = -1
    assert clips.kind(clip)[1] < 0.8


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("moves right", "moves left"), ("moves down", "moves up"), ("grows", "shrinks")],
)
def test_a_clip_played_backwards_shows_the_other_motion(motion, backwards):
    clip = clips.draw(clips.Scene("red", "square", motion), torch.Generator().manual_seed(1))
    assert clips.seen(clip) == ("red", motion)
    assert clips.seen(clip.flip(1)) == ("red", backwards)


def test_black_and_still_clips_show_no_motion():
    black = torch.full((3, 17, 64, 64), -1.0)
    assert (clips.seen(black), clips.kind(black)) == (("nothing", "stays"), ("nothing", 0.0))
    clip = clips.draw(clips.Scene("blue", "ball", "grows"), torch.Generator().manual_seed(1))
    assert clips.seen(clip[:, -1:].expand(3, 17, 64, 64)) == ("blue", "stays")


def test_training_and_check_share_no_prompt():
    generator = torch.Generator().manual_seed(0)
    trained, unseen = (
        {scene.prompt for scene in clips.pick(2000, generator, unseen)} for unseen in (False, True)
    )
    assert len(trained) > 500 and len(unseen) > 50 and not trained & unseen


def test_every_clip_is_drawn_as_often_as_picked():
    weights, scenes, _ = zip(*clips.every_clip(), strict=True)
    picked = {scene for scene in clips.pick(20000, torch.Generator().manual_seed(0))}
    assert picked == set(scenes)
    named = sum(w for w, scene in zip(weights, scenes, strict=True) if scene.ground)
    assert named == pytest.approx(sum(weights) / 2)


def test_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    calls = []

    def loss(model, generator):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return model(torch.randn(2, 1, 3, 4, 4, generator=generator)).square().mean()

    def train_in(name):
        torch.manual_seed(0)
        (tmp_path / name).mkdir(exist_ok=True)
        return train.minimise(tmp_path / name / "x.state.pt", nn.Conv3d(1, 2, 2), loss, 4, 0.1)

    straight = train_in("a")
    with pytest.raises(KeyboardInterrupt):
        train_in("b")
    continued = train_in("b")
    assert len(calls) == 4 + 2 + 3
    for a, b in zip(straight.parameters(), continued.parameters(), strict=True):
        assert torch.equal(a, b)


def test_short_training_leaves_a_checkpoint_that_generates(tmp_path, monkeypatch, capsys):
    for name, few in {"VAE_BATCH": 1, "MEASURED": 4, "CHECK_STEPS": 2}.items():
        monkeypatch.setattr(train, name, few)
    short = {"vae_steps": 1, "vae_whole_steps": 1, "clips": 16, "steps": 3, "check": 2}
    flags = [f"--{name}={value}" for name, value in short.items()]
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "ckpt"), *flags])
    train.main()
    output = capsys.readouterr().out
    assert '"shown": 0.0' in output and '"chance"' in output
    command = ["--ckpt_dir", tmp_path / "ckpt", "--teacache_thresh", 0, "--sample_steps", 2]
    command += ["--prompt", "a red ball moves right", "--save_file", tmp_path / "x.mp4"]
    code, output = attempt(capsys, *command)
    assert code == 0, output
    assert frames(tmp_path / "x.mp4").shape == (17, 64, 64, 3)


def test_the_shipped_checkpoint_is_small_and_complete():
    files = [file for file in ASSETS.rglob("*") if file.is_file() and ".state." not in file.name]
    assert sum(file.stat().st_size for file in files) < 16e6
    assert {"README.md", "config.json", "teacache.json"} <= {file.name for file in files}


def test_the_shipped_checkpoint_follows_unseen_prompts():
    """With 100 videos: see assets/wan_nano/README.md."""
    found = train.check(ASSETS, count=8, steps=50)
    assert found["shown"] >= 0.75
    assert found["overlap"] >= 0.75
    assert found["vae_psnr_db"] >= 32
