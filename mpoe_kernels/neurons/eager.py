"""Plain PyTorch: slots sorted by expert, in blocks of rows of one expert, many blocks in one
batched product.

A block's rows are padded with rows of zeros that count for nothing. Few slots make blocks of one
row, which gather the weights of chosen experts alone. A piece of the blocks is computed at a time,
so that no temporary grows with T x K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.linear.eager.activation import ACTIVATION, ACTIVATION_GRADIENT

if TYPE_CHECKING:
    from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall

LARGEST_BLOCK = 128  # rows
PIECE = 1 << 22  # elements of rows and weights that are gathered at once


class Piece(NamedTuple):
    """Some blocks of `rows` slots: the expert of each ``[n]``, its slots' numbers and tokens ``[n,
    rows]``.

    Slots past a block's end have the numbers T K and T; ``padding [n, rows, 1]`` marks them, None
    if there are none.
    """

    experts: Tensor
    slots: Tensor
    tokens: Tensor
    padding: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """``[n, rows, width]`` from ``[T, width]``; zeros for padding."""
        taken = values.index_select(0, self.tokens.clamp(max=len(values) - 1).view(-1))
        return self.clear(taken.view(*self.tokens.shape, -1))

    def gates(self, gates: Tensor) -> Tensor:
        """``[n, rows, 1]`` from ``[T, K]``; zeros for padding."""
        taken = gates.reshape(-1).index_select(0, self.slots.clamp(max=gates.numel() - 1).view(-1))
        return self.clear(taken.view(*self.slots.shape, 1))

    def clear(self, values: Tensor) -> Tensor:
        """Zeros in the rows of padding, which may have met an expert's NaN."""
        return values if self.padding is None else values.masked_fill_(self.padding, 0)

    def of(self, weights: Tensor) -> Tensor:
        """The experts' weights ``[n, m, .]``."""
        return weights.index_select(0, self.experts)


def _pieces(index: Tensor, experts: int, per_row: int, per_expert: int) -> Iterator[Piece]:
    """All slots with an expert, in the order of experts and tokens. ``per_row`` and ``per_expert``:
    elements that a piece gathers."""
    top_k, flat = index.shape[1], index.reshape(-1)
    _, order = torch.sort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    starts = counts.cumsum(0) - counts
    used = int((counts[1:] > 0).sum())
    if not used:
        return
    mean = (flat.numel() - int(counts[0])) // used
    size = min(LARGEST_BLOCK, 1 << max(0, mean.bit_length() - 1))
    blocks = (counts[1:] + size - 1) // size
    of_block = torch.repeat_interleave(torch.arange(experts, device=index.device), blocks)
    number = (
        torch.arange(len(of_block), device=index.device) - (blocks.cumsum(0) - blocks)[of_block]
    )
    most = max(1, PIECE // (size * per_row + per_expert))
    for first in range(0, len(of_block), most):
        own, numbers = of_block[first : first + most], number[first : first + most]
        within = numbers[:, None] * size + torch.arange(size, device=index.device)
        padding = within >= counts[1:][own][:, None]
        place = (starts[1:][own][:, None] + within).masked_fill(padding, 0)
        slots = order[place].masked_fill(padding, flat.numel())
        some = padding[:, :, None] if bool(padding.any()) else None
        yield Piece(own, slots, slots // top_k, some)


def _total(rows: int, *shape: int, like: Tensor) -> Tensor:
    """Zeros in a dtype with enough precision for sums over experts."""
    return like.new_zeros(rows, *shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    total.index_add_(
        0, index.view(-1), values.reshape(index.numel(), *total.shape[1:]).to(total.dtype)
    )


def _sizes(call: NeuronCall) -> tuple[int, int]:
    """Elements that one slot, and one block's expert, gather and compute."""
    weights = sum(
        each[0].numel() for each in (call.up, call.down, call.gate_up) if each is not None
    )
    return call.x.shape[1] + call.down.shape[2] + 4 * call.up.shape[1], weights


class Hidden(NamedTuple):
    """Hidden neurons of a piece: ``h``, and what its gradient needs."""

    h: Tensor
    z: Tensor
    act: Tensor
    value: Tensor | None


def _hidden(
    call: NeuronCall, piece: Piece, x: Tensor, up: Tensor, gate_up: Tensor | None
) -> Hidden:
    value = torch.bmm(x, up.transpose(1, 2))
    z = value if gate_up is None else torch.bmm(x, gate_up.transpose(1, 2))
    if call.bias is not None:
        z = z + piece.of(call.bias)[:, None]
    act = ACTIVATION[call.activation](z.clone() if call.activation == "relu" else z)
    return Hidden(act, z, act, None) if gate_up is None else Hidden(act * value, z, act, value)


def forward(call: NeuronCall) -> Tensor:
    """See `neuron_experts`."""
    x, tokens, num_experts = call.x, call.x.shape[0], call.up.shape[0]
    check_range("top_k_index", call.top_k_index, -1, num_experts - 1)
    out = _total(tokens + 1, call.down.shape[2], like=x)  # the last row takes the padding's
    for piece in _pieces(call.top_k_index, num_experts, *_sizes(call)):
        gate_up = None if call.gate_up is None else piece.of(call.gate_up)
        hidden = _hidden(call, piece, piece.rows(x), piece.of(call.up), gate_up)
        _add(out, piece.tokens, torch.bmm(hidden.h, piece.of(call.down)) * piece.gates(call.gates))
    return out[:tokens].to(x.dtype)


def backward(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    """See `NeuronBackwardCall`."""
    x, tokens, slots, num_experts = call.x, call.x.shape[0], call.gates.numel(), call.up.shape[0]
    need_x, need_gates, need_up, need_down, need_bias, need_gate_up = call.wanted
    dx = _total(tokens + 1 if need_x else 0, x.shape[1], like=x)
    dgates = _total(slots + 1 if need_gates else 0, like=call.gates)
    dup, ddown, dbias, dgate_up = (
        x.new_empty(0) if value is None or not wants else _total(*value.shape, like=value)
        for value, wants in zip(call.differentiable[2:], call.wanted[2:], strict=True)
    )
    for piece in _pieces(call.top_k_index, num_experts, *_sizes(call)):
        rows, grad, gate, experts = (
            piece.rows(x),
            piece.rows(call.grad),
            piece.gates(call.gates),
            piece.experts,
        )
        up, gate_up = piece.of(call.up), None if call.gate_up is None else piece.of(call.gate_up)
        hidden = _hidden(call, piece, rows, up, gate_up)
        dh = torch.bmm(grad, piece.of(call.down).transpose(1, 2))
        if need_gates:
            _add(dgates, piece.slots, (hidden.h.to(dgates.dtype) * dh.to(dgates.dtype)).sum(-1))
        if need_down:
            h = piece.clear((hidden.h * gate).to(x.dtype))
            _add(ddown, experts, torch.bmm(h.transpose(1, 2), grad))
        dh = piece.clear((dh * gate).to(x.dtype))
        dvalue = dz = ACTIVATION_GRADIENT[call.activation](
            dh if hidden.value is None else dh * hidden.value, hidden.z
        )
        if hidden.value is not None:
            dvalue, dz = piece.clear(dh * hidden.act), piece.clear(dz)
        if need_x:
            back = torch.bmm(dvalue, up)
            _add(dx, piece.tokens, back if gate_up is None else back.baddbmm_(dz, gate_up))
        if need_up:
            _add(dup, experts, torch.bmm(dvalue.transpose(1, 2), rows))
        if need_gate_up:
            _add(dgate_up, experts, torch.bmm(dz.transpose(1, 2), rows))
        if need_bias:
            _add(dbias, experts, dz.sum(1))
    found = (dx[:tokens], dgates[:slots], dup, ddown, dbias, dgate_up)
    return tuple(
        x.new_empty(0) if value is None or not wants else total.to(value.dtype).view(value.shape)
        for total, value, wants in zip(found, call.differentiable, call.wanted, strict=True)
    )
