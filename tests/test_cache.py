"""The cache on exact arithmetic: a model of three lines whose blocks add known numbers."""

import gc
import inspect
import weakref

import pytest
import torch
from torch import nn

from teacache_generate import (
    TeaCacheConfig,
    reach,
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


def sample(model, steps, x=0.0, guide_scale=5.0):
    """What a pipeline does: two calls a step; every t is half of the one before."""
    outputs = []
    for step in range(steps):
        t = torch.tensor([2.0**-step])
        for branch in (0, 1):
            outputs.append(model([torch.full((1,), x + 100 * branch)], t=t, context=None)[0].item())
    return outputs


def config(steps, thresh=1.5, coefficients=ALWAYS, **settings):
    return TeaCacheConfig(steps, thresh, coefficients, **settings)


@torch.no_grad()
def test_a_skipped_step_adds_the_residual_of_its_own_branch():
    model = ToyModel()
    # e0.mean() at step i is 2 t_i, so the residual of step 0 is 3 * 2 and that of step 2 3 * 0.5
    with teacache(model, config(4)) as cache:
        first = sample(model, 2)
        kept = {k: [(i, r.item()) for i, r in v] for k, v in cache.residuals.items()}
        assert kept == {0: [(0, 6.0)], 1: [(0, 6.0)]}
        for t in (0.25, 0.125):
            for x in (10.0, 110.0):
                first.append(model([torch.full((1,), x)], t=torch.tensor([t]))[0].item())
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
    model, x = ToyModel(), [torch.full((1,), 256.0)]
    with teacache(model, config(3, thresh=9.0)):
        for t in (0.0546875, 0.0546875, 0.5):  # both branches of step 0, and step 1, skipped
            out = model(x, t=torch.tensor([t]))[0]
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
@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_retention_steps_compare_the_output_of_time_projection(use_ret_steps):
    model = ToyModel()
    seen = []
    with teacache(model, config(2, use_ret_steps=use_ret_steps)) as cache:
        sample(model, 1)
        seen.append(tuple(cache.signal.shape))
    assert seen == [(1, 12) if use_ret_steps else (1, 2)]


@torch.no_grad()
def test_at_most_two_residuals_live_and_none_after_the_last_step():
    model, alive = ToyModel(), []

    def tensors():
        return sum(type(o) is torch.Tensor and o.shape == (7, 11) for o in gc.get_objects())

    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(tensors()))
    x = torch.zeros(7, 11)
    with teacache(model, config(6, thresh=0.5)) as cache:
        for step in range(6):
            for _ in (0, 1):
                model([x], t=torch.tensor([2.0**-step]))
        assert cache.residuals == {}
    # x, h in bfloat16, the first block's output, the last output, the other branch's residual
    assert max(alive) == 5


@torch.no_grad()
def test_order_1_goes_on_along_the_line_through_the_last_two_residuals():
    model, script = ToyModel(), [0, 1, 3, 6]
    # the residual of step i is 6 t_i: 6, 3, (1.5), 0.75, ..., 6/64
    with teacache(model, config(7, order=1)) as cache:
        cache.schedule.decide = lambda timestep, distance: cache.step in script
        outputs = sample(model, 7)[::2]
    at_2 = 3 - 0.75 * 3  # one step behind 1, as 1 is behind 0
    at_4, at_5 = 0.75 - 0.75 * 2.25 / 2, 0.75 - 0.75 * 2.25  # behind 3, which is two behind 1
    assert outputs == pytest.approx([6, 3, at_2, 0.75, at_4, at_5, 6 / 64])


@pytest.mark.parametrize(
    ("since", "gap", "way"),
    [
        *((1, 4, 0.1875), (1, 1, 0.75)),
        *((2, 1, 1.5), (3, 1, 1.5), (9, 1, 1.5)),  # two gaps at most
        *((4, 3, 1.0), (5, 3, 1.0), (9, 4, 0.75)),  # and 4 steps
        *((1, 5, 0.0), (9, 5, 0.0)),
    ],
)
def test_order_1_goes_at_most_two_gaps_or_4_steps_on_and_nowhere_from_a_gap_above_4(
    since, gap, way
):
    assert reach(since, gap) == way


@torch.no_grad()
def test_order_1_holds_still_where_there_is_one_residual_only():
    model = ToyModel()
    with teacache(model, config(4, thresh=9.0, order=1)):
        assert sample(model, 4)[:6:2] == [6.0, 6.0, 6.0]


@torch.no_grad()
def test_order_1_keeps_two_residuals_a_branch_and_none_after_the_last_step():
    model, kept = ToyModel(), []
    with teacache(model, config(12, use_ret_steps=True, order=1)) as cache:
        for step in range(12):
            for _ in (0, 1):
                model([torch.zeros(1)], t=torch.tensor([2.0**-step]))
            kept.append([[i for i, _ in cache.residuals.get(branch, [])] for branch in (0, 1)])
    # ALWAYS computes every second step after the fifth: 6, 8 and 10
    assert kept[:3] == [[[], []]] * 3
    assert kept[3:9:2] == [[[3], [3]], [[4, 3], [4, 3]], [[6, 4], [6, 4]]]
    assert kept[11] == [[], []]


@torch.no_grad()
def test_a_residual_that_no_step_can_use_is_not_kept():
    model = ToyModel()
    with teacache(model, config(8, coefficients=NEVER, use_ret_steps=True)) as cache:
        sample(model, 4)
        assert cache.residuals == {}  # steps 0 to 4 are computed in any case
    model = ToyModel()
    with teacache(model, config(8, thresh=0.0)) as cache:
        sample(model, 8)
        assert cache.residuals == {}
    assert model.blocks[0].runs == 16


@torch.no_grad()
def test_guidance_scale_one_runs_the_conditional_branch_only():
    model = ToyModel()
    with teacache(model, config(4, guide_scale=1.0)) as cache:
        outputs = sample(model, 4)
    assert outputs[0::2] == outputs[1::2]
    assert cache.schedule.computed == [0, 2, 3]
    assert model.blocks[0].runs == 3


@torch.no_grad()
def test_guidance_scale_one_with_threshold_zero_is_stock():
    model = ToyModel()
    stock = sample(model, 4)
    with teacache(model, config(4, thresh=0.0, guide_scale=1.0)):
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
    assert cache.residuals == {}


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
    assert "negative increments at steps 1 2 3:" in caplog.text


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
        "(estimated from the computed steps)"
    )


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
