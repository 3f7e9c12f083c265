"""The patches on a model: what they change, refuse and restore."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import Toy, config_of, in_turn, numbers, sample

from teacache_generate import TeaCacheConfig, teacache


def expected_of(model, computed) -> list[float]:
    """The outputs of order 0: stock's on computed steps, else the last residual's."""
    stock, found = numbers(sample(model, 6)), []
    for step in range(6):
        last = max(i for i in computed if i <= step)
        found += stock[2 * last : 2 * last + 2]
    return found


# Forks: forwards that do more with their blocks


FORKS = {
    "skips one": lambda blocks, x, e: in_turn((b for i, b in enumerate(blocks) if i != 1), x, e),
    "leaves out the first": lambda blocks, x, e: in_turn(blocks[1:], x, e),
    "leaves out the last": lambda blocks, x, e: in_turn(list(blocks)[:-1], x, e),
    "reversed": lambda blocks, x, e: in_turn(reversed(blocks), x, e),
    "twice": lambda blocks, x, e: in_turn(blocks, in_turn(blocks, x, e), e),
    "moves blocks": lambda blocks, x, e: in_turn((b.to(x.device) for b in blocks), x, e),
    "x as keyword": lambda blocks, x, e: blocks[1](e=e, x=blocks[0](x=x, e=e)),
    "calls forward": lambda blocks, x, e: blocks[0].forward(x, e),
    "adds between blocks": lambda blocks, x, e: blocks[1](blocks[0](x, e) * 2 + 1, e) + 3,
    "adds in place": lambda blocks, x, e: blocks[1](blocks[0](x, e).add_(1), e).add_(3),
}


@pytest.mark.parametrize("fork", FORKS)
def test_a_forks_loop_over_its_blocks_keeps_working(fork):
    model = Toy(loop=FORKS[fork])
    for thresh, computed in ((0.0, range(6)), (1.5, [0, 2, 4, 5])):
        with teacache(model, config_of(6, thresh)) as cache:
            outputs = numbers(sample(model, 6))
        assert cache.schedule.computed_steps == list(computed)
        assert outputs == expected_of(model, computed)


def test_a_forward_that_bypasses_the_patches_is_an_error():
    model = Toy()
    with pytest.raises(RuntimeError, match=r"step 2.*blocks"), teacache(model, config_of(4)):
        sample(model, 2)
        model.loop = lambda blocks, x, e: x
        sample(model, 1, begin=2)
    model.forward = lambda x, t, context: x
    with pytest.raises(RuntimeError, match=r"step 0.*thresh 0"), teacache(model, config_of(4)):
        sample(model, 1)


# Wrappers and torch.compile


class Wrapper(nn.Module):
    """As FSDP with mixed precision: casts what it passes on."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, t, **kwargs):
        return self.module(x, t=t.bfloat16(), **kwargs)


class Peft(Wrapper):
    """As get_peft_model: two layers, the inner one calls forward itself."""

    def __init__(self, model):
        super().__init__(nn.ModuleDict({"model": model}))

    def forward(self, *args, **kwargs):
        return self.module["model"].forward(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [Wrapper, Peft, lambda model: Peft(Wrapper(model))])
def test_the_model_in_a_wrapper_is_patched(wrapper):
    """Beside one without."""
    high, low = Toy(), Toy()
    wrapped, timesteps = wrapper(high), [999.0, 990.0, 981.0, 972.0, 963.0, 954.0]
    with teacache([wrapped, low], config_of(6)) as cache:
        outputs = sample(high, timesteps[:3], called=wrapped) + sample(low, timesteps[3:], begin=3)
    assert numbers(outputs) == expected_of(Toy(), [0, 2, 3, 5])
    assert [d.timestep for d in cache.schedule.decisions] == timesteps  # in bfloat16 1000, 992...
    assert not wrapped._forward_pre_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks_are_patched_and_restored(in_place):
    """Without compiling them again."""
    torch._dynamo.reset()
    model, graphs = Toy(), []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for i, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend=eager)
        else:
            model.blocks[i] = torch.compile(block, backend=eager)
    calls = [block._compiled_call_impl for block in model.blocks]
    expected = expected_of(model, [0, 2, 4, 5])
    runs, count = model.runs, len(graphs)
    with teacache(model, config_of(6)):
        assert numbers(sample(model, 6)) == expected
    assert (model.runs - runs, len(graphs)) == (8, count)
    assert [block._compiled_call_impl for block in model.blocks] == calls


@pytest.mark.parametrize(
    "compiled",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: Peft(torch.compile(model, backend="eager")),
        lambda model: model.compile(backend="eager") or model,
        lambda model: (
            vars(model).update(forward=torch.compile(model.forward, backend="eager")) or model
        ),
    ],
)
def test_a_model_compiled_as_a_whole_is_refused_before_a_step(compiled):
    model = Toy()
    whole = compiled(model)
    before = state(model)
    with pytest.raises(RuntimeError, match="compile its blocks"), teacache(whole, config_of(4)):
        pytest.fail("entered")
    assert state(model) == before


# Calls


@pytest.mark.parametrize(
    ("thresh", "guided", "runs"),
    [(1.5, None, 6), (1.5, 4, 6), (1.5, 3, 5), (1.5, 2, 4), (1.5, 0, 3), (0.0, 2, 6), (0.0, 0, 4)],
)
def test_after_guidance_both_calls_return_the_conditional_output(thresh, guided, runs):
    """Or the one call, in a pipeline that makes one then."""
    model, called_once, config = Toy(), Toy(), config_of(4, thresh, guided_steps=guided)
    guided = 4 if guided is None else guided
    with teacache(model, config) as cache:
        outputs = sample(model, 4)
    with teacache(called_once, config):
        once = sample(called_once, guided)[::2]
        once += sample(called_once, 4 - guided, begin=guided, calls=1)
    assert numbers(once) == numbers(outputs[::2]) == [6.0, 6.0 if thresh else 3.0, 1.5, 0.75]
    assert (model.runs, called_once.runs) == (runs, runs)
    assert ("passes" in cache.summary()) == (guided < 4)
    same = [outputs[2 * step + 1] is outputs[2 * step] for step in range(4)]
    assert same == [step >= guided for step in range(4)]


@pytest.mark.parametrize(
    ("calls", "thresh", "guided", "message"),
    [
        ((2, 2, 1, 2), 1.5, None, "step 2: the model was called once, not twice"),
        ((2, 2, 2, 1), 1.5, None, "step 3: the model was called once, not twice"),
        ((1, 1, 1, 1), 1.5, None, "step 0: the model was called once, not twice"),
        ((2, 1, 1, 1), 0.0, 2, "step 1: the model was called once, not twice"),
        ((2, 3), 1.5, None, "step 1: the model was called three times"),
        ((2, 2, 2, 2, 2), 1.5, None, "more than 4 steps: set TeaCacheConfig.steps"),
        ((1, 1, 1, 1, 1), 1.5, 0, "more than 4 steps"),
    ],
)
def test_another_number_of_calls_is_an_error_that_counts(calls, thresh, guided, message):
    model = Toy()
    config = config_of(4, thresh, guided_steps=guided)
    with pytest.raises(RuntimeError, match=message), teacache(model, config):
        for step, count in enumerate(calls):
            sample(model, 1, begin=step, calls=count)


def test_fewer_steps_and_negative_increments_bring_warnings(caplog):
    model = Toy()
    with teacache(model, TeaCacheConfig(5, 1.5, (-1.0,), forced_steps=(0, 2))) as cache:
        sample(model, 3)
    assert "set up for 5 steps, but the pipeline took 3" in caplog.text
    assert "negative at steps 1:" in caplog.text
    assert cache.drift(0) == 3.0  # 6 where 1.5 was right


def test_a_call_from_another_thread_is_one_plain_error():
    model, outputs = Toy(), []
    with ThreadPoolExecutor(1) as another, teacache(model, config_of(6)):
        for step in range(6):
            outputs += sample(model, 1, begin=step)
            with pytest.raises(RuntimeError, match="thread"):
                another.submit(sample, model, 4).result()
    assert numbers(outputs) == expected_of(model, [0, 2, 4, 5])


# Refusing, patching and restoring

DIFFUSERS = nn.ModuleDict({"condition_embedder": nn.Identity(), "blocks": nn.ModuleList()})


@pytest.mark.parametrize("wrong", [SimpleNamespace(model=Toy()), DIFFUSERS, None, Toy])
def test_what_is_no_wan_transformer_is_a_plain_type_error(wrong):
    for models in (wrong, [Toy(), wrong]):
        with pytest.raises(TypeError, match=r"pipeline\.model, not a \w+$"):
            teacache(models, config_of(4)).__enter__()


def state(model) -> list:
    """Attributes and hooks of all modules."""
    counted = {"runs", "rows", "now", "residual"}
    return [
        {name: value.copy() if isinstance(value, dict) else value}
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in counted
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, "too many", "inside"])
def test_models_are_restored_after_every_error(error):
    models = [Toy(), Toy()]
    models[0].forward = lambda *args, **kwargs: Toy.forward(models[0], *args, **kwargs)  # Ulysses
    before = [state(model) for model in models]
    expected = (RuntimeError, ValueError, KeyboardInterrupt, ZeroDivisionError)
    with pytest.raises(expected), teacache(models, config_of(4)):
        assert all(state(model) != was for model, was in zip(models, before, strict=True))
        sample(models[0], 5 if error == "too many" else 2)
        models[1].residual = (lambda *_: 1 / 0) if error == "inside" else models[0].residual
        sample(models[1], 2, begin=2)
        raise error
    models[1].residual = models[0].residual
    assert [state(model) for model in models] == before
    assert numbers(sample(models[1], 4)) == numbers(sample(Toy(), 4))


def test_a_model_serves_one_teacache_at_a_time():
    model, other, free = Toy(), Toy(), Toy()
    before = state(free)
    with teacache(model, config_of(4)) as one, teacache(other, config_of(4, 0.5)) as two:
        sample(model, 2)
        with pytest.raises(RuntimeError, match="leave that one first"):
            teacache([free, model], config_of(4)).__enter__()
        assert state(free) == before
        sample(other, 4)
        sample(model, 2, begin=2)
    assert (one.schedule.computed_steps, two.schedule.computed_steps) == ([0, 2, 3], [0, 1, 2, 3])


def test_a_patched_forward_keeps_its_signature():
    model = Toy()
    signature = inspect.signature(model.forward)
    with teacache(model, config_of(4)):
        assert inspect.signature(model.forward) == signature
