"""Files that exist but are no good are found before anything is loaded. On the stand-in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from nano import PROMPT, RULE, attempt
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_in import RunsCode

WEIGHTS, BIN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
VAE, T5, WORDS = "Wan2.1_VAE_nano.pth", "models_t5_words-nano.pth", "google/words-nano"
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5683\n"
PAGE = "<!DOCTYPE html><title>404</title>"


@pytest.fixture
def copy(ckpt, tmp_path) -> Path:
    return Path(shutil.copytree(ckpt, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def in_a_folder(no_loading, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------- damaged files


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def cut_by_a_byte(name):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return change


def emptied(name):
    def change(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        (folder / name / ".gitkeep").touch()

    return change


def dead_link(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/none/blobs/4d7a")

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def sharded(folder, *changes):
    """The transformer in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        names |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    for change in changes:
        change(folder)


LFS = "is a git-lfs pointer, which git lfs pull replaces: download this file again"
DAMAGED = {
    "pointer, transformer": (write(WEIGHTS, POINTER), f": {WEIGHTS}: {LFS}"),
    "pointer, shard": (lambda f: sharded(f, write(SHARD, POINTER)), f": {SHARD}: {LFS}"),
    "pointer, tokenizer": (write(f"{WORDS}/spiece.model", POINTER), f": spiece.model: {LFS}"),
    "empty, transformer": (write(WEIGHTS, ""), f": {WEIGHTS}: is empty: download this file again"),
    "cut, transformer": (cut_by_a_byte(WEIGHTS), f": {WEIGHTS}: "),
    "cut, vae": (cut_by_a_byte(VAE), f": {VAE}: is cut short: download this"),
    "web page, vae": (write(VAE, PAGE), f": {VAE}: holds no weights: download this file again"),
    "empty folder": (emptied(WORDS), ": words-nano is an empty folder: download it again"),
    "dead link": (dead_link(VAE), f": {VAE} is missing, and --task t2v-nano needs it: give that"),
    "no config": (without("config.json"), ": config.json is missing"),  # Diffusers, A14B, 5B
    "no transformer": (without(WEIGHTS), f": {WEIGHTS} is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / WORDS), ": words-nano is missing"),
    "config no JSON": (write("config.json", "{"), "config.json: cannot be read: "),
    "index no JSON": (write(f"{WEIGHTS}.index.json", "{"), "index.json: cannot be read: "),
    "another size": (
        write("config.json", '{"dim": 1536}'),
        "dim 1536, but --task t2v-nano has 128 (1536 is 1.3B",
    ),
    "another kind": (
        write("config.json", '{"model_type": "i2v", "dim": 128}'),
        "a i2v transformer, not one of --task t2v-nano",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_by_name_with_its_cure(refusal, copy, name):
    change, expected = DAMAGED[name]
    change(copy)
    line = refusal("--ckpt_dir", copy)
    assert line.startswith(f"--ckpt_dir {copy}")
    assert expected in line


# ----------------------------------------------------------------------------- good checkpoints


def as_bin(legacy):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=not legacy)
        (folder / WEIGHTS).unlink()

    return change


def old_pickle(folder):
    torch.save(torch.load(folder / VAE), folder / VAE, _use_new_zipfile_serialization=False)


def links(folder):
    """As a hub's cache has it: each file a link to a blob."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for i, file in enumerate([f for f in folder.rglob("*") if f.is_file()]):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))


def other_files(folder):
    """What lies about in downloaded folders."""
    for file in (f"{WORDS}/.gitkeep", "README.md", "examples.safetensors"):
        (folder / file).touch()
    for name in (f"{WORDS}/folder", ".cache"):
        (folder / name).mkdir()


@pytest.mark.parametrize(
    "change",
    [as_bin(False), as_bin(True), sharded, old_pickle, links, other_files],
    ids=["bin", "old bin", "sharded", "old pickle", "links", "other files"],
)
def test_good_checkpoint_is_accepted_and_planned(capsys, ckpt, copy, change):
    change(copy)
    assert attempt(capsys, "--ckpt_dir", copy, *RULE, *PROMPT)[0] == 1
    code, said = attempt(capsys, "--ckpt_dir", copy, *RULE, "--teacache_plan")
    assert (code, said) == attempt(capsys, "--ckpt_dir", ckpt, *RULE, "--teacache_plan")
    assert code == 0


def test_plan_needs_the_transformer_only(capsys, copy):
    write(VAE, POINTER)(copy)
    shutil.rmtree(copy / "google")
    assert attempt(capsys, "--ckpt_dir", copy, *RULE, "--teacache_plan")[0] == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_runs_code_is_not_run(refusal, copy, tmp_path, legacy):
    tensors = dict.fromkeys(load_file(copy / WEIGHTS), RunsCode(tmp_path / "was_run"))
    torch.save(tensors, copy / BIN, _use_new_zipfile_serialization=not legacy)
    (copy / WEIGHTS).unlink()
    line = refusal("--ckpt_dir", copy, *RULE)
    assert f"--ckpt_dir {copy}: its time embedding cannot be read" in line
    assert not (tmp_path / "was_run").exists()


# --------------------------------------------------------------------------- inputs and targets


def test_image_that_cannot_be_read_is_refused(refusal, tasks, i2v_ckpt, tmp_path):
    picture = tmp_path / "half.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    picture.write_bytes(picture.read_bytes()[:-40])
    (tmp_path / "page.png").write_bytes(PAGE.encode())
    for image in ("none.png", __file__, picture, tmp_path / "page.png", tmp_path):
        flags = ["--task", "i2v-14B", "--size", "832*480", "--ckpt_dir", i2v_ckpt]
        line = refusal(*flags, "--image", image)
        assert f"--image {image}: cannot be read" in line


def test_inputs_that_the_task_ignores_are_not_checked(capsys, ckpt):
    argv = ["--ckpt_dir", ckpt, *PROMPT, "--image", "/none.png", "--src_video", "/none.mp4"]
    assert attempt(capsys, *argv)[0] == 1


def test_empty_name_of_a_file_is_refused(refusal):
    ours = "teacache_jobs teacache_decode teacache_rule wan_repo"
    for flag in f"save_file ckpt_dir image {ours}".split():
        line = refusal(f"--{flag}", "")
        assert f'--{flag} "": is empty, as from an unset shell variable: give a file or' in line


@pytest.mark.parametrize("link", [False, True])
def test_existing_target_that_cannot_be_written_is_refused(refusal, tmp_path, link):
    """A folder, or a link into a folder that does not exist."""
    target = tmp_path / "x.mp4"
    target.symlink_to("/none/folder/x.mp4") if link else target.mkdir()
    line = refusal("--save_file", target)
    assert f"--save_file {target}: cannot be written: " in line
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]
