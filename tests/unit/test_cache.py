"""What a patched model computes: residuals, predictions, drift, memory."""

import gc
import math
import weakref
from contextlib import suppress
from functools import partial, partialmethod
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from toys import Toy, config_of, numbers, sample, scripted

from teacache_generate import EMBEDDING, NOISE_LEVEL, PROJECTION, sdpa_attention, teacache

# Order 1

TENTHS = [1000.0 - 100 * step for step in range(10)]
TRUE = {0: {0: 2, 1: 4, 4: 5.5, 6: 7, 9: 9}, 1: {0: 1, 1: 2, 4: 1, 6: 0.5, 9: 0}}
COMPUTED = [0, 1, 4, 6, 9]


def by_hand(order: int):
    model = Toy()
    model.residual = lambda step, branch: torch.tensor(float(TRUE[branch].get(step, math.nan)))
    with teacache(model, scripted(COMPUTED, 10, order=order)) as cache:
        outputs = numbers(sample(model, TENTHS))
    return cache, outputs[::2], [output - 100 for output in outputs[1::2]]


def test_order_1_continues_two_lines_by_their_measured_gains():
    """Unconditional and difference: 1 at first; 0 and 5/6 at step 4; 3/4 and 1 (clipped from 1.2)
    at step 6."""
    cache, conditional, unconditional = by_hand(order=1)
    assert cache.schedule.as_text() == "##..#.#..#"
    # at 2 one line ahead, at 3 no further: 2 steps after a line of 1; at 5 a third of a line
    assert conditional == pytest.approx([2, 4, 6, 6, 5.5, 5.5 + 2.5 * 5 / 18, 7, 7.8125, 8.625, 9])
    assert unconditional == pytest.approx([1, 2, 3, 3, 1, 1, 0.5, 0.3125, 0.125, 0])


def test_drift_is_measured_for_both_orders_whatever_runs():
    by_order = ([2.5 / 6.5, 2 / 7.5, 2.5 / 9], [2.5 / 6.5, 11 / 18 / 7.5, 0.5 / 9])
    means = [f"{100 * np.mean(drifts):.1f} %" for drifts in by_order]
    for order in (0, 1):
        cache, *_ = by_hand(order)
        assert [cache.drift(0), cache.drift(1)] == pytest.approx(np.mean(by_order, axis=1))
        largest = f"max {100 * by_order[order][0]:.1f} % at step 4"
        shown = f"mean drift {means[order]} ({largest}; order {1 - order}: {means[1 - order]})"
        assert cache.summary().endswith(shown)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_residuals_that_are_zero_or_no_number_have_no_drift(value):
    model = Toy(lambda step, branch: torch.tensor(value))
    with teacache(model, config_of(8, order=1)) as cache:
        sample(model, 8)
    assert cache.drift(0) is cache.drift(1) is None
    assert "drift" not in cache.summary()


def test_drift_after_guidance_is_of_the_conditional_branch():
    model = Toy(lambda step, branch: torch.tensor([1.0, math.nan, 2.0][step]))
    with teacache(model, config_of(3, 9.0, guided_steps=2)) as cache:
        sample(model, 3)
    assert (cache.drift(0), cache.drift(1)) == (0.5, 0.5)


# Waits for the GPU and memory


@pytest.mark.parametrize("order", [0, 1])
def test_a_step_waits_for_the_gpu_once_and_the_end_once(monkeypatch, order):
    """Whatever reads a number from a tensor waits."""
    waits = []
    names = ("tolist", "numpy", "cpu", "item", "nonzero", "__bool__", "__float__", "__int__")
    for owner, name in [(torch, "equal"), *((torch.Tensor, name) for name in names)]:
        plain = getattr(owner, name)
        noted = partial(lambda plain, *args: waits.append(plain) or plain(*args), plain)
        monkeypatch.setattr(owner, name, partialmethod(noted) if owner is torch.Tensor else noted)
    model = Toy()
    with teacache(model, config_of(9, order=order)):
        for step in range(9):
            sample(model, 1, begin=step)
            assert len(waits) == step + 1 + (step == 8)


SHAPE = (1, 2048, 3)


def alive(shape=SHAPE) -> int:
    return sum(type(u) is torch.Tensor and u.shape == shape for u in gc.get_objects())


class Watching(Toy):
    """Counts the tensors that are alive before the blocks."""

    def __init__(self):
        super().__init__(lambda *_: torch.tensor(1.0))
        self.found = []
        self.blocks[0].register_forward_pre_hook(lambda *_: self.found.append(alive()))

    def call(self, steps, begin=0):
        for step in range(begin, begin + steps):
            for _ in (0, 1):  # outputs are dropped; each call has a timestep tensor of its own
                self([torch.zeros(SHAPE)], t=torch.tensor([2.0**-step]))


@pytest.mark.parametrize(("order", "older"), [(0, 0), (1, 2)])
def test_old_residuals_are_freed_when_a_step_is_decided(order, older):
    """Beside x in two dtypes: with order 1 two residuals of the step before; in the unconditional
    call the conditional residual and the conditional output."""
    model, second_model = Watching(), Watching()
    with teacache([model, second_model], config_of(8, 0.5, order=order)):
        model.call(6)
        assert model.found == [2, 4, *[2 + older, 4 + older] * 5]
        second_model.call(2, begin=6)
        assert second_model.found[0] == 2  # nothing of the first model
        assert alive() == 0


@pytest.mark.parametrize(
    ("ending", "guided"), [("last", None), ("last", 3), ("short", None), ("error", None)]
)
def test_no_tensor_and_no_model_outlives_the_sampling(ending, guided):
    models, config = [Toy(), Toy()], config_of(6, order=1, guided_steps=guided)
    with suppress(ZeroDivisionError), teacache(models, config) as cache:
        sample(models[0], 3, SHAPE)
        assert alive() > 0
        if ending == "error":
            raise ZeroDivisionError
        if ending == "last":
            sample(models[1], 3, SHAPE, begin=3)
            assert alive() == alive((1, 1024, 3)) == 0  # the VAE decodes now
    assert alive() == alive((1, 1024, 3)) == 0
    references = list(map(weakref.ref, models))
    models.clear()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert cache.schedule.computed_steps[:2] == [0, 2]


# Wan2.2: a timestep a token, two models


@pytest.mark.parametrize(("measure", "probe"), [(EMBEDDING, 0), (PROJECTION, 1)])
def test_a_skipped_step_projects_one_token(measure, probe):
    """The last token tells how far the embedding has moved, since the first may be 0."""
    model, counts = Toy(), []
    with teacache(model, config_of(8, 2.5, measure)) as cache:
        for step in range(8):
            before, t = model.time_projection.rows, torch.tensor([[0.0] * 8 + [2.0**-step] * 24])
            for _ in (0, 1):
                model([torch.zeros(1, 5, 3)], t=t)
            counts.append(model.time_projection.rows - before)
    computed = cache.schedule.computed_steps
    assert computed == {EMBEDDING: [0, 3, 6, 7], PROJECTION: [*range(5), 7]}[measure]
    assert counts == [(64 if step in computed else 2) + probe for step in range(8)]
    assert [d.distance for d in cache.schedule.decisions] == [None, *[0.5] * 7]


@pytest.mark.parametrize(
    ("measure", "computed"), [(EMBEDDING, "#....#.#"), (NOISE_LEVEL, "##.#.#.#")]
)
@pytest.mark.parametrize("order", [0, 1])
def test_the_first_step_of_the_second_model_is_computed(measure, computed, order):
    high, low = (Toy(lambda step, branch, by=by: torch.tensor(by + step)) for by in (10.0, 50.0))
    with teacache([high, low], config_of(8, 9.0, measure, order=order)) as cache:
        sample(high, 5)
        outputs = numbers(sample(low, 3, begin=5)[::2])
    assert cache.schedule.as_text() == computed
    assert outputs == [55, 55, 57]  # nothing of the first model's residuals
    assert cache.schedule.decisions[5].distance is None
    assert (high.runs, low.runs) == (2 * computed[:5].count("#"), 4)


# PyTorch's attention in place of Wan's


def softmax_attention(q, k, v):
    """The formula, for one sample [L, N, C]."""
    weights = torch.einsum("qnc,knc->nqk", q, k) / q.size(-1) ** 0.5
    return torch.einsum("nqk,knc->qnc", weights.softmax(-1), v)


def test_attention_equals_the_formula_within_key_lengths(monkeypatch):
    attend = Mock(wraps=nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind()
    for lengths in ([6, 3], [4, 4]):
        out = sdpa_attention(q, k, v, k_lens=torch.tensor(lengths))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(out[i], softmax_attention(q[i], k[i, :n], v[i, :n]))
    assert attend.call_args[0][3] is None  # a mask rules out PyTorch's fast kernels
    scaled = sdpa_attention(q, k, v, softmax_scale=0.5)[0]
    torch.testing.assert_close(scaled, softmax_attention(q[0] * 0.5 * 8**0.5, k[0], v[0]))


def test_attention_computes_in_vs_dtype_and_returns_qs():
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())
    with pytest.raises(NotImplementedError, match="window_size"):
        sdpa_attention(q, q, q, window_size=(3, 3))
