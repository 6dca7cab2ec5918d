"""`MPOEFeedForward`: a router and experts in place of a dense feed-forward network;
`KeptFeedForward`: around one."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_integer, check_type
from mpoe.layers.context import RouterRecord, check_mask, current_routing, is_recorded
from mpoe.layers.cores import Device, DType
from mpoe.layers.drop_in import linear_weight
from mpoe.layers.experts import DenseExperts, MPOExperts, sizes_by_kind
from mpoe.layers.losses import count_choices
from mpoe.layers.router import Joined, RouterOutput, TopKRouter
from mpoe_kernels import Routing, route
from mpoe_kernels.checks import check_dense


def is_observed(*modules: nn.Module) -> bool:
    """Whether one of the modules has hooks, or its forward was replaced."""
    for module in modules:
        attributes = module.__dict__
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
        ):
            return True
    return _has_any_global_hook()


@functools.cache
def _say_that_nothing_balances() -> None:
    """Warn, once in a process, that a layer trains without its balancing loss."""
    warnings.warn(
        "a mixture's layer trains outside a converted model, so nothing adds its balancing loss: "
        "run it in mpoe.layers.routing_context() and add mpoe.layers.load_balancing_loss of the "
        "records",
        stacklevel=4,
    )


class RoutedFeedForward(nn.Module):
    """The common part of mixtures of every shape: the router, the call's token mask, the router's
    record.

    Arguments as of `MPOEFeedForward`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        config: MPOEConfig | None = None,
        *,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        stream: str = "main",
        init_std: Mapping[str, float] | None = None,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        config = MPOEConfig() if config is None else config
        check_type("config", config, MPOEConfig, "an MPOEConfig")
        check_integer("in_features", in_features, 1)
        check_integer("hidden_features", hidden_features, 1)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.num_experts = config.num_experts
        self.stream = stream
        self.backend = config.backend
        override = config.router.expert_dropout
        self.expert_dropout = dropout if override is None else override
        self.router: TopKRouter | None = None
        if config.moe_type != "none":
            self.router = TopKRouter(
                in_features, self.num_experts, config.router, backend=config.backend, device=device
            )
        self.dropout = nn.Dropout(output_dropout)
        options = {
            "activation": activation,
            "gated": gated,
            "bias": bias,
            "init_std": dict(init_std or {}),
            "device": device,
            "dtype": dtype,
        }
        self.experts: Any = self.new_experts(config, options)

    def new_experts(self, config: MPOEConfig, options: dict) -> nn.Module:
        """Experts for a network of these sizes; ``options`` are those of the network by name."""
        raise NotImplementedError

    def tokens(
        self, hidden_states: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``[..., I]`` as ``[T, I]`` with zeros for padding, and the mask ``[T]``: the argument's
        or the call's.

        Raises:
            TypeError: what is no tensor of floating-point numbers; a mask that is neither bool nor
                of integers.
            ValueError: sizes that do not fit, tensors that are not dense.
        """
        check_type("hidden_states", hidden_states, Tensor, "a tensor [..., I]")
        check_dense("hidden_states", hidden_states)
        if not hidden_states.is_floating_point():
            raise TypeError(
                f"hidden_states must hold floating-point numbers; got {hidden_states.dtype}"
            )
        if not hidden_states.dim() or hidden_states.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden_states must be [..., {self.in_features}]; got {list(hidden_states.shape)}"
            )
        routing_call = current_routing()
        if token_mask is None and routing_call is not None:
            token_mask = routing_call.masks.get(self.stream)
            if token_mask is not None and hidden_states.dim() == 2:
                token_mask = token_mask.reshape(-1)  # OPT's layers flatten what they pass on
        x = hidden_states.reshape(-1, self.in_features)
        if token_mask is not None:
            # Like hidden_states without its last axis.
            token_mask = check_mask("token_mask", token_mask, hidden_states.shape[:-1]).reshape(-1)
            # Padding may contain anything, including NaN, and the router reads every row.
            x = x.masked_fill(~token_mask[:, None], 0.0)
        return x, token_mask

    def record(
        self,
        decision: RouterOutput,
        token_mask: Tensor | None,
        expert_offsets: Tensor | None = None,
    ) -> None:
        """Store the router's decision, if there is one, in the context of the model call in
        progress.

        ``expert_offsets``: of the slots; default: an expert's load is how many chose it.
        """
        if self.router is None:
            return
        call = current_routing()
        if (
            call is None
            and self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            _say_that_nothing_balances()
        if call is not None and call.records is not None:
            index = decision.top_k_index
            if expert_offsets is None:
                expert_load = count_choices(index, self.num_experts, token_mask).int()
            else:
                expert_load = expert_offsets.diff()
            # The balancing loss of GShard's gating counts first choices.
            counted = index if decision.kept is None else index[:, :1]
            call.records.append(
                RouterRecord(self.stream, decision.logits, counted, expert_load, token_mask)
            )

    def skips_ops(self, kind: type[nn.Module]) -> bool:
        """Whether native calls may replace the forwards of the router and of the experts, if these
        are of this kind: without gradients, and if nobody observes them."""
        router = self.router
        experts = self.experts
        if torch.is_grad_enabled() or self.training or type(router) is not TopKRouter:
            return False
        if type(experts) is not kind or experts.backend != router.backend:
            return False
        return not is_observed(router, experts)

    def decide(self, x: Tensor, joined: Joined | None = None) -> RouterOutput:
        """The router's decision for tokens ``x [T, I]``, see `TopKRouter.forward`; without a router
        all have the one expert."""
        if self.router is not None:
            return self.router(x) if joined is None else self.router(x, joined)
        ones = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
        return RouterOutput(ones, torch.zeros_like(ones, dtype=torch.int64), ones)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the experts' dtype; under autocast as it is."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.experts.dtype)

    def dropped(self, y: Tensor) -> Tensor:
        """``y`` after the output dropout; a module that does nothing is not called, because that
        costs time while decoding."""
        dropout = self.dropout
        return dropout(y) if dropout.training and dropout.p > 0.0 else y

    def extra_repr(self) -> str:
        return f"expert_dropout={self.expert_dropout}, stream={self.stream!r}"


class MPOEFeedForward(RoutedFeedForward):
    """Mixture of experts ``[..., I] -> [..., I]``; with ``moe_type="none"`` one expert without a
    router.

    Args:
        in_features: model size I.
        hidden_features: size F of the dense network's, or the experts', hidden layer.
        config: `MPOEConfig`: experts, shapes, router. Hidden-side experts get projections of their
            own, `nn.Linear` up, down and, if gated, gate_proj.
        activation: name of the activation.
        gated: whether the network is ``down(act(gate x) * up x)``.
        bias: biases on up and down, shared by the experts.
        dropout: rate between the projections, unless ``config.router.expert_dropout`` replaces it.
        output_dropout: rate on the result.
        stream: which of the call's token masks this layer reads: ``"main"``, ``"encoder"`` or
            ``"decoder"``.
        init_std: per kind of projection, for random weights.
    """

    def new_experts(self, config: MPOEConfig, options: dict) -> nn.Module:
        """`MPOExperts` or `DenseExperts`; of the shape "hidden", `HiddenExperts` and projections
        around them."""
        if config.is_hidden:
            from mpoe.layers.hidden import HiddenMixture  # which is made of this class

            made: Any = self
            made.__class__ = HiddenMixture
            return HiddenMixture.new_experts(made, config, options)
        sizes = (self.in_features, self.hidden_features)
        if config.expert_type == "dense":
            return DenseExperts(
                *sizes,
                config.num_experts,
                own_bias=config.expert_bias,
                own_output_bias=config.expert_output_bias,
                **options,
            )
        kinds = sizes_by_kind(*sizes, options.pop("gated")).items()
        shapes = {kind: config.shape_for(kind, *size) for kind, size in kinds}
        return MPOExperts(shapes, config.num_experts, backend=config.backend, **options)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Route every token and compute its experts.

        Args:
            hidden_states: ``[..., I]``, floating; cast to the experts' dtype, or by autocast. A
                dense network that stays does not cast.
            token_mask: bool ``[...]``, ``False`` = padding, which is neither routed nor counted and
                yields zero. ``None`` reads the mask of the model call in progress, if there is one.

        Returns:
            ``[..., I]`` in the experts' dtype, also for tokens in another dtype; under autocast in
            autocast's.

        Raises:
            TypeError: what is no tensor of floating-point numbers; a mask that is neither bool nor
                of integers.
            ValueError: sizes that do not fit, tensors that are not dense.
        """
        x, token_mask = self.tokens(hidden_states, token_mask)
        if self.skips_ops(MPOExperts) and not is_recorded():
            y = self.experts.routed(self.router, x, token_mask)
            if y is not None:
                return self.dropped(y).view(hidden_states.shape)
        routing, gates = self._route(x, token_mask)
        x = self.cast(x)
        rate = self.expert_dropout if self.training else 0.0
        return self.dropped(self.experts(x, routing, gates, rate)).view(hidden_states.shape)

    def _route(self, x: Tensor, token_mask: Tensor | None) -> tuple[Routing, Tensor]:
        """Slots and gates ``[T, K]`` of tokens ``x [T, I]``; stores the router's record."""
        decision = self.decide(x)
        if self.router is None:
            routing = route(decision.top_k_index, 1, None, token_mask, backend=self.backend)
        else:
            routing = self.router.route(decision, token_mask)
        self.record(decision, token_mask, routing.expert_offsets)
        return routing, decision.top_k_weights


class KeptFeedForward(RoutedFeedForward):
    """The common part of mixtures around a dense network's own projections, which keep their types
    and names.

    Args:
        names: attribute of each projection by kind: ``up``, ``gate_proj`` if gated, ``down``;
            without those that are in another module.
        columns: if two kinds share one projection, which of its outputs belong to each.
        sizes, options: as in `MPOEFeedForward`; ``gated`` also if `names` has a gate.

    Attributes:
        shape: name of the shape in `MPOEConfig`.
        experts: the experts' own parameters, of which `own_cores` have a learning rate of their
            own.
        central_masked: while True (the gradient mask) what all experts share has no gradient.
    """

    shape: str

    def __init__(
        self,
        *sizes: Any,
        names: Mapping[str, str],
        columns: Mapping[str, slice] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            *sizes, **{**options, "gated": options.get("gated") or "gate_proj" in names}
        )
        self.keep(names, columns or {})

    def keep(self, names: Mapping[str, str], columns: Mapping[str, slice]) -> None:
        """Set `names` and `columns`; `adopt` brings the projections."""
        self.names, self.columns = dict(names), dict(columns)
        self._projections: dict[str, nn.Module] = {}
        self._central_masked = False

    def adopt(self, projections: Mapping[str, nn.Module]) -> None:
        """Take over the dense projections, by kind; those that are not in `names` stay where they
        are."""
        for kind, name in self.names.items():
            self.add_module(name, projections[kind])
        # A plain dict, so that modules that live elsewhere are not registered here too.
        self._projections = {
            kind: module for kind, module in projections.items() if kind not in self.names
        }

    def projections(self) -> dict[str, nn.Module]:
        """The dense projections by kind, including one in another module."""
        dense = {kind: getattr(self, name) for kind, name in self.names.items()}
        return {**dense, **self._projections}

    def _decision(
        self, x: Tensor, token_mask: Tensor | None, joined: Joined | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gates and experts ``[T, K]`` of tokens ``x [T, I]``, -1 for padding; stores the router's
        record."""
        decision = self.decide(x, joined)
        self.record(decision, token_mask)
        index = decision.top_k_index
        if token_mask is not None:
            index = index.masked_fill(~token_mask[:, None], -1)
        return decision.top_k_weights, index

    # ------------------------------------------------------------- the centre

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Weights of the projections by kind. A weight of two kinds is listed under the first."""
        parameters: dict[str, nn.Parameter] = {}
        for kind, module in self.projections().items():
            if not any(module.weight is weight for weight in parameters.values()):
                parameters[kind] = module.weight  # type: ignore[assignment]
        return parameters

    def central_parameters(self) -> dict[str, nn.Parameter]:
        """What all experts share, by name: the weights of the projections, and
        `shared_parameters`."""
        return {**self.dense_parameters(), **self.shared_parameters()}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What all experts share besides the dense network, by name."""
        return {}

    def own_parameters(self) -> int:
        """Numbers that the experts own, all together."""
        shared = sum(part.numel() for part in self.shared_parameters().values())
        return sum(part.numel() for part in self.experts.parameters()) - shared

    def relative_flops(self, top_k: int) -> float:
        """FLOPs of a forward pass with ``top_k`` experts per token, relative to the dense
        network's; without the router's."""
        raise NotImplementedError

    def described(self) -> tuple[str, str]:
        """Cells of `mpoe_summary`: how the experts are built, and the size that they have instead
        of a bond."""
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
            # quantised weights have no gradient
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                raise ValueError(
                    "the gradient mask needs projections that train; "
                    f"{name}.{self.names.get(kind, kind)} ({type(module).__name__}) is frozen or "
                    "quantised"
                )
