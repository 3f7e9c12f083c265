"""Parameters spread over the processes."""

import torch
from torch import nn


def shard_model(model: nn.Module, device_id: int | torch.device) -> nn.Module:
    """The model in FSDP and each of its ``blocks``, if it has any, in one of its own.

    Nothing is broadcast first: every process has read the same checkpoint.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision  # slow
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    full = torch.float32
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({type(block) for block in getattr(model, "blocks", ())}),
        mixed_precision=MixedPrecision(param_dtype=full, reduce_dtype=full, buffer_dtype=full),
        device_id=device_id,
    )
