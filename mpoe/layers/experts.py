"""`MPOExperts` and `DenseExperts`: the feed-forward networks behind a router, with the same interface."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpoe.layers.activations import ACTIVATIONS, check_activation
from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights, grouped_dense_linear
from mpoe_kernels import MPOShape, Routing, combine, dispatch, mpo_ffn


class MPOExperts(nn.Module):
    """``y[t] = sum_k gate[t, k] * down_e(activation(up_e x[t]))``, or ``down_e(activation(gate_e x) * up_e x)``.

    Children ``up``, ``down`` and, for gated activations, ``gate_proj`` are `MPOCores`.

    Args:
        shapes: `MPOShape` for ``"up"``, ``"down"`` and, if gated, ``"gate_proj"``.
        num_experts: E.
        activation: see `ACTIVATIONS`.
        bias: biases on up and down, shared by the experts.
        init_std: for every kind, the standard deviation of random weights.
        backend: name of a kernel backend, or ``None``.

    Raises:
        ValueError: an unknown activation, or shapes that do not chain.
    """

    def __init__(
        self,
        shapes: Mapping[str, MPOShape],
        num_experts: int,
        activation: str = "relu",
        bias: bool = False,
        init_std: Mapping[str, float] | None = None,
        backend: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.num_experts, self.backend = num_experts, backend
        up, down, gate = shapes["up"], shapes["down"], shapes.get("gate_proj")
        if (down.in_features, down.out_features) != (up.out_features, up.in_features):
            raise ValueError(
                f"the down shape must be [{up.out_features}, {up.in_features}], the way back of up; "
                f"got [{down.in_features}, {down.out_features}]"
            )
        if gate is not None and (gate.in_features, gate.out_features) != (up.in_features, up.out_features):
            raise ValueError(
                f"the gate_proj shape must be [{up.in_features}, {up.out_features}] like up; "
                f"got [{gate.in_features}, {gate.out_features}]"
            )
        std = dict(init_std or {})

        def cores(kind: str, shape: MPOShape, with_bias: bool) -> MPOCores:
            return MPOCores(shape, num_experts, with_bias, std.get(kind, 0.02), device=device, dtype=dtype)

        self.up = cores("up", up, bias)
        self.down = cores("down", down, bias)
        self.gate_proj = None if gate is None else cores("gate_proj", gate, False)

    @property
    def is_gated(self) -> bool:
        return self.gate_proj is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.up.central.dtype

    def projections(self) -> dict[str, MPOCores]:
        """Children by kind."""
        kinds = {"up": self.up, "down": self.down}
        return kinds if self.gate_proj is None else {**kinds, "gate_proj": self.gate_proj}

    def forward(self, x: Tensor, routing: Routing, top_k_weights: Tensor, dropout: float = 0.0) -> Tensor:
        """Tokens ``x [T, I]`` through their experts -> ``[T, I]``; a dropped token's row is zero.

        ``dropout`` is the rate between the projections; pass it in training only.
        """
        return mpo_ffn(
            x,
            routing,
            top_k_weights,
            self.up.blocks(),
            self.down.blocks(),
            gate_proj=None if self.gate_proj is None else self.gate_proj.blocks(),
            up_bias=self.up.bias,
            down_bias=self.down.bias,
            activation=self.activation,
            dropout=dropout,
            backend=self.backend,
        )


class DenseExperts(nn.Module):
    """The same network with full weights ``[E, I, F]`` per expert: the Switch Transformer baseline."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        activation: str = "relu",
        bias: bool = False,
        gated: bool = False,
        init_std: Mapping[str, float] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.num_experts = num_experts
        std = dict(init_std or {})

        def weights(kind: str, rows: int, columns: int, with_bias: bool) -> ExpertWeights:
            return ExpertWeights(rows, columns, num_experts, with_bias, std.get(kind, 0.02), device=device, dtype=dtype)

        self.up = weights("up", in_features, hidden_features, bias)
        self.down = weights("down", hidden_features, in_features, bias)
        self.gate_proj = weights("gate_proj", in_features, hidden_features, False) if gated else None

    @property
    def is_gated(self) -> bool:
        return self.gate_proj is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.up.weight.dtype

    def projections(self) -> dict[str, ExpertWeights]:
        """Children by kind."""
        kinds = {"up": self.up, "down": self.down}
        return kinds if self.gate_proj is None else {**kinds, "gate_proj": self.gate_proj}

    def forward(self, x: Tensor, routing: Routing, top_k_weights: Tensor, dropout: float = 0.0) -> Tensor:
        """As `MPOExperts.forward`."""
        offsets = routing.expert_offsets
        rows = dispatch(x, routing)
        act = ACTIVATIONS[self.activation]
        hidden = grouped_dense_linear(rows, self.up.weight, offsets, self.up.bias)
        if self.gate_proj is None:
            hidden = act(hidden)
        else:
            hidden = act(grouped_dense_linear(rows, self.gate_proj.weight, offsets)) * hidden
        if dropout > 0.0:
            hidden = nn.functional.dropout(hidden, dropout)
        y = grouped_dense_linear(hidden, self.down.weight, offsets, self.down.bias)
        return combine(y, routing, top_k_weights)
