"""The ops of csrc/cuda for tensors without memory: what they launch, and what a few blocks of it do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from mpoe_kernels.cuda_library import CUDA_OPS
from mpoe_kernels.triton.architecture import SHARED_MEMORY

from .emulation import OPS, Launched, library, limits

BLOCKS = 128  # of a launch that run; sorting up to 65,536 pairs takes no more, so it is whole


class Called(NamedTuple):
    """A call of an op: its name, its tensors and what it launched."""

    op: str
    tensors: list[Tensor]
    launched: list[Launched]


class StandIns:
    """As ``torch.ops.mpoe_cuda``; appends every call to ``log``. So many slots are spread evenly over the experts."""

    def __init__(self, experts: int, slots: int, log: list[Any]) -> None:
        self.experts, self.slots, self.log = experts, slots, log

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            tensors: list[Tensor] = []

            def with_memory(tensor: Tensor) -> Tensor:
                tensors.append(tensor)
                return self.like(tensor)

            def without(tensor: Tensor) -> Tensor:
                tensors.append(torch.empty_like(tensor, device="meta"))
                return tensors[-1]

            with _disable_current_modes(), library().sampled(BLOCKS) as launched:
                found = getattr(OPS, name)(*tree_map_only(Tensor, with_memory, arguments))
                results = tree_map_only(Tensor, without, found)
            self.log.append(Called(name, tensors, launched))
            return results

        return call

    def like(self, tensor: Tensor) -> Tensor:
        """Offsets, indices that are valid whatever they count, or zeros."""
        if tensor.dtype == torch.int32:
            return torch.arange(tensor.numel(), dtype=torch.int32) * (self.slots // self.experts)
        if tensor.dtype == torch.int64:
            return (torch.arange(tensor.numel()) % self.experts).view(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


@contextmanager
def cuda_on_stand_ins(experts: int, slots: int, log: list[Any]) -> Iterator[None]:
    """The backend ``cuda`` calls `StandIns` that have an H100's limits."""
    memory, stand_ins = SHARED_MEMORY["sm_90"], StandIns(experts, slots, log)
    properties = SimpleNamespace(shared_memory_per_block_optin=memory)
    with ExitStack() as patches:
        patches.enter_context(limits(shared_bytes=memory, multiprocessors=132))
        patches.enter_context(patch.dict(CUDA_OPS.__dict__, {"_ops": stand_ins}, clear=True))
        patches.enter_context(patch.object(torch.cuda, "get_device_properties", lambda _: properties))
        yield
