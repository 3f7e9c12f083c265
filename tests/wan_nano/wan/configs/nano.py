"""The miniature: Wan2.1's keys with small numbers, and float32 for a CPU."""

import torch
from easydict import EasyDict

t2v_nano = EasyDict(
    __name__="Config: Wan T2V nano",
    t5_model="words_nano",
    t5_dtype=torch.float32,
    t5_checkpoint="models_t5_words-nano.pth",
    t5_tokenizer="google/words-nano",
    vae_checkpoint="Wan2.1_VAE_nano.pth",
    vae_stride=(4, 8, 8),
    param_dtype=torch.float32,
    num_train_timesteps=1000,
    sample_fps=8,
    sample_neg_prompt="",  # one clip in ten is trained with it instead of a prompt
    cross_attn_norm=True,
    eps=1e-6,
    freq_dim=64,
    num_heads=4,
    patch_size=(1, 2, 2),
    qk_norm=True,
    window_size=(-1, -1),
    text_len=32,
    dim=128,
    ffn_dim=384,
    num_layers=6,
)
