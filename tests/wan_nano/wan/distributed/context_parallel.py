"""Sequence parallelism: each process has the tokens of its rank, and gathers keys and values.

Wan2.1 does it by Ulysses and ring attention (xfuser). What a model sees is the same: a ``forward``
of its own on the model and on each self-attention, in the way of the classes' forwards.
"""

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..modules.attention import flash_attention
from ..modules.model import WanModel, WanSelfAttention


def split(tokens: Tensor) -> Tensor:
    """This rank's part of [B, L, ...], where L is a multiple of the number of ranks."""
    return tokens.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def gather(tokens: Tensor) -> Tensor:
    """The parts [B, L / ranks, ...] of all ranks in one."""
    parts = [torch.empty_like(tokens.contiguous()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tokens.contiguous())
    return torch.cat(parts, dim=1)


def usp_attn_forward(self: WanSelfAttention, x: Tensor, seq_lens: Tensor, freqs: Tensor) -> Tensor:
    q, k, v = self.qkv(x, freqs)
    out = flash_attention(q, gather(k), gather(v), k_lens=seq_lens)
    return self.o(out.flatten(2))


def usp_dit_forward(self: WanModel, *args: Any, **kwargs: Any) -> list[Tensor]:
    return self.predict(*args, **kwargs, split=split, gather=gather)


def parallelize(model: WanModel) -> int:
    """Put both in the model's way, as Wan2.1's pipelines do; returns the number of ranks."""
    for block in model.blocks:
        block.self_attn.forward = MethodType(usp_attn_forward, block.self_attn)
    model.forward = MethodType(usp_dit_forward, model)
    return dist.get_world_size()
