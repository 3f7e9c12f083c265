"""Files that are there but no good: found before anything is loaded. On the stand-in."""

import json
import os
import shutil
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from nano import PROMPT, ROW, attempt
from safetensors.torch import load_file, save_file

import teacache_generate

WEIGHTS = "diffusion_pytorch_model.safetensors"
BIN = "diffusion_pytorch_model.bin"
VAE, T5 = "Wan2.1_VAE_nano.pth", "models_t5_words-nano.pth"
WORDS = "google/words-nano"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5683\n"


@pytest.fixture
def copy(ckpt, tmp_path) -> Path:
    return Path(shutil.copytree(ckpt, tmp_path / "copy"))


@pytest.fixture
def copy_of_i2v(i2v_ckpt, tmp_path) -> Path:
    return Path(shutil.copytree(i2v_ckpt, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def nothing_is_loaded(wan, monkeypatch):
    """A pipeline that would be made is an error of another kind."""

    def made(self, *args, **kwargs):
        raise KeyError("the pipeline was made")

    for kind in (wan[1].WanT2V, wan[1].WanI2V):
        monkeypatch.setattr(kind, "__init__", made)


def refusal(capsys, folder, *argv) -> str:
    """The one line that refuses a run with this checkpoint."""
    code, said = attempt(capsys, "--ckpt_dir", folder, *ROW, *PROMPT, *argv)
    lines = said.splitlines()
    assert code == 2, said
    assert len(lines) == 1
    assert lines[0].startswith("teacache_generate.py: error: --ckpt_dir ")
    return lines[0]


def passes(capsys, monkeypatch, folder, *argv) -> None:
    """The checks find nothing: it goes on to the pipeline."""
    monkeypatch.chdir(folder.parent)
    code, _ = attempt(capsys, "--ckpt_dir", folder, *ROW, *PROMPT, *argv)
    assert code == 1


def write(name, content):
    def change(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return change


def cut(name, share):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def shorter(name, by):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def longer(name):
    def change(folder):
        with (folder / name).open("ab") as file:
            file.write(b"\0")

    return change


def empty_folder(name):
    def change(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return change


def only_hidden(folder):
    empty_folder(WORDS)(folder)
    (folder / WORDS / ".gitkeep").touch()


def dead_link(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("/none/blobs/4d7a")

    return change


def sharded(folder, missing=False):
    """The transformer in two files with an index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {}
    for i, part in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        names |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return file


def with_shard(change):
    return lambda folder: change(sharded(folder))(folder)


def without(name):
    return lambda folder: (folder / name).unlink()


LFS = "is a git-lfs pointer, not the file: run git lfs pull in its folder"
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"
SHORT = "is cut short: download this file again"
PAGE = "<!DOCTYPE html><title>404</title>"

NO_GOOD = {
    "pointer, transformer": (write(WEIGHTS, POINTER), f": {WEIGHTS} {LFS}"),
    "pointer, vae": (write(VAE, POINTER), f": {VAE} {LFS}"),
    "pointer, text encoder": (write(T5, POINTER), f": {T5} {LFS}"),
    "pointer, shard": (with_shard(lambda name: write(name, POINTER)), f": {SHARD} {LFS}"),
    "pointer, tokenizer": (write(f"{WORDS}/vocab.txt", POINTER), f": vocab.txt {LFS}"),
    "pointer, another of its files": (write(f"{WORDS}/spiece.model", POINTER), f"model {LFS}"),
    "empty, transformer": (write(WEIGHTS, ""), f": {WEIGHTS} is empty: download this file again"),
    "empty, vae": (write(VAE, ""), f": {VAE} is empty: download this file again"),
    "empty, config": (write("config.json", ""), ": config.json is empty: download this"),
    "empty, shard": (with_shard(lambda name: write(name, "")), f": {SHARD} is empty"),
    "empty, of a tokenizer": (write(f"{WORDS}/vocab.txt", ""), ": vocab.txt is empty"),
    "cut, transformer": (cut(WEIGHTS, 0.5), "bytes of 8,321,"),
    "cut, one byte": (shorter(WEIGHTS, 1), "bytes of 8,321,"),
    "cut, header": (cut(WEIGHTS, 0.0001), f": {WEIGHTS} {SHORT}"),
    "cut, 5 bytes": (write(WEIGHTS, b"\x10\0\0\0\0"), f": {WEIGHTS}"),
    "cut, shard": (with_shard(lambda name: cut(name, 0.9)), f": {SHARD} has "),
    "too long": (longer(WEIGHTS), f": {WEIGHTS} has "),
    "cut, zip": (cut(VAE, 0.5), f": {VAE} {SHORT}"),
    "cut, zip by one byte": (shorter(VAE, 1), f": {VAE} {SHORT}"),
    "cut, zip at its beginning": (cut(T5, 0.01), f": {T5} {SHORT}"),
    "zeros, safetensors": (write(WEIGHTS, bytes(5000)), f": {WEIGHTS}"),
    "zeros, pth": (write(VAE, bytes(5000)), f": {VAE} holds no weights"),
    "a web page, safetensors": (write(WEIGHTS, PAGE), f": {WEIGHTS} is cut short"),
    "a web page, pth": (write(VAE, PAGE), f": {VAE} holds no weights"),
    "no files of a tokenizer": (empty_folder(WORDS), ": words-nano is an empty folder: download"),
    "hidden ones only": (only_hidden, ": words-nano is an empty folder: download it again"),
    "dead link, weights": (dead_link(VAE), f": {VAE} is missing"),
    "dead link, tokenizer": (dead_link(f"{WORDS}/vocab.txt"), ": vocab.txt"),
    "no config": (without("config.json"), ": config.json is missing"),
    "no transformer": (without(WEIGHTS), f": {WEIGHTS} is missing"),
    "no vae": (without(VAE), f": {VAE} is missing"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / WORDS), ": words-nano is missing"),
    "no shard": (with_shard(without), f": {SHARD} is missing"),
    "config no JSON": (write("config.json", "{"), "config.json: cannot be read: "),
    "config no object": (write("config.json", "[]"), "its transformer has dim None, that of"),
    "index no JSON": (write(f"{WEIGHTS}.index.json", "{"), "index.json: cannot be read: "),
    "index empty": (write(f"{WEIGHTS}.index.json", ""), "index.json: cannot be read: "),
    "index, pointer": (write(f"{WEIGHTS}.index.json", POINTER), "index.json: cannot be read: "),
    "another size": (write("config.json", '{"dim": 1536}'), "has dim 1536, that of --task t2v-n"),
    "another kind": (
        write("config.json", '{"model_type": "i2v"}'),
        "a i2v transformer, not one of --task t2v-nano",
    ),
}


@pytest.mark.parametrize("name", NO_GOOD)
def test_a_file_that_is_no_good_is_refused_and_named_with_its_cure(capsys, copy, name):
    change, expected = NO_GOOD[name]
    change(copy)
    assert expected in refusal(capsys, copy)


def test_a_file_that_is_no_good_is_no_matter_where_it_is_not_needed(capsys, copy):
    """A plan needs the transformer's weights only."""
    write(VAE, POINTER)(copy)
    shutil.rmtree(copy / "google")
    code, said = attempt(capsys, "--ckpt_dir", copy, *ROW, "--teacache_plan")
    assert (code, "TeaCache plan" in said) == (0, True)


def test_the_parts_that_only_the_task_needs_are_checked(capsys, ckpt, copy_of_i2v, picture):
    argv = ["--task", "i2v-nano", "--image", picture]
    write("models_clip_nano.pth", POINTER)(copy_of_i2v)
    assert f"models_clip_nano.pth {LFS}" in refusal(capsys, copy_of_i2v, *argv)
    shutil.copy(ckpt / VAE, copy_of_i2v / "models_clip_nano.pth")
    empty_folder("clip-words-nano")(copy_of_i2v)
    assert "clip-words-nano is an empty folder" in refusal(capsys, copy_of_i2v, *argv)


def diffusers_folder(folder):
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')


def wan22_a14b(folder):
    for name in ("high_noise_model", "low_noise_model"):
        (folder / name).mkdir()


def wan22_5b(folder):
    (folder / "Wan2.2_VAE.pth").touch()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (diffusers_folder, "is a -Diffusers checkpoint: download the one of the same name without"),
        (wan22_a14b, "is a Wan2.2 A14B checkpoint: give its task, with --wan_repo a checkout of"),
        (wan22_5b, "is a Wan2.2 5B checkpoint: give its task, with --wan_repo a checkout of Wan"),
    ],
)
def test_a_folder_for_other_code_is_called_what_it_is(capsys, copy, change, expected, bare):
    if bare:
        shutil.rmtree(copy)
        copy.mkdir()
    change(copy)
    assert expected in refusal(capsys, copy)
    assert expected in refusal(capsys, copy, "--teacache_plan")


# ------------------------------------------------------------------------- what must pass


def as_bin(legacy):
    def change(folder):
        state = load_file(folder / WEIGHTS)
        torch.save(state, folder / BIN, _use_new_zipfile_serialization=not legacy)
        (folder / WEIGHTS).unlink()

    return change


def sharded_bin(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {name: f"part-{i % 2}.bin" for i, name in enumerate(sorted(state))}
    for file in set(names.values()):
        torch.save({n: state[n] for n in state if names[n] == file}, folder / file)
    (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": names}))


def old_pickle(folder):
    state = torch.load(folder / VAE)
    torch.save(state, folder / VAE, _use_new_zipfile_serialization=False)


def links(folder):
    """As a hub's cache has it: each file a link to a blob."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for i, file in enumerate([f for f in folder.rglob("*") if f.is_file()]):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))


def others(folder):
    """What lies about in downloaded folders."""
    (folder / WORDS / ".gitkeep").touch()
    (folder / WORDS / "folder").mkdir()
    (folder / ".cache").mkdir()
    (folder / "README.md").touch()
    (folder / "examples.safetensors").touch()


MUST_PASS = {
    "bin": as_bin(legacy=False),
    "old bin": as_bin(legacy=True),
    "sharded bin": sharded_bin,
    "sharded": sharded,
    "old pickle": old_pickle,
    "links": links,
    "other files": others,
}


@pytest.mark.parametrize("name", MUST_PASS)
def test_a_good_checkpoint_passes_and_plans(capsys, monkeypatch, ckpt, copy, name):
    MUST_PASS[name](copy)
    passes(capsys, monkeypatch, copy)
    plans = [
        attempt(capsys, "--ckpt_dir", folder, *ROW, "--teacache_plan") for folder in (ckpt, copy)
    ]
    assert plans[0] == plans[1]
    assert plans[0][0] == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_a_transformer_in_a_bin_file_makes_the_video(capsys, wan, copy, tmp_path, legacy):
    as_bin(legacy)(copy)
    model = wan[1].modules.model.WanModel.from_pretrained(copy)
    assert model.dim == 128  # stock loads it


def test_an_index_counts_before_a_single_file_as_in_diffusers(capsys, ckpt, copy):
    sharded(copy)
    shutil.copy(ckpt / WEIGHTS, copy)
    (copy / SHARD).unlink()
    assert f"{SHARD} is missing" in refusal(capsys, copy)


def test_the_check_takes_milliseconds_whatever_the_size(ckpt, copy, wan):
    """Of 64 GiB: files with holes, which take no room."""
    args = Namespace(ckpt_dir=str(copy), task="t2v-nano")
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}})
    with (copy / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**36)
    with (copy / T5).open("wb") as file:  # an old pickle's beginning
        file.write(b"\x80\x02")
        file.truncate(2**36)
    began = time.process_time()
    teacache_generate.check_checkpoint(args, wan[0].WAN_CONFIGS["t2v-nano"], all_files=True)
    assert time.process_time() - began < 0.1


# ------------------------------------------------------------------ other inputs, and the target


def test_an_image_given_to_text_to_video_is_ignored(capsys, monkeypatch, copy):
    passes(capsys, monkeypatch, copy, "--image", "/none.png", "--src_video", "/none.mp4")


def test_an_image_that_cannot_be_read_is_refused(capsys, i2v_ckpt, tmp_path, picture):
    half = tmp_path / "half.png"
    whole = picture.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    pointer = tmp_path / "pointer.png"
    pointer.write_text(POINTER)
    for image in ("none.png", __file__, half, pointer, tmp_path):
        argv = ["--task", "i2v-nano", "--image", image, "--ckpt_dir", i2v_ckpt]
        code, said = attempt(capsys, *argv, *ROW, *PROMPT)
        assert code == 2
        assert f"--image {image}: cannot be read" in said
        assert len(said.splitlines()) == 1


EMPTY = "is empty, as of an unset shell variable: give a file or leave it out"


@pytest.mark.parametrize(
    "flag",
    [
        *("save_file", "image", "teacache_jobs", "teacache_decode", "teacache_report"),
        *("teacache_coefficients", "wan_repo", "ckpt_dir"),
    ],
)
def test_the_name_of_a_file_that_is_empty_is_refused(capsys, ckpt, flag):
    row = [] if flag == "teacache_coefficients" else ROW
    code, said = attempt(capsys, "--ckpt_dir", ckpt, *row, *PROMPT, f"--{flag}", "")
    assert code == 2
    assert f'--{flag} "": {EMPTY}' in said


def test_the_name_of_a_checkpoint_that_is_empty_is_refused_by_a_plan_too(capsys):
    code, said = attempt(capsys, "--ckpt_dir", "", *ROW, "--teacache_plan")
    assert code == 2
    assert f'--ckpt_dir "": {EMPTY}' in said


def directory(target):
    target.mkdir()


def immutable(target):
    target.touch()
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", target]).returncode:
        pytest.skip("no file can be made immutable here")


def link_to_nowhere(target):
    target.symlink_to("/none/folder/x.mp4")


@pytest.mark.parametrize("make", [directory, immutable, link_to_nowhere])
def test_an_existing_target_that_cannot_be_written_is_refused(capsys, ckpt, tmp_path, make):
    target = tmp_path / "x.mp4"
    make(target)
    try:
        code, said = attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--save_file", target)
    finally:
        subprocess.run(["chattr", "-i", target], capture_output=True)
    assert code == 2
    assert f"--save_file {target}: cannot be written: " in said
    assert [file.name for file in tmp_path.iterdir()] == ["x.mp4"]


def test_an_existing_target_is_not_touched_before_its_video_is_there(
    capsys, monkeypatch, ckpt, tmp_path
):
    target = tmp_path / "x.mp4"
    target.write_text("the video of yesterday")
    code, _ = attempt(capsys, "--ckpt_dir", ckpt, *ROW, *PROMPT, "--save_file", target)
    assert code == 1  # at the pipeline
    assert target.read_text() == "the video of yesterday"
