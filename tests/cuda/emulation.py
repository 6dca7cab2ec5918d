"""The CUDA kernels, compiled for the CPU and run by the emulator of csrc/emu: ops ``torch.ops.mpoe_emulated``."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import cuda_emulate
import torch
from torch import Tensor

from mpoe_kernels.backends.cuda import backend_of
from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.cuda.cost import steps_program
from mpoe_kernels.linear.cuda.panels import Panel
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.hardware import HARDWARE
from mpoe_kernels.testing.assertions import poisoned_memory

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # as csrc/common/types.h numbers them
OPS = torch.ops.mpoe_emulated
NEVER_CHOSEN = 1e9  # seconds


class Schedule(NamedTuple):
    """Which of the ready threads runs next, and when asynchronous copies happen."""

    order: str
    copies: str


# What an op's refusal arrives as depends on torch's release.
REFUSED = (ValueError, RuntimeError)
SCHEDULES = [Schedule(*pair) for pair in product(("ascending", "descending"), ("lazy", "eager"))]


def missing() -> list[str]:
    """Why the kernels cannot be emulated here."""
    reasons = []
    if platform.machine() not in ("x86_64", "AMD64"):
        reasons.append("the emulator switches stacks on x86-64 only")
    if cuda_emulate.compiler() is None:
        reasons.append("no C++ compiler was found")
    if importlib.util.find_spec("pybind11") is None:
        reasons.append("the package pybind11 is not installed")
    return reasons


@lru_cache(maxsize=1)
def library() -> Any:
    """The module of csrc/emu/module.cpp; the ops are there once it is loaded.

    ``MPOE_EMULATED`` names another build, such as one with a sanitizer.
    """
    path = os.environ.get("MPOE_EMULATED") or str(cuda_emulate.library())
    spec = importlib.util.spec_from_file_location("mpoe_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The backend ``cuda`` on the emulated kernels, for CPU tensors and only where it is named.
EMULATED = backend_of(
    name="emulated",
    ops=OPS,
    device_type="cpu",
    hardware=lambda _: HARDWARE["h100"],
    unavailable_reasons=missing,
    predicted_cost=lambda _: NEVER_CHOSEN,
    least_seconds=NEVER_CHOSEN,
)


@contextmanager
def schedule(order: str = "ascending", copies: str = "lazy", seed: int = 0) -> Iterator[None]:
    library().configure(order, copies, seed)
    try:
        yield
    finally:
        library().configure()


@contextmanager
def limits(**changed: int) -> Iterator[None]:
    """Another device than usual: ``shared_bytes`` of a block, ``multiprocessors``."""
    library().limit(**changed)
    try:
        yield
    finally:
        library().limit()


def stats() -> dict[str, int]:
    """What was counted since the last call."""
    return library().counters()


def panel_bytes(dims: BlockDims, dtype: torch.dtype, transposed: bool, panel: Panel) -> int:
    """Shared memory that the kernel takes."""
    return library().panel_bytes(DTYPES[dtype], list(dims), transposed, list(panel[:3]), panel.left_first)


def few_bytes(dims: BlockDims, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> int:
    """Shared memory that the kernel of few rows takes."""
    return library().few_bytes(DTYPES[dtype], list(dims), list(shape))


class Linear:
    """`grouped_mpo_linear` and its backward on the emulated kernels. Results begin as NaN."""

    def __init__(self, x, blocks, offsets, bias, row_index, in_features, out_features, activation, tf32=False) -> None:
        library()
        self.x, self.blocks, self.offsets, self.bias, self.row_index = x, blocks, offsets, bias, row_index
        self.dims = BlockDims.of_blocks(*blocks, in_features, out_features)
        self.slots = x.shape[0] if row_index is None else row_index.shape[0]
        self.activation, self.tf32 = activation, tf32

    def _program(self, strategy: str) -> str:
        """Of a strategy, or of a text that is a program already."""
        return strategy if "|" in strategy else steps_program(self.dims, strategy)

    def _rest(self, strategy: str) -> tuple[Any, ...]:
        sizes = (self.dims.in_features, self.dims.out_features)
        return *sizes, self.activation, self._program(strategy), self.tf32

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``y``, and what backward reads: h of the strategy ``separable``, the pre-activation."""
        save_h, save_z = save and strategy == "separable", save and self.activation not in ("none", "relu")
        common = (self.x, *self.blocks, self.offsets, self.bias, self.row_index)
        with poisoned_memory():
            y, h, z = OPS.linear_forward(*common, *self._rest(strategy), save_h, save_z)
        return y, h if save_h else None, z if save_z else None

    def backward(self, strategy: str, grad: Tensor, h: Tensor | None, saved: Tensor | None, need: list[bool]):
        """``(dx [T, I], dleft, dcentral, dright, dbias)``, None where not needed."""
        common = (grad, self.x, *self.blocks, self.offsets, self.row_index, h, saved)
        with poisoned_memory():
            found = OPS.linear_backward(*common, *self._rest(strategy), *need)
        wanted = [result if needed else None for result, needed in zip(found, need, strict=True)]
        if wanted[0] is not None and self.row_index is not None:
            wanted[0] = OPS.sum_rows(wanted[0], *slots_by_token(self.row_index, self.x.shape[0]))
        return wanted

    def workspace_bytes(self, strategy: str, need: list[bool]) -> int:
        """Scratch memory of the backward, without an activation; of the forward where no gradient is needed."""
        sizes = (DTYPES[self.x.dtype], list(self.dims), self.blocks[0].shape[0], self.slots)
        return library().workspace_bytes(*sizes, self._program(strategy), need)


def few(linear: Linear, shape: tuple[int, int, int, int], expert_of_slot: Tensor, row_index: Tensor) -> Tensor:
    """The product of `linear` for slots that each name their expert."""
    tensors = (linear.x, *linear.blocks, expert_of_slot, linear.bias, row_index)
    with poisoned_memory():
        return OPS.few_forward(*tensors, linear.dims.in_features, linear.dims.out_features, linear.activation, *shape)
