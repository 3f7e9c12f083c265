"""Image to video."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from easydict import EasyDict
from PIL import Image
from torch import Tensor

from .modules.clip import CLIPModel
from .pipeline import WanPipeline


class WanI2V(WanPipeline):
    def __init__(
        self,
        config: EasyDict,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
    ):
        """As ``WanPipeline``, and the image encoder. init_on_cpu: of no account at this size."""
        super().__init__(
            config, checkpoint_dir, device_id, rank, t5_fsdp, dit_fsdp, use_usp, t5_cpu
        )
        folder = Path(checkpoint_dir)
        self.clip = CLIPModel(
            config.clip_dtype,
            self.device,
            folder / config.clip_checkpoint,
            folder / config.clip_tokenizer,
        )

    def generate(
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 64 * 64,
        frame_num: int = 17,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:
        """A video [3, frame_num, height, width] in [-1, 1] that begins with img.

        Height and width have the proportions of img and at most max_area. For the rest see
        ``WanT2V.generate``.
        """
        pixels = torch.from_numpy(np.array(img.convert("RGB"))).permute(2, 0, 1)
        image = (pixels / 127.5 - 1).to(self.device)
        area = self.latent_area(max_area, img.height / img.width)
        noise = self.noise(frame_num, area, seed)
        contexts = self.encode_prompts(input_prompt, n_prompt, offload_model)

        self.clip.model.to(self.device)
        clip_fea = self.clip.visual([image[:, None]])
        if offload_model:
            self.clip.model.cpu()
        given = {
            "clip_fea": clip_fea,
            "y": [self.condition(image, frame_num, area)],
            "seq_len": self.seq_len(noise),
        }
        arg_c, arg_null = ({"context": context, **given} for context in contexts)
        scheduler = self.scheduler(sample_solver, sampling_steps, shift)
        return self.sample(noise, arg_c, arg_null, scheduler, guide_scale, offload_model)

    def latent_area(self, max_area: int, aspect_ratio: float) -> tuple[int, int]:
        """Height and width of the latent for an image of aspect_ratio = height / width."""
        sides = (math.sqrt(max_area * aspect_ratio), math.sqrt(max_area / aspect_ratio))
        units = zip(sides, self.vae_stride[1:], self.patch_size[1:], strict=True)
        height, width = (int(side // stride // patch) * patch for side, stride, patch in units)
        return height, width

    def condition(self, image: Tensor, frame_num: int, area: tuple[int, int]) -> Tensor:
        """Mask (4 channels) and latent of a video with nothing but its first frame, [20, ...]."""
        size = (area[0] * self.vae_stride[1], area[1] * self.vae_stride[2])
        video = torch.zeros(3, frame_num, *size, device=self.device)
        video[:, 0] = F.interpolate(image[None], size, mode="bicubic")[0]
        latent = self.vae.encode([video])[0]
        mask = latent.new_zeros(self.vae_stride[0], *latent.shape[1:])
        mask[:, 0] = 1
        return torch.cat([mask, latent])
