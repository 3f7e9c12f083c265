"""The two miniatures: Wan2.1's keys with small numbers, and float32 for a CPU."""

import torch
from easydict import EasyDict

shared = {
    "t5_model": "words_nano",
    "t5_dtype": torch.float32,
    "t5_checkpoint": "models_t5_words-nano.pth",
    "t5_tokenizer": "google/words-nano",
    "vae_checkpoint": "Wan2.1_VAE_nano.pth",
    "vae_stride": (4, 8, 8),
    "param_dtype": torch.float32,
    "num_train_timesteps": 1000,
    "sample_fps": 8,
    "sample_neg_prompt": "",  # with which, in place of a prompt, one clip in ten is trained
    "patch_size": (1, 2, 2),
    "freq_dim": 64,
    "num_heads": 4,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}

t2v_nano = EasyDict(
    shared, __name__="Config: Wan T2V nano", text_len=32, dim=128, ffn_dim=384, num_layers=6
)

i2v_nano = EasyDict(
    shared,
    __name__="Config: Wan I2V nano",
    text_len=512,  # Wan2.1's cross-attention takes all but the last 512 tokens for image tokens
    dim=96,
    ffn_dim=256,
    num_layers=4,
    clip_model="clip_nano",
    clip_dtype=torch.float32,
    clip_checkpoint="models_clip_nano.pth",
    clip_tokenizer="clip-words-nano",
)
