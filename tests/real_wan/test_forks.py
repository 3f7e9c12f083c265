"""The script on forks of Wan2.1: a copy of its checkout, edited here as people have edited it."""

import shutil
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import RET, T2V, Case, Done

if not (cases.WAN21 / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {cases.WAN21} (or $WAN_REPO)", allow_module_level=True)

EDITS = [  # file, what is replaced, by what
    # skip-layer guidance, and blocks that are moved to the device one by one
    (
        "wan/modules/model.py",
        "        for block in self.blocks:\n            x = block(x, **kwargs)\n",
        "        for i, block in enumerate(self.blocks):\n"
        "            if i == 1:\n"
        "                continue\n"
        "            x = block.to(x.device)(x, **kwargs)\n",
    ),
    # an attention of the user's own, for small heads only; at half the temperature, so that no
    # other gives the same
    (
        "wan/modules/attention.py",
        "def attention(\n",
        "def sage_attention(q, k, v, k_lens=None, **kwargs):\n"
        "    assert q.size(-1) < 128\n"
        "    k, v = (u[:, :int(k_lens.max()) if k_lens is not None else None] for u in (k, v))\n"
        "    heads = (u.to(v.dtype).transpose(1, 2) for u in (2 * q, k, v))\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(*heads)\n"
        "    return out.transpose(1, 2).to(q.dtype)\n\n\n"
        "flash_attention = sage_attention\n\n\n"
        "def attention(\n",
    ),
    # a wrapper of the transformer, as PEFT's
    (
        "wan/text2video.py",
        "class WanT2V:\n",
        "class Adapted(torch.nn.Module):\n"
        "    def __init__(self, model):\n"
        "        super().__init__()\n"
        "        self.base_model = torch.nn.Sequential(model)\n"
        "    def forward(self, *args, **kwargs):\n"
        "        return self.base_model[0](*args, **kwargs)\n\n\n"
        "class WanT2V:\n",
    ),
    (
        "wan/text2video.py",
        "        self.model.eval().requires_grad_(False)\n",
        "        self.model = Adapted(self.model).eval().requires_grad_(False)\n",
    ),
    # one call a step where the second would be multiplied by 0, or at the end of the steps
    (
        "wan/text2video.py",
        "                noise_pred_uncond = self.model(\n"
        "                    latent_model_input, t=timestep, **arg_null)[0]\n",
        "                noise_pred_uncond = noise_pred_cond\n"
        "                if guide_scale != 1 and (guide_scale != 1.5 or t > 500):\n"
        "                    noise_pred_uncond = self.model(\n"
        "                        latent_model_input, t=timestep, **arg_null)[0]\n",
    ),
    # a parser without --t5_fsdp, and with a file of prompts for one generate(args)
    (
        "generate.py",
        '        "--t5_fsdp",\n        action="store_true",\n        default=False,\n',
        '        "--prompt_file",\n',
    ),
    ("generate.py", "            args.t5_fsdp or args.dit_fsdp\n", "            args.dit_fsdp\n"),
    ("generate.py", "t5_fsdp=args.t5_fsdp,", "t5_fsdp=False,"),
    ("generate.py", "def generate(args):\n", "def generate_one(args):\n"),
    (
        "generate.py",
        'if __name__ == "__main__":\n',
        "def generate(args):\n"
        "    lines = open(args.prompt_file) if args.prompt_file else [args.prompt]\n"
        "    for line in lines:\n"
        '        generate_one(argparse.Namespace(**{**vars(args), "prompt": line.strip()}))\n\n\n'
        'if __name__ == "__main__":\n',
    ),
]
BALL = "A red ball moves right."
FORK = {
    "plain": cases.by_rule("t2v-1.3B", T2V),
    "ret": cases.by_rule("t2v-1.3B", T2V, RET),
    "order-1": cases.order_1(cases.by_sigma(T2V, *cases.SIGMA)),
}


def fork_of(checkout: Path, fork: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", "assets", "examples")
    shutil.copytree(checkout, fork, ignore=ignored)
    for name, old, new in EDITS:
        text = (fork / name).read_text()
        assert old in text
        (fork / name).write_text(text.replace(old, new))
    return fork


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> Done:
    out = tmp_path_factory.mktemp("fork")
    (out / "prompts.txt").write_text(f"{cases.CATS}\n{BALL}\n")

    def of_scale(scale: str) -> Case:
        return cases.by_rule("t2v-1.3B", [*T2V, "--sample_guide_scale", scale])

    jobs = [
        *cases.jobs_of_cases(FORK, out),
        cases.threshold_0("plain", FORK, out),
        of_scale("1").job("teacache", "scale-1", out),
        of_scale("1.5").job("teacache", "scale-1.5", out),
        Case([*T2V, "--prompt", BALL], [], {}).job("teacache", "ball", out),
        Case([*T2V, "--prompt_file", str(out / "prompts.txt")], [], {}).job("teacache", "two", out),
    ]
    return cases.run(fork_of(cases.WAN21, out / "Wan2.1"), jobs, out)


@pytest.mark.parametrize("name", FORK)
def test_fork_equals_the_reference(fork, name):
    """Although it leaves out a block, moves blocks, has an own attention, wraps its transformer,
    and has no --t5_fsdp."""
    cases.check(fork, name, FORK)


def test_fork_at_threshold_zero_gives_its_own_video(fork):
    cases.check_threshold_0(fork, "plain", FORK)


def test_own_attention_is_left_alone(fork):
    assert "attention: wan.modules.attention.sage_attention" in fork.printed("plain.teacache")


def test_one_call_a_step_at_scale_one_skips_the_same_steps(fork):
    """The distances do not depend on guidance."""
    seen = fork.succeeded("scale-1.teacache")
    computed = [step for step, ran in enumerate(seen["ran"]) if ran]
    assert len(seen["ran"]) == 20
    assert computed == fork.record("plain.teacache")["computed"]
    assert computed == fork.record("scale-1.teacache")["computed"]


def test_missing_unconditional_call_fails_and_names_the_step(fork):
    name = "scale-1.5.teacache"
    assert fork.seen(name)["exit"] == 1
    assert "step 17: the model was called once, not twice" in fork.printed(name)
    assert fork.record(name)["status"].startswith("failed: ")


def test_several_videos_of_one_generate_have_names_and_records(fork):
    assert fork.succeeded("two.teacache")["constructed"] == 1
    singles = [("two.teacache", "plain", cases.CATS), ("two.teacache.2", "ball", BALL)]
    for i, (name, single, prompt) in enumerate(singles):
        assert np.array_equal(fork.frames("two.teacache", i), fork.frames(f"{single}.teacache"))
        record, alone = fork.record(name), fork.record(f"{single}.teacache")
        assert (record["status"], record["prompt"]) == ("finished", prompt)
        assert (record["frames"], record["computed"]) == (17, alone["computed"])
        made, expected = (fork.out / f"{file}.mp4" for file in (name, f"{single}.teacache"))
        assert made.read_bytes() == expected.read_bytes()
