"""Trains the miniature from nothing: VAE, text encoder and transformer, on clips drawn by code.

    python tests/wan_nano_training/train.py CKPT

Writes the checkpoint folder CKPT in an hour or two on 2 CPU cores, then checks 100 videos of unseen
prompts. Flow matching, as Wan2.1: x = (1 - sigma) x0 + sigma noise, the model predicts noise - x0
at the timestep 1000 sigma. One prompt in ten is left out, for classifier-free guidance.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wan_nano"))

from clips import Scene, draw, pick, seen, vocabulary
from make_checkpoint import new_transformer, save_transformer, write_vocabulary
from wan.configs import WAN_CONFIGS
from wan.modules.t5 import WordEncoder
from wan.modules.tokenizers import WordTokenizer
from wan.modules.vae import VAE
from wan.text2video import WanT2V

CONFIG = WAN_CONFIGS["t2v-nano"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VAE_BATCH, VAE_RATE, KL_WEIGHT = 4, 1e-3, 1e-4
BATCH, RATE, UNGUIDED, SHIFT = 24, 2e-3, 0.1, 3.0
MEASURED = 128  # clips whose latents give the mean and standard deviation
CHECK_STEPS = 50


def random(*place: int | str) -> torch.Generator:
    """Random numbers for a place in the training, the same in each run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))


def clips_of(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1]."""
    return torch.stack([draw(scene, generator) for scene in scenes])


def minimise(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    steps: int,
    rate: float,
) -> nn.Module:
    """Train ``model``; return the average of its last steps. Averages only a few: at the end the
    rate is near zero, and earlier models differ."""
    model = model.to(DEVICE).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    bar = tqdm(range(steps), name, smoothing=0.05)
    for step in bar:
        error = loss(model, random(name, step))
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{error.item():.4f}")
    return average.module.eval().requires_grad_(False)


def vae_loss(vae: nn.Module, generator: torch.Generator) -> Tensor:
    """Distance of clips to their reconstruction, and of latents to a normal distribution."""
    clips = clips_of(pick(VAE_BATCH, generator), generator).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):  # twice as fast, on a CPU too
        mean, log_variance = (u.float() for u in vae.encode(clips))
        log_variance = log_variance.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
        found = vae.decode(mean + noise * (log_variance / 2).exp()).float()
    kl = (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2
    return F.mse_loss(found, clips) + 0.1 * F.l1_loss(found, clips) + KL_WEIGHT * kl


def train_vae(steps: int) -> VAE:
    torch.manual_seed(0)
    vae = minimise("VAE", VAE(), vae_loss, steps, VAE_RATE)
    generator = random("latents")
    latents = vae.encode(clips_of(pick(MEASURED, generator), generator).to(DEVICE))[0]
    vae.latent_mean.copy_(latents.mean((0, 2, 3, 4))[:, None, None, None])
    vae.latent_std.copy_(latents.std((0, 2, 3, 4))[:, None, None, None])
    return vae


def encode(vae: VAE, count: int) -> tuple[list[str], Tensor]:
    """Prompts of ``count`` clips and their latents [count, 16, n + 1, h, w]."""
    prompts, latents = [], []
    for i in tqdm(range(0, count, 16), "encoding"):
        generator = random("clips", i)
        scenes = pick(16, generator)
        prompts += [scene.prompt for scene in scenes]
        latents.append(vae.encode(clips_of(scenes, generator).to(DEVICE))[0])
    return prompts, torch.cat(latents)


class TextToLatent(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, tokenizer: WordTokenizer):
        super().__init__()
        self.text_encoder = WordEncoder(tokenizer.vocab_size, tokenizer.seq_len)
        self.transformer = new_transformer()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """The flow at x [B, 16, n + 1, h, w], timesteps t [B], prompts ids [B, text_len]."""
        vectors = self.text_encoder(ids)
        context = [u[:n] for u, n in zip(vectors, lengths.tolist(), strict=True)]
        tokens = x[0, 0].numel() // 4
        return torch.stack(self.transformer(list(x.unbind()), t, context, seq_len=tokens))


def train_transformer(
    tokenizer: WordTokenizer, prompts: list[str], latents: Tensor, steps: int
) -> TextToLatent:
    ids, lengths = tokenizer([*prompts, ""])

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(prompts), (BATCH,), generator=generator)
        unguided = torch.rand(BATCH, generator=generator) < UNGUIDED
        ids_of = torch.where(unguided, len(prompts), chosen)
        x0 = latents[chosen.to(DEVICE)]
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        u = torch.rand(BATCH, generator=generator).to(DEVICE)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        x = torch.lerp(x0, noise, sigma[:, None, None, None, None])
        flow = model(x, 1000 * sigma, ids[ids_of].to(DEVICE), lengths[ids_of])
        return F.mse_loss(flow, noise - x0)

    torch.manual_seed(0)
    return minimise("transformer", TextToLatent(tokenizer), loss, steps, RATE)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def check(folder: Path, count: int, steps: int) -> dict[str, float]:
    """Check ``count`` videos of unseen prompts, and the VAE on unseen clips.

    shown: share of videos that show what their prompt says. chance: the same for another prompt.
    """
    pipeline, generator = WanT2V(CONFIG, folder), random("check")
    scenes = pick(count, generator, unseen=True)
    clips = clips_of(scenes, generator)
    kept = [pipeline.vae.decode(pipeline.vae.encode([clip.to(DEVICE)]))[0].cpu() for clip in clips]
    videos = [
        pipeline.generate(scene.prompt, sampling_steps=steps, seed=seed, offload_model=False)
        for seed, scene in enumerate(tqdm(scenes, "checking"))
    ]
    says = [(scene.colour, scene.motion) for scene in scenes]
    shows = [seen(video.cpu()) for video in videos]
    others = [(a, b) for i, a in enumerate(says) for j, b in enumerate(shows) if i != j]
    wrong = [scene.prompt for scene, a, b in zip(scenes, says, shows, strict=True) if a != b]
    return {
        "shown": sum(a == b for a, b in zip(says, shows, strict=True)) / count,
        "chance": sum(a == b for a, b in others) / max(len(others), 1),
        "vae_psnr_db": sum(map(psnr, kept, clips)) / count,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--vae_steps", type=int, default=1600)
    parser.add_argument("--clips", type=int, default=10240, help="of the transformer")
    parser.add_argument("--steps", type=int, default=14000, help="of the transformer")
    parser.add_argument("--check", type=int, default=100, help="videos at the end")
    args = parser.parse_args()
    folder = args.folder
    write_vocabulary(folder / CONFIG.t5_tokenizer, vocabulary())
    tokenizer = WordTokenizer(folder / CONFIG.t5_tokenizer, CONFIG.text_len)

    vae = train_vae(args.vae_steps)
    torch.save(vae.state_dict(), folder / CONFIG.vae_checkpoint)
    trained = train_transformer(tokenizer, *encode(vae, args.clips), args.steps)
    save_transformer(trained.transformer, folder)
    torch.save(trained.text_encoder.state_dict(), folder / CONFIG.t5_checkpoint)
    print(json.dumps(check(folder, args.check, CHECK_STEPS), indent=1))


if __name__ == "__main__":
    main()
