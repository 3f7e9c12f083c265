"""Text to video: loading, prompts, sampling, decoding."""

import logging
import math
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from easydict import EasyDict
from torch import Tensor
from tqdm import tqdm

from .distributed.context_parallel import parallelize
from .distributed.fsdp import shard_model
from .modules.model import WanModel
from .modules.t5 import T5EncoderModel
from .modules.vae import WanVAE
from .utils import fm_solvers, fm_solvers_unipc


class WanT2V:
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
    ):
        """Load a checkpoint folder, laid out as ``config`` names its files.

        device_id: of the GPU, where there is one. use_usp: split the tokens over the processes.
        t5_fsdp, dit_fsdp: spread the parameters of text encoder and transformer over them.
        """
        cuda = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{device_id}" if cuda else "cpu")
        self.config, self.rank, self.t5_cpu = config, rank, t5_cpu
        self.num_train_timesteps, self.param_dtype = config.num_train_timesteps, config.param_dtype
        self.vae_stride, self.patch_size = config.vae_stride, config.patch_size
        self.sample_neg_prompt = config.sample_neg_prompt

        folder, shard_fn = Path(checkpoint_dir), partial(shard_model, device_id=self.device)
        self.text_encoder = T5EncoderModel(
            config.text_len,
            dtype=config.t5_dtype,
            checkpoint_path=folder / config.t5_checkpoint,
            tokenizer_path=folder / config.t5_tokenizer,
            shard_fn=shard_fn if t5_fsdp else None,
        )
        self.vae = WanVAE(vae_pth=folder / config.vae_checkpoint, device=self.device)
        logging.info("Creating WanModel from %s", folder)
        self.model = (
            WanModel.from_pretrained(folder, low_cpu_mem_usage=False).eval().requires_grad_(False)
        )
        self.sp_size = parallelize(self.model) if use_usp else 1
        if dist.is_initialized():
            dist.barrier()
        self.model = shard_fn(self.model) if dit_fsdp else self.model.to(self.device)

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (64, 64),
        frame_num: int = 17,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:
        """A video [3, frame_num, height, width] in [-1, 1] of size (width, height).

        frame_num: 4n + 1. sample_solver: "unipc" or "dpm++". n_prompt: the config's if it is
        empty. seed: any if it is negative. Returns None but on rank 0.
        """
        width, height = size
        area = (height // self.vae_stride[1], width // self.vae_stride[2])
        noise = self.noise(frame_num, area, seed)
        contexts = self.encode_prompts(input_prompt, n_prompt, offload_model)
        arg_c, arg_null = (
            {"context": context, "seq_len": self.seq_len(noise)} for context in contexts
        )
        scheduler = self.scheduler(sample_solver, sampling_steps, shift)
        return self.sample(noise, arg_c, arg_null, scheduler, guide_scale, offload_model)

    def noise(self, frame_num: int, area: tuple[int, int], seed: int) -> Tensor:
        """What the sampling begins with, [16, n + 1, *area] for 4n + 1 frames."""
        seed = seed if seed >= 0 else random.randint(0, sys.maxsize)
        generator = torch.Generator(self.device).manual_seed(seed)
        frames = (frame_num - 1) // self.vae_stride[0] + 1
        shape = (self.vae.model.z_dim, frames, *area)
        return torch.randn(shape, generator=generator, device=self.device)

    def seq_len(self, latent: Tensor) -> int:
        """Tokens of a latent, padded so that each process gets as many."""
        tokens = math.prod(latent.shape[1:]) / math.prod(self.patch_size)
        return math.ceil(tokens / self.sp_size) * self.sp_size

    def encode_prompts(self, prompt: str, n_prompt: str, offload_model: bool) -> list[list[Tensor]]:
        """The contexts of the conditional and of the unconditional branch."""
        device = torch.device("cpu") if self.t5_cpu else self.device
        if not self.t5_cpu:
            self.text_encoder.model.to(device)
        texts = [prompt, n_prompt or self.sample_neg_prompt]
        contexts = [self.text_encoder([text], device) for text in texts]
        if offload_model and not self.t5_cpu:
            self.text_encoder.model.cpu()
        return [[u.to(self.device) for u in context] for context in contexts]

    def scheduler(self, solver: str, steps: int, shift: float) -> Any:
        """A flow-matching scheduler with its timesteps set."""
        common = {"num_train_timesteps": self.num_train_timesteps, "shift": 1}
        if solver == "unipc":
            scheduler = fm_solvers_unipc.FlowUniPCMultistepScheduler(**common)
            scheduler.set_timesteps(steps, device=self.device, shift=shift)
        elif solver == "dpm++":
            scheduler = fm_solvers.FlowDPMSolverMultistepScheduler(**common)
            sigmas = fm_solvers.get_sampling_sigmas(steps, shift)
            fm_solvers.retrieve_timesteps(scheduler, self.device, sigmas)
        else:
            raise NotImplementedError(f"Unsupported solver {solver}: unipc or dpm++")
        scheduler.set_begin_index(0)  # where timesteps repeat, they do not tell where to begin
        return scheduler

    def sample(
        self,
        latent: Tensor,
        arg_c: dict[str, Any],
        arg_null: dict[str, Any],
        scheduler: Any,
        guide_scale: float,
        offload_model: bool,
    ) -> Tensor | None:
        """Noise [16, n + 1, h, w] to a video [3, 4n + 1, 8h, 8w] in [-1, 1]; None but on rank 0.

        arg_c, arg_null: what the model is given on the conditional and unconditional branch.
        """
        autocast = torch.autocast(
            self.device.type, self.param_dtype, enabled=self.param_dtype != torch.float32
        )
        with autocast, torch.no_grad(), getattr(self.model, "no_sync", nullcontext)():
            self.model.to(self.device)
            for t in tqdm(scheduler.timesteps):
                cond = self.model([latent], t=t[None], **arg_c)[0]
                uncond = self.model([latent], t=t[None], **arg_null)[0]
                flow = uncond + guide_scale * (cond - uncond)
                latent = scheduler.step(flow[None], t, latent[None], return_dict=False)[0][0]
            if offload_model:
                self.model.to("cpu")
            torch.cuda.empty_cache()
            video = self.vae.decode([latent])[0] if self.rank == 0 else None
        if dist.is_initialized():
            dist.barrier()
        return video
