"""fit.py, which makes the miniature's teacache.json, on random weights."""

import json
import shutil

import fit
import numpy as np
import pytest
import torch
from nano import attempt
from torch import nn


def test_a_change_is_between_one_branchs_residuals():
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


def test_the_script_reads_a_fit_and_computes_half(ckpt, tmp_path, monkeypatch, capsys):
    folder, prompts = tmp_path / "ckpt", tmp_path / "prompts.txt"
    shutil.copytree(ckpt, folder)
    prompts.write_text("a red ball\ntwo blue boxes fall\n")
    argv = ["--ckpt_dir", folder, "--prompts", prompts]
    monkeypatch.setattr("sys.argv", ["fit.py", *map(str, argv)])
    fit.main()
    rule = json.loads((folder / "teacache.json").read_text())
    assert (rule["steps"], rule["shift"], rule["solver"]) == (50, 5.0, "unipc")
    for mode, flags in (("plain", []), ("retention", ["--use_ret_steps"])):
        assert np.isfinite(rule[mode]["coefficients"]).all()
        code, output = attempt(capsys, "--ckpt_dir", folder, "--teacache_plan", *flags)
        assert code == 0
        (line,) = [u for u in output.splitlines() if u.startswith(">")]
        assert 25 <= line.split()[-1].count("#") <= 27
