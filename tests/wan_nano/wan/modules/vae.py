"""The VAE: 4 x 8 x 8 smaller, causal in time, so that the first frame is encoded alone."""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Z_DIM = 16


class CausalConv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution [B, C, F, H, W] that sees a frame and the two before it."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int] | int = 1):
        super().__init__(in_channels, out_channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return super().forward(torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.conv = CausalConv3d(channels, channels)
        self.mix = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The norm is over channels only: one over time would let a frame see those after it.
        normed = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gain
        return x + self.mix(F.silu(self.conv(F.silu(normed))))


class Upsample(nn.Module):
    """Twice the height and width, and in time n + 1 frames to 2n + 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x[:, :, 1:])  # of the first frame, one is enough


class VAE(nn.Module):
    """latent_mean and latent_std [Z_DIM, 1, 1, 1]: what makes latents zero-mean, unit-variance."""

    def __init__(self, z_dim: int = Z_DIM, widths: tuple[int, int] = (64, 96)):
        super().__init__()
        self.z_dim = z_dim
        middle, large = widths
        self.encoder = nn.Sequential(
            CausalConv3d(3 * 4 * 4, middle, (2, 1, 1)),  # the 4 x 4 pixels of each place
            ResidualBlock(middle),
            CausalConv3d(middle, large, 2),
            ResidualBlock(large),
            CausalConv3d(large, 2 * z_dim),
        )
        self.decoder = nn.Sequential(
            CausalConv3d(z_dim, large),
            ResidualBlock(large),
            Upsample(large, middle),
            ResidualBlock(middle),
            ResidualBlock(middle),
            CausalConv3d(middle, 2 * 3 * 4 * 4),  # the 4 x 4 pixels of two frames
        )
        self.register_buffer("latent_mean", torch.zeros(z_dim, 1, 1, 1))
        self.register_buffer("latent_std", torch.ones(z_dim, 1, 1, 1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Videos [B, 3, 4n + 1, H, W] to mean and log-variance, [B, z_dim, n + 1, H/8, W/8]."""
        places = F.pixel_unshuffle(x.transpose(1, 2), 4).transpose(1, 2)
        mean, log_variance = self.encoder(places).chunk(2, dim=1)
        mean = (mean - self.latent_mean) / self.latent_std
        return mean, log_variance - 2 * self.latent_std.log()

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, z_dim, n + 1, H/8, W/8] to videos [B, 3, 4n + 1, H, W]."""
        pairs = self.decoder(z * self.latent_std + self.latent_mean).transpose(1, 2)
        frames = pairs.unflatten(2, (2, -1)).flatten(1, 2)[:, 1:]  # one of the first pair
        return F.pixel_shuffle(frames, 4).transpose(1, 2)


class WanVAE:
    def __init__(
        self,
        z_dim: int = Z_DIM,
        vae_pth: str | Path = "Wan2.1_VAE_nano.pth",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        logging.info("loading %s", vae_pth)
        self.device = torch.device(device)
        self.model = VAE(z_dim)
        self.model.load_state_dict(torch.load(vae_pth, map_location="cpu"))
        self.model = self.model.to(device, dtype).eval().requires_grad_(False)

    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        """Videos [3, F, H, W] in [-1, 1] to latents [z_dim, (F - 1) / 4 + 1, H / 8, W / 8]."""
        with torch.autocast(self.device.type, enabled=False):
            return [self.model.encode(u[None])[0][0].float() for u in videos]

    def decode(self, zs: list[Tensor]) -> list[Tensor]:
        """Latents [z_dim, n + 1, h, w] to videos [3, 4n + 1, 8h, 8w] in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            return [self.model.decode(u[None])[0].float().clamp(-1, 1) for u in zs]
