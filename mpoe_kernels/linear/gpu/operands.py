"""Operands with named axes, and the index maps that a contraction of two of them needs.

Axes carry the names of the block sizes (``iL jL a iC jC b iR jR``). The names determine which axes form the M, K and N
dimensions of a GEMM: shared axes are contracted, the others remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import AXES, BlockDims

DIGITS = 4


@dataclass(frozen=True)
class Operand:
    """A tensor whose inner axes have names.

    Attributes:
        data: the tensor.
        strides: elements between neighbours along every axis.
        outer: elements between slots (of activations) or experts (of blocks); 0 for a block that experts share.
        limit: number of true columns if the axes pad them, else 0.
    """

    data: Tensor
    strides: Mapping[str, int]
    outer: int
    limit: int = 0

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(self.strides)

    def experts(self, first: int, last: int) -> Operand:
        """The same block, for experts ``first:last`` only; a shared block is unchanged."""
        if self.outer == 0 or (first, last) == (0, self.data.shape[0]):
            return self
        return Operand(self.data[first:last], self.strides, self.outer, self.limit)


@lru_cache(maxsize=4096)
def row_major(axes: tuple[str, ...], dims: BlockDims) -> Mapping[str, int]:
    """Strides of axes, slowest first, of a dense tensor."""
    strides, step = {}, 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= getattr(dims, axis)
    return strides


def activations(data: Tensor, axes: tuple[str, ...], dims: BlockDims, true_columns: int = 0) -> Operand:
    """Rows ``[.., columns]`` of contiguous columns; ``true_columns`` if the axes pad them."""
    padded = dims.elements(frozenset(axes))
    return Operand(data, row_major(axes, dims), data.stride(0), true_columns if true_columns != padded else 0)


def block(data: Tensor, name: str) -> Operand:
    """Block ``[E, ...]`` (the central one without E) of any strides."""
    strides = data.stride() if name == "C" else data.stride()[1:]
    return Operand(data, dict(zip(AXES[name], strides, strict=True)), 0 if name == "C" else data.stride(0))


def scratch(name: str, experts: int, dims: BlockDims, like: Tensor) -> Operand:
    """Uninitialised memory for a composite of ``experts`` experts."""
    size = dims.elements(frozenset(AXES[name]))
    data = torch.empty(experts, size, dtype=like.dtype, device=like.device)
    return Operand(data, row_major(AXES[name], dims), size)


class IndexMap(NamedTuple):
    """One dimension of a GEMM: its extent, and sizes and strides (per operand) of its digits."""

    extent: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def index_map(axes: Iterable[str], dims: BlockDims, *operands: Operand) -> IndexMap:
    """Digits of ``axes``, most significant first by the first operand's strides; adjacent axes are merged.

    Raises:
        ValueError: more digits than the kernels support.
    """
    return _index_map(frozenset(axes), dims, *(tuple(operand.strides.items()) for operand in operands))


@lru_cache(maxsize=16384)
def _index_map(axes: frozenset[str], dims: BlockDims, *layouts: tuple[tuple[str, int], ...]) -> IndexMap:
    """The cached map of layouts, given as items of strides: a launch needs three, and computing each takes longer than
    a launch should."""
    strides_of = [dict(layout) for layout in layouts]
    named = [axis for axis in axes if getattr(dims, axis) > 1]
    named.sort(key=lambda axis: strides_of[0][axis], reverse=True)
    digits: list[tuple[int, list[int]]] = []
    for axis in named:
        size, strides = getattr(dims, axis), [known[axis] for known in strides_of]
        if digits and digits[-1][1] == [size * stride for stride in strides]:
            digits[-1] = (digits[-1][0] * size, strides)
        else:
            digits.append((size, strides))
    if len(digits) > DIGITS:
        raise ValueError(f"a dimension of {len(digits)} digits ({', '.join(named)}) does not fit {DIGITS}")
    digits += [(1, [0] * len(layouts))] * (DIGITS - len(digits))
    sizes = tuple(size for size, _ in digits)
    columns = tuple(tuple(strides[k] for _, strides in digits) for k in range(len(layouts)))
    return IndexMap(math.prod(sizes), sizes, columns)
