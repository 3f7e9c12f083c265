"""DPM-Solver++ for flow matching: diffusers' scheduler under Wan2.1's names."""

from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor


def get_sampling_sigmas(sampling_steps: int, shift: float) -> np.ndarray:
    """Noise levels [sampling_steps] from 1 down, moved up by shift."""
    sigmas = 1 - np.arange(sampling_steps) / sampling_steps
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class FlowDPMSolverMultistepScheduler(DPMSolverMultistepScheduler):
    """diffusers' scheduler for a model that predicts the flow, noise - x0."""

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, **_: Any):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )


def retrieve_timesteps(
    scheduler: Any, device: str | torch.device | None = None, sigmas: np.ndarray | None = None
) -> tuple[Tensor, int]:
    """Give a scheduler its noise levels; its timesteps and their number."""
    scheduler.set_timesteps(len(sigmas), device=device)
    scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)
    scheduler.timesteps = torch.from_numpy(sigmas * scheduler.config.num_train_timesteps).to(
        device=device, dtype=torch.int64
    )
    return scheduler.timesteps, len(sigmas)
