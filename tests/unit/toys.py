"""Small models with the frame of a WanModel, and what calls them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from teacache_generate import EMBEDDING, TeaCacheConfig

SHARES = (0.5, 0.25, 0.25)  # of the residual, by block: exact in binary


class Block(nn.Module):
    """Adds its share of a residual in float32, as Wan's gated sums do."""

    def __init__(self, share: float):
        super().__init__()
        self.share, self.runs = share, 0

    def forward(self, x, e):
        self.runs += 1
        return x.float() + self.share * e


class Projection(nn.Linear):
    """Counts the rows that it projects."""

    rows = 0

    def forward(self, e):
        self.rows += e.shape[:-1].numel()
        return super().forward(e)


class Head(nn.Module):
    def forward(self, x, e):
        return x


def halving(step: int, branch: int) -> Tensor:
    return torch.tensor(6.0 * 2.0**-step)


def in_turn(blocks, x, e):
    for block in blocks:
        x = block(x, e)
    return x


class Toy(nn.Module):
    """x in bfloat16, a time embedding, blocks and a head. One sample.

    residual: by step and branch, anything that can be added to [1, tokens, dim].
    loop: how the forward runs its blocks.
    """

    def __init__(self, residual: Callable = halving, loop: Callable = in_turn):
        super().__init__()
        self.time_projection = Projection(2, 12, bias=False)
        nn.init.normal_(self.time_projection.weight, generator=torch.Generator().manual_seed(0))
        self.blocks, self.head = nn.ModuleList(map(Block, SHARES)), Head()
        self.residual, self.loop, self.now = residual, loop, (0, 0)
        self.requires_grad_(False)

    def forward(self, x, t, context=None, seq_len=None):
        """The toy's own docstring."""
        e0, x = self.time_projection(self.embed(t)), x[0].bfloat16()
        return [self.head(self.loop(self.blocks, x, self.residual(*self.now)), e0)]

    def embed(self, t):
        """[1, 2]; for a timestep a token [1, tokens], as in Wan2.2's ti2v, [1, tokens, 2]."""
        return torch.stack([t, t], dim=-1).float()

    @property
    def runs(self) -> int:
        return self.blocks[0].runs


def config_of(steps, thresh=1.5, measure=EMBEDDING, **others) -> TeaCacheConfig:
    """Every increment is 1: at 1.5 every second step is computed."""
    return TeaCacheConfig(steps, thresh, (1.0,), measure, **others)


def scripted(computed, steps: int, **others) -> TeaCacheConfig:
    """Computes these steps."""
    return TeaCacheConfig(steps, 1.0, (0.0,), forced_steps=tuple(computed), **others)


def sample(model, timesteps, shape=(1, 1, 1), begin=0, calls=2, called=None) -> list[Tensor]:
    """Call a model as a pipeline does, and return its outputs. Latents are 0, in the unconditional
    call 100.

    timesteps: or the number of steps. begin: the first step. called: a wrapper of the model.
    """
    called = model if called is None else called
    if isinstance(timesteps, int):  # each is half of the one before
        timesteps = [2.0**-step for step in range(begin, begin + timesteps)]
    outputs = []
    for step, timestep in enumerate(timesteps, begin):
        t = torch.tensor([timestep], dtype=torch.float64)
        for branch in range(calls):
            model.now = step, branch
            outputs += called([torch.full(shape, 100.0 * branch)], t=t, context=None)
    return outputs


def numbers(outputs) -> list[float]:
    return [output.item() for output in outputs]
