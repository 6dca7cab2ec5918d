"""Plain PyTorch, of both forms: slots sorted by expert, in blocks of rows of one expert, many
blocks in one batched product.

A block's rows are padded with rows of zeros that count for nothing, so no Inf or NaN of one expert
reaches another's tokens. Few slots make blocks of one row, which gather the weights of chosen
experts alone. A piece of the blocks is computed at a time, so that no temporary grows with T x K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.linear.activation import ACTIVATION, ACTIVATION_GRADIENT

if TYPE_CHECKING:
    from mpoe_kernels.experts.op import BackwardCall, ForwardCall

LARGEST_BLOCK = 128  # rows
PIECE = 1 << 22  # elements of rows and weights that are gathered at once


def _activate(name: str, z: Tensor) -> Tensor:
    """Activation of ``z``; may overwrite it. ``gelu_new`` is `gelu_tanh` bit-identical to
    Transformers' formula."""
    if name != "gelu_new":
        return ACTIVATION[name](z)
    inner = math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))
    return 0.5 * z * (1.0 + torch.tanh(inner))


def _activation_gradient(name: str, grad: Tensor, z: Tensor) -> Tensor:
    """``d loss / d z`` from the pre-activation."""
    if name == "gelu_new":
        name = "gelu_tanh"
    return ACTIVATION_GRADIENT[name](grad, z)


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
        tokens = self.tokens.clamp(max=len(values) - 1)
        taken = values.index_select(0, tokens.view(-1))
        return self.clear(taken.view(*tokens.shape, -1))

    def gates(self, gates: Tensor) -> Tensor:
        """``[n, rows, 1]`` from ``[T, K]``; zeros for padding."""
        slots = self.slots.clamp(max=gates.numel() - 1)
        taken = gates.reshape(-1).index_select(0, slots.view(-1))
        return self.clear(taken.view(*slots.shape, 1))

    def clear(self, values: Tensor) -> Tensor:
        """Zeros in the rows of padding, which may have met an expert's NaN."""
        if self.padding is None:
            return values
        return values.masked_fill_(self.padding, 0)

    def of(self, weights: Tensor) -> Tensor:
        """The experts' weights ``[n, ...]``."""
        return weights.index_select(0, self.experts)


def _pieces(index: Tensor, experts: int, per_row: int, per_expert: int) -> Iterator[Piece]:
    """All slots with an expert, in the order of experts and tokens. ``per_row`` and ``per_expert``:
    elements that a piece gathers."""
    top_k = index.shape[1]
    flat = index.reshape(-1)
    _, order = torch.sort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=experts + 1)
    starts = counts.cumsum(0) - counts
    without_expert = int(counts[0])
    counts = counts[1:]
    starts = starts[1:]
    used = int((counts > 0).sum())
    if not used:
        return
    mean = (flat.numel() - without_expert) // used
    power = max(0, mean.bit_length() - 1)
    size = min(LARGEST_BLOCK, 1 << power)
    blocks = (counts + size - 1) // size
    numbers = torch.arange(experts, device=index.device)
    of_block = torch.repeat_interleave(numbers, blocks)
    first_block = blocks.cumsum(0) - blocks
    number = torch.arange(len(of_block), device=index.device)
    number -= first_block[of_block]
    row = torch.arange(size, device=index.device)
    most = max(1, PIECE // (size * per_row + per_expert))
    for first in range(0, len(of_block), most):
        piece = slice(first, first + most)
        chosen = of_block[piece]
        within = number[piece, None] * size + row
        padding = within >= counts[chosen, None]
        place = starts[chosen, None] + within
        slots = order[place.masked_fill(padding, 0)]
        slots = slots.masked_fill(padding, flat.numel())
        marks = None
        if bool(padding.any()):
            marks = padding[:, :, None]
        yield Piece(chosen, slots, slots // top_k, marks)


def _operands(call: ForwardCall) -> list[Any]:
    return [None if name is None else getattr(call, name) for name in call.OPERANDS]


def _right(piece: Piece, weights: Tensor) -> Tensor:
    """``[n, G', p, q]``, which multiply rows, from the blocks ``[E, G', p, q]`` of hidden-side
    experts, or from neurons ``[E, q, p]``."""
    chosen = piece.of(weights)
    if chosen.dim() == 4:
        return chosen
    return chosen[:, None].transpose(2, 3)


def _left(piece: Piece, weights: Tensor) -> Tensor:
    """The same of ``[E, G', p, q]`` or ``[E, p, q]``."""
    chosen = piece.of(weights)
    if chosen.dim() == 4:
        return chosen
    return chosen[:, None]


def _by_blocks(x: Tensor, blocks: Tensor, onto: Tensor | None = None) -> Tensor:
    """``(onto +) x`` times block-diagonal matrices.

    Args:
        x: ``[n, rows, G p]``.
        blocks: ``[n, G', p, q]``; G' is 1 if the groups share them.
        onto: like the result ``[n, rows, G q]``; may be overwritten.
    """
    n, groups, size, out = blocks.shape
    count = x.shape[1]
    if groups > 1:
        by_group = x.view(n, -1, groups, size).transpose(1, 2)
        product = torch.matmul(by_group, blocks).transpose(1, 2)
        product = product.reshape(n, count, groups * out)
        if onto is None:
            return product
        return onto + product
    rows = x.reshape(n, -1, size)
    blocks = blocks[:, 0]
    if onto is None:
        product = torch.bmm(rows, blocks)
    else:
        product = onto.view(n, -1, out).baddbmm_(rows, blocks)
    return product.view(n, count, -1)


def _back_by_blocks(grad: Tensor, blocks: Tensor, onto: Tensor | None = None) -> Tensor:
    return _by_blocks(grad, blocks.transpose(2, 3), onto)


def _block_gradient(x: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """``sum over rows x^T grad`` per block: ``[n, rows, G p], [n, rows, G q]`` to ``[n, G', p, q]``
    or ``[n, p, q]``, as ``like`` is."""
    n = x.shape[0]
    size, out = like.shape[-2:]
    if like.dim() == 3 or like.shape[1] == 1:
        x = x.reshape(n, -1, size)
        grad = grad.reshape(n, -1, out)
        return torch.bmm(x.transpose(1, 2), grad)
    groups = like.shape[1]
    x = x.view(n, -1, groups, size).permute(0, 2, 3, 1)
    grad = grad.view(n, -1, groups, out).transpose(1, 2)
    return torch.matmul(x, grad)


def _right_gradient(x: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """The same of weights that `_right` takes."""
    if like.dim() == 4:
        return _block_gradient(x, grad, like)
    return _block_gradient(grad, x, like)


def _total(rows: int, *shape: int, like: Tensor) -> Tensor:
    """Zeros in a dtype with enough precision for sums over experts."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(rows, *shape, dtype=dtype)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    values = values.reshape(index.numel(), *total.shape[1:])
    total.index_add_(0, index.view(-1), values.to(total.dtype))


def _sizes(call: ForwardCall) -> tuple[int, int]:
    """Elements that one slot, and one block's expert, gather and compute."""
    x, _, _, right, left, _, _, right_gate = _operands(call)
    weights = right[0].numel() + left[0].numel()
    if right_gate is not None:
        weights += right_gate[0].numel()
    hidden = width = x.shape[1]
    if right.dim() == 3:
        hidden = right.shape[1]
    return width + call.out_features + 4 * hidden, weights


class Hidden(NamedTuple):
    """Hidden activations of a piece: ``h``, and what its gradient needs."""

    h: Tensor
    z: Tensor
    act: Tensor
    value: Tensor | None
    x: Tensor
    x_gate: Tensor


def _hidden(call: ForwardCall, piece: Piece) -> Hidden:
    x, _, _, right, _, bias, x_gate, right_gate = _operands(call)
    rows = piece.rows(x)
    rows_gate = rows
    if x_gate is not None:
        rows_gate = piece.rows(x_gate)
    value = _by_blocks(rows, _right(piece, right))
    z = value
    if right_gate is not None:
        z = _by_blocks(rows_gate, _right(piece, right_gate))
    if bias is not None:
        z = z + piece.of(bias)[:, None]
    overwritten = z.clone() if call.activation == "relu" else z
    act = _activate(call.activation, overwritten)
    if right_gate is None:
        return Hidden(act, z, act, None, rows, rows_gate)
    return Hidden(act * value, z, act, value, rows, rows_gate)


def forward(call: ForwardCall) -> Tensor:
    """See `hidden_experts` and `neuron_experts`."""
    x, gates, index, _, left, _, _, _ = _operands(call)
    check_range("top_k_index", index, -1, call.num_experts - 1)
    out = _total(len(x) + 1, call.out_features, like=x)  # the last row takes the padding's
    for piece in _pieces(index, call.num_experts, *_sizes(call)):
        hidden = _hidden(call, piece)
        rows = _by_blocks(hidden.h, _left(piece, left))
        _add(out, piece.tokens, rows * piece.gates(gates))
    return out[: len(x)].to(x.dtype)


def _new_totals(call: BackwardCall) -> dict[str, Tensor]:
    """Zeros for the gradients that are wanted, by their names; of rows and gates, the last one
    takes the padding's."""
    x_name, gates_name, _, _, _, _, x_gate_name, _ = call.OPERANDS
    totals = {}
    values = zip(call.DIFFERENTIABLE, call.differentiable, call.wanted, strict=True)
    for name, value, wanted in values:
        if not wanted or value is None:
            continue
        if name == gates_name:
            totals[name] = _total(value.numel() + 1, like=value)
        elif name in (x_name, x_gate_name):
            totals[name] = _total(len(value) + 1, value.shape[1], like=value)
        else:
            totals[name] = _total(*value.shape, like=value)
    return totals


def backward(call: BackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall` and `NeuronBackwardCall`."""
    x, _, index, *_ = _operands(call)
    totals = _new_totals(call)
    by_operand = [totals.get(name or "") for name in call.OPERANDS]
    for piece in _pieces(index, call.num_experts, *_sizes(call)):
        _add_gradients(call, piece, by_operand)
    results = []
    for name, value in zip(call.DIFFERENTIABLE, call.differentiable, strict=True):
        result = x.new_empty(0)
        if name in totals and value is not None:
            total = totals[name].view(-1)[: value.numel()]
            result = total.to(value.dtype).view(value.shape)
        results.append(result)
    return tuple(results)


def _add_gradients(call: BackwardCall, piece: Piece, totals: list[Tensor | None]) -> None:
    """Add those of a piece to ``totals``, in the order of the operands; None: not wanted."""
    x, gates, _, right, left, _, x_gate, right_gate = _operands(call)
    dx, dgates, _, dright, dleft, dbias, dx_gate, dright_gate = totals
    grad = piece.rows(call.grad)
    gate = piece.gates(gates)
    hidden = _hidden(call, piece)
    dh = _back_by_blocks(grad, _left(piece, left))
    if dgates is not None:
        precise = dgates.dtype
        products = hidden.h.to(precise) * dh.to(precise)
        _add(dgates, piece.slots, products.sum(-1))
    if dleft is not None:
        h = piece.clear((hidden.h * gate).to(x.dtype))
        _add(dleft, piece.experts, _block_gradient(h, grad, left))
    dh = piece.clear((dh * gate).to(x.dtype))
    of_act = dh
    if hidden.value is not None:
        of_act = dh * hidden.value
    dvalue = dz = _activation_gradient(call.activation, of_act, hidden.z)
    if hidden.value is not None:
        dvalue = piece.clear(dh * hidden.act)
        dz = piece.clear(dz)
    if dx is not None:
        back = _back_by_blocks(dvalue, _right(piece, right))
        if right_gate is not None and x_gate is None:
            back = _back_by_blocks(dz, _right(piece, right_gate), back)
        _add(dx, piece.tokens, back)
    if dx_gate is not None:
        back = _back_by_blocks(dz, _right(piece, right_gate))
        _add(dx_gate, piece.tokens, back)
    if dright is not None:
        _add(dright, piece.experts, _right_gradient(hidden.x, dvalue, right))
    if dright_gate is not None:
        _add(dright_gate, piece.experts, _right_gradient(hidden.x_gate, dz, right_gate))
    if dbias is not None:
        _add(dbias, piece.experts, dz.sum(1))
