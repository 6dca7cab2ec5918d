"""A mixture layer's native calls without ops around them: for passes that nobody differentiates,
compiles or watches.

While decoding, the ops of `route`, `grouped_mpo_linear` and `combine` (checks, dispatch) take
longer than their kernels. Whoever calls these functions has asked
`mpoe_kernels.routing.gating.can_route_natively`. The kernels and their order are those of the ops,
so the results are the same to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.contract import ALL_GRADIENTS
from mpoe_kernels.contract.autotune import chosen_for
from mpoe_kernels.define import requested_backend
from mpoe_kernels.linear.native import dense_blocks, linear_sizes
from mpoe_kernels.linear.op import ACTIVATIONS, ForwardCall
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.native_library import NATIVE_LIBRARY, address, dense, dense_like, name_of

# What the library computes without Python in between.
IN_ONE_CALL = ("native separable", "native rebuild", "native half_left", "native chain")


class Rule(NamedTuple):
    """How a router distributes tokens.

    Attributes:
        top_k, raw: as in `native_gating`.
        capacity: as in `mpoe_kernels.route`.
    """

    top_k: int
    raw: bool
    capacity: int | None


class Chains(NamedTuple):
    """A feed-forward network's projections, ``down(activation(up x))`` or ``down(activation(gate x)
    * up x)``.

    Attributes:
        up, down, gate: folded blocks; gate may be None.
        up_bias, down_bias: ``[hidden]`` and ``[I]``, or None.
        activation: see `mpoe_kernels.grouped_mpo_linear`.
    """

    up: MPOBlocks
    down: MPOBlocks
    gate: MPOBlocks | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    @property
    def of_rows(self) -> tuple[tuple[MPOBlocks, Tensor | None, str], ...]:
        """The projections of tokens, with their biases and formulas: the gate, if there is one,
        then up."""
        formula = ACTIVATIONS[self.activation]
        if self.gate is None:
            return ((self.up, self.up_bias, formula),)
        return (self.gate, None, formula), (self.up, self.up_bias, "none")


def routed_ffn(
    x: Tensor,
    weight: Tensor,
    rule: Rule,
    chains: Chains,
    token_mask: Tensor | None,
    backend: str | None,
) -> Tensor | None:
    """A router's decision and `mpoe_kernels.mpo_ffn` as one native call, if kernels of the library
    are chosen for every projection; else None.

    Args:
        x: tokens ``[T, I]``, of the dtype of the chains.
        weight: the router's, ``[E, I]``, as in `native_gating`.
        rule: see `Rule`.
        chains: see `Chains`.
        token_mask: as in `mpoe_kernels.route`.
        backend: name of a kernel backend, or ``None``.

    Raises:
        ValueError: chains that do not fit each other.
    """
    if x.shape[1] != chains.up.in_features or weight.shape[0] != chains.up.num_experts:
        return None
    x = dense("x", x)
    weight = dense("weight", weight)
    tokens = x.shape[0]
    requested = requested_backend(backend)
    # A choice depends on the number of slots alone.
    rows = x
    if rule.top_k != 1:
        rows = x.new_empty(tokens * rule.top_k, 0)
    projections: list[Any] = []
    kept = []  # until the library returns
    for blocks, bias, formula in (*chains.of_rows, (chains.down, chains.down_bias, "none")):
        call = ForwardCall(
            rows,
            blocks.left,
            blocks.central,
            blocks.right,
            rows,
            bias,
            None,
            blocks.in_features,
            blocks.out_features,
            formula,
            "auto",
            requested,
            False,
        )
        if not all(block.dtype == x.dtype for block in call.blocks):
            return None
        candidate = chosen_for("grouped_mpo_linear", call, call.slots, ALL_GRADIENTS, False)
        if candidate.text not in IN_ONE_CALL:
            return None
        left, central, right = dense_blocks(call)
        if bias is not None:
            bias = dense_like("bias", bias, (call.out_features,), x.dtype)
        kept.append((left, central, right, bias))
        memory = (left.data_ptr(), central.data_ptr(), right.data_ptr(), address(bias))
        projections.append((linear_sizes(call), memory))
    *of_rows, down = projections
    mask = None
    if token_mask is not None:
        mask = dense("token_mask", token_mask)
    slots = (tokens, rule.top_k, -1 if rule.capacity is None else rule.capacity)
    y = torch.empty_like(x)
    NATIVE_LIBRARY.functions.routed_ffn(
        name_of(weight.dtype),
        slots,
        rule.raw,
        x.data_ptr(),
        weight.data_ptr(),
        address(mask),
        of_rows,
        down,
        y.data_ptr(),
    )
    return y
