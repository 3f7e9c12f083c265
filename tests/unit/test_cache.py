"""The cache on exact arithmetic: toy models whose blocks add known numbers."""

import gc
import inspect
import math
import weakref
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from scripted import Scripted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import teacache_generate
from teacache_generate import (
    Drift,
    TeaCacheConfig,
    relative_l1,
    sdpa_attention,
    shadow,
    teacache,
)

ALWAYS = [0.0, 0.0, 0.0, 0.0, 1.0]  # every distance adds 1
NEVER = [0.0] * 5


class Block(nn.Module):
    """Half of the residual that the toy has now, in float32, as Wan's gated sums give it."""

    def __init__(self, toy: "Toy"):
        super().__init__()
        self.toy, self.runs = weakref.ref(toy), 0

    def forward(self, x, e):
        self.runs += 1
        toy = self.toy()
        return x.float() + toy.residual(*toy.now) / 2


class Toy(nn.Module):
    """The frame of a WanModel: x in bfloat16, e, e0, blocks, head. One sample.

    residual: of a step and a branch, anything that can be added to [1, tokens, dim].
    """

    def __init__(self, residual=lambda step, branch: torch.tensor(6.0 * 2.0**-step)):
        super().__init__()
        self.time_projection = nn.Linear(2, 12, bias=False)
        nn.init.ones_(self.time_projection.weight)
        self.blocks = nn.ModuleList([Block(self), Block(self)])
        self.residual, self.now, self.head_dtypes = residual, (0, 0), []

    def forward(self, x, t, context=None, seq_len=None):
        """The toy's own docstring."""
        e0 = self.time_projection(self.embed(t))
        x = x[0].bfloat16()
        for block in self.blocks:
            x = block(x, e=e0)
        self.head_dtypes.append(x.dtype)
        return [x]

    def embed(self, t):
        return torch.cat([t, t]).float()[None]  # [1, 2]

    @property
    def runs(self) -> int:
        return self.blocks[0].runs


class ToyVace(Toy):
    vace_runs = 0

    def forward_vace(self, x, kwargs):
        self.vace_runs += 1
        return [x]

    def forward(self, x, t, context=None, seq_len=None):
        hints = self.forward_vace(x, {})
        out = super().forward(x, t)
        self.hints_of_last_call = hints
        return out


def config(steps, thresh=1.5, mode="plain", coefficients=ALWAYS, **settings):
    return TeaCacheConfig(steps, thresh, mode, coefficients, **settings)


def scripted(script, steps, **settings):
    return Scripted(steps, 1.0, coefficients=NEVER, script=tuple(script), **settings)


def sample(model, timesteps, shape=(1, 1, 1), begin=0):
    """What a pipeline does: two calls a step. Latents are 0, of the unconditional call 100."""
    if isinstance(timesteps, int):
        timesteps = [2.0**-step for step in range(timesteps)]  # each is half of the one before
    outputs = []
    for step, timestep in enumerate(timesteps, begin):
        t = torch.tensor([timestep], dtype=torch.float64)
        for branch in (0, 1):
            model.now = step, branch
            outputs.append(model([torch.full(shape, 100.0 * branch)], t=t, context=None)[0])
    return outputs


def numbers(outputs) -> list[float]:
    """Of one element each."""
    return [out.item() for out in outputs]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------ as published


def published(model, config, timesteps, shape):
    """TeaCache by its description, for order 0: the outputs of all calls."""
    outputs, residuals, before, accumulated = [], {}, None, 0.0
    for step, timestep in enumerate(timesteps):
        e = model.embed(torch.tensor([timestep], dtype=torch.float64))
        signal = model.time_projection(e) if config.mode == "retention" else e
        always = step < 5 if config.mode == "retention" else step in (0, config.steps - 1)
        if before is not None and not always:
            distance = ((signal - before).abs().mean() / before.abs().mean()).item()
            accumulated += np.poly1d(config.coefficients)(distance)
        before = signal
        computes = always or accumulated >= config.thresh
        if computes:
            accumulated = 0.0
        for branch in (0, 1):
            h = torch.full(shape, 100.0 * branch).bfloat16()
            if computes:
                out = h.float() + model.residual(step, branch) / 2
                out = out + model.residual(step, branch) / 2
                residuals[branch] = out - h
            else:
                out = h + residuals[branch]
            outputs.append(out)
    return outputs


@pytest.mark.parametrize("mode", ["plain", "retention"])
@pytest.mark.parametrize("thresh", [0.0, 0.1, 0.3])
def test_order_0_is_as_published_to_the_bit(mode, thresh):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(20, 2, 1, 7, 5, generator=generator)
    timesteps = (1000 * np.linspace(1, 0.05, 20) ** 0.7).tolist()
    settings = config(20, thresh, mode, [0.0, 3.0, -0.5, 1.1, 0.01])
    model = Toy(lambda step, branch: given[step, branch])
    with teacache(model, settings) as cache:
        outputs = sample(model, timesteps, (1, 7, 5))
    assert (len(cache.schedule.computed_steps) < 20) == (thresh > 0)
    for ours, theirs in zip(outputs, published(model, settings, timesteps, (1, 7, 5)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_skipped_step_adds_the_residual_of_its_own_branch():
    model = Toy(lambda step, branch: torch.tensor(6.0 * 2.0**-step + branch))
    with teacache(model, config(4)) as cache:
        outputs = numbers(sample(model, 4))
    assert outputs == [6.0, 107.0, 6.0, 107.0, 1.5, 102.5, 0.75, 101.75]
    assert cache.schedule.computed_steps == [0, 2, 3]
    assert [block.runs for block in model.blocks] == [6, 6]


def test_the_head_gets_the_same_dtype_on_computed_and_skipped_steps():
    model = Toy()
    for order in (0, 1):
        with teacache(model, config(6, order=order)):
            sample(model, 6)
    assert set(model.head_dtypes) == {torch.float32}


@pytest.mark.parametrize("order", [0, 1])
def test_a_sum_keeps_the_bits_that_bfloat16_would_lose(order):
    model = Toy(lambda step, branch: torch.tensor(0.328125))
    with teacache(model, config(4, 9.0, order=order)):
        outputs = numbers(sample(model, 4))
    assert outputs[3] == 100.328125  # bfloat16 knows 100 and 100.5


@pytest.mark.parametrize("mode", ["plain", "retention"])
def test_the_distance_is_taken_to_the_step_before_skipped_or_not(mode):
    model = Toy()
    with teacache(model, config(7, 9.0, mode)) as cache:
        sample(model, 7)
    assert [step.distance for step in cache.schedule.decisions] == [None, *[0.5] * 6]
    assert [step.timestep for step in cache.schedule.decisions] == [2.0**-i for i in range(7)]


def test_the_relative_distance_is_the_mean_change_over_the_mean_size():
    assert relative_l1(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -2.0])).item() == 0.5


@pytest.mark.parametrize(("mode", "size"), [("plain", 2), ("retention", 12)])
def test_retention_steps_compare_the_output_of_time_projection(mode, size):
    model = Toy()
    with teacache(model, config(2, mode=mode)) as cache:
        sample(model, 1)
        assert cache.signal.shape == (size,)


def test_vace_runs_its_blocks_on_computed_steps_only():
    model = ToyVace()
    with teacache(model, config(4)):
        sample(model, 4)
    assert model.vace_runs == 6


# ----------------------------------------------------- order 1, as test_order.py has it


def test_order_1_measures_each_branch_at_a_computed_step_for_the_skipped_ones_after_it():
    # at .9 and .8 computed, .7 skipped, .6 computed, .5 and .4 skipped, .3 and .2 computed
    true = {0: {0: 2, 1: 4, 3: 5, 6: 9, 7: 9}, 1: {0: 1, 1: 2, 3: 6, 6: 9, 7: 9}}
    model = Toy(lambda step, branch: torch.tensor(float(true[branch][step])))
    timesteps = [900, 800, 700, 600, 500, 400, 300, 200]
    with teacache(model, scripted([0, 1, 3, 6, 7], 8, order=1)) as cache:
        outputs = numbers(sample(model, timesteps))
    # unconditional: 2 + 1/2 * 1, half of the line at first; then the gain is 4 / (2 * 1), clipped
    # to 1, where 1/3 was expected after two steps: the mean is 2/3, and so the bend 1/4
    # of a line of 4, a step and half a gap on 4/10, two steps and a gap on 2/3
    unconditional = [1, 2, 2.5, 6, 6 + 4 * 2 / 5, 6 + 4 * 2 / 3, 9, 9]
    assert [out - 100 for out in outputs[1::2]] == pytest.approx(unconditional)
    # difference: 1, 2, 2.5; then -1 where 4 was the line: gain 0, the mean 1/6, the bend 5/2
    # of a line of -3, half a gap on 1/7, a gap on 1/6
    difference = [1, 2, 2.5, -1, -1 - 3 / 7, -1 - 3 / 6, 0, 0]
    conditional = [u + d for u, d in zip(unconditional, difference, strict=True)]
    assert outputs[::2] == pytest.approx(conditional)
    assert cache.schedule.marks() == "##.#..##"


def test_it_is_measured_at_a_computed_step_after_a_computed_one_too():
    true = [1.0, 2.0, 2.25, None, 9.0]
    model = Toy(lambda step, branch: torch.tensor(true[step]))
    with teacache(model, scripted([0, 1, 2, 4], 5, order=1)):
        outputs = numbers(sample(model, [900, 800, 700, 600, 500]))
    assert outputs[1::2] == pytest.approx([101, 102, 102.25, 102.25 + 0.375 * 0.25, 109])


def test_order_1_holds_where_the_computed_steps_are_at_one_place():
    true = [1.0, 2.0, None, 3.0, None, 9.0]
    model = Toy(lambda step, branch: torch.tensor(true[step]))
    timesteps = [1000.0, 1000.0, 900.0, 800.0, 700.0, 600.0]
    with teacache(model, scripted([0, 1, 3, 5], 6, order=1)) as cache:
        outputs = numbers(sample(model, timesteps))
    assert outputs[4] == 2.0
    # the bend is 1 still, since no line was there to be measured: of half a gap half
    assert outputs[8] == pytest.approx(3 + 1 / 4)
    assert cache.measurements.drifts[0] == Drift(3, (1 / 3, 1 / 3))


def test_order_1_holds_where_there_is_one_residual_only():
    model = Toy()
    with teacache(model, config(4, 9.0, order=1)):
        assert numbers(sample(model, 4))[:6:2] == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("guided", [0, 3])
def test_order_1_goes_on_where_only_the_conditional_branch_runs(guided):
    true = [1.0, 2.0, 2.5, 2.75, None, 9.0]
    model = Toy(lambda step, branch: torch.tensor(true[step] + 7.0 * branch * step))
    settings = {"order": 1, "guided_steps": guided}
    with teacache(model, scripted([0, 1, 2, 3, 5], 6, **settings)):
        outputs = numbers(sample(model, [900, 800, 700, 600, 500, 400]))
    assert outputs[8] == pytest.approx(2.75 + 0.5 * 0.25)


@pytest.mark.parametrize(
    ("tokens", "measured"), [(80, 80), (1024, 1024), (1025, 513), (9000, 1000)]
)
def test_about_a_thousand_tokens_are_measured_all_of_them_in_small_models(tokens, measured):
    model = Toy()
    with teacache(model, config(3)) as cache:
        sample(model, 1, (1, tokens, 3))
        (computed,) = cache.residuals.newest_first
        sampled = computed.sampled[0]
        assert sampled.shape == (1, measured, 3)
        assert sampled.untyped_storage().nbytes() == measured * 3 * 4  # nothing behind it
        assert computed.residuals[0].shape == (1, tokens, 3)


def test_measured_are_every_nth_tokens():
    model = Toy(lambda step, branch: torch.arange(2049.0)[None, :, None])
    with teacache(model, config(3)) as cache:
        sample(model, 1, (1, 2049, 1))
        (computed,) = cache.residuals.newest_first
        assert computed.sampled[0].flatten().tolist() == list(range(0, 2049, 3))


# ------------------------------------------------------------------------------------------- drift


TRUE = {0: [2, 4, None, 3, 4, None, 2], 1: [1, 2, None, -6, 4, None, 2]}


@pytest.mark.parametrize("order", [0, 1])
def test_drift_is_how_far_both_guesses_would_have_been_off_whatever_the_order(order):
    model = Toy(lambda step, branch: torch.tensor(float(TRUE[branch][step])))
    with teacache(model, scripted([0, 1, 3, 4, 6], 7, order=order)) as cache:
        sample(model, [900, 800, 700, 600, 500, 400, 300])
    # at 3: true 3 and -6; held 4 and 2; the line, a step on as its ends are apart, so half of D: 5
    # and 2.5. Then, after two steps, 1/3 was expected, and the gains are 0 of the unconditional one
    # and 1 of the difference: the bends are 5/2 and 1/4
    # at 4: D is -8 and 7, but 10 and -9 are gone, against both, where 2/7 and 4/5 was expected: the
    # means are 1/7 and 2/5
    # at 6: true 2 and 2; held 4 and 4; the line, one step and one gap on, 4 + 10 / 7 for the
    # unconditional one, and that - 9 * 2/5
    assert [drift.step for drift in cache.measurements.drifts] == [3, 6]
    held, extrapolated = zip(*(drift.by_order for drift in cache.measurements.drifts), strict=True)
    assert held == pytest.approx([9 / 9, 4 / 4])
    assert extrapolated == pytest.approx([10.5 / 9, (24 / 7 + 6 / 35) / 4])
    assert cache.measurements.drift(0) == pytest.approx(1.0)
    assert cache.measurements.drift(1) == pytest.approx((10.5 / 9 + 3.6 / 4) / 2)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (
            0,
            "; reused residuals were off by 20.0 % (largest 25.0 % at step 3); by order 1 they "
            "would have been by 7.5 %",
        ),
        (
            1,
            "; reused residuals were off by 7.5 % (largest 15.0 % at step 5); by order 0 they "
            "would have been by 20.0 %",
        ),
    ],
)
def test_the_last_line_tells_the_drift_of_both_orders(order, said):
    model = Toy()
    with teacache(model, config(4, order=order)) as cache:
        sample(model, 4)
    cache.measurements.drifts = [Drift(3, (0.25, 0.0)), Drift(5, (0.15, 0.15))]
    assert cache.summary().endswith(said)


def test_without_a_skipped_step_there_is_no_drift():
    model = Toy()
    with teacache(model, config(4, 1e-9)) as cache:
        sample(model, 4)
    assert cache.measurements.drifts == []
    assert cache.measurements.drift(0) is None
    assert "off by" not in cache.summary()


def test_residuals_that_are_nothing_or_no_number_have_no_drift():
    for value in (0.0, math.nan, math.inf):
        model = Toy(lambda step, branch, value=value: torch.tensor(value))
        with teacache(model, config(4, order=1)) as cache:
            sample(model, 4)
        assert all(math.isfinite(drift.by_order[1]) for drift in cache.measurements.drifts)


def test_nothing_is_measured_at_threshold_0(monkeypatch):
    monkeypatch.setattr(teacache_generate, "totals", None)
    model = Toy()
    with teacache(model, config(4, 0.0, order=1)) as cache:
        for step in range(4):
            sample(model, [2.0**-step], begin=step)
            assert not cache.residuals.newest_first and not cache.measurements.unread
    assert model.runs == 8
    assert cache.measurements.drifts == []


class Synchronised(TorchDispatchMode):
    """Counts what has to wait for a GPU: numbers that are brought to the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        for name in ("tolist", "numpy", "cpu", "item"):
            plain = getattr(torch.Tensor, name)

            def counting(tensor, *args, name=name, plain=plain):
                self.found[name] += 1
                return plain(tensor, *args)

            monkeypatch.setattr(torch.Tensor, name, counting)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("thresh", [0.0, 1.5])
def test_a_step_waits_for_the_gpu_once_and_the_end_once_more(monkeypatch, order, thresh):
    model = Toy()
    with Synchronised(monkeypatch) as waits, teacache(model, config(9, thresh, order=order)):
        for step in range(8):
            sample(model, [2.0**-step], begin=step)
            assert waits.found == {"tolist": step + 1}
        sample(model, [2.0**-8], begin=8)
    assert waits.found == {"tolist": 10 if thresh else 9}


# -------------------------------------------------------------------------------- what stays alive


def alive(shape) -> int:
    return sum(type(u) is torch.Tensor and u.shape == shape for u in gc.get_objects())


@pytest.mark.parametrize(("order", "most"), [(0, 5), (1, 7)])
def test_so_many_tensors_are_alive_while_the_blocks_run(order, most):
    """x, h in bfloat16, the first block's output, what the last call returned, the conditional
    residual of this step; at order 1 both of the computed step before. Samples are smaller here."""
    model, found, shape = Toy(), [], (1, 2048, 3)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: found.append(alive(shape)))
    with teacache(model, config(8, 0.5, order=order)):
        for step in range(8):
            t = torch.tensor([2.0**-step])
            for _ in (0, 1):
                model([torch.zeros(shape)], t=t)
    assert max(found) == most
    assert alive(shape) == 0


@pytest.mark.parametrize("order", [0, 1])
def test_kept_are_the_residuals_of_the_last_step_and_by_order_1_of_the_one_before(order):
    model, kept = Toy(), []
    with teacache(model, config(12, mode="retention", order=order)) as cache:
        for step in range(12):
            sample(model, [2.0**-step], begin=step)
            kept.append([len(one.residuals) for one in cache.residuals.newest_first])
        assert cache.schedule.marks() == "#####.#.#.#."
    older = 2 * order
    assert kept == [[2], *[[2, older]] * 10, []]


def test_after_the_guided_steps_no_unconditional_residual_is_kept():
    model, kept = Toy(), []
    with teacache(model, config(8, 0.5, guided_steps=4)) as cache:
        for step in range(8):
            sample(model, [2.0**-step], begin=step)
            kept.append([sorted(one.residuals) for one in cache.residuals.newest_first[:1]])
    assert kept == [[[0, 1]]] * 4 + [[[0]]] * 3 + [[]]


@pytest.mark.parametrize("ending", ["whole", "short", "error"])
def test_no_tensor_and_no_model_outlives_the_sampling(ending):
    shape = (1, 2048, 3)
    model, other = Toy(), Toy()
    try:
        with teacache([model, other], config(6, order=1)) as cache:
            sample(model, 3, shape)
            if ending == "error":
                raise ValueError
            if ending == "whole":
                sample(other, [2.0**-step for step in range(3, 6)], shape, begin=3)
                assert alive(shape) == 0  # the VAE is next, before the end of the with
                assert alive((1, 1024, 3)) == 0
    except ValueError:
        pass
    assert alive(shape) == alive((1, 1024, 3)) == 0
    models = [weakref.ref(model), weakref.ref(other)]
    del model, other
    gc.collect()
    assert [ref() for ref in models] == [None, None]
    assert cache.schedule.decisions


class Tokens(Toy):
    """As Wan2.2's ti2v: a timestep for each token; those of the given frame are 0."""

    def embed(self, t):
        return torch.stack([t, t], dim=-1).float()  # [1, tokens, 2]


@pytest.mark.parametrize("mode", ["plain", "retention"])
def test_of_a_timestep_for_each_token_the_last_token_tells(mode):
    model = Tokens()
    with teacache(model, config(6, 9.0, mode)) as cache:
        for step in range(5):
            t = torch.full((1, 4096), 2.0**-step)
            t[:, :1024] = 0
            for _ in (0, 1):
                model([torch.zeros(1, 5, 3)], t=t)
            size = 2 if mode == "plain" else 12
            assert cache.signal.untyped_storage().nbytes() == 4 * size  # not of all tokens
    assert [step.distance for step in cache.schedule.decisions] == [None, *[0.5] * 4]
    assert [step.timestep for step in cache.schedule.decisions] == [2.0**-step for step in range(5)]


# ------------------------------------------------------------------------------- Wan2.2: two models


def test_a_residual_never_crosses_from_one_model_to_the_other():
    high, low = (Toy(lambda step, branch, by=by: torch.tensor(by + step)) for by in (10.0, 50.0))
    with teacache([high, low], config(8, 9.0, order=1)) as cache:
        outputs = numbers(sample(high, 3)[::2])
        assert len(cache.residuals.newest_first) == 1
        outputs += numbers(sample(low, [2.0**-step for step in range(3, 8)], begin=3)[::2])
    assert outputs == [10, 10, 10, 53, 53, 53, 53, 57]
    assert cache.schedule.marks() == "#..#...#"
    assert cache.schedule.decisions[3].distance is None
    assert [drift.step for drift in cache.measurements.drifts] == [7]
    assert (high.runs, low.runs) == (2, 4)


@pytest.mark.parametrize(("mode", "marks"), [("plain", "#....#.#"), ("sigma", "##...#.#")])
def test_the_first_step_of_the_second_model_is_computed(mode, marks):
    high, low = Toy(), Toy(lambda step, branch: torch.tensor(50.0 + step))
    with teacache([high, low], config(8, 9.0, mode)) as cache:
        sample(high, 5)
        outputs = numbers(sample(low, [2.0**-step for step in range(5, 8)], begin=5)[::2])
    assert outputs == [55, 55, 57]
    assert cache.schedule.marks() == marks


def test_only_the_active_models_residuals_are_alive():
    high, low, shape = Toy(), Toy(), (1, 2048, 3)
    found = []
    low.blocks[0].register_forward_pre_hook(lambda *_: found.append(alive(shape)))
    with teacache([high, low], config(8, 0.5, order=1)):
        for step in range(4):
            model = high if step < 3 else low
            for _ in (0, 1):
                model([torch.zeros(shape)], t=torch.tensor([2.0**-step]))
    assert found[0] == 3  # x, h and what the last call returned: nothing else of the other model's


# -------------------------------------------------------------------------------- what is no cache


@pytest.fixture
def compiler():
    yield lambda model: torch.compile(model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("used_before", [False, True])
def test_a_compiled_model_is_an_error_and_not_a_cache_that_skips_nothing(compiler, used_before):
    compiled = compiler(Toy())
    if used_before:
        sample(compiled, 1)
    with pytest.raises(RuntimeError, match=r"torch\.compile"), teacache(compiled, config(4)):
        sample(compiled, 1)


class Past(Toy):
    """Its forward can go past its blocks, as a graph does that was compiled with others."""

    past = False

    def forward(self, x, t, context=None, seq_len=None):
        if not self.past:
            return super().forward(x, t)
        self.time_projection(self.embed(t))
        return [x[0].bfloat16()]


def test_a_forward_that_goes_past_the_blocks_in_a_later_step_only_is_an_error_too():
    model = Past()
    with teacache(model, config(4)):
        sample(model, 2)
        model.past = True
        with pytest.raises(RuntimeError, match="went past"):
            sample(model, [0.25], begin=2)


@pytest.mark.parametrize("in_place", [False, True])
def test_where_compiling_goes_through_the_cache_it_skips_as_it_says(compiler, in_place):
    model = Toy()
    called = compiler(model)
    if in_place:
        model.compile(backend="eager")
        called = model
    with teacache(model, config(3)) as cache:
        assert numbers(sample(called, 3)) == [6.0, 106.0, 6.0, 106.0, 1.5, 101.5]
    assert cache.schedule.computed_steps == [0, 2]
    assert model.runs == 4


def test_compiled_blocks_are_served(compiler):
    model = Toy()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiler(block)
    with teacache(model, config(4)):
        assert numbers(sample(model, 4)) == [6.0, 106.0, 6.0, 106.0, 1.5, 101.5, 0.75, 100.75]


def test_a_pipeline_that_calls_once_a_step_is_an_error_at_its_second_call():
    model = Toy()
    with teacache(model, config(4)), pytest.raises(RuntimeError, match="distilled"):
        model([torch.zeros(1, 1, 1)], t=torch.tensor([1.0]))
        model([torch.zeros(1, 1, 1)], t=torch.tensor([0.5]))
    assert model.runs == 1


def test_two_calls_may_have_a_timestep_of_their_own_each():
    model = Toy()
    with teacache(model, config(2)) as cache:
        for timestep in (1.0, 0.5):
            for _ in (0, 1):
                model([torch.zeros(1, 1, 1)], t=torch.tensor([timestep]))
    assert cache.schedule.computed_steps == [0, 1]


def test_more_steps_than_configured_are_an_error_and_fewer_a_warning(caplog):
    model = Toy()
    with pytest.raises(RuntimeError, match="sampling_steps"), teacache(model, config(4)):
        sample(model, 5)
    with teacache(model, config(4)) as cache:
        sample(model, 3)
    assert "set up for 4 steps, but saw 3" in caplog.text
    assert cache.summary().startswith("TeaCache: computed 2 of 3 steps (0 2)")
    # what was measured is read all the same
    assert [drift.step for drift in cache.measurements.drifts] == [2]
    assert len(cache.measurements.times) == 5  # begin, three decisions, end
    with teacache(model, config(4)) as cache:
        pass
    assert cache.summary() == "TeaCache: no step was taken"


def test_negative_increments_are_said_with_their_steps(caplog):
    model = Toy()
    with teacache(model, config(5, coefficients=[0.0, 0.0, 0.0, 0.0, -1.0])):
        sample(model, 5)
    assert "negative increments at steps 1-3:" in caplog.text


# ----------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize(("guided", "runs"), [(None, 6), (4, 6), (3, 5), (2, 4), (0, 3)])
def test_without_guidance_the_unconditional_call_returns_the_conditional_output(guided, runs):
    model = Toy()
    with teacache(model, config(4, guided_steps=guided)) as cache:
        outputs = sample(model, 4)
    assert cache.schedule.computed_steps == [0, 2, 3]
    assert model.runs == runs == cache.schedule.passes
    for step, (conditional, unconditional) in enumerate(
        zip(outputs[::2], outputs[1::2], strict=True)
    ):
        same = guided is not None and step >= guided
        assert (unconditional is conditional) == same


def test_the_last_line_counts_passes_where_not_all_steps_are_guided():
    model = Toy()
    with teacache(model, config(4, guided_steps=3)) as cache:
        sample(model, 4)
    assert cache.summary().split("; ")[1] == "5 of 8 passes"
    with teacache(model, config(4, guided_steps=4)) as cache:
        sample(model, 4)
    assert "passes" not in cache.summary()


def test_drift_after_the_guided_steps_is_of_the_conditional_branch():
    true = {0: [1.0, None, 2.0], 1: [1.0, None, None]}
    model = Toy(lambda step, branch: torch.tensor(true[branch][step]))
    with teacache(model, config(3, 9.0, guided_steps=2)) as cache:
        sample(model, 3)
    assert cache.measurements.drifts == [Drift(2, (0.5, 0.5))]


def test_the_summary_counts_steps_and_calls_its_speedup_an_estimate():
    model = Toy()
    with teacache(model, config(4)) as cache:
        sample(model, 4)
    # computed 4, skipped 1, computed 4 and 4 s
    cache.measurements.times = [0.0, 1.0, 5.0, 6.0, 10.0, 14.0]
    assert cache.summary().startswith(
        "TeaCache: computed 3 of 4 steps (0 2 3), sampling 14.0 s, about 1.14x of stock "
        "(estimated from the computed steps); reused residuals were off by "
    )


def test_an_unguided_step_counts_as_half_a_step_of_stock():
    model = Toy()
    with teacache(model, config(4, guided_steps=2)) as cache:
        sample(model, 4)
    # 4 s for two passes, 1, 2 and 2 s for one
    cache.measurements.times = [0.0, 1.0, 5.0, 6.0, 8.0, 10.0]
    assert cache.measurements.speedup == pytest.approx(2 * 2 * 4 / 10)


def test_an_interrupted_sampling_tells_of_its_whole_steps():
    model = Toy()
    with pytest.raises(KeyboardInterrupt), teacache(model, config(6)) as cache:
        sample(model, 3)
        raise KeyboardInterrupt
    assert cache.summary().startswith("TeaCache: computed 2 of 3 steps (0 2)")
    with pytest.raises(KeyboardInterrupt), teacache(model, config(6)) as cache:
        sample(model, 1)
        raise KeyboardInterrupt
    assert cache.summary() == "TeaCache: no step was taken"


# --------------------------------------------------------------------------- the model is as before


def attributes(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    own = {"vace_runs", "now", "head_dtypes", "hints_of_last_call"}
    return {name: value for name, value in vars(model).items() if name not in own}, hooks


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, "too many", "inside"])
@pytest.mark.parametrize("kind", [Toy, ToyVace])
def test_the_models_are_left_as_they_were_on_every_way_out(kind, error):
    models = [kind(), kind()]
    before = [attributes(model) for model in models]
    stock = numbers(sample(kind(), 4))
    expected = (RuntimeError, ValueError, KeyboardInterrupt, ZeroDivisionError)
    with pytest.raises(expected), teacache(models, config(4)) as cache:
        assert all(attributes(m) != b for m, b in zip(models, before, strict=True))
        sample(models[0], 5 if error == "too many" else 2)
        if error == "inside":
            models[1].residual = lambda *_: 1 / 0
        sample(models[1], 2, begin=2)
        raise error
    models[1].residual = models[0].residual
    before[1][0]["residual"] = models[0].residual
    assert [attributes(model) for model in models] == before
    assert not cache.residuals.newest_first
    assert [numbers(sample(model, 4)) for model in models] == [stock, stock]


def test_where_the_second_model_cannot_be_taken_the_first_is_given_back():
    free, taken = Toy(), Toy()
    before = attributes(free)
    with ExitStack() as stack:
        stack.enter_context(teacache(taken, config(4)))
        with pytest.raises(RuntimeError, match="leave that one first"):
            stack.enter_context(teacache([free, taken], config(4)))
        assert attributes(free) == before


def test_a_forward_of_the_instance_is_used_and_comes_back():
    model = Toy()  # Ulysses and ring set one, where a patched class is never asked

    def own(x, t, **kwargs):
        return [u + 1000 for u in Toy.forward(model, x, t)]

    model.forward = own
    with teacache(model, config(4)):
        assert numbers(sample(model, 4))[:2] == [1006.0, 1106.0]
    assert vars(model)["forward"] is own


def test_only_the_instance_is_patched():
    model, other = Toy(), Toy()
    forward = Toy.forward
    with teacache(model, config(4)):
        assert Toy.forward is forward
        assert "forward" not in vars(other)
        stock = numbers(sample(other, 4))
    assert stock == numbers(sample(Toy(), 4))


def test_two_models_can_be_nested_and_one_cannot():
    outer, inner = Toy(), Toy()
    with teacache(outer, config(4)) as one, teacache(inner, config(4, 0.5)) as two:
        sample(outer, 4)
        sample(inner, 4)
        with pytest.raises(RuntimeError, match="leave that one first"), teacache(outer, config(4)):
            pass
        assert "forward" in vars(outer)
    assert (one.schedule.computed_steps, two.schedule.computed_steps) == ([0, 2, 3], [0, 1, 2, 3])


def test_the_model_in_an_fsdp_wrapper_is_served():
    model = Toy()
    wrapper = nn.Module()
    wrapper.module = model
    with teacache(wrapper, config(4)) as cache:
        sample(model, 4)
    assert cache.schedule.computed_steps == [0, 2, 3]


def test_the_patched_forward_keeps_name_and_signature():
    model = Toy()
    signature = inspect.signature(model.forward)
    with teacache(model, config(4)):
        assert model.forward.__name__ == "forward"
        assert model.forward.__doc__ == "The toy's own docstring."
        assert inspect.signature(model.forward) == signature


def test_shadow_gives_back_what_was_there_and_removes_what_was_not():
    target = nn.Module()
    target.old = 1
    with pytest.raises(ZeroDivisionError), shadow(target, old=2, new=3):
        assert (target.old, target.new) == (2, 3)
        raise ZeroDivisionError
    assert target.old == 1
    assert not hasattr(target, "new")


# ------------------------------------------------------------------------------------- attention


def softmax_attention(q, k, v):
    """By the formula, for one sample [L, N, C]."""
    weights = torch.einsum("qnc,knc->nqk", q, k) / q.size(-1) ** 0.5
    return torch.einsum("nqk,knc->qnc", weights.softmax(-1), v)


def test_attention_is_the_formula_and_respects_key_lengths():
    q, k, v = torch.randn(3, 2, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v, k_lens=torch.tensor([6, 3]))
    torch.testing.assert_close(out[0], softmax_attention(q[0], k[0], v[0]))
    torch.testing.assert_close(out[1], softmax_attention(q[1], k[1, :3], v[1, :3]))


def test_attention_of_samples_of_one_length_needs_no_mask(monkeypatch):
    """With one, PyTorch's fast kernels are ruled out: a run of Wan has one sample."""
    masks, stock = [], nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, mask, *others):
        masks.append(mask)
        return stock(q, k, v, mask, *others)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", recorded)
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v, k_lens=torch.tensor([4]))
    torch.testing.assert_close(out[0], softmax_attention(q[0], k[0, :4], v[0, :4]))
    assert masks == [None]


def test_attention_computes_in_the_dtype_of_v_and_returns_that_of_q():
    q, k, v = torch.randn(3, 1, 6, 4, 8).unbind()
    out = sdpa_attention(q, k, v.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())


def test_attention_refuses_a_window():
    q = torch.randn(1, 6, 4, 8)
    with pytest.raises(NotImplementedError, match="window_size"):
        sdpa_attention(q, q, q, window_size=(3, 3))
