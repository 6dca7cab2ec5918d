"""Plain PyTorch: one expert after the other, each on its own tokens, so that no Inf or NaN of one
reaches others.

The experts are summed in order, so results do not depend on the distribution of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.linear.eager.activation import ACTIVATION, ACTIVATION_GRADIENT

if TYPE_CHECKING:
    from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall


def activate_(name: str, z: Tensor) -> Tensor:
    """Activation of ``z``; may overwrite it. ``gelu_new`` is `gelu_tanh` bit-identical to
    Transformers' formula."""
    if name == "gelu_new":
        return (
            0.5
            * z
            * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))
        )
    return ACTIVATION[name](z)


def activation_gradient(name: str, grad: Tensor, z: Tensor) -> Tensor:
    """``d loss / d z`` from the pre-activation."""
    return ACTIVATION_GRADIENT["gelu_tanh" if name == "gelu_new" else name](grad, z)


class Share(NamedTuple):
    """The work of one expert: its index, its tokens (``None`` = all) and their gates ``[n, 1]``."""

    expert: int
    rows: Tensor | None
    gate: Tensor

    def of(self, value: Tensor) -> Tensor:
        """The expert's rows of ``value [T, F]``."""
        return value if self.rows is None else value.index_select(0, self.rows)


def _shares(gates: Tensor, index: Tensor, experts: int) -> Iterator[Share]:
    """The experts that have tokens, in order. A token that chose an expert twice counts once, with
    both gates."""
    numbers = torch.arange(experts, device=index.device)
    gate = gates.new_zeros(gates.shape[0], experts)
    chosen = torch.zeros(gate.shape, dtype=torch.bool, device=index.device)
    for k in range(index.shape[1]):
        here = index[:, k : k + 1] == numbers
        gate = torch.where(here, gate + gates[:, k : k + 1], gate)
        chosen |= here
    counts = chosen.sum(0).tolist()
    tokens = chosen.T.nonzero()[:, 1].split(counts)
    for e, rows in enumerate(tokens):
        if counts[e] == len(gate) > 0:
            yield Share(e, None, gate[:, e : e + 1])
        elif counts[e]:
            yield Share(e, rows, gate[:, e].index_select(0, rows)[:, None])


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """``x [n, F]`` times the block-diagonal matrix of ``blocks [G', b, b]``."""
    groups, size, _ = blocks.shape
    if groups == 1:
        return (x.reshape(-1, size) @ blocks[0]).view(x.shape)
    return (
        torch.bmm(x.view(len(x), groups, size).transpose(0, 1), blocks)
        .transpose(0, 1)
        .reshape(x.shape)
    )


def _block_gradient(x: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """``sum over tokens x^T grad`` per block: ``[n, F], [n, F] -> [G', b, b]``."""
    groups, size, _ = like.shape
    if groups == 1:
        return (x.reshape(-1, size).T @ grad.reshape(-1, size))[None]
    return torch.bmm(
        x.view(len(x), groups, size).permute(1, 2, 0),
        grad.view(len(x), groups, size).transpose(0, 1),
    )


def _add(total: Tensor, rows: Tensor | None, value: Tensor) -> Tensor:
    value = value.to(total.dtype)
    return total.add_(value) if rows is None else total.index_add_(0, rows, value)


def _total(like: Tensor) -> Tensor:
    """Zeros in a dtype with enough precision for sums over experts."""
    return torch.zeros(
        like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    gates, top_k_index, right, left, bias = (
        call.gates,
        call.top_k_index,
        call.right,
        call.left,
        call.bias,
    )
    right_gate, activation = call.right_gate, call.activation
    check_range("top_k_index", top_k_index, -1, right.shape[0] - 1)
    u, u_gate = call.u.contiguous(), None if call.u_gate is None else call.u_gate.contiguous()
    out = _total(u)
    for share in _shares(gates, top_k_index, right.shape[0]):
        e = share.expert
        if u_gate is None or right_gate is None:
            h = activate_(activation, _with_bias(_by_blocks(share.of(u), right[e]), bias, e))
        else:
            z = _with_bias(_by_blocks(share.of(u_gate), right_gate[e]), bias, e)
            h = activate_(activation, z) * _by_blocks(share.of(u), right[e])
        _add(out, share.rows, _by_blocks(h, left[e]) * share.gate)
    return out.to(u.dtype)


def _with_bias(z: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    return z if bias is None else z.add_(bias[expert])


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    gates, top_k_index, right, left, bias = (
        call.gates,
        call.top_k_index,
        call.right,
        call.left,
        call.bias,
    )
    right_gate, activation, grad = call.right_gate, call.activation, call.grad
    u, u_gate = call.u.contiguous(), None if call.u_gate is None else call.u_gate.contiguous()
    inputs, wanted = call.differentiable, call.wanted
    du, dgates, dright, dleft, dbias, du_gate, dright_gate = (
        u.new_empty(0) if value is None or not wants else _total(value)
        for value, wants in zip(inputs, wanted, strict=True)
    )
    need_u, need_gates, need_right, need_left, need_bias, need_u_gate, need_right_gate = wanted
    for share in _shares(gates, top_k_index, right.shape[0]):
        e, x, do = share.expert, share.of(u), share.of(grad)
        value = _by_blocks(x, right[e])  # u R
        if u_gate is None or right_gate is None:
            z = value if bias is None else value + bias[e]
            h = act = activate_(activation, z.clone())
        else:
            x_gate = share.of(u_gate)
            z = _with_bias(_by_blocks(x_gate, right_gate[e]), bias, e)
            act = activate_(activation, z.clone())
            h = act * value
        dh = _by_blocks(do, left[e].transpose(-1, -2))
        if need_gates:
            column = (h.to(dgates.dtype) * dh.to(dgates.dtype)).sum(-1)
            mine = top_k_index if share.rows is None else top_k_index.index_select(0, share.rows)
            _add(dgates, share.rows, torch.where(mine == e, column[:, None], 0))
        if need_left:
            dleft[e] = _block_gradient((h * share.gate).to(h.dtype), do, left[e])
        dh = (dh * share.gate).to(h.dtype)
        if u_gate is None or right_gate is None:
            dvalue = dz = activation_gradient(activation, dh, z)
        else:
            dvalue, dz = dh * act, activation_gradient(activation, dh * value, z)
            if need_u_gate:
                _add(du_gate, share.rows, _by_blocks(dz, right_gate[e].transpose(-1, -2)))
            if need_right_gate:
                dright_gate[e] = _block_gradient(x_gate, dz, right_gate[e])
        if need_u:
            _add(du, share.rows, _by_blocks(dvalue, right[e].transpose(-1, -2)))
        if need_right:
            dright[e] = _block_gradient(x, dvalue, right[e])
        if need_bias:
            dbias[e] = dz.sum(0)
    sums = (du, dgates, dright, dleft, dbias, du_gate, dright_gate)
    return tuple(
        total.to(u.dtype if value is None else value.dtype)
        for total, value in zip(sums, inputs, strict=True)
    )
