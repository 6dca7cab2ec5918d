"""One expert's weight built from its blocks in slabs that stay in cache.

A slab is a range of ``iL``, so it is a range of the weight's rows. Products of blocks are in *block order*
``[(iL jL iC jC), (iR jR)]``; one copy of a slab converts them to ``[(iL iC iR), (jL jC jR)]`` or back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.eager.row_groups import Group, active_groups, select_experts

# A slab in block order and the same slab in the weight's order should fit in a core's cache together.
SLAB_BYTES = 2 << 20
# Half-built weights of several experts share one GEMM if they take less than this fraction of a weight.
CHUNK = 0.75


def in_natural_order(block: Tensor, dims: BlockDims) -> Tensor:
    """A slab in block order -> a view of it as ``[rows iL, iC, iR, jL, jC, jR]``."""
    return block.view(-1, dims.jL, dims.iC, dims.jC, dims.iR, dims.jR).permute(0, 2, 4, 1, 3, 5)


def rebuild_weight(left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> Tensor:
    """One expert's ``[I, F]`` from ``left [iL, jL, a]``, ``central [a, iC, jC, b]``, ``right [b, iR, jR]``."""
    if dims.left_first:
        half = left.reshape(-1, dims.a) @ central.reshape(dims.a, -1)
        full = half.view(-1, dims.b) @ right.reshape(dims.b, -1)
    else:
        half = central.reshape(-1, dims.b) @ right.reshape(dims.b, -1)
        full = left.reshape(-1, dims.a) @ half.view(dims.a, -1)
    del half
    padded = in_natural_order(full, dims).reshape(dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR)
    return padded[: dims.in_features, : dims.out_features]


def block_order(dweight: Tensor, dims: BlockDims) -> Tensor:
    """``[I, F] -> [(iL jL iC jC), (iR jR)]``, the order in which the blocks multiply."""
    padded_in, padded_out = dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
    if (padded_in, padded_out) != (dims.in_features, dims.out_features):
        dweight = torch.nn.functional.pad(dweight, (0, padded_out - dims.out_features, 0, padded_in - dims.in_features))
    ordered = dweight.view(dims.iL, dims.iC, dims.iR, dims.jL, dims.jC, dims.jR).permute(0, 3, 1, 4, 2, 5)
    return ordered.reshape(-1, dims.iR * dims.jR)


def project_gradient(
    ordered: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims, need_central: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of one expert's blocks from that of its weight: ``dleft``, ``dcentral`` (or None), ``dright``.

    Args:
        ordered: weight gradient as `block_order` returns it. Right is contracted first, so the two remaining products
            are small.
    """
    left_matrix, central_matrix = left.reshape(-1, dims.a), central.reshape(dims.a, -1)
    half = (left_matrix @ central_matrix).view(-1, dims.b)
    dright = (half.T @ ordered).view(dims.b, dims.iR, dims.jR)
    del half  # as large as the weight itself at full bonds
    dhalf = (ordered @ right.reshape(dims.b, -1).T).view(dims.iL * dims.jL, -1)  # [(iL jL), (iC jC b)]
    dleft = (dhalf @ central_matrix.T).view(dims.iL, dims.jL, dims.a)
    dcentral = (left_matrix.T @ dhalf).view(central.shape) if need_central else None
    return dleft, dcentral, dright


class WeightBuilder:
    """Builds weights from blocks as matrices."""

    def __init__(self, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> None:
        self.dims = dims
        self.same_order = dims.is_separable  # the order of blocks is the weight's own, no copy is needed
        # Right first needs all of ``C R`` for every slab, so it must leave room for the weight and its gradient.
        self.left_first = dims.left_first or dims.a > CHUNK * dims.iL * dims.jL
        experts = left.shape[0]
        self.left = left.reshape(experts, dims.iL * dims.jL, dims.a)
        self.central = central.reshape(dims.a, dims.iC * dims.jC * dims.b)
        self.right = right.reshape(experts, dims.b, dims.iR * dims.jR)
        self.row_elements = dims.weight_elements // dims.iL  # of one iL
        self.in_step, self.padded_out = dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
        self.padded_in = dims.iL * self.in_step
        count = -(-dims.weight_elements * left.element_size() // SLAB_BYTES) if left.is_cpu else 1
        self.slab_rows = -(-dims.iL // min(dims.iL, max(4, count)))
        self.slab_elements = self.slab_rows * self.row_elements
        if self.left_first:
            self.half_elements = dims.iL * dims.jL * dims.iC * dims.jC * dims.b
            self.chunk = max(1, int(CHUNK * dims.weight_elements / self.half_elements))
        else:
            self.half_elements = dims.a * dims.iC * dims.jC * dims.iR * dims.jR
            self.chunk = 1

    def chunks(self, offsets: list[int]) -> Iterator[list[Group]]:
        """Busy experts in groups whose half-built weights are built together."""
        groups = list(active_groups(offsets))
        for first in range(0, len(groups), self.chunk):
            yield groups[first : first + self.chunk]

    def ranges(self, whole: tuple[int, int], rows: int) -> Iterator[tuple[int, int]]:
        """A range of iL in pieces of ``rows``."""
        for first in range(*whole, rows):
            yield first, min(first + rows, whole[1])

    def halves(self, experts: list[int], out: Tensor) -> Tensor:
        """``L C`` of some experts ``[experts, (iL jL), (iC jC b)]``, or ``C R`` of one ``[1, a, (iC jC iR jR)]``."""
        out = out[: len(experts) * self.half_elements]
        if self.left_first:
            lefts = select_experts(self.left, experts).reshape(-1, self.dims.a)
            return torch.mm(lefts, self.central, out=out.view(lefts.shape[0], -1)).view(len(experts), -1, self.dims.b)
        rows = self.central.view(-1, self.dims.b)
        return torch.mm(rows, self.right[experts[0]], out=out.view(rows.shape[0], -1)).view(1, self.dims.a, -1)

    def half_rows(self, half: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first..last`` of iL of an expert's ``L C [(iL jL iC jC), b]``."""
        step = half.shape[0] // self.dims.iL
        return half[first * step : last * step]

    def build(self, expert: int, half: Tensor, whole: tuple[int, int], scratch: Tensor, out: Tensor) -> None:
        """A range of iL of the weight into ``out [rows, (jL jC jR)]``, slab by slab through ``scratch``.

        If block order is the weight's own, ``scratch`` is not used.
        """
        dims = self.dims
        for first, last in self.ranges(whole, self.slab_rows):
            result = out[(first - whole[0]) * self.in_step : (last - whole[0]) * self.in_step]
            block = result if self.same_order else scratch[: result.numel()]
            if self.left_first:
                torch.mm(self.half_rows(half, first, last), self.right[expert], out=block.view(-1, dims.iR * dims.jR))
            else:
                rows = slice(first * dims.jL, last * dims.jL)
                torch.mm(self.left[expert, rows], half, out=block.view((last - first) * dims.jL, -1))
            if not self.same_order:
                self.natural(result).copy_(in_natural_order(block, dims))

    def reordered(self, matrix: Tensor, first: int, last: int, scratch: Tensor) -> Tensor:
        """Rows ``first..last`` of iL of ``matrix [.., (jL jC jR)]`` in block order, ``[(iL jL iC jC), (iR jR)]``."""
        slab = matrix[first * self.in_step : last * self.in_step]
        if not self.same_order:
            block = scratch[: slab.numel()]
            in_natural_order(block, self.dims).copy_(self.natural(slab))
            slab = block
        return slab.view(-1, self.dims.iR * self.dims.jR)

    def natural(self, slab: Tensor) -> Tensor:
        """A slab of the weight as ``[rows iL, iC, iR, jL, jC, jR]``."""
        return slab.view(-1, self.dims.iC, self.dims.iR, self.dims.jL, self.dims.jC, self.dims.jR)
