"""What the tests of batches, comparisons, failures and the queue share: hooks in the stand-in."""

import json
import pkgutil
import subprocess
from pathlib import Path

import pytest
import torch
from nano import NANO, SCRIPT, python


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


class RunsCode:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def record(name: str = "x", folder: Path | None = None) -> dict:
    """The record beside a video."""
    return json.loads((folder or Path()).joinpath(f"{name}.json").read_text(encoding="utf-8"))


def wrap(patch: pytest.MonkeyPatch, name: str, wrapper) -> None:
    """Replace a function by its full name; the wrapper gets the stock function first."""
    owner, attribute = name.rsplit(".", 1)
    stock = getattr(pkgutil.resolve_name(owner), attribute)
    patch.setattr(name, lambda *args, **kwargs: wrapper(stock, *args, **kwargs))


def first(act):
    """A wrapper that acts before the stock function, but not for the probe of a check."""

    def wrapper(stock, *args, **kwargs):
        if not any("probe" in str(value) for value in args):
            act()
        return stock(*args, **kwargs)

    return wrapper


def after(act):
    """A wrapper that passes the stock function's result on."""
    return lambda stock, *args, **kwargs: act(stock(*args, **kwargs))


class Made:
    """Records the seed of each video sampled, and each video that the VAE decodes.

    then: what to call before the decoding of that number, counted from 0.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.sampled, self.decoded, self.then = [], [], {}
        wrap(patch, "wan.text2video.WanT2V.generate", self.generate)
        wrap(patch, "wan.modules.vae.WanVAE.decode", self.decode)

    def generate(self, stock, *args, **options):
        self.sampled.append(options["seed"])
        return stock(*args, **options)

    def decode(self, stock, vae, latents):
        number = len(self.decoded)
        self.decoded.append(None)
        if number in self.then:
            self.then[number]()
        self.decoded[number] = stock(vae, latents)[0]
        return [self.decoded[number]]


def run_two(folder: Path, prelude: str, *argv, **environment: str) -> subprocess.CompletedProcess:
    """The script in two processes of torchrun; the fork's generate.py begins with prelude."""
    repo = folder / "repo"
    if not repo.exists():
        repo.mkdir()
        (repo / "wan").symlink_to(NANO / "wan")
        (repo / "generate.py").write_text(prelude + (NANO / "generate.py").read_text())
        (repo / "xfuser/core").mkdir(parents=True)  # the stand-in does without
        xfuser = "init_distributed_environment = initialize_model_parallel = None"
        (repo / "xfuser/core/distributed.py").write_text(xfuser)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT]
    environment = {"CUDA_VISIBLE_DEVICES": "4,7"} | environment
    return python(*torchrun, "--wan_repo", repo, *argv, cwd=folder, **environment)
