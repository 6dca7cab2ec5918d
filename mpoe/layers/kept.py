"""Mixtures that keep a dense network's projections as they are: what all their experts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers.drop_in import linear_weight
from mpoe.layers.feed_forward import RoutedFeedForward


class KeptFeedForward(RoutedFeedForward):
    """The common part of mixtures around a dense network's own projections, which keep their types and names.

    Args:
        in_features: model size I.
        hidden_features: F.
        config: `MPOEConfig`.
        names: attribute of each projection by kind: ``up``, ``gate_proj`` if gated, ``down``; without those that are in
            another module.
        columns: if two kinds share one projection, which of its outputs belong to each.
        others: as in `MPOEFeedForward`; ``gated`` also if `names` has a gate.

    Attributes:
        shape: name of the shape in `MPOEConfig`.
        experts: the experts' own parameters, of which `own_cores` have a learning rate of their own.
        central_masked: while True (the gradient mask) what all experts share has no gradient.
    """

    shape: str

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        config: MPOEConfig,
        *,
        names: Mapping[str, str],
        columns: Mapping[str, slice] | None = None,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        stream: str = "main",
        init_std: Mapping[str, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (in_features, hidden_features)  # `super` would be another class in a `HiddenMixture`
        RoutedFeedForward.__init__(self, *sizes, config, dropout, output_dropout, stream, device)
        self.names, self.columns = dict(names), dict(columns or {})
        self._projections: dict[str, nn.Module] = {}
        self._central_masked = False
        options = {"activation": activation, "gated": gated or "gate_proj" in names, "backend": config.backend}
        options |= {"device": device, "dtype": dtype}
        self.experts = self.new_experts(config, bias, (init_std or {}).get("up"), options)

    def new_experts(self, config: MPOEConfig, bias: bool, init_std: float | None, options: dict[str, Any]) -> nn.Module:
        """Experts for a network of these sizes, whose projections have biases or not.

        Args:
            init_std: of the dense neurons' weights, if it is known.
            options: arguments of the constructors of all experts.
        """
        raise NotImplementedError

    def adopt(self, projections: Mapping[str, nn.Module]) -> None:
        """Take over the dense projections, by kind; those that are not in `names` stay where they are."""
        for kind, name in self.names.items():
            self.add_module(name, projections[kind])
        # A plain dict, so that modules that live elsewhere are not registered here too.
        self._projections = {kind: module for kind, module in projections.items() if kind not in self.names}

    def projections(self) -> dict[str, nn.Module]:
        """The dense projections by kind, including one in another module."""
        own = {kind: getattr(self, name) for kind, name in self.names.items()}
        return {**own, **self._projections}

    def _decision(self, x: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates and experts ``[T, K]`` of tokens ``x [T, I]``, -1 for padding; stores the router's record."""
        if self.router is None:
            gates = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
            index = torch.zeros_like(gates, dtype=torch.int64)
        else:
            decision = self.router(x)
            gates, index = decision.top_k_weights, decision.top_k_index
            self.record(decision, token_mask)
        return gates, index if token_mask is None else index.masked_fill(~token_mask[:, None], -1)

    # ------------------------------------------------------------- the centre

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Weights of the projections by kind. A weight of two kinds is listed under the first."""
        found: dict[str, nn.Parameter] = {}
        for kind, module in self.projections().items():
            if not any(module.weight is weight for weight in found.values()):
                found[kind] = module.weight  # type: ignore[assignment]
        return found

    def central_parameters(self) -> dict[str, nn.Parameter]:
        """What all experts share, by name: the weights of the projections, and `shared_parameters`."""
        return {**self.dense_parameters(), **self.shared_parameters()}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What all experts share besides the dense network, by name."""
        return {}

    def own_parameters(self) -> int:
        """Numbers that the experts own, all together."""
        parameters, shared = self.experts.parameters(), self.shared_parameters().values()
        return sum(part.numel() for part in parameters) - sum(part.numel() for part in shared)

    def relative_flops(self, top_k: int) -> float:
        """FLOPs of a forward pass with ``top_k`` experts per token, relative to the dense network's; without the
        router's."""
        raise NotImplementedError

    def described(self) -> tuple[str, str]:
        """Cells of `mpoe_summary`: how the experts are built, and the size that they have instead of a bond."""
        raise NotImplementedError

    def central_weight(self, kind: str) -> Tensor:
        """The shared weight of one kind of projection, ``[in, out]``."""
        return linear_weight(self.projections()[kind])[:, self.columns.get(kind, slice(None))]

    @property
    def central_masked(self) -> bool:
        return self._central_masked

    @central_masked.setter
    def central_masked(self, masked: bool) -> None:
        if masked != self._central_masked:
            self._central_masked = masked
            for weight in self.central_parameters().values():
                weight.requires_grad_(not masked)

    def check_maskable(self, name: str) -> None:
        """Refuse the gradient mask if a projection is not trained.

        Raises:
            ValueError: a frozen, quantised or adapted projection, by name.
        """
        for kind, module in self.projections().items():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad or not weight.is_floating_point():
                raise ValueError(
                    f"the gradient mask needs projections that train; {name}.{self.names.get(kind, kind)} "
                    f"({type(module).__name__}) is frozen or quantised"
                )
