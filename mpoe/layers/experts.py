"""`MPOExperts`, `DenseExperts`: the feed-forward networks behind a router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe.config.checks import check_choice
from mpoe.config.shapes import check_sizes
from mpoe.layers.cores import Device, DType, ExpertWeights, MPOCores
from mpoe.layers.expert_cache import KeptExperts, full_weights_pay, kept_experts
from mpoe.layers.router import TopKRouter
from mpoe_kernels import MPOBlocks, MPOShape, Routing, combine, dispatch, mpo_ffn
from mpoe_kernels.mixture import Chains, Rule, routed_ffn


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


# `mpoe_kernels.grouped_mpo_linear` supports every name too, and fuses it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
}


DEFAULT_STD = dict.fromkeys(("up", "down", "gate_proj"), 0.02)  # of random weights


def check_activation(name: object) -> str:
    """Return ``name`` if experts can compute it.

    Raises:
        ValueError: an unknown activation; the message suggests similar names.
    """
    check_choice("activation", name, tuple(ACTIVATIONS))
    return str(name)


def sizes_by_kind(
    in_features: int, hidden_features: int, gated: bool
) -> dict[str, tuple[int, int]]:
    """``(in, out)`` of every projection of a feed-forward network."""
    kinds = {"up": (in_features, hidden_features), "down": (hidden_features, in_features)}
    return {**kinds, "gate_proj": kinds["up"]} if gated else kinds


class _Network(nn.Module):
    """Projections ``up``, ``down`` and, for gated activations, ``gate_proj``."""

    up: Any
    down: Any
    gate_proj: Any

    @property
    def is_gated(self) -> bool:
        return self.gate_proj is not None

    def projections(self) -> dict[str, Any]:
        """Children by kind."""
        kinds = {"up": self.up, "down": self.down}
        return kinds if self.gate_proj is None else {**kinds, "gate_proj": self.gate_proj}


class MPOExperts(_Network):
    """``y[t] = sum_k gate[t, k] * down_e(activation(up_e x[t]))``, or ``down_e(activation(gate_e x)
    * up_e x)``.

    Children ``up``, ``down`` and, for gated activations, ``gate_proj`` are `MPOCores`.

    Args:
        shapes: `MPOShape` for ``"up"``, ``"down"`` and, if gated, ``"gate_proj"``.
        num_experts: E.
        activation: see `ACTIVATIONS`.
        bias: biases on up and down, shared by the experts.
        init_std: for every kind, the standard deviation of random weights.
        backend: name of a kernel backend, or ``None``.

    Raises:
        ValueError: an unknown activation, or shapes that do not match.
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
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.num_experts = num_experts
        self.backend = backend
        up = shapes["up"]
        std = {**DEFAULT_STD, **(init_std or {})}
        self.gate_proj = None
        sizes = sizes_by_kind(up.in_features, up.out_features, "gate_proj" in shapes)
        for kind, size in sizes.items():
            shape = check_sizes(f"the {kind} shape", shapes[kind], *size)
            has_bias = bias and kind != "gate_proj"
            cores = MPOCores(shape, num_experts, has_bias, std[kind], device=device, dtype=dtype)
            setattr(self, kind, cores)

    @property
    def dtype(self) -> torch.dtype:
        return self.up.central.dtype

    def weights(self) -> list[Tensor]:
        """All cores and biases."""
        weights: list[Tensor] = []
        for cores in self.projections().values():
            weights += cores.cores()
            if cores.bias is not None:
                weights.append(cores.bias)
        return weights

    def full_weights_pay(self, slots: int, dtype: torch.dtype) -> bool:
        """Whether full weights need much less work for this many slots, of as many experts as there
        may be."""
        shapes = tuple(cores.shape for cores in self.projections().values())
        return slots > 0 and full_weights_pay(shapes, min(slots, self.num_experts), slots, dtype)

    def as_dense(
        self, weight_of: Callable[[MPOCores], Tensor], own_bias: bool = False
    ) -> DenseExperts:
        """Dense experts with the same biases, and these weights ``[E, in, out]`` of every
        projection; ``own_bias`` as in `DenseExperts`."""
        dense = DenseExperts(
            self.up.in_features,
            self.up.out_features,
            self.num_experts,
            self.activation,
            self.up.bias is not None,
            self.is_gated,
            own_bias=own_bias,
            device="meta",
        )
        for kind, weights in dense.projections().items():
            cores = self.projections()[kind]
            weights.init_std = cores.init_std
            weights.weight = nn.Parameter(weight_of(cores))
            if weights.bias is not None:
                bias = weights.weight.new_zeros(()) if cores.bias is None else cores.bias.detach()
                weights.bias = nn.Parameter(bias.expand(weights.bias.shape).clone())
        return dense.train(self.training)

    # --------------------------------------------------------------- forward

    def forward(
        self, x: Tensor, routing: Routing, top_k_weights: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """Tokens ``x [T, I]`` through their experts -> ``[T, I]``; a dropped token's row is zero.

        ``dropout`` is the rate between the projections; pass it in training only.
        """
        kept = kept_experts(self)
        if kept is not None and dropout == 0.0 and x.device.type == "cpu":
            lowers = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
            dtype = torch.get_autocast_dtype("cpu") if lowers else x.dtype
            dense = kept.dense(routing.token_of_slot.shape[0], dtype)
            if dense is not None:
                return dense(x, routing, top_k_weights)
        chains = self._chains(kept)
        return mpo_ffn(
            x,
            routing,
            top_k_weights,
            chains.up,
            chains.down,
            gate_proj=chains.gate,
            up_bias=self.up.bias,
            down_bias=self.down.bias,
            activation=self.activation,
            dropout=dropout,
            backend=self.backend,
        )

    def routed(self, router: TopKRouter, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Route tokens ``x [T, I]`` and compute them by one native call in place of the ops of both
        forwards.

        Returns the result, which is the same, or None with gradients, autocast, a compiler, several
        dtypes, or where `forward` has full weights.
        """
        tensors = self.weights()
        if any(tensor.dtype != x.dtype for tensor in tensors) or not router.can_gate_natively(
            x, token_mask, *tensors
        ):
            return None
        kept = kept_experts(self)
        if kept is not None and kept.dense(x.shape[0] * router.top_k, x.dtype) is not None:
            return None
        rule = Rule(router.top_k, router.config.is_scale_prob, router.capacity(x.shape[0]))
        return routed_ffn(x, router.weight, rule, self._chains(kept), token_mask, self.backend)

    def _chains(self, kept: KeptExperts | None) -> Chains:
        """The folded chains."""
        blocks = self.blocks() if kept is None else kept.blocks
        gate = blocks.get("gate_proj")
        biases = (self.up.bias, self.down.bias)
        return Chains(blocks["up"], blocks["down"], gate, *biases, self.activation)

    def blocks(self) -> Mapping[str, MPOBlocks]:
        """The folded chains by kind."""
        return {kind: cores.blocks() for kind, cores in self.projections().items()}


class DenseExperts(_Network):
    """The same network with full weights ``[E, I, F]``: the Switch Transformer baseline."""

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
        own_bias: bool = False,
        own_output_bias: bool = False,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.num_experts = num_experts
        std = {**DEFAULT_STD, **(init_std or {})}
        self.gate_proj = None
        # If experts have their own biases, so does the projection before the activation.
        owns = {
            "up": own_bias and (bias or not gated),
            "down": own_output_bias and bias,
            "gate_proj": own_bias,
        }
        for kind, size in sizes_by_kind(in_features, hidden_features, gated).items():
            has_bias = bias and kind != "gate_proj"
            weights = ExpertWeights(
                *size,
                num_experts,
                has_bias,
                std[kind],
                own_bias=owns[kind],
                device=device,
                dtype=dtype,
            )
            setattr(self, kind, weights)

    @property
    def dtype(self) -> torch.dtype:
        return self.up.weight.dtype

    def forward(
        self, x: Tensor, routing: Routing, top_k_weights: Tensor, dropout: float = 0.0
    ) -> Tensor:
        """As `MPOExperts.forward`."""
        offsets = routing.expert_offsets
        rows = dispatch(x, routing)
        act = ACTIVATIONS[self.activation]
        hidden = self.up(rows, offsets)
        if self.gate_proj is None:
            hidden = act(hidden)
        else:
            hidden = act(self.gate_proj(rows, offsets)) * hidden
        if dropout > 0.0:
            hidden = nn.functional.dropout(hidden, dropout)
        return combine(self.down(hidden, offsets), routing, top_k_weights)
