"""Files of frames, which like Wan2.1's are silently not there if something goes wrong."""

import argparse
import math
import tempfile
from pathlib import Path

import imageio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def grid_frames(
    tensor: Tensor, nrow: int, normalize: bool, value_range: tuple[float, float]
) -> np.ndarray:
    """[B, 3, F, H, W] to bytes [F, rows * H, columns * W, 3], up to ``nrow`` samples a row."""
    low, high = min(value_range), max(value_range)
    tensor = tensor.clamp(low, high)
    if normalize:
        tensor = (tensor - low) / (high - low)
    columns = min(nrow, len(tensor))
    rows = math.ceil(len(tensor) / columns)
    tensor = F.pad(tensor, (0, 0) * 4 + (0, rows * columns - len(tensor)))
    grid = tensor.unflatten(0, (rows, columns)).permute(3, 0, 4, 1, 5, 2)  # F, rows, H, columns, W
    return (grid.flatten(3, 4).flatten(1, 2) * 255).byte().cpu().numpy()


def cache_video(
    tensor: Tensor,
    save_file: str | None = None,
    fps: int = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str | None:
    """Write [B, 3, F, H, W] by H.264. Returns the file, or prints why there is none.

    As in Wan2.1 a second try is given the bytes that the first one made, fails on them, and so only
    that is printed: the reason of the first is known with ``retry=1`` alone.
    """
    target = save_file or tempfile.mktemp(suffix=f".{suffix.lstrip('.')}")
    error: Exception | None = None
    for _ in range(retry):
        try:
            tensor = torch.from_numpy(grid_frames(tensor, nrow, normalize, value_range))
            with imageio.get_writer(target, fps=fps, codec="libx264", quality=8) as writer:
                for frame in tensor.numpy():
                    writer.append_data(frame)
            return target
        except Exception as caught:
            error = caught
    print(f"cache_video failed, error: {error}", flush=True)
    return None


def cache_image(
    tensor: Tensor,
    save_file: str,
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
    retry: int = 5,
) -> str | None:
    """Write [B, 3, H, W] as one picture. Returns the file, or None and says nothing."""
    for _ in range(retry):
        try:
            frames = grid_frames(tensor[:, :, None], nrow, normalize, value_range)
            imageio.imwrite(Path(save_file), frames[0])
            return save_file
        except Exception:
            continue
    return None


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 or no, false, f, n, 0; argparse.ArgumentTypeError for another."""
    word = str(v).lower()
    if word not in {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}:
        raise argparse.ArgumentTypeError(f"yes or no is expected, not {v}")
    return word in {"yes", "true", "t", "y", "1"}
