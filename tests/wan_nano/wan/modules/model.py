"""WanModel, the diffusion transformer: parameters, arguments and results of Wan2.1's, own code.

Weights move between the two as they are. As under CUDA's autocast, whatever carries the timestep
(time embedding, modulation, gated sums, head) stays in float32: with bfloat16 autocast the first
block gets bfloat16 tokens and the last one returns float32.

Shapes: B samples, L tokens of ``dim`` channels, N heads of C channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .attention import flash_attention

Grid = tuple[int, int, int]  # tokens along frames, height, width


def sinusoidal_embedding_1d(dim: int, position: Tensor) -> Tensor:
    """cos and sin, in float64, of positions [B] at dim / 2 frequencies from 1 down to 1e-4."""
    steps = torch.arange(dim // 2, dtype=torch.float64, device=position.device)
    angles = position.double()[:, None] * 10000.0 ** (-2 * steps / dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotations(grid: Grid, channels: int, length: int, device: torch.device) -> Tensor:
    """The rotary embedding: cos and sin of angles, [length, 1, channels / 2, 2].

    Each axis turns its share of the channel pairs. Padding behind the grid's tokens is not turned.
    """
    pairs = channels // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).double()
    angles = [
        place[:, None] * 10000.0 ** -(torch.arange(n, device=device).double() / n)
        for place, n in zip(places.unbind(1), shares, strict=True)
    ]
    padded = F.pad(torch.cat(angles, dim=1), (0, 0, 0, length - len(places)))
    return torch.stack([padded.cos(), padded.sin()], dim=-1)[:, None].float()


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """x [B, L, N, C] turned by freqs [B, L, 1, C / 2, 2], in float32."""
    cos, sin = freqs.unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def float32_region(x: Tensor) -> torch.autocast:
    """No autocast inside: float32 parameters meet float32 numbers."""
    return torch.autocast(x.device.type, enabled=False)


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(-1, keepdim=True)
        return (x.float() * (mean_square + self.eps).rsqrt()).to(x.dtype) * self.weight


class WanLayerNorm(nn.LayerNorm):
    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False):
        super().__init__(dim, eps, elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = WanRMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def qkv(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and turned, and values, each [B, L, N, C]."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        return rotate(self.heads(q), freqs), rotate(self.heads(k), freqs), self.heads(v)

    def forward(self, x: Tensor, seq_lens: Tensor, freqs: Tensor) -> Tensor:
        """x [B, L, dim], of which seq_lens [B] tokens count, with freqs [B, L, 1, C / 2, 2]."""
        q, k, v = self.qkv(x, freqs)
        return self.o(flash_attention(q, k, v, k_lens=seq_lens).flatten(2))


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:
        """x [B, L, dim] attends to context [B, text_len, dim]."""
        q = self.heads(self.norm_q(self.q(x)))
        k, v = self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))
        return self.o(flash_attention(q, k, v, k_lens=context_lens).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: bool = True,
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1, self.norm2 = WanLayerNorm(dim, eps), WanLayerNorm(dim, eps)
        self.norm3 = WanLayerNorm(dim, eps, True) if cross_attn_norm else nn.Identity()
        self.self_attn = WanSelfAttention(dim, num_heads, qk_norm, eps)
        self.cross_attn = WanT2VCrossAttention(dim, num_heads, qk_norm, eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        seq_lens: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_lens: Tensor | None,
    ) -> Tensor:
        """x [B, L, dim], modulated by e [B, 6, dim]; the result is float32."""
        assert e.dtype == torch.float32, "the modulation must not be rounded"
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e).chunk(6, dim=1)
        y = self.self_attn(self.norm1(x).float() * (1 + scale1) + shift1, seq_lens, freqs)
        x = x + y * gate1
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        return x + self.ffn(self.norm2(x).float() * (1 + scale2) + shift2) * gate2


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, patch_size: Grid, eps: float = 1e-6):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps)
        self.head = nn.Linear(dim, out_dim * math.prod(patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, L, dim] and e [B, dim] to patches [B, L, out_dim * patch volume]."""
        with float32_region(x):
            shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
            return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(ModelMixin, ConfigMixin):
    """The transformer of text-to-video ("t2v")."""

    ignore_for_config = ("patch_size", "cross_attn_norm", "qk_norm", "text_dim", "window_size")
    _no_split_modules = ("WanAttentionBlock",)

    @register_to_config
    def __init__(
        self,
        model_type: str = "t2v",
        patch_size: Grid = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        window_size: tuple[int, int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        assert model_type == "t2v", f"no {model_type} in the miniature"
        assert window_size == (-1, -1), "no local attention in the miniature"
        self.model_type, self.patch_size, self.text_len = model_type, patch_size, text_len
        self.dim, self.freq_dim, self.out_dim, self.num_heads = dim, freq_dim, out_dim, num_heads

        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            WanAttentionBlock(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim, patch_size, eps)
        self.init_weights()

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        clip_fea: Tensor | None = None,
        y: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Predict the flow of each latent.

        x: B latents [in_dim, F, H, W]. t [B]: timesteps. context: B texts [up to text_len,
        text_dim]. seq_len: tokens to pad to. clip_fea, y: of i2v, not used.
        Returns B flows [out_dim, F, H, W], float32.
        """
        return self.predict(x, t, context, seq_len)

    def predict(
        self,
        x: list[Tensor],
        t: Tensor,
        context: list[Tensor],
        seq_len: int,
        split: Callable[[Tensor], Tensor] = lambda tokens: tokens,
        gather: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    ) -> list[Tensor]:
        """``forward``, with the blocks seeing what ``split`` leaves of [B, L, ...]."""
        patches = [self.patch_embedding(u[None])[0] for u in x]
        grids = [tuple(u.shape[1:]) for u in patches]
        seq_lens = torch.tensor([math.prod(grid) for grid in grids])
        assert int(seq_lens.max()) <= seq_len, f"more tokens than {seq_len=}"
        channels, device = self.dim // self.num_heads, patches[0].device
        freqs = torch.stack([rotations(grid, channels, seq_len, device) for grid in grids])

        e, e0 = self.embed_time(t)
        kwargs: dict[str, Any] = {
            "e": e0,
            "seq_lens": seq_lens,
            "freqs": split(freqs),
            "context": self.embed_context(context),
            "context_lens": None,
        }
        x = split(torch.stack([pad(u.flatten(1).T, seq_len) for u in patches]))
        for block in self.blocks:
            x = block(x, **kwargs)
        x = gather(self.head(x, e))
        return [self.unpatchify(u, grid) for u, grid in zip(x, grids, strict=True)]

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """e [B, dim] and e0 [B, 6, dim] of timesteps [B], in float32."""
        with float32_region(t):
            e = self.time_embedding(sinusoidal_embedding_1d(self.freq_dim, t).float())
            return e, self.time_projection(e).unflatten(1, (6, self.dim))

    def embed_context(self, context: list[Tensor]) -> Tensor:
        """Texts, padded with zeros before they are embedded."""
        return self.text_embedding(torch.stack([pad(u, self.text_len) for u in context]))

    def unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """Patches [L, out_dim * patch volume] of a grid, padding behind, to [out_dim, F, H, W]."""
        patches = x[: math.prod(grid)].reshape(*grid, *self.patch_size, self.out_dim)
        volume = patches.permute(6, 0, 3, 1, 4, 2, 5)  # channels, then each axis before its patch
        return volume.flatten(5, 6).flatten(3, 4).flatten(1, 2).float()

    def init_weights(self) -> None:
        """A start for training: the head's weights are zero, and so is what the model says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)


def pad(rows: Tensor, length: int) -> Tensor:
    """[n, channels] with rows of zeros behind, [length, channels]."""
    return F.pad(rows, (0, 0, 0, length - len(rows)))
