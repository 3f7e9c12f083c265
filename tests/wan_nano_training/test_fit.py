"""What makes the miniature's teacache.json, on random weights."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from nano import HERE, attempt
from PIL import Image
from torch import nn


@pytest.fixture
def fit(wan):
    return importlib.import_module("fit")


def test_a_change_is_that_of_a_branchs_residual_to_the_step_before(fit):
    class Add(nn.Module):
        def forward(self, x):
            return x + self.amount

    blocks = nn.ModuleList([Add(), Add()])
    seen = fit.Changes(blocks)
    # residuals of two blocks: (2, -4), (3, -6), (4, -5): of 6 by 3, of 9 by 2; the other stays
    for conditional in ((1.0, -2.0), (1.5, -3.0), (2.0, -2.5)):
        for amount in (conditional, (7.0, 7.0)):
            blocks[0].amount = blocks[1].amount = torch.tensor(amount)
            blocks[1](blocks[0](torch.ones(2)))
    assert list(seen) == pytest.approx([3 / 6, 0.0, 2 / 9, 0.0])


def test_a_fit_is_read_by_the_script_and_computes_half_of_the_steps(
    fit, ckpt, tmp_path, monkeypatch, capsys
):
    folder, picture, prompts = tmp_path / "ckpt", tmp_path / "fit.png", tmp_path / "prompts.txt"
    shutil.copytree(ckpt, folder)
    prompts.write_text("a red ball\ntwo blue boxes fall\n")
    argv = ["--ckpt_dir", folder, "--picture", picture, "--prompts", prompts]
    monkeypatch.setattr("sys.argv", ["fit.py", *map(str, argv)])
    fit.main()
    assert "one process, 2 videos" in capsys.readouterr().out
    told = json.loads((folder / "teacache.json").read_text())
    assert (told["steps"], told["shift"], told["solver"]) == (50, 5.0, "unipc")
    for mode, flags in (("plain", []), ("retention", ["--use_ret_steps"])):
        assert np.isfinite(told[mode]["coefficients"]).all()
        code, said = attempt(capsys, "--ckpt_dir", folder, "--teacache_plan", *flags)
        assert code == 0
        (line,) = [u for u in said.splitlines() if u.startswith(">")]
        assert 25 <= line.split()[-1].count("#") <= 27
    with Image.open(picture) as drawn:
        assert drawn.width == 1800
        assert np.asarray(drawn.convert("RGB")).std() > 10


def test_a_fit_runs_one_process_and_says_so(fit, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["fit.py"])
    with pytest.raises(SystemExit):
        fit.main()
    assert "it runs one process" in capsys.readouterr().err
    assert "one process" in (HERE / "wan_nano_training/fit.py").read_text().split('"""')[1]
