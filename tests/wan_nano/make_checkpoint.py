"""Make a checkpoint folder for the miniature, laid out like one of Wan2.1, its weights random.

    python make_checkpoint.py CKPT [--seed 0]

The pictures mean nothing, but they depend on the prompt, and the blocks' residuals change from step
to step. What the timestep embedding does is set so that the distances between its steps lie where
the polynomials that are published for Wan2.1 compute some of the steps and skip others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import TEXT_DIM, WORD_DIM, WordEncoder
from wan.modules.tokenizers import WordTokenizer
from wan.modules.vae import VAE, Z_DIM

# With this, of 50 steps, the row t2v-1.3B computes 25 or 26 at 0.08, and 26 or 27 with retention
# steps at 0.1 (measured for the seeds 0 to 5).
TIME_STD = 0.025

VOCABULARY = """
a an the and of on over under in to from with into behind two three one many . ,
red green blue yellow white black grey orange purple dark bright small large round
ball square circle triangle box cat dog bird fish wave cloud sun moon star floor wall sky sea
rolls moves turns falls rises jumps flies swims grows shrinks slowly quickly away left right up down
static blurred worst quality
"""


def new_transformer() -> WanModel:
    """A WanModel about to be trained, on words without the zeros behind."""
    config = WAN_CONFIGS["t2v-nano"]
    names = ("text_len", "dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")
    return WanModel(
        in_dim=Z_DIM,
        text_dim=WORD_DIM,
        out_dim=Z_DIM,
        **{name: config[name] for name in names},
    )


def random_transformer() -> WanModel:
    """A WanModel in which every part has a say, unlike in one that is about to be trained."""
    model = new_transformer()
    for layer in (model.text_embedding[0], model.text_embedding[2]):
        nn.init.xavier_uniform_(layer.weight)
    for block in model.blocks:  # sharp enough attention for one word to matter among many
        nn.init.constant_(block.cross_attn.norm_q.weight, 3.0)
        nn.init.constant_(block.cross_attn.norm_k.weight, 3.0)
    nn.init.xavier_uniform_(model.head.head.weight, gain=2.0)
    first, last = model.time_embedding[0], model.time_embedding[2]
    nn.init.normal_(first.weight, std=TIME_STD)
    nn.init.normal_(last.weight, std=TIME_STD)
    nn.init.normal_(last.bias)
    return model


def save_transformer(model: WanModel, folder: Path) -> None:
    """Widen the model for words with the zeros behind, as any WanModel is made, and save it."""
    layer = model.text_embedding[0]
    layer.weight = nn.Parameter(F.pad(layer.weight, (0, TEXT_DIM - WORD_DIM)))
    layer.in_features = TEXT_DIM
    model.save_pretrained(folder)


def write_vocabulary(folder: Path, words: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def make_checkpoint(folder: Path, seed: int) -> None:
    """Write a checkpoint into ``folder``; the same bytes for the same seed."""
    config = WAN_CONFIGS["t2v-nano"]
    torch.manual_seed(seed)
    write_vocabulary(folder / config.t5_tokenizer, VOCABULARY.split())
    words = WordTokenizer(folder / config.t5_tokenizer, config.text_len).vocab_size
    save_transformer(random_transformer(), folder)
    torch.save(WordEncoder(words, config.text_len).state_dict(), folder / config.t5_checkpoint)
    torch.save(VAE().state_dict(), folder / config.vae_checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a checkpoint folder with random weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.folder, args.seed)
