"""The command line of Wan2.1 in miniature: its flags, its defaults and what it refuses.

    python make_checkpoint.py CKPT
    python generate.py --ckpt_dir CKPT --prompt "A red ball rolls to the left."

On a CPU it runs in one thread: at this size several only wait for each other.
"""

import argparse
import logging
import os
import random
import sys
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist
import wan
from torch import Tensor
from wan.configs import SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from wan.utils.utils import cache_image, cache_video, str2bool

__all__ = ["EXAMPLE_PROMPT", "cache_image", "cache_video", "generate"]

EXAMPLE_PROMPT = {"t2v-nano": {"prompt": "A red ball rolls to the left over a blue floor."}}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate a small video from a prompt")
    add = parser.add_argument
    add("--task", default="t2v-nano", choices=list(WAN_CONFIGS), help="what to make of what")
    add("--size", default="64*64", choices=list(SIZE_CONFIGS), help="width*height")
    add("--frame_num", type=int, help="4n+1; default: 17")
    add("--ckpt_dir", help="folder of the checkpoint")
    add("--offload_model", type=str2bool, help="move models to the CPU; default: if one process")
    add("--ulysses_size", type=int, default=1, help="processes that share the tokens")
    add("--ring_size", type=int, default=1, help="processes that share the tokens")
    add("--t5_fsdp", action="store_true", help="spread the text encoder over the processes")
    add("--t5_cpu", action="store_true", help="leave the text encoder on the CPU")
    add("--dit_fsdp", action="store_true", help="spread the transformer over the processes")
    add("--save_file", help="where to write the video")
    for name in ("src_video", "src_mask", "src_ref_images", "image", "first_frame", "last_frame"):
        add(f"--{name}", help="of other tasks, which are not in the miniature")
    add("--prompt", help="what is to be seen")
    add("--use_prompt_extend", action="store_true", help="not in the miniature")
    add("--prompt_extend_method", default="local_qwen", choices=["dashscope", "local_qwen"])
    add("--prompt_extend_model")
    add("--prompt_extend_target_lang", default="zh", choices=["zh", "en"])
    add("--base_seed", type=int, default=-1, help="of the noise; negative: any")
    add("--sample_solver", default="unipc", choices=["unipc", "dpm++"])
    add("--sample_steps", type=int, help="default: 50")
    add("--sample_shift", type=float, help="default: 5")
    add("--sample_guide_scale", type=float, default=5.0)
    args = parser.parse_args()
    _validate_args(args)
    return args


def _validate_args(args: argparse.Namespace) -> None:
    """Fill in what depends on the task; AssertionError for what cannot be."""
    assert args.ckpt_dir is not None, "Please specify the checkpoint directory."
    assert args.task in WAN_CONFIGS and args.task in EXAMPLE_PROMPT, f"Unsupported {args.task=}"
    sizes = SUPPORTED_SIZES[args.task]
    assert args.size in sizes, f"Unsupported {args.size=}: one of {', '.join(sizes)}"
    defaults = {"sample_steps": 50, "sample_shift": 5.0, "frame_num": 17}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.base_seed = args.base_seed if args.base_seed >= 0 else random.randrange(2**63)


def _init_logging(rank: int) -> None:
    if rank == 0:
        form = "[%(asctime)s] %(levelname)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form, stream=sys.stdout)
    else:
        logging.basicConfig(level=logging.ERROR)


def _init_processes(args: argparse.Namespace, local_rank: int, world_size: int) -> None:
    """The process group that the flags ask for; AssertionError for flags that do not fit."""
    parts = args.ulysses_size * args.ring_size
    if world_size == 1:
        assert not (args.t5_fsdp or args.dit_fsdp), "FSDP needs several processes: use torchrun."
        assert parts == 1, "Context parallelism needs several processes: use torchrun."
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    assert parts in (1, world_size), "ulysses_size * ring_size must be the number of processes."
    heads = WAN_CONFIGS[args.task].num_heads
    assert heads % args.ulysses_size == 0, f"{heads} heads cannot be split by {args.ulysses_size=}"
    seeds = [args.base_seed]
    dist.broadcast_object_list(seeds, src=0)
    args.base_seed = seeds[0]


def generate(args: argparse.Namespace) -> None:
    """Make the video that the flags ask for, and on rank 0 write it."""
    rank, world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    local_rank = int(os.getenv("LOCAL_RANK", "0"))
    _init_logging(rank)
    if args.offload_model is None:
        args.offload_model = world_size == 1
    assert not args.use_prompt_extend, "The miniature cannot extend prompts."
    torch.set_num_threads(1)
    _init_processes(args, local_rank, world_size)
    if args.prompt is None:
        args.prompt = EXAMPLE_PROMPT[args.task]["prompt"]
    logging.info("Generation job args: %s", args)
    video = _run_pipeline(args, device_id=local_rank, rank=rank)
    if rank == 0:
        args.save_file = args.save_file or _file_name(args)
        logging.info("Saving generated video to %s", args.save_file)
        fps = WAN_CONFIGS[args.task].sample_fps
        cache_video(
            tensor=video[None], save_file=args.save_file, fps=fps, nrow=1, value_range=(-1, 1)
        )
    logging.info("Finished.")
    if dist.is_initialized():
        dist.destroy_process_group()


def _run_pipeline(args: argparse.Namespace, device_id: int, rank: int) -> Tensor | None:
    """Make the task's pipeline, looked up in ``wan`` when it is needed, and let it generate."""
    load: dict[str, Any] = {
        "config": WAN_CONFIGS[args.task],
        "checkpoint_dir": args.ckpt_dir,
        "device_id": device_id,
        "rank": rank,
        "t5_fsdp": args.t5_fsdp,
        "dit_fsdp": args.dit_fsdp,
        "use_usp": args.ulysses_size * args.ring_size > 1,
        "t5_cpu": args.t5_cpu,
    }
    options: dict[str, Any] = {
        "frame_num": args.frame_num,
        "shift": args.sample_shift,
        "sample_solver": args.sample_solver,
        "sampling_steps": args.sample_steps,
        "guide_scale": args.sample_guide_scale,
        "seed": args.base_seed,
        "offload_model": args.offload_model,
    }
    return wan.WanT2V(**load).generate(args.prompt, size=SIZE_CONFIGS[args.size], **options)


def _file_name(args: argparse.Namespace) -> str:
    prompt = args.prompt.replace(" ", "_").replace("/", "_")[:50]
    parts = (args.task, args.size, args.ulysses_size, args.ring_size, prompt)
    return "_".join(map(str, parts)) + f"_{datetime.now():%Y%m%d_%H%M%S}.mp4"


if __name__ == "__main__":
    generate(_parse_args())
