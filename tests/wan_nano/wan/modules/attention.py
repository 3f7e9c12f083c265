"""Attention under the name and with the signature of Wan2.1's, without flash-attn."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    version: int | None = None,
) -> Tensor:
    """Attention of q [B, Lq, N, C] to k and v [B, Lk, N, C], computed in v's dtype.

    k_lens [B]: of each sample, the keys that count; all of them where it is None.
    q_lens, deterministic, dtype, version say how flash-attn is to work and change nothing here.
    Returns [B, Lq, N, C] in q's dtype.
    """
    assert not causal and window_size == (-1, -1), "here every token attends to every token"
    mask = None
    if k_lens is not None and int(k_lens.min()) < k.shape[1]:
        places = torch.arange(k.shape[1], device=k.device)
        mask = (places < k_lens.to(k.device)[:, None])[:, None, None]  # [B, 1, 1, Lk]
    scaled = q if q_scale is None else q * q_scale
    heads_first = (u.to(v.dtype).transpose(1, 2) for u in (scaled, k, v))
    out = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, dropout_p=dropout_p, scale=softmax_scale
    )
    return out.transpose(1, 2).to(q.dtype)
