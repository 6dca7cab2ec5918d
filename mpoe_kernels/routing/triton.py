"""`route`, `dispatch`, `combine` and their gradients on the kernels of `routing_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.routing import triton_kernels as kernels
from mpoe_kernels.triton.start import cdiv, power_of_two, start

BLOCK = 128  # pairs of one program; ranks inside a block compare all of them with one another
FEW = 256  # at most so many pairs are sorted by one program
CHUNK, PART = 32, 128  # blocks and keys whose counts a program of the prefix holds at once
ROWS = {"BM": 16, "BN": 128, "num_warps": 4}


def route_forward(
    top_k_index: Tensor, num_experts: int, capacity: int | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mpoe_kernels.routing.op.route`."""
    tokens, top_k = top_k_index.shape
    pairs = tokens * top_k
    index = top_k_index.contiguous()
    offsets = index.new_empty(num_experts + 1, dtype=torch.int32)
    token_of_slot = index.new_empty(pairs, dtype=torch.int64)
    slot_of_token = index.new_empty(tokens, top_k, dtype=torch.int64)
    if pairs == 0:
        return offsets.zero_(), token_of_slot, slot_of_token
    mask = index if token_mask is None else token_mask.contiguous().view(torch.uint8)
    sizes: dict[str, Any] = {"EXPERTS": num_experts, "TOP_K": top_k, "BINS": power_of_two(num_experts + 2)}
    if pairs <= FEW:
        start(
            kernels.route_few_kernel,
            (1,),
            index=index,
            mask=mask,
            offsets=offsets,
            token_of_slot=token_of_slot,
            slot_of_token=slot_of_token,
            tokens=tokens,
            capacity=capacity or 0,
            HAS_MASK=token_mask is not None,
            HAS_CAPACITY=capacity is not None,
            BLOCK=max(16, power_of_two(pairs)),
            num_warps=8,
            **sizes,
        )
        return offsets, token_of_slot, slot_of_token
    blocks = cdiv(pairs, BLOCK)
    counts = index.new_empty(blocks + 1, sizes["BINS"], dtype=torch.int32)
    common: dict[str, Any] = {**sizes, "tokens": tokens, "BLOCK": BLOCK, "num_warps": 4}
    has_mask = token_mask is not None

    def count(by_choice: bool) -> None:
        start(
            kernels.histogram_kernel,
            (blocks,),
            index=index,
            mask=mask,
            counts=counts,
            HAS_MASK=has_mask,
            BY_CHOICE=by_choice,
            **common,
        )
        keys = {"EXPERTS": num_experts, "BINS": sizes["BINS"], "num_warps": 4}
        part = min(PART, sizes["BINS"])
        prefix = {"counts": counts, "offsets": offsets, "blocks": blocks, "PART": part, "CHUNK": CHUNK}
        start(kernels.prefix_kernel, (sizes["BINS"] // part,), **prefix, **keys)
        if part < sizes["BINS"]:
            start(kernels.offsets_kernel, (1,), totals=counts[blocks], offsets=offsets, **keys)

    if capacity is not None:
        count(by_choice=True)
        keys = index.new_empty(pairs, dtype=torch.int32)
        start(
            kernels.drop_kernel,
            (blocks,),
            index=index,
            mask=mask,
            counts=counts,
            keys=keys,
            capacity=capacity,
            HAS_MASK=has_mask,
            **common,
        )
        index, has_mask = keys, False
    count(by_choice=False)
    start(
        kernels.scatter_kernel,
        (blocks,),
        index=index,
        mask=mask,
        counts=counts,
        offsets=offsets,
        token_of_slot=token_of_slot,
        slot_of_token=slot_of_token,
        HAS_MASK=has_mask,
        **common,
    )
    return offsets, token_of_slot, slot_of_token


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return cdiv(rows, ROWS["BM"]), cdiv(columns, ROWS["BN"])


def dispatch_forward(x: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[T, I] -> [N, I]``; slots past the last offset are zero, whatever their token holds."""
    slots, columns = token_of_slot.shape[0], x.shape[1]
    out = x.new_empty(slots, columns)
    start(
        kernels.dispatch_kernel,
        _grid(slots, columns),
        x=x.contiguous(),
        offsets=expert_offsets,
        token_of_slot=token_of_slot,
        out=out,
        slots=slots,
        I=columns,
        EXPERTS=expert_offsets.shape[0] - 1,
        **ROWS,
    )
    return out


def _collect(rows: Tensor, slot_of_token: Tensor, weights: Tensor | None) -> Tensor:
    tokens, top_k = slot_of_token.shape
    out = rows.new_empty(tokens, rows.shape[1])
    start(
        kernels.collect_kernel,
        _grid(tokens, rows.shape[1]),
        rows=rows.contiguous(),
        slot_of_token=slot_of_token.contiguous(),
        weights=rows if weights is None else weights.contiguous(),
        out=out,
        tokens=tokens,
        F=rows.shape[1],
        TOP_K=top_k,
        HAS_WEIGHTS=weights is not None,
        **ROWS,
    )
    return out


def dispatch_backward(grad: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[N, I] -> [T, I]``: a gather over slots, so it is deterministic."""
    return _collect(grad, slot_of_token, None)


def combine_forward(
    y_sorted: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``[N, F] -> [T, F]``, gated; dropped pairs contribute nothing, even if their slot holds NaN."""
    return _collect(y_sorted, slot_of_token, top_k_weights)


def combine_backward(
    grad: Tensor,
    y_sorted: Tensor,
    token_of_slot: Tensor,
    slot_of_token: Tensor,
    top_k_weights: Tensor,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``y_sorted`` and ``top_k_weights``; an empty tensor where none is needed."""
    tokens, top_k = slot_of_token.shape
    slots, columns = y_sorted.shape
    grad, slot_of_token = grad.contiguous(), slot_of_token.contiguous()
    dy, dweights = grad.new_empty(0), top_k_weights.new_empty(0)
    if need_y:
        dy = grad.new_empty(slots, columns)
        start(
            kernels.spread_kernel,
            _grid(slots, columns),
            grad=grad,
            token_of_slot=token_of_slot,
            slot_of_token=slot_of_token,
            weights=top_k_weights.contiguous(),
            dy=dy,
            slots=slots,
            F=columns,
            TOP_K=top_k,
            **ROWS,
        )
    if need_weights:
        dweights = top_k_weights.new_empty(tokens, top_k)
        start(
            kernels.weight_gradient_kernel,
            (cdiv(tokens, ROWS["BM"]), top_k),
            grad=grad,
            rows=y_sorted.contiguous(),
            slot_of_token=slot_of_token,
            dweights=dweights,
            tokens=tokens,
            F=columns,
            TOP_K=top_k,
            **ROWS,
        )
    return dy, dweights
