"""Two projections of the same rows, one with an activation, multiplied: the first half of a gated network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.linear.op import grouped_mpo_linear
from mpoe_kernels.mpo.fold import MPOBlocks


def gated_mpo_linear(
    x: Tensor,
    up: MPOBlocks,
    expert_offsets: Tensor,
    up_bias: Tensor | None = None,
    *,
    gate_proj: MPOBlocks,
    row_index: Tensor | None = None,
    slot_of_token: Tensor | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """``y[s] = activation(x[row_index[s]] @ W_gate,e) * (x[row_index[s]] @ W_up,e + up_bias)``, ``[N, F]``.

    Args:
        x, expert_offsets, row_index, slot_of_token, activation, backend: as in `grouped_mpo_linear`.
        up, up_bias: as ``blocks`` and ``bias`` there.
        gate_proj: blocks of the projection with the activation, with the same features.

    Raises:
        TypeError, ValueError, BackendError: as `grouped_mpo_linear`.
    """
    if not isinstance(up, MPOBlocks) or not isinstance(gate_proj, MPOBlocks):
        found = gate_proj if isinstance(up, MPOBlocks) else up
        raise TypeError(f"up and gate_proj must be MPOBlocks (see fold); got {describe(found)}")
    if up.out_features != gate_proj.out_features:
        raise ValueError(f"gate_proj must have {up.out_features} out_features like up; got {gate_proj.out_features}")
    rows: dict[str, Any] = {"row_index": row_index, "slot_of_token": slot_of_token}
    gate = grouped_mpo_linear(x, gate_proj, expert_offsets, **rows, activation=activation, backend=backend)
    return gate * grouped_mpo_linear(x, up, expert_offsets, up_bias, **rows, backend=backend)
