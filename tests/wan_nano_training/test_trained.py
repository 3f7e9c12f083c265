"""The miniature's clips, its training cut to a few steps, and the shipped checkpoint."""

import clips
import pytest
import torch
import train
from nano import SCRIPT, attempt, frames

ASSETS = SCRIPT.parent / "assets" / "wan_nano"


def test_a_drawn_scene_is_recognised():
    generator = torch.Generator().manual_seed(0)
    for scene in clips.pick(60, generator):
        assert clips.seen(clips.draw(scene, generator)) == (scene.colour, scene.motion), scene


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("moves right", "moves left"), ("moves down", "moves up"), ("grows", "shrinks")],
)
def test_a_clip_played_backwards_shows_the_other_motion(motion, backwards):
    clip = clips.draw(clips.Scene("red", "square", motion), torch.Generator().manual_seed(1))
    assert clips.seen(clip) == ("red", motion)
    assert clips.seen(clip.flip(1)) == ("red", backwards)


def test_black_and_still_clips_show_no_motion():
    assert clips.seen(torch.full((3, 17, 64, 64), -1.0)) == ("nothing", "stays")
    clip = clips.draw(clips.Scene("blue", "ball", "grows"), torch.Generator().manual_seed(1))
    assert clips.seen(clip[:, -1:].expand(3, 17, 64, 64)) == ("blue", "stays")


def test_training_and_check_share_no_prompt():
    generator = torch.Generator().manual_seed(0)
    trained, unseen = (
        {scene.prompt for scene in clips.pick(2000, generator, unseen)} for unseen in (False, True)
    )
    assert len(trained) > 500 and len(unseen) > 50 and not trained & unseen


def test_short_training_leaves_a_checkpoint_that_generates(tmp_path, monkeypatch, capsys):
    for name, few in {"VAE_BATCH": 1, "MEASURED": 4, "CHECK_STEPS": 2}.items():
        monkeypatch.setattr(train, name, few)
    short = ["--vae_steps", "1", "--clips", "16", "--steps", "3", "--check", "2"]
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "ckpt"), *short])
    train.main()
    output = capsys.readouterr().out
    assert '"shown": 0.0' in output and '"chance"' in output
    command = ["--ckpt_dir", tmp_path / "ckpt", "--teacache_thresh", 0, "--sample_steps", 2]
    command += ["--prompt", "a red ball moves right", "--save_file", tmp_path / "x.mp4"]
    code, output = attempt(capsys, *command)
    assert code == 0, output
    assert frames(tmp_path / "x.mp4").shape == (17, 64, 64, 3)


def test_the_shipped_checkpoint_is_small_and_complete():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {"README.md", "config.json", "teacache.json"} <= {file.name for file in files}


def test_the_shipped_checkpoint_follows_unseen_prompts():
    """With 100 videos: see assets/wan_nano/README.md."""
    found = train.check(ASSETS, count=8, steps=50)
    assert found["shown"] >= 0.75
    assert found["vae_psnr_db"] >= 30
