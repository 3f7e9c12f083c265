"""A fake GPU: prices the ops of a torch program, counts its memory, and notes the host's waits.

Under torch's FakeTensorMode tensors on "cuda" have shape, dtype, device and lifetime, but no
numbers; tensors of the host are real.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

GPU, aten = torch.device("cuda:0"), torch.ops.aten

# An A800: peaks of its data sheet times the achieved share, the same for all models. The share of
# the tensor cores is fitted to bench_scale.PUBLISHED, stock; no other number is fitted.
FLOPS_PER_SECOND = {torch.bfloat16: 312e12 * 0.72, torch.float64: 9.7e12 * 0.85}
OTHER_FLOPS_PER_SECOND = 19.5e12 * 0.85  # float32 without TF32, as torch has it by default
BYTES_PER_SECOND, LAUNCH_SECONDS = 2.0e12 * 0.80, 5e-6


def prepare_gpu() -> None:
    """Let a CPU build of torch do what it does on a GPU. Call it after all imports."""
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 15).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    guards[cuda] = guards[cuda] or guards[meta]  # a CPU build has none, and indexing needs one
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    generator = torch.Generator
    torch.Generator = lambda device=None: generator()
    FakeTensor.tolist = to_list


def to_list(fake: Tensor) -> list[Any]:
    """A tensor's tolist, with one wait for the GPU: torch reads fake ones element by element."""
    copy = fake.cpu()
    with unset_fake_temporarily():
        return on_host(copy).tolist()


class Op:
    """A call of an operator.

    ``host_value`` of a fake tensor holds its numbers if they come from the host, as timesteps do.
    The host reads all other numbers as 1.
    """

    READS = (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default)
    COPIES = (aten._to_copy.default, aten.copy_.default)

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.inputs = tensors((args, kwargs))

    def is_on_host(self) -> bool:
        """Whether all its tensors are on the host, where they are real."""
        device = self.kwargs.get("device")
        is_real = not any(isinstance(tensor, FakeTensor) for tensor in self.inputs)
        return is_real and (device is None or device.type == "cpu")

    def run_on_host(self) -> Any:
        with unset_fake_temporarily():
            return self.func(*tree_map(on_host, self.args), **tree_map(on_host, self.kwargs))

    def read(self) -> Any:
        """The result of an operator that reads numbers."""
        out = self.run_on_host()
        if not isinstance(out, Tensor):
            return out
        fake = self.inputs[0].new_empty(out.shape, dtype=out.dtype)
        fake.host_value = out
        return fake

    def note_host_values(self, outputs: Sequence[Tensor]) -> None:
        """Compute the outputs on the host, if the inputs are known and the outputs small."""
        known = all(host_value(u) is not None for u in self.inputs)
        few = sum(u.numel() for u in outputs) <= 2**15
        values = tensors(self.run_on_host()) if known and few else []
        for output, value in zip_longest(outputs, values):
            output.host_value = value  # None if an in-place op makes it unknown

    def is_blocking_copy(self, out: Any) -> bool:
        """Whether it copies between host and GPU, and blocks the host."""
        copies, waits = self.func in self.COPIES, not self.kwargs.get("non_blocking")
        return copies and waits and on_gpu(self.inputs[-1]) != on_gpu(out)

    def is_kernel(self) -> bool:
        """Whether the GPU has work: not to allocate, and not to view an input."""
        is_view = self.func.is_view or self.func is aten._unsafe_view.default
        return not is_view and "empty" not in self.func.name()

    def seconds(self, out: Any) -> float:
        """As long as the slowest resource needs."""
        formula = flop_registry.get(self.func.overloadpacket, lambda *_, **__: 0)
        flops = formula(*self.args, **self.kwargs, out_val=out)
        touched = [*self.inputs, *tensors(out)]
        rate = FLOPS_PER_SECOND.get((self.inputs or touched)[-1].dtype, OTHER_FLOPS_PER_SECOND)
        return max(flops / rate, sum(map(nbytes, touched)) / BYTES_PER_SECOND, LAUNCH_SECONDS)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def host_value(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "host_value", None) if isinstance(tensor, FakeTensor) else tensor


def on_host(leaf: Any) -> Any:
    """An argument of an op for the same op on the host."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    value = host_value(leaf)
    return torch.ones(leaf.shape, dtype=leaf.dtype) if value is None else value


def nbytes(tensor: Tensor) -> int:
    """Bytes in memory: an expanded dimension counts once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(side for side, stride in sides if stride)


@dataclass
class Pass:
    """One call of a model. ``syncs`` counts the host's waits until the next call."""

    seconds: float = 0.0
    syncs: int = 0


class Meter(TorchDispatchMode):
    """Sees each op of a generation, and the calls of its models."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = [Pass()]  # the first one stands for everything before sampling
        self.in_pass = False
        self.times = 1  # how many blocks the running block stands for
        self.weights = 0  # bytes of a model at full depth
        # bytes beside the weights, in the 512-byte units of CUDA's caching allocator
        self.alive = self.peak = self.alive_at_vae = 0
        self.storages: set[int] = set()  # counted in alive, or weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = Op(func, args, kwargs or {})
        if op.is_on_host():
            return op.run_on_host()
        if func in op.READS:
            self.passes[-1].syncs += any(map(on_gpu, op.inputs))
            return op.read()
        out = func(*args, **op.kwargs)
        outputs = tensors(out)
        op.note_host_values(outputs)
        for output in filter(on_gpu, outputs):
            self.hold(output.untyped_storage())
        self.passes[-1].syncs += op.is_blocking_copy(out)
        if self.in_pass and any(map(on_gpu, outputs)) and op.is_kernel():
            self.passes[-1].seconds += self.times * op.seconds(out)
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as alive until it is freed."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.storages:
            return
        self.storages.add(key)
        weakref.finalize(storage, self.free, key, size)
        self.alive += size
        if self.in_pass:
            self.peak = max(self.peak, self.alive)

    def free(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.alive -= size

    def watch(self, model: nn.Module, stacks: Iterable[tuple[nn.ModuleList, int]]) -> None:
        """Hook a model, below all that TeaCache patches.

        stacks: block lists with their full depth; the last block of a list counts as all that are
            missing.
        """
        self.storages |= {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.weights = sum(map(nbytes, model.parameters()))
        model.register_forward_pre_hook(self.begin_pass)
        model.register_forward_hook(self.end_pass)
        for blocks, depth in stacks:
            missing = depth - len(blocks)
            self.weights += missing * sum(map(nbytes, blocks[-1].parameters()))
            blocks[-1].register_forward_pre_hook(partial(self.count_times, 1 + missing))
            blocks[-1].register_forward_hook(partial(self.count_times, 1))

    def begin_pass(self, *_: Any) -> None:
        self.passes.append(Pass())
        self.in_pass = True

    def end_pass(self, *_: Any) -> None:
        self.in_pass = False

    def count_times(self, times: int, *_: Any) -> None:
        self.times = times

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """Stands in for the VAE's."""
        self.alive_at_vae = self.alive
        return latents

    @property
    def syncs(self) -> list[int]:
        """The host's waits by step."""
        counts = [one.syncs for one in self.passes[1:]]
        return [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
