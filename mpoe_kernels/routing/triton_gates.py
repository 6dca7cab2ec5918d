"""A router's logits and gates, and their gradient, on Triton: launches and kernels, for
`routing.gating`.

Arrays are indexed by token and expert, or by token and choice; weights by expert and feature.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpoe_kernels.routing.gating import Gating
from mpoe_kernels.triton.device_functions import COUNTS, row_tile, store_rows
from mpoe_kernels.triton.start import cdiv, dense, power_of_two, start

GATED = 512  # logits of one program
# of a part of the logits: one token's parts fill as many multiprocessors as its width allows
PART_OF_WIDTH = 256
# 32 experts: 64 spill on sm_80. 64 tokens share the splitting of a weight, and keep four warps from
# multiplying the same. Both have the same inner size, the order of sums.
LOGITS = {"BM": 64, "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 2}
LOGITS_FEW = LOGITS | {"BM": 16, "num_stages": 3}
FEW = 256  # tokens whose larger tiles would leave multiprocessors idle


@triton.jit(do_not_specialize=COUNTS)
def logits_kernel(
    x,  # [tokens, width]
    weight,  # [EXPERTS, width]
    parts,  # [parts of the width, tokens, EXPERTS] float32
    tokens,
    width,
    share,  # of the width in a part
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(token blocks, expert blocks, parts of the width)``: ``x weight^T`` in 16-bit
    products, exact in float32; a float32 weight is split into three numbers of 8 bits each as it is
    loaded, so no parts of it are kept."""
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    expert = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = x + token.to(tl.int64) * width
    columns = weight + expert.to(tl.int64)[None, :] * width
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, width)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in tl.range(begin, end, BK):
        k = k0 + tl.arange(0, BK)
        row = row_tile(rows, token < tokens, k, end)
        mask = (expert < EXPERTS)[None, :] & (k < end)[:, None]
        column = tl.load(columns + k[:, None], mask=mask, other=0.0)
        first = column.to(x.dtype.element_ty)
        if weight.dtype.element_ty == tl.float32:
            rest = column - first.to(tl.float32)
            second = rest.to(x.dtype.element_ty)
            third = (rest - second.to(tl.float32)).to(x.dtype.element_ty)
            acc = tl.dot(row, third, acc)
            acc = tl.dot(row, second, acc)
        acc = tl.dot(row, first, acc)
    place = tl.program_id(2).to(tl.int64) * tokens + token
    store_rows(parts, place, acc, token < tokens, expert, EXPERTS)


@triton.jit
def probabilities(z):
    """Softmax of rows ``[BM, SCAN]``."""
    p = tl.exp(z - tl.max(z, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def logits_of_program(tokens, EXPERTS: tl.constexpr, SCAN: tl.constexpr, BM: tl.constexpr):
    """``(token [BM], expert [SCAN], known, inside, at)``: a program's tokens, all experts, which of
    them there are, which of the logits ``[BM, SCAN]``, and their places."""
    token = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    expert = tl.arange(0, SCAN)
    known = (expert < EXPERTS)[None, :]
    inside = (token < tokens)[:, None] & known
    return token, expert, known, inside, token[:, None] * EXPERTS + expert[None, :]


@triton.jit(do_not_specialize=COUNTS)
def gate_kernel(
    parts,  # [PARTS, tokens, EXPERTS] float32
    logits,  # [tokens, EXPERTS]: their sum; None: of one part, itself
    weights,  # [tokens, TOP_K] float32
    index,  # [tokens, TOP_K]
    tokens,
    scale,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RAW: tl.constexpr,
    SCAN: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid ``(token blocks,)``: softmax and the largest of it, of equal ones the smaller number
    first; NaN is largest.

    ``SCAN`` and ``KP`` are powers of two that are at least ``EXPERTS`` and ``TOP_K``.
    """
    token, expert, known, inside, at = logits_of_program(tokens, EXPERTS, SCAN, BM)
    choice = tl.arange(0, KP)
    z = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        at_part = parts + tl.cast(part, tl.int64) * tokens * EXPERTS
        z += tl.load(at_part + at, mask=inside, other=0.0)
    if logits is not None:
        tl.store(logits + at, z, mask=inside)
    p = probabilities(tl.where(known, z, float("-inf")))
    left = tl.where(known, tl.where(p == p, p, 2.0), -1.0)  # -1: not to be chosen
    gates = tl.zeros((BM, KP), dtype=tl.float32)
    numbers = tl.zeros((BM, KP), dtype=tl.int64)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 1)
        chosen = expert[None, :] == best[:, None]
        value = tl.sum(tl.where(chosen, p, 0.0), 1)
        gates = tl.where(choice[None, :] == k, value[:, None], gates)
        numbers = tl.where(choice[None, :] == k, best[:, None].to(tl.int64), numbers)
        left = tl.where(chosen, -1.0, left)
    if not RAW:
        gates = gates / tl.sum(gates, 1)[:, None]
    store_rows(weights, token, gates * scale, token < tokens, choice, TOP_K)
    store_rows(index, token, numbers, token < tokens, choice, TOP_K)


@triton.jit(do_not_specialize=COUNTS)
def gate_backward_kernel(
    logits,  # [tokens, EXPERTS] float32
    index,  # [tokens, TOP_K]
    dweights,  # [tokens, TOP_K] float32, or None
    given,  # [tokens, EXPERTS]: what logits have from elsewhere, or None
    dlogits,  # [tokens, EXPERTS] float32; IN_PARTS: [tokens, 3, EXPERTS] bfloat16, their sums
    tokens,
    scale,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RAW: tl.constexpr,
    IN_PARTS: tl.constexpr,
    SCAN: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid ``(token blocks,)``: a gate is a probability, RAW, or divided by the sum of the chosen
    ones; a single one then is 1 with the gradient of log p. With c_j, the gradient of log p_j, that
    of a logit is ``c - p sum c``."""
    token, expert, known, inside, at = logits_of_program(tokens, EXPERTS, SCAN, BM)
    choice = tl.arange(0, KP)
    grad = tl.zeros((BM, SCAN), dtype=tl.float32)
    if given is not None:
        grad = tl.load(given + at, mask=inside, other=0.0)
    if dweights is not None:
        z = tl.load(logits + at, mask=inside, other=0.0)
        p = probabilities(tl.where(known, z, float("-inf")))
        dw = row_tile(dweights + token * TOP_K, token < tokens, choice, TOP_K) * scale
        of_chosen = tl.zeros((BM, KP), dtype=tl.float32)
        for k in tl.static_range(TOP_K):
            number = tl.load(index + token * TOP_K + k, mask=token < tokens, other=0)
            value = tl.sum(tl.where(expert[None, :] == number[:, None], p, 0.0), 1)
            of_chosen = tl.where(choice[None, :] == k, value[:, None], of_chosen)
        if RAW:
            dw = dw * of_chosen
        elif TOP_K > 1:
            share = of_chosen / tl.sum(of_chosen, 1)[:, None]
            dw = (dw - tl.sum(dw * share, 1)[:, None]) * share
        grad -= p * tl.sum(dw, 1)[:, None]
        for k in tl.static_range(TOP_K):
            number = tl.load(index + token * TOP_K + k, mask=token < tokens, other=0)
            of_k = tl.sum(tl.where(choice[None, :] == k, dw, 0.0), 1)
            grad += tl.where(expert[None, :] == number[:, None], of_k[:, None], 0.0)
    if not IN_PARTS:
        tl.store(dlogits + at, grad, mask=inside)
    else:
        at_part = dlogits + token[:, None] * (3 * EXPERTS) + expert[None, :]
        for part in tl.static_range(3):
            rounded = grad.to(tl.bfloat16)
            tl.store(at_part + part * EXPERTS, rounded, mask=inside)
            grad = grad - rounded.to(tl.float32)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T [T, E]`` in parts ``[P, T, E]`` float32, which `gate` adds; P depends on the
    width alone. One launch for 16-bit tokens and a weight of their dtype, or bfloat16 ones and a
    float32 weight."""
    tokens, width = x.shape
    experts = len(weight)
    is_narrow = x.dtype != torch.float32 and weight.dtype == x.dtype
    # Not of float16 tokens: float16 cannot hold the last digits of such a weight.
    is_split = x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if not is_narrow and not is_split:
        return torch.mm(x.float(), weight.float().t())[None]
    parts = x.new_empty(cdiv(width, PART_OF_WIDTH), tokens, experts, dtype=torch.float32)
    tile = LOGITS
    if tokens <= FEW:
        tile = LOGITS_FEW
    start(
        logits_kernel,
        (cdiv(tokens, tile["BM"]), cdiv(experts, tile["BN"]), parts.shape[0]),
        x=x.contiguous(),
        weight=weight.contiguous(),
        parts=parts,
        tokens=tokens,
        width=width,
        share=PART_OF_WIDTH,
        EXPERTS=experts,
        **tile,
    )
    return parts


def _gated(tokens: int, experts: int, top_k: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the gates' kernels."""
    scan = power_of_two(max(2, experts))
    rows = max(1, min(16, GATED // scan))
    options = {
        "EXPERTS": experts,
        "TOP_K": top_k,
        "SCAN": scan,
        "KP": power_of_two(top_k),
        "BM": rows,
        "num_warps": 4 if scan <= 1024 else 8,  # a row of thousands would spill on sm_80
    }
    return (cdiv(tokens, rows),), options


def gate(parts: Tensor, top_k: int, raw: bool, scale: float) -> Gating:
    """From parts of logits ``[P, T, E]``. One launch. ``raw``: gates are probabilities, otherwise
    they sum to 1; both times ``scale``."""
    count, tokens, experts = parts.shape
    logits = parts[0] if count == 1 else parts.new_empty(tokens, experts)
    weights = parts.new_empty(tokens, top_k)
    index = parts.new_empty(tokens, top_k, dtype=torch.int64)
    grid, options = _gated(tokens, experts, top_k)
    start(
        gate_kernel,
        grid,
        parts=parts,
        logits=None if count == 1 else logits,
        weights=weights,
        index=index,
        tokens=tokens,
        scale=scale,
        PARTS=count,
        RAW=raw,
        **options,
    )
    return Gating(logits, index, weights)


def gate_backward(
    decided: Gating,
    dlogits: Tensor | None,
    dweights: Tensor | None,
    raw: bool,
    scale: float,
    in_parts: bool,
) -> Tensor:
    """The gradient of the logits ``[T, E]`` from those of both results, of which one may be
    missing; ``in_parts``: as three bfloat16 numbers whose sum it is, the first of them the nearest,
    ``[T, 3 E]``. One launch."""
    logits = decided.logits
    index = decided.top_k_index
    tokens, experts = logits.shape
    top_k = index.shape[1]
    gradient = logits.new_empty(tokens, experts)
    if in_parts:
        gradient = logits.new_empty(tokens, 3 * experts, dtype=torch.bfloat16)
    grid, options = _gated(tokens, experts, top_k)
    start(
        gate_backward_kernel,
        grid,
        logits=logits,
        index=index,
        dweights=dense(dweights),
        given=dense(dlogits),
        dlogits=gradient,
        tokens=tokens,
        scale=scale,
        RAW=raw,
        IN_PARTS=in_parts,
        **options,
    )
    return gradient
