"""UniPC for flow matching: diffusers' scheduler under Wan2.1's names."""

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler


class FlowUniPCMultistepScheduler(UniPCMultistepScheduler):
    """diffusers' scheduler for a model that predicts the flow, noise - x0."""

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, **_: Any):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, shift: float = 1.0
    ) -> None:
        self.register_to_config(flow_shift=shift)
        super().set_timesteps(num_inference_steps, device=device)
