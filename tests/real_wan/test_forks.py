"""The script on forks of Wan2.1: a copy of its checkout, edited here as people have edited it."""

import shutil

import cases
import numpy as np
import pytest
from cases import RET, T2V, Case, Done

if not (cases.WAN21 / "generate.py").is_file():
    pytest.skip(f"no real Wan2.1 at {cases.WAN21} (or $WAN_REPO)", allow_module_level=True)

EDITS = {  # by file; - is replaced by +
    "wan/modules/model.py": """
# skip-layer guidance, and blocks that are moved to the device one by one
-        for block in self.blocks:
-            x = block(x, **kwargs)
+        for i, block in enumerate(self.blocks):
+            if i == 1:
+                continue
+            x = block.to(x.device)(x, **kwargs)
""",
    "wan/modules/attention.py": """
# an own attention, for small heads only; at half the temperature: no other gives the same
-def attention(
+def sage_attention(q, k, v, k_lens=None, **kwargs):
+    assert q.size(-1) < 128
+    keys = k.size(1) if k_lens is None else int(k_lens)
+    heads = (u.to(v.dtype).transpose(1, 2) for u in (2 * q, k[:, :keys], v[:, :keys]))
+    out = torch.nn.functional.scaled_dot_product_attention(*heads)
+    return out.transpose(1, 2).to(q.dtype)
+flash_attention = sage_attention
+def attention(
""",
    "wan/text2video.py": """
# a wrapper of the transformer, as PEFT's
-class WanT2V:
+class Adapted(torch.nn.Module):
+    def __init__(self, model):
+        super().__init__()
+        self.base_model = torch.nn.Sequential(model)
+    def forward(self, *args, **kwargs):
+        return self.base_model[0](*args, **kwargs)
+class WanT2V:

-        self.model.eval().requires_grad_(False)
+        self.model = Adapted(self.model).eval().requires_grad_(False)

# one call a step, where the second would be multiplied by 0 or near the end
-                noise_pred_uncond = self.model(
-                    latent_model_input, t=timestep, **arg_null)[0]
+                noise_pred_uncond = noise_pred_cond
+                if guide_scale != 1 and (guide_scale != 1.5 or t > 500):
+                    noise_pred_uncond = self.model(
+                        latent_model_input, t=timestep, **arg_null)[0]
""",
    "generate.py": """
# no --t5_fsdp, and a file of prompts for one generate(args)
-        "--t5_fsdp",
-        action="store_true",
-        default=False,
+        "--prompt_file",

-            args.t5_fsdp or args.dit_fsdp
+            args.dit_fsdp

-            t5_fsdp=args.t5_fsdp,
+            t5_fsdp=False,

-def generate(args):
+def generate(args):
+    for prompt in open(args.prompt_file) if args.prompt_file else [args.prompt]:
+        generate_one(argparse.Namespace(**{**vars(args), "prompt": prompt.strip()}))
+def generate_one(args):
""",
}
BALL = "A red ball moves right."
FORK = {
    "plain": cases.by_rule("t2v-1.3B", T2V),
    "ret": cases.by_rule("t2v-1.3B", T2V, RET),
    "order-1": cases.order_1(cases.by_sigma(T2V, *cases.SIGMA)),
}


def edited(text: str, edits: str) -> str:
    for edit in edits.split("\n\n"):
        lines = edit.splitlines()
        old, new = ("".join(f"{u[1:]}\n" for u in lines if u[:1] == mark) for mark in "-+")
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> Done:
    out = tmp_path_factory.mktemp("fork")
    (out / "prompts.txt").write_text(f"{cases.CATS}\n{BALL}\n")
    repo, ignored = out / "Wan2.1", shutil.ignore_patterns(".git", "assets", "examples")
    shutil.copytree(cases.WAN21, repo, ignore=ignored)
    for name, edits in EDITS.items():
        (repo / name).write_text(edited((repo / name).read_text(), edits))
    more = {
        "scale-1": ["--sample_guide_scale", "1"],
        "scale-1.5": ["--sample_guide_scale", "1.5"],
        "ball": ["--prompt", BALL],
        "two": ["--prompt_file", str(out / "prompts.txt")],
    }
    jobs = [*cases.jobs_of_cases(FORK, out), cases.threshold_0("plain", FORK, out)]
    jobs += [Case([*T2V, *flags], [], {}).job("teacache", n, out) for n, flags in more.items()]
    return cases.run(repo, jobs, out)


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
