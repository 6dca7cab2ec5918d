"""`neuron_experts` written as its definition: loops over tokens and choices. Only tests and bench
import it."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.linear.reference import activation_reference


def neuron_experts_reference(
    x: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gate_up: Tensor | None = None,
) -> Tensor:
    """See `mpoe_kernels.neuron_experts`."""
    # Views of all experts are taken at once: the gradient of each taken alone would be as large as
    # the whole.
    ups, downs = up.unbind(), down.unbind()
    gate_ups = ups if gate_up is None else gate_up.unbind()
    rows = []
    for t, choices in enumerate(top_k_index.tolist()):
        row = x.new_zeros(down.shape[2])
        for k, e in enumerate(choices):
            if e < 0:
                continue
            z = gate_ups[e] @ x[t]
            h = activation_reference(activation, z if bias is None else z + bias[e])
            if gate_up is not None:
                h = h * (ups[e] @ x[t])
            row = row + gates[t, k].to(x.dtype) * (h @ downs[e])
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, down.shape[2])
