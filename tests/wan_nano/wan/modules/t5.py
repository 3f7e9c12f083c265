"""The text encoder in T5's place: a learned vector for each word, and one for its place.

Behind a vector stand zeros, as many as make it as wide as one of umT5.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokenizers import WordTokenizer

TEXT_DIM = 4096  # channels of umT5, and so what every WanModel expects
WORD_DIM = 64


class WordEncoder(nn.Module):
    def __init__(self, vocab_size: int, text_len: int, dim: int = WORD_DIM):
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim)
        self.place = nn.Embedding(text_len, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Numbers of words [B, L] to vectors [B, L, dim]."""
        return self.norm(self.word(ids) + self.place.weight[: ids.shape[1]])


class T5EncoderModel:
    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        checkpoint_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        shard_fn: Callable[..., nn.Module] | None = None,
    ):
        self.tokenizer = WordTokenizer(tokenizer_path, text_len)
        model = WordEncoder(self.tokenizer.vocab_size, text_len)
        logging.info("loading %s", checkpoint_path)
        model.load_state_dict(torch.load(checkpoint_path, map_location="cpu"))
        model = model.to(device, dtype).eval().requires_grad_(False)
        self.model = shard_fn(model) if shard_fn else model

    def __call__(self, texts: list[str], device: torch.device | str) -> list[Tensor]:
        """Each text as [its tokens, TEXT_DIM]."""
        ids, lengths = self.tokenizer(texts)
        vectors = F.pad(self.model(ids.to(device)), (0, TEXT_DIM - WORD_DIM))
        return [u[:n] for u, n in zip(vectors, lengths.tolist(), strict=True)]
