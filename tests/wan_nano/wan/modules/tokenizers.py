"""Words to numbers."""

import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

PAD, END, FIRST_WORD = 0, 1, 2
UNKNOWN = 64  # numbers behind the vocabulary, which unknown words share


class WordTokenizer:
    """A folder's vocab.txt, one word a line.

    A word that is not in it gets one of ``UNKNOWN`` further numbers, by its spelling, so that any
    two prompts most likely differ.
    """

    def __init__(self, name: str | Path, seq_len: int):
        words = (Path(name) / "vocab.txt").read_text(encoding="utf-8").split()
        self.numbers = {word: FIRST_WORD + i for i, word in enumerate(words)}
        self.seq_len = seq_len

    @property
    def vocab_size(self) -> int:
        return FIRST_WORD + len(self.numbers) + UNKNOWN

    def number(self, word: str) -> int:
        unknown = FIRST_WORD + len(self.numbers) + zlib.crc32(word.encode()) % UNKNOWN
        return self.numbers.get(word, unknown)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Numbers [B, seq_len], each text with END and then PAD behind, and lengths [B]."""
        rows = [
            [self.number(word) for word in re.findall(r"\w+|[^\w\s]", text.lower())]
            for text in texts
        ]
        rows = [[*row[: self.seq_len - 1], END] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        return torch.tensor([row + [PAD] * (self.seq_len - len(row)) for row in rows]), lengths
