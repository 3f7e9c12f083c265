"""Trains the miniature from nothing: VAE, text encoder and transformer, on clips drawn by code.

    python tests/wan_nano_training/train.py CKPT

Writes the checkpoint folder CKPT in two or three hours on 2 CPU cores, then checks 100 videos of
unseen prompts. Started again, it continues from CKPT/*.state.pt; delete them to start from nothing.

Flow matching, as Wan2.1: x = (1 - sigma) x0 + sigma noise, the model predicts noise - x0 at the
timestep 1000 sigma. One prompt in ten is left out, for classifier-free guidance.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wan_nano"))

from clips import CELL, FRAMES, SIZE, Scene, draw, draw_at, every_clip, kind, pick, seen, vocabulary
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
SAVE_SECONDS = 120
FAST = torch.channels_last_3d  # a fifth faster on a CPU


def random(*place: int | str) -> torch.Generator:
    """Random numbers for a place in the training, the same in each run."""
    return torch.Generator().manual_seed(zlib.crc32(repr(place).encode()))


def clips_of(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1]."""
    return torch.stack([draw(scene, generator) for scene in scenes])


class Muon(torch.optim.Optimizer):
    """Momentum with all singular values near 1, https://kellerjordan.github.io/posts/muon.

    The VAE needs a third of AdamW's steps to the same loss. A kernel is a matrix, too.
    """

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for weight in group["params"]:
            mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 0.05)
            x = torch.lerp(weight.grad, mean, 0.95).flatten(1)
            x = x / x.norm().clamp(min=1e-7)
            tall = len(x) > len(x.T)
            gram = x.T @ x if tall else x @ x.T
            total = eye = torch.eye(len(gram), device=x.device)
            for _ in range(5):
                square = total @ gram @ total
                total = total @ (3.4445 * eye - 4.7750 * square + 2.0315 * square @ square)
            x = x @ total if tall else total @ x
            # a step as large as AdamW's at the same rate
            weight -= 0.2 * group["lr"] * max(x.shape) ** 0.5 * x.view_as(weight)


def optimizers_of(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for kernels and for the matrices of the blocks, AdamW for all others."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, weight in model.named_parameters():
        groups[weight.dim() == 5 or (weight.dim() == 2 and ".blocks." in name)].append(weight)
    adamw = torch.optim.AdamW(groups[0], rate, betas=(0.9, 0.99), weight_decay=0.01)
    return [adamw, Muon(groups[1], {"lr": rate})]


def minimise(
    state: Path,
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    steps: int,
    rate: float,
) -> nn.Module:
    """Train ``model``; return the average of its last steps. Continues from the file ``state``.

    The rate is constant up to the half, so that training can be continued with more steps.
    """
    model = model.to(DEVICE).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizers = optimizers_of(model, rate)
    first, saved = 0, time.monotonic()
    if state.exists():
        content = torch.load(state, map_location=DEVICE)
        first = content["step"]
        for part, kept in zip((model, average, *optimizers), content["parts"], strict=True):
            part.load_state_dict(kept)
    bar = tqdm(range(first, steps), state.name, steps, initial=first, smoothing=0.05)
    for step in bar:
        error = loss(model, random(state.name, step))
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * min(step / 100, 1, 2 * (1 - step / steps))
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{error.item():.4f}")
        if step + 1 == steps or time.monotonic() - saved > SAVE_SECONDS:
            parts = [part.state_dict() for part in (model, average, *optimizers)]
            torch.save({"step": step + 1, "parts": parts}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            saved = time.monotonic()
    return average.module.eval().requires_grad_(False)


def vae_loss(vae: nn.Module, generator: torch.Generator, crop: tuple[int, int, int]) -> Tensor:
    """Distance of clips to their reconstruction, and of latents to a normal distribution.

    crop: frames, height and width of the part of a clip to train on, in whole latents.
    """
    clips = clips_of(pick(VAE_BATCH, generator), generator)
    place = torch.rand(3, generator=generator).tolist()
    sizes, units = (FRAMES, SIZE, SIZE), (4, CELL, CELL)
    for dim, (share, size, part, unit) in enumerate(zip(place, sizes, crop, units, strict=True), 2):
        clips = clips.narrow(dim, unit * int(share * ((size - part) // unit + 1)), part)
    clips = clips.to(DEVICE, memory_format=FAST)
    mean, log_variance = vae.encode(clips)
    log_variance = log_variance.clamp(-20, 10)
    noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
    found = vae.decode(mean + noise * (log_variance / 2).exp())
    kl = (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2
    return F.mse_loss(found, clips) + 0.1 * F.l1_loss(found, clips) + KL_WEIGHT * kl


def train_vae(steps: int, whole_steps: int, folder: Path) -> VAE:
    """First on parts of clips, a third of the work, then on whole clips."""
    torch.manual_seed(0)
    vae = VAE()
    nn.init.constant_(vae.encoder[-1].bias[vae.z_dim :], -4)  # little noise at first
    for weight in vae.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=FAST)
    loss = partial(vae_loss, crop=(9, 48, 48))
    vae = minimise(folder / "vae.state.pt", vae, loss, steps, VAE_RATE).requires_grad_(True)
    loss = partial(vae_loss, crop=(FRAMES, SIZE, SIZE))
    vae = minimise(folder / "vae_whole.state.pt", vae, loss, whole_steps, VAE_RATE)
    vae = vae.to(memory_format=torch.contiguous_format)
    generator = random("latents")
    latents = vae.encode(clips_of(pick(MEASURED, generator), generator).to(DEVICE))[0]
    vae.latent_mean.copy_(latents.mean((0, 2, 3, 4))[:, None, None, None])
    vae.latent_std.copy_(latents.std((0, 2, 3, 4))[:, None, None, None])
    return vae


def encode(vae: VAE, count: int) -> tuple[Tensor, list[str], Tensor]:
    """How often each of the training's clips is shown, their prompts and their latents, in
    [clips, 16, n + 1, h, w]; only ``count`` of them, if there are more."""
    weights, scenes, places = zip(*every_clip()[:count], strict=True)
    latents = [
        vae.encode(draw_at(*one)[None].to(DEVICE))[0].half()
        for one in zip(tqdm(scenes, "encoding"), places, strict=True)
    ]
    return torch.tensor(weights), [scene.prompt for scene in scenes], torch.cat(latents)


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
    tokenizer: WordTokenizer,
    weights: Tensor,
    prompts: list[str],
    latents: Tensor,
    steps: int,
    state: Path,
) -> TextToLatent:
    ids, lengths = tokenizer([*prompts, ""])

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        unguided = torch.rand(BATCH, generator=generator) < UNGUIDED
        ids_of = torch.where(unguided, len(prompts), chosen)
        x0 = latents[chosen.to(DEVICE)].float()
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)).to(DEVICE) / BATCH
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        x = torch.lerp(x0, noise, sigma[:, None, None, None, None])
        flow = model(x, 1000 * sigma, ids[ids_of].to(DEVICE), lengths[ids_of])
        return F.mse_loss(flow, noise - x0)

    torch.manual_seed(0)
    return minimise(state, TextToLatent(tokenizer), loss, steps, RATE)


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def check(folder: Path, count: int, steps: int) -> dict[str, Any]:
    """Check ``count`` videos of unseen prompts, and the VAE on their clips.

    shown: share of videos that show colour, motion and kind of shape as their prompt says, and of
    each alone. chance: as shown, for another prompt. overlap: intersection over union with the
    best-fitting drawn shape.
    """
    pipeline, generator = WanT2V(CONFIG, folder), random("check")
    scenes = pick(count, generator, unseen=True)
    clips = clips_of(scenes, generator)
    kept = [pipeline.vae.decode(pipeline.vae.encode([clip.to(DEVICE)]))[0].cpu() for clip in clips]
    videos = [
        pipeline.generate(u.prompt, sampling_steps=steps, seed=seed, offload_model=False).cpu()
        for seed, u in enumerate(tqdm(scenes, "checking"))
    ]
    fits = [kind(video) for video in videos]
    says = [(u.colour, u.motion, u.shape) for u in scenes]
    shows = [(*seen(video), shape) for video, (shape, _) in zip(videos, fits, strict=True)]
    pairs = list(zip(says, shows, strict=True))
    others = [a == b for i, a in enumerate(says) for j, b in enumerate(shows) if i != j]
    alone = {
        name: sum(a[i] == b[i] for a, b in pairs) / count
        for i, name in enumerate(("colour", "motion", "kind"))
    }
    return {
        "shown": sum(a == b for a, b in pairs) / count,
        **alone,
        "chance": sum(others) / max(len(others), 1),
        "overlap": sum(overlap for _, overlap in fits) / count,
        "vae_psnr_db": sum(map(psnr, kept, clips)) / count,
        "wrong": [f"{u.prompt}: {b}" for u, (a, b) in zip(scenes, pairs, strict=True) if a != b],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--vae_whole_steps", type=int, default=2000, help="on whole clips")
    parser.add_argument("--clips", type=int, default=10000, help="of the transformer, at most")
    parser.add_argument("--steps", type=int, default=10000, help="of the transformer")
    parser.add_argument("--check", type=int, default=100, help="videos at the end")
    args = parser.parse_args()
    folder = args.folder
    write_vocabulary(folder / CONFIG.t5_tokenizer, vocabulary())
    tokenizer = WordTokenizer(folder / CONFIG.t5_tokenizer, CONFIG.text_len)

    vae = train_vae(args.vae_steps, args.vae_whole_steps, folder)
    torch.save(vae.state_dict(), folder / CONFIG.vae_checkpoint)
    clips = encode(vae, args.clips)
    trained = train_transformer(tokenizer, *clips, args.steps, folder / "transformer.state.pt")
    save_transformer(trained.transformer, folder)
    torch.save(trained.text_encoder.state_dict(), folder / CONFIG.t5_checkpoint)
    print(json.dumps(check(folder, args.check, CHECK_STEPS), indent=1))


if __name__ == "__main__":
    main()
