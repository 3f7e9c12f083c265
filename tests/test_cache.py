"""The cache on exact arithmetic: a model of three lines whose blocks add known numbers."""

import gc
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from teacache_generate import (
    PLAIN,
    RETENTION,
    TeaCacheConfig,
    relative_l1,
    sdpa_attention,
    shadow,
    teacache,
)

ALWAYS = [0.0, 0.0, 0.0, 0.0, 1.0]  # every distance adds 1
NEVER = [0.0] * 5


class Add(nn.Module):
    """A block: x + amount, in float32, as Wan2.1's gated sums give under autocast."""

    def __init__(self, amount: float):
        super().__init__()
        self.amount, self.runs = amount, 0

    def forward(self, x, e):
        self.runs += 1
        return x.float() + self.amount * e.mean()


class ToyModel(nn.Module):
    """The frame of a WanModel: x in bfloat16, e, e0, blocks, head. One sample, one token."""

    def __init__(self):
        super().__init__()
        self.time_projection = nn.Linear(2, 12, bias=False)
        nn.init.ones_(self.time_projection.weight)
        self.blocks = nn.ModuleList([Add(1.0), Add(2.0)])
        self.head_dtypes = []

    def forward(self, x, t, context=None, seq_len=None):
        """The toy's own docstring."""
        e = torch.cat([t, t]).float()[None]  # [1, 2]
        e0 = self.time_projection(e)
        x = x[0].bfloat16()
        for block in self.blocks:
            x = block(x, e=e0)
        self.head_dtypes.append(x.dtype)
        return [x]


class ToyVace(ToyModel):
    def __init__(self):
        super().__init__()
        self.vace_runs = 0

    def forward_vace(self, x, kwargs):
        self.vace_runs += 1
        return [x]

    def forward(self, x, t, context=None, seq_len=None):
        e0 = self.time_projection(torch.cat([t, t]).float()[None])
        x = x[0].bfloat16()
        self.forward_vace(x, {"e": e0})
        for block in self.blocks:
            x = block(x, e=e0)
        return [x]


def latent(x):
    """One token of one channel, [1, 1, 1]."""
    return [torch.full((1, 1, 1), x)]


def sample(model, steps, x=0.0):
    """What a pipeline does: two calls a step; every t is half of the one before."""
    outputs = []
    for step in range(steps):
        t = torch.tensor([2.0**-step])
        for branch in (0, 1):
            outputs.append(model(latent(x + 100 * branch), t=t, context=None)[0].item())
    return outputs


def config(steps, thresh=1.5, coefficients=ALWAYS, mode=PLAIN, **settings):
    return TeaCacheConfig(steps, thresh, mode, coefficients, **settings)


@dataclass(frozen=True)
class Scripted(TeaCacheConfig):
    """Computes the steps that are named; the noise level is the timestep."""

    script: Sequence[int] = ()

    def always_computes(self, step):
        return step in self.script or step >= self.steps


@torch.no_grad()
def test_a_skipped_step_adds_the_residual_of_its_own_branch():
    model = ToyModel()
    # e0.mean() at step i is 2 t_i, so the residual of step 0 is 3 * 2 and that of step 2 3 * 0.5
    with teacache(model, config(4)) as cache:
        first = sample(model, 2)
        (anchor,) = cache.residuals.anchors
        assert {branch: r.item() for branch, r in anchor.residuals.items()} == {0: 6.0, 1: 6.0}
        for t in map(torch.tensor, ([0.25], [0.125])):
            for x in (10.0, 110.0):
                first.append(model(latent(x), t=t)[0].item())
    assert first == [6.0, 106.0, 6.0, 106.0, 11.5, 111.5, 10.75, 110.75]
    assert cache.schedule.computed == [0, 2, 3]
    assert [block.runs for block in model.blocks] == [6, 6]


@torch.no_grad()
def test_the_head_gets_the_same_dtype_on_computed_and_skipped_steps():
    model = ToyModel()
    with teacache(model, config(4)):
        sample(model, 4, x=0.1)
    assert set(model.head_dtypes) == {torch.float32}


@torch.no_grad()
def test_a_sum_keeps_the_bits_that_bfloat16_would_lose():
    model = ToyModel()
    with teacache(model, config(3, thresh=9.0)):
        for t in (0.0546875, 0.0546875, 0.5):  # both branches of step 0, and step 1, skipped
            out = model(latent(256.0), t=torch.tensor([t]))[0]
    assert out.item() == 256.0 + 6 * 0.0546875  # bfloat16 knows 256 and 258


@torch.no_grad()
def test_the_distance_is_taken_to_the_step_before_skipped_or_not():
    model = ToyModel()
    with teacache(model, config(4, thresh=9.0)) as cache:
        sample(model, 4)
    assert [step.distance for step in cache.schedule.steps] == [None, 0.5, 0.5, 0.5]
    assert [step.timestep for step in cache.schedule.steps] == [1.0, 0.5, 0.25, 0.125]


def test_the_relative_distance_is_the_mean_change_over_the_mean_size():
    assert relative_l1(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0])).item() == 0.5


@torch.no_grad()
@pytest.mark.parametrize(("mode", "channels"), [(PLAIN, 2), (RETENTION, 12)])
def test_retention_steps_compare_the_output_of_time_projection(mode, channels):
    model = ToyModel()
    with teacache(model, config(2, mode=mode)) as cache:
        sample(model, 1)
        assert cache.signal.shape == (channels,)
        sample(model, 1)


@torch.no_grad()
@pytest.mark.parametrize(("order", "most"), [(0, 5), (1, 7)])
def test_so_many_residuals_live_and_none_after_the_last_step(order, most):
    model, alive = ToyModel(), []

    def tensors():  # the samples, every second of 2000 tokens, are not among them
        return sum(type(o) is torch.Tensor and o.shape == (1, 2000, 3) for o in gc.get_objects())

    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(tensors()))
    x = torch.zeros(1, 2000, 3)
    with teacache(model, config(8, thresh=0.5, order=order)) as cache:
        for step in range(8):
            for _ in (0, 1):
                model([x], t=torch.tensor([2.0**-step]))
        assert cache.residuals.anchors == []
    # x, h in bfloat16, the first block's output, the last output, the other branch's residual;
    # at order 1 the one before of each branch too
    assert max(alive) == most


@torch.no_grad()
def test_a_residual_that_no_step_can_use_is_not_kept():
    model = ToyModel()
    with teacache(model, config(8, coefficients=NEVER, mode=RETENTION)) as cache:
        sample(model, 4)  # steps 0 to 4 are computed in any case
        assert [anchor.residuals for anchor in cache.residuals.anchors] == [{}, {}]
    model = ToyModel()
    with teacache(model, config(8, thresh=0.0)) as cache:
        sample(model, 7)
        assert cache.residuals.anchors == []  # nothing is measured either
        sample(model, 1)
    assert model.blocks[0].runs == 16


@torch.no_grad()
def test_guidance_scale_one_runs_the_conditional_branch_only():
    model = ToyModel()
    with teacache(model, config(4, guided_steps=0)) as cache:
        outputs = sample(model, 4)
    assert outputs[0::2] == outputs[1::2]
    assert cache.schedule.computed == [0, 2, 3]
    assert model.blocks[0].runs == 3


@torch.no_grad()
def test_after_the_guided_steps_the_unconditional_call_gives_the_conditional_output():
    model = ToyModel()
    with teacache(model, config(6, thresh=0.0, guided_steps=2)) as cache:
        outputs = sample(model, 6)
    assert outputs == [6.0, 106.0, 3.0, 103.0, 1.5, 1.5, 0.75, 0.75, 0.375, 0.375, 0.1875, 0.1875]
    assert (model.blocks[0].runs, cache.schedule.passes) == (8, 8)
    assert cache.summary().count("8 of 12 passes") == 1


@torch.no_grad()
def test_threshold_zero_is_stock():
    model = ToyModel()
    stock = sample(model, 4)
    with teacache(model, config(4, thresh=0.0)):
        assert sample(model, 4) == stock
    assert model.blocks[0].runs == 16


@torch.no_grad()
def test_vace_runs_its_blocks_on_computed_steps_only():
    model = ToyVace()
    with teacache(model, config(4)):
        sample(model, 4)
    assert model.vace_runs == 6


def attributes(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return {name: value for name, value in vars(model).items() if name != "vace_runs"}, hooks


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = ToyVace()
    before = attributes(model)
    with teacache(model, config(4)):
        assert attributes(model) != before
        sample(model, 4)
    assert attributes(model) == before


@torch.no_grad()
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_after_an_error(error):
    model = ToyModel()
    before = attributes(model)
    with pytest.raises(error), teacache(model, config(4)) as cache:
        sample(model, 2)
        raise error
    assert attributes(model) == before
    assert cache.residuals.anchors == []


@torch.no_grad()
def test_a_forward_of_the_instance_is_used_and_comes_back():
    model = ToyModel()  # Ulysses and ring set one, where a patched class is never asked

    def own(x, t, **kwargs):
        return [u + 1000 for u in ToyModel.forward(model, x, t)]

    model.forward = own
    with teacache(model, config(4)):
        assert sample(model, 4)[:2] == [1006.0, 1106.0]
    assert vars(model)["forward"] is own


@torch.no_grad()
def test_only_the_instance_is_patched():
    model, other = ToyModel(), ToyModel()
    forward = ToyModel.forward
    with teacache(model, config(4)):
        assert ToyModel.forward is forward
        assert "forward" not in vars(other)
        stock = sample(other, 4)
    assert stock == sample(ToyModel(), 4)


@torch.no_grad()
def test_two_models_can_be_nested_and_one_cannot():
    outer, inner = ToyModel(), ToyModel()
    with teacache(outer, config(4)) as one, teacache(inner, config(4, thresh=0.5)) as two:
        sample(outer, 4)
        sample(inner, 4)
        with pytest.raises(RuntimeError, match="leave that one first"), teacache(outer, config(4)):
            pass
        assert "forward" in vars(outer)
    assert (one.schedule.computed, two.schedule.computed) == ([0, 2, 3], [0, 1, 2, 3])


@torch.no_grad()
def test_more_steps_than_configured_are_an_error_and_fewer_a_warning(caplog):
    model = ToyModel()
    with pytest.raises(RuntimeError, match="sampling_steps"), teacache(model, config(4)):
        sample(model, 5)
    with teacache(model, config(4)) as cache:
        sample(model, 3)
    assert "set up for 4 steps, but saw 3" in caplog.text
    assert cache.summary().startswith("TeaCache: computed 2 of 3 steps (0 2)")
    with teacache(model, config(4)) as cache:
        pass
    assert cache.summary() == "TeaCache: no step was taken"


@torch.no_grad()
def test_the_cache_does_not_keep_the_model_alive():
    model = ToyModel()
    with teacache(model, config(2)) as cache:
        sample(model, 2)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert cache.schedule.computed == [0, 1]


@pytest.mark.parametrize("thresh", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_means_nothing_is_an_error(thresh):
    with pytest.raises(ValueError, match="must be 0"):
        config(4, thresh=thresh)


@torch.no_grad()
def test_negative_increments_are_said_with_their_steps(caplog):
    model = ToyModel()
    with teacache(model, config(5, coefficients=[0.0, 0.0, 0.0, 0.0, -1.0])):
        sample(model, 5)
    assert "negative increments at steps 1-3:" in caplog.text


def test_the_patched_forward_keeps_name_and_signature():
    model = ToyModel()
    signature = inspect.signature(model.forward)
    with teacache(model, config(4)):
        assert model.forward.__name__ == "forward"
        assert model.forward.__doc__ == "The toy's own docstring."
        assert inspect.signature(model.forward) == signature


@torch.no_grad()
def test_the_summary_counts_steps_and_calls_its_speedup_an_estimate():
    model = ToyModel()
    with teacache(model, config(4)) as cache:
        sample(model, 4)
    cache.marks = [0.0, 1.0, 5.0, 6.0, 10.0, 14.0]  # computed 4, skipped 1, computed 4 and 4 s
    assert cache.summary() == (
        "TeaCache: computed 3 of 4 steps (0 2 3), sampling 14.0 s, about 1.14x of stock "
        "(estimated from the computed steps); reused residuals were off by 300.0 % (largest "
        "300.0 % at step 2); by order 1 they would have been by 300.0 %"
    )


@torch.no_grad()
def test_drift_is_the_error_of_the_held_residual_over_the_true_one():
    model, script = ToyModel(), [0, 1, 3]
    with teacache(model, config(4)) as cache:
        cache.schedule.config = Scripted(4, 1.5, script=script)
        sample(model, 4)
    # residuals 6, 3 and, at step 3, 0.75: held 3; the noise level halves from step to step, so that
    # step 3 is 1.5 gaps of 0.5 beyond step 1, whose gain is 1 until one was measured
    (drift,) = cache.drifts
    assert (drift.step, drift.hold) == (3, 3.0)
    line = 3 + 3 * (0.125 - 0.5) / (0.5 - 1.0) * -1
    assert drift.line == pytest.approx(abs(line - 0.75) / 0.75)


@torch.no_grad()
def test_order_1_computes_the_same_steps_and_goes_on_along_the_noise_level():
    model, script = ToyModel(), [0, 1, 4]
    with teacache(model, config(5, order=1)) as cache:
        cache.schedule.config = Scripted(5, 1.5, script=script)
        outputs = sample(model, 5)
    # the residual is 6 times the noise level, so that the line is right at every step
    assert outputs[::2] == pytest.approx([6, 3, 1.5, 0.75, 0.375])
    assert [drift.line for drift in cache.drifts] == pytest.approx([0.0], abs=1e-6)


@torch.no_grad()
def test_with_one_residual_order_1_holds():
    model = ToyModel()
    with teacache(model, config(4, thresh=9.0, order=1)):
        assert sample(model, 4)[:6:2] == [6.0, 6.0, 6.0]


@torch.no_grad()
def test_a_run_waits_for_the_gpu_once_a_step_and_once_at_the_end(monkeypatch):
    waits, tolist, item = [], torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(1) or tolist(x))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: waits.append(1) or item(x))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: waits.append(1) or bool(tolist(x)))
    model = ToyModel()
    with teacache(model, config(8, thresh=2.5, order=1)) as cache:
        for step in range(8):
            t = torch.tensor([2.0**-step])
            for _ in (0, 1):
                model(latent(1.0), t=t)
    assert cache.drifts
    assert len(waits) == 8 + 1


class ToyWan22(ToyModel):
    """One timestep a token, as Wan2.2 has it: e is [1, tokens, 2]."""

    def forward(self, x, t, context=None, seq_len=None):
        t = t if t.dim() == 2 else t.expand(1, x[0].size(1))
        e0 = self.time_projection(torch.stack([t, t], dim=2).float())
        x = x[0].bfloat16()
        for block in self.blocks:
            x = block(x, e=e0[:, -1])
        return [x]


@torch.no_grad()
def test_of_many_tokens_the_last_one_tells():
    model, x = ToyWan22(), [torch.zeros(1, 5, 1)]
    with teacache(model, config(3)) as cache:
        for step in range(3):
            t = torch.tensor([[0.0, 0.0, 0.0, 2.0**-step, 2.0**-step]])  # an image's tokens first
            for _ in (0, 1):
                model(x, t=t)
            if step < 2:
                assert cache.signal.shape == (2,)
                assert cache.signal.untyped_storage().size() == 8  # bytes: not a view of all
    assert [step.timestep for step in cache.schedule.steps] == [1.0, 0.5, 0.25]
    assert [step.distance for step in cache.schedule.steps] == [None, 0.5, 0.5]


@torch.no_grad()
@pytest.mark.parametrize("order", [0, 1])
def test_a_residual_never_crosses_from_one_model_to_the_next(order):
    high, low = ToyWan22(), ToyWan22()
    settings = config(8, thresh=9.0, order=order, switch=4)
    with teacache([high, low], settings) as cache:
        for step in range(8):
            model, t = (high, low)[step >= 4], torch.tensor([2.0**-step])
            for _ in (0, 1):
                model(latent(0.0), t=t)
            if step == 4:
                assert len(cache.residuals.anchors) == 1  # only those of the active model live
    assert cache.schedule.computed == [0, 4, 7]
    assert (high.blocks[0].runs, low.blocks[0].runs) == (2, 4)
    assert cache.schedule.steps[4].distance is None


@torch.no_grad()
def test_a_model_that_takes_over_unplanned_is_computed_too():
    high, low = ToyWan22(), ToyWan22()
    with teacache([high, low], config(6, thresh=9.0)) as cache:
        for step in range(6):
            model, t = (high, low)[step >= 3], torch.tensor([2.0**-step])
            for _ in (0, 1):
                model(latent(0.0), t=t)
    assert cache.schedule.computed == [0, 3, 5]


@torch.no_grad()
def test_a_compiled_model_whose_blocks_cannot_be_stood_in_for_is_an_error():
    model = ToyModel()
    compiled = torch.compile(model, backend="eager")
    compiled(latent(0.0), t=torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="in torch"), teacache(compiled, config(4)):
        sample(compiled, 4)


@torch.no_grad()
def test_a_pipeline_with_one_call_a_step_is_an_error_at_the_second_call():
    model = ToyModel()
    with pytest.raises(RuntimeError, match="two calls"), teacache(model, config(4)):
        model(latent(0.0), t=torch.tensor([1.0]))
        model(latent(0.0), t=torch.tensor([0.5]))


@torch.no_grad()
def test_two_tensors_of_one_timestep_are_one_step():
    model = ToyModel()
    with teacache(model, config(2)):
        for t in (1.0, 1.0, 0.5, 0.5):
            model(latent(0.0), t=torch.tensor([t]))


def test_shadow_gives_back_what_was_there_and_removes_what_was_not():
    target = nn.Module()
    target.old = 1
    with pytest.raises(ZeroDivisionError), shadow(target, old=2, new=3):
        assert (target.old, target.new) == (2, 3)
        raise ZeroDivisionError
    assert target.old == 1
    assert not hasattr(target, "new")


def softmax_attention(q, k, v):
    """By the formula, for one sample [L, N, C]."""
    weights = torch.einsum("qnc,knc->nqk", q, k) / q.size(-1) ** 0.5
    return torch.einsum("nqk,knc->qnc", weights.softmax(-1), v)


def test_attention_is_the_formula_and_respects_key_lengths():
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v, k_lens=torch.tensor([6, 3]))
    torch.testing.assert_close(out[0], softmax_attention(q[0], k[0], v[0]))
    torch.testing.assert_close(out[1], softmax_attention(q[1], k[1, :3], v[1, :3]))


def test_attention_computes_in_the_dtype_of_v_and_returns_that_of_q():
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())


def test_attention_refuses_a_window():
    q = torch.randn(1, 6, 4, 8)
    with pytest.raises(NotImplementedError, match="window_size"):
        sdpa_attention(q, q, q, window_size=(3, 3))
