"""Text to video."""

from torch import Tensor

from .pipeline import WanPipeline


class WanT2V(WanPipeline):
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
