"""The ops of csrc/cuda for tensors without memory: what they launch, and what a few blocks of it do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from mpoe_kernels.cuda_library import CUDA_OPS
from mpoe_kernels.triton.architecture import SHARED_MEMORY

from .emulation import OPS, Launched, library, limits

# Blocks of a launch that run. Sorting must be whole, which takes up to 128 for 65,536 pairs; those of products with
# rebuilt weights take long.
BLOCKS = {"rebuilt_product": 8, "weight_gradient_product": 8}
MOST_BLOCKS = 128
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Called(NamedTuple):
    """A call of an op: its name, its tensors, bytes of memory for the call alone, and what it launched."""

    op: str
    tensors: list[Tensor]
    scratch: int
    launched: list[Launched]


class ScratchOf(TorchDispatchMode):
    """``bytes`` of the memory that ops allocate for themselves (csrc/cuda/bind.h)."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "mpoe_emulated":
            with self:  # also in its kernel
                return function.redispatch(_CPU, *arguments)
        result = function(*arguments, **(options or {}))
        if function is torch.ops.aten.new_empty.default and result.dtype == torch.uint8:
            self.bytes += result.numel()
        return result


class StandIns:
    """As ``torch.ops.mpoe_cuda``; appends every call to ``log``. So many slots are spread evenly over the experts."""

    def __init__(self, experts: int, slots: int, log: list[Any]) -> None:
        self._spread, self._slots, self._log = experts, slots, log

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tensors: list[Tensor] = []

            def with_memory(tensor: Tensor) -> Tensor:
                tensors.append(tensor)
                return self.like(tensor)

            def without(tensor: Tensor) -> Tensor:
                tensors.append(torch.empty_like(tensor, device="meta"))
                return tensors[-1]

            blocks = BLOCKS.get(name, MOST_BLOCKS)
            with _disable_current_modes(), ScratchOf() as scratch, library().sampled(blocks) as launched:
                found = getattr(OPS, name)(*tree_map_only(Tensor, with_memory, arguments))
                results = tree_map_only(Tensor, without, found)
            self._log.append(Called(name, tensors, scratch.bytes, launched))
            return results

        return call

    def like(self, tensor: Tensor) -> Tensor:
        """Offsets, indices that are valid whatever they count, or zeros."""
        if tensor.dtype == torch.int32:
            return torch.arange(tensor.numel(), dtype=torch.int32) * (self._slots // self._spread)
        if tensor.dtype == torch.int64:
            return (torch.arange(tensor.numel()) % self._spread).view(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


@contextmanager
def cuda_on_stand_ins(experts: int, slots: int, log: list[Any]) -> Iterator[None]:
    """The backend ``cuda`` calls `StandIns` that have an H100's limits."""
    memory, stand_ins = SHARED_MEMORY["sm_90"], StandIns(experts, slots, log)
    properties = SimpleNamespace(shared_memory_per_block_optin=memory)
    with ExitStack() as patches:
        patches.enter_context(limits(shared_bytes=memory, multiprocessors=132, cache_bytes=50 << 20))
        patches.enter_context(patch.dict(CUDA_OPS.__dict__, {"_ops": stand_ins}, clear=True))
        patches.enter_context(patch.object(torch.cuda, "get_device_properties", lambda _: properties))
        yield
