"""The image encoder in CLIP's place: one layer of attention over 16 x 16 patches."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import flash_attention

WIDTH, HEADS, FEATURES = 64, 4, 1280


class PatchEncoder(nn.Module):
    image_size = 64

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.features = nn.Linear(WIDTH, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] to features [B, 257, 1280]: of the whole, then of each patch."""
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(images), -1, -1), patches], dim=1)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return self.features(x + flash_attention(q, k, v).flatten(2))


class CLIPModel:
    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        checkpoint_path: str | Path,
        tokenizer_path: str | Path,
    ):
        logging.info("loading %s", checkpoint_path)
        self.dtype, self.tokenizer_path = dtype, tokenizer_path  # Wan2.1 reads no text by CLIP
        self.model = PatchEncoder()
        self.model.load_state_dict(torch.load(checkpoint_path, map_location="cpu"))
        self.model = self.model.to(device, dtype).eval().requires_grad_(False)

    def visual(self, videos: list[Tensor]) -> Tensor:
        """Videos [3, 1, H, W] in [-1, 1] to features [B, 257, 1280]."""
        size = (self.model.image_size, self.model.image_size)
        images = [F.interpolate(u.transpose(0, 1), size, mode="bicubic") for u in videos]
        return self.model(torch.cat(images).to(self.dtype))
