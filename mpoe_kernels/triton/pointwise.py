"""The activation's gradient with the bias gradient, sums of rows by token, and of partial results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpoe_kernels.triton.device_functions import activation_slope
from mpoe_kernels.triton.start import start


@triton.jit
def activation_backward_kernel(
    grad,  # [slots, F]
    saved,  # [slots, F]
    dz,  # [slots, F]
    partial,  # [row blocks, F]
    offsets,
    slots,
    F,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(row blocks, column blocks)``. Empty slots get zero and do not contribute."""
    filled = tl.load(offsets + EXPERTS).to(tl.int32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    inside = (row < slots)[:, None] & (column < F)[None, :]
    busy = inside & (row < filled)[:, None]
    value = tl.load(grad + at, mask=busy, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        value = value * activation_slope(tl.load(saved + at, mask=busy, other=0.0).to(tl.float32), ACTIVATION)
        rounded = tl.where(busy, value, 0.0).to(dz.dtype.element_ty)
        tl.store(dz + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if SUM:
        tl.store(partial + tl.program_id(0) * F + column, tl.sum(value, 0), mask=column < F)


@triton.jit
def sum_rows_kernel(
    rows,  # [slots, F]
    order,  # slots sorted by token
    starts,  # [T + 1] first entry of every token in ``order``
    out,  # [T, F]
    F,
    BN: tl.constexpr,
):
    """Grid ``(tokens, column blocks)``: the sum of a token's rows, in the order of their slots."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for entry in tl.range(tl.load(starts + token), tl.load(starts + token + 1)):
        slot = tl.load(order + entry).to(tl.int64)
        total += tl.load(rows + slot * F + column, mask=column < F, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * F + column, total.to(out.dtype.element_ty), mask=column < F)


@triton.jit
def sum_parts_kernel(
    parts,  # [count, elements]
    out,  # [elements]
    count,
    elements,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(blocks of elements,)``: the sum over ``parts`` in a fixed order; ADD: including the previous value of
    ``out``."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    if ADD:
        total += tl.load(out + column, mask=column < elements, other=0.0).to(tl.float32)
    for first in tl.range(0, count, BM):
        row = first + tl.arange(0, BM)
        inside = (row < count)[:, None] & (column < elements)[None, :]
        at = row.to(tl.int64)[:, None] * elements + column[None, :]
        total += tl.sum(tl.load(parts + at, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < elements)


def sum_parts(parts: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """``out = sum of parts[p]``, dense ``[P, ...]`` and ``[...]``, in a fixed order; ``add``: ``out += ...``."""
    elements = out.numel()
    bm, bn = (16, 128) if parts.shape[0] > 1 else (1, 1024)
    start(
        sum_parts_kernel,
        (triton.cdiv(elements, bn),),
        parts=parts,
        out=out,
        count=parts.shape[0],
        elements=elements,
        ADD=add,
        BM=bm,
        BN=bn,
        num_warps=4,
    )
    return out


def activation_backward(
    grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """``(dz [N, F], dbias [F] or None)`` from the gradient of the result and the tensor saved for the activation."""
    slots, columns = grad.shape
    if activation == "none" and not need_bias:
        return grad, None
    bm, bn = 32, 128
    dz = grad if activation == "none" else torch.empty_like(grad)
    blocks = triton.cdiv(slots, bm)
    partial = torch.empty(blocks if need_bias else 0, columns, dtype=torch.float32, device=grad.device)
    start(
        activation_backward_kernel,
        (blocks, triton.cdiv(columns, bn)),
        grad=grad,
        saved=saved if activation != "none" else grad,
        dz=dz,
        partial=partial,
        offsets=offsets,
        slots=slots,
        F=columns,
        EXPERTS=offsets.shape[0] - 1,
        ACTIVATION=activation,
        SUM=need_bias,
        BM=bm,
        BN=bn,
        num_warps=4,
    )
    return dz, sum_parts(partial, grad.new_empty(columns)) if need_bias else None


def sum_rows(rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """``out[t]`` = sum of the rows of token t, ``[T, F]``; see `slots_by_token`. Deterministic, no atomics."""
    tokens, bn = starts.shape[0] - 1, 256
    out = rows.new_empty(tokens, rows.shape[1])
    start(
        sum_rows_kernel,
        (tokens, triton.cdiv(rows.shape[1], bn)),
        rows=rows,
        order=order,
        starts=starts,
        out=out,
        F=rows.shape[1],
        BN=bn,
        num_warps=4,
    )
    return out
