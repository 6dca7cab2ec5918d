"""The CUDA kernels, compiled for the CPU and run by the emulator of csrc/emu."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends.cuda.panels import Panel
from mpoe_kernels.planner.orders import BlockDims, program

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import cuda_emulate

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


class Schedule(NamedTuple):
    """Which of the ready threads runs next, and when asynchronous copies happen."""

    order: str
    copies: str


SCHEDULES = [Schedule(*pair) for pair in product(("ascending", "descending"), ("lazy", "eager"))]
ORDERS = {"ascending": 0, "descending": 1, "random": 2}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """``MPOE_EMULATED`` names another build, such as one with a sanitizer."""
    loaded = ctypes.CDLL(os.environ.get("MPOE_EMULATED") or str(cuda_emulate.library()))
    loaded.mpoe_emu_error.restype = ctypes.c_char_p
    return loaded


@contextmanager
def schedule(order: str = "ascending", copies: str = "lazy", seed: int = 0, planted: int = 0) -> Iterator[None]:
    library().mpoe_emu_config(ORDERS[order], int(copies == "lazy"), seed, planted)
    try:
        yield
    finally:
        library().mpoe_emu_config(0, 1, 0, 0)


@contextmanager
def limits(shared_bytes: int = 227 * 1024, multiprocessors: int = 4) -> Iterator[None]:
    """Another device than usual."""
    library().mpoe_emu_limits(ctypes.c_int64(shared_bytes), multiprocessors)
    try:
        yield
    finally:
        library().mpoe_emu_limits(ctypes.c_int64(227 * 1024), 4)


def stats() -> dict[str, int]:
    """What was counted since the last call."""
    names = ("launches", "blocks", "mma", "ldmatrix", "wavefronts", "cp_async", "barriers")
    counts = (ctypes.c_int64 * len(names))()
    library().mpoe_emu_stats(counts)
    return dict(zip(names, counts, strict=True))


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr() or None


def call(name: str, *arguments: object) -> None:
    """Call the library; its error becomes a RuntimeError."""
    if getattr(library(), name)(*arguments):
        raise RuntimeError(library().mpoe_emu_error().decode())


def integers(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def pointers(tensors: list[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def program_text(dims: BlockDims, strategy: str) -> bytes:
    """Of a strategy, or of a text that is a program already."""
    if "|" in strategy:
        return strategy.encode()
    merges, order = program(dims, strategy)
    return " ".join([*(result for result, _, _ in merges), "|", *order]).encode()


def panel_bytes(dims: BlockDims, dtype: torch.dtype, transposed: bool, panel: Panel) -> int:
    """Shared memory that the kernel takes."""
    sizes = integers([DTYPES[dtype], 0, 0, 1, 0, dims.in_features, dims.out_features, *dims[:8]])
    needed = ctypes.c_int64()
    call("mpoe_emu_panel_bytes", sizes, int(transposed), integers([*panel[:3], panel.left_first]), ctypes.byref(needed))
    return needed.value


def few_bytes(dims: BlockDims, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> int:
    """Shared memory that the kernel of few rows takes."""
    sizes = integers([DTYPES[dtype], 0, 0, 1, 0, dims.in_features, dims.out_features, *dims[:8]])
    needed = ctypes.c_int64()
    call("mpoe_emu_few_bytes", sizes, integers([*shape]), ctypes.byref(needed))
    return needed.value


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class Linear:
    """`grouped_mpo_linear` and its backward on the emulated kernels. Results begin as NaN."""

    def __init__(self, x, blocks, offsets, bias, row_index, in_features, out_features, activation, tf32=False) -> None:
        self.x, self.blocks, self.offsets, self.bias, self.row_index = x, blocks, offsets.int(), bias, row_index
        self.dims = BlockDims.of_blocks(*blocks, in_features, out_features)
        self.slots = x.shape[0] if row_index is None else row_index.shape[0]
        self.experts = offsets.shape[0] - 1
        self.activation = activation
        self.workspace = 0  # bytes of the last call
        sizes = [DTYPES[x.dtype], ACTIVATIONS[activation], int(tf32), self.experts, self.slots, in_features]
        self.sizes = integers([*sizes, out_features, *self.dims[:8]])

    def _call(self, name: str, strategy: str, tensors: list[Tensor | None]) -> None:
        common = [self.x, *self.blocks, self.offsets, self.row_index]
        needed = ctypes.c_int64()
        text = program_text(self.dims, strategy)
        call(name, self.sizes, text, pointers([*common, *tensors]), ctypes.byref(needed))
        self.workspace = needed.value

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y = nan(self.slots, self.dims.out_features, dtype=self.x.dtype)
        h = z = None
        if save and strategy == "separable":
            h = nan(self.slots * self.dims.jC, self.dims.b, dtype=self.x.dtype)
        if save and self.activation not in ("none", "relu"):
            z = torch.full_like(y, float("nan"))
        self._call("mpoe_emu_linear_forward", strategy, [self.bias, y, h, z])
        return y, h, z

    def backward(self, strategy: str, grad: Tensor, h: Tensor | None, saved: Tensor | None, need: list[bool]):
        """``(dx [T, I], dleft, dcentral, dright, dbias)``, None where not needed."""
        dx = nan(self.slots, self.dims.in_features, dtype=self.x.dtype)
        results = [dx, *(torch.full_like(block, float("nan")) for block in self.blocks)]
        results.append(nan(self.dims.out_features, dtype=self.x.dtype))
        wanted = [result if needed else None for result, needed in zip(results, need, strict=True)]
        self._call("mpoe_emu_linear_backward", strategy, [grad, h, saved, *wanted])
        if wanted[0] is not None and self.row_index is not None:
            wanted[0] = sum_rows(dx, self.row_index, self.x.shape[0])
        return wanted


def few(linear: Linear, shape: tuple[int, int, int, int], expert_of_slot: Tensor, row_index: Tensor) -> Tensor:
    """The product of `linear` for slots that each name their expert."""
    y = nan(linear.slots, linear.dims.out_features, dtype=linear.x.dtype)
    tensors = [linear.x, *linear.blocks, expert_of_slot, row_index, linear.bias, y, None]
    call("mpoe_emu_few", linear.sizes, integers([*shape]), pointers(tensors))
    return y


def sum_rows(rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
    out = nan(tokens, rows.shape[1], dtype=rows.dtype)
    ordered, order = torch.sort(row_index, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(tokens + 1))
    arguments = (pointer(rows), pointer(order), pointer(starts), pointer(out))
    call("mpoe_emu_sum_rows", DTYPES[rows.dtype], *map(ctypes.c_void_p, arguments), tokens, rows.shape[1])
    return out
