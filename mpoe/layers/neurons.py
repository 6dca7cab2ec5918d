"""Experts that are extra hidden neurons beside a dense feed-forward network, which stays."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers.context import current_routing, is_recorded
from mpoe.layers.cores import Device, DType, FromInitialValues
from mpoe.layers.experts import check_activation
from mpoe.layers.feed_forward import KeptFeedForward
from mpoe.layers.request import Evidence, join_request
from mpoe.layers.router import Joined, TopKRouter
from mpoe_kernels import neuron_experts
from mpoe_kernels.experts import ACTIVATIONS, routed_neurons

START_NOISE = 0.5  # of copied neurons, relative to the standard deviation of the dense network's
# Attributes of a patched or compiled module that it calls in place of its class's forward. They are
# not taken over, as the experts would not be called.
_OWN_FORWARDS = ("forward", "_compiled_call_impl")


class NeuronExperts(FromInitialValues):
    """m hidden neurons of each of E experts: ``o = [sum_k gate_k act(x P a_e^T + bias_e) b_e] Q``.

    Without a latent size P and Q are identities. Gated: ``act(x P ag_e^T + bias_e) * (x P a_e^T)``.
    Every b_e starts at 0, so that the experts contribute nothing.

    Args:
        in_features: model size I.
        num_experts: E.
        neurons: m.
        latent: size l between the shared P and Q, or ``None``.
        activation: see `ACTIVATIONS`.
        gated: the neurons are gated.
        bias: every expert has its own bias before the activation.
        backend: name of a kernel backend, or ``None``.
        init_std: standard deviation of a dense neuron's weights, for random weights; ``None`` =
            I^-1/2.

    Attributes:
        up: a_e, ``[E, m, l or I]``; a neuron is a row.
        gate_proj: ag_e, like ``up``, or ``None``.
        down: b_e, like ``up``.
        bias: ``[E, m]`` or ``None``.
        latent_in: P ``[I, l]``, or ``None``.
        latent_out: Q ``[l, I]``, or ``None``.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        neurons: int,
        latent: int | None = None,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = False,
        backend: str | None = None,
        *,
        init_std: float | None = None,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.in_features = in_features
        self.num_experts = num_experts
        self.neurons = neurons
        self.latent = latent
        self.backend = backend
        self.init_std = in_features**-0.5 if init_std is None else init_std

        def new(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        inner = in_features if latent is None else latent
        self.up = new(num_experts, neurons, inner)
        self.down = new(num_experts, neurons, inner)
        self.gate_proj = new(num_experts, neurons, inner) if gated else None
        self.bias = new(num_experts, neurons) if bias else None
        self.latent_in = None if latent is None else new(in_features, latent)
        self.latent_out = None if latent is None else new(latent, in_features)
        self.reset_parameters()

    @property
    def own_cores(self) -> list[nn.Parameter]:
        """The experts' weights: what has the rate of auxiliary cores."""
        return [part for part in (self.up, self.gate_proj, self.down) if part is not None]

    @property
    def shared(self) -> dict[str, nn.Parameter]:
        """P and Q by name, if there are any: what all experts share."""
        parts = {"latent_in": self.latent_in, "latent_out": self.latent_out}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    def initial_values(self) -> dict[str, Tensor]:
        """Random neurons whose inner products have the scale of a dense neuron's; by parameter
        name."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            options: dict = {"dtype": torch.float32, "device": parameter.device}
            if name in ("down", "bias"):
                values[name] = torch.zeros(parameter.shape, **options)
                continue
            if name in self.shared:
                std = parameter.shape[0] ** -0.5
            else:
                # P gives every latent number about the size |x| / sqrt(I)
                std = self.init_std * (self.in_features / parameter.shape[-1]) ** 0.5
            values[name] = torch.randn(parameter.shape, **options) * std
        return values

    @torch.no_grad()
    def copy_neurons_(
        self, weights: Mapping[str, Tensor], bias: Tensor | None, noise: float
    ) -> None:
        """Start from random neurons of a dense network, and Gaussian noise so that they differ;
        for experts without a latent size.

        Args:
            weights: ``up`` and, if gated, ``gate_proj``: ``[I, F]``.
            bias: ``[F]``, or ``None``.
            noise: relative to the weights' standard deviation.
        """
        dense_neurons = weights["up"].shape[1]
        chosen = torch.randint(dense_neurons, (self.num_experts * self.neurons,))
        chosen = chosen.to(weights["up"].device)
        for name, weight in weights.items():
            parameter: nn.Parameter = getattr(self, name)
            parameter.copy_(weight.t()[chosen].view(parameter.shape))
            if noise:
                parameter.add_(torch.randn_like(parameter) * (noise * weight.float().std()))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias[chosen].view(self.bias.shape))

    def forward(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        """``[T, I] -> [T, I]``, see `mpoe_kernels.neuron_experts`."""
        x = x if self.latent_in is None else x @ self.latent_in
        o = neuron_experts(
            x,
            gates,
            index,
            self.up,
            self.down,
            self.bias,
            activation=self.activation,
            gate_up=self.gate_proj,
            backend=self.backend,
        )
        return o if self.latent_out is None else o @ self.latent_out

    def routed(self, router: TopKRouter, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Route tokens ``x [T, I]`` and compute them by one native call in place of the ops of both
        forwards.

        Returns the result, which is the same; or None where native code cannot do that (gradients,
        autocast, a compiler, other devices, dtypes, backends or gates), so that the ops must.
        """
        # as attributes they would be found by nn.Module.__getattr__, which is slow for one token
        parameters: Any = self._parameters
        if x.dtype != parameters["down"].dtype or not router.can_gate_natively(
            x, token_mask, *parameters.values()
        ):
            return None
        latent_in, latent_out = parameters.get("latent_in"), parameters.get("latent_out")
        o = routed_neurons(
            x,
            router.weight,
            router.top_k,
            router.config.is_scale_prob,
            router.scale,
            token_mask,
            x if latent_in is None else x @ latent_in,
            parameters,
            ACTIVATIONS[self.activation],
        )
        if o is None:
            return None
        return o if latent_out is None else o @ latent_out

    @torch.no_grad()
    def merged(self) -> NeuronExperts:
        """The same experts without a latent size: ``a_e <- a_e P^T``, ``b_e <- b_e Q``, exact up to
        rounding."""
        whole = copy.deepcopy(self)
        if self.latent_in is not None and self.latent_out is not None:
            inward = self.latent_in.t()
            sides = {"up": inward, "gate_proj": inward, "down": self.latent_out}
            for name, side in sides.items():
                weight = getattr(self, name)
                if weight is not None:
                    setattr(whole, name, nn.Parameter(weight @ side, weight.requires_grad))
            whole.latent = whole.latent_in = whole.latent_out = None
        return whole

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, neurons={self.neurons}, latent={self.latent}"


class NeuronFeedForward(KeptFeedForward):
    """A dense feed-forward network, unchanged, whose result the experts of a token add to.

    `around` makes it an instance of the dense module's class too, with the same submodules,
    attributes and hooks. Its forward still calls the dense module's, with the same arguments by
    position.

    Args:
        adds_input: the dense module is not the network itself but the one that ends it, called with
            its input too, and adds that (BERT): ``forward(hidden, x)``.
        dropout: not used; the dense network applies its own, and experts have
            ``config.router.expert_dropout``.
        output_dropout: rate on the experts' result; the dense network applies its own to its own.
        sizes, options: as in `KeptFeedForward`, with ``config.shape="neurons"``.
    """

    shape = "neurons"
    dense_class: type[nn.Module] | None = None
    adds_experts = True  # False: computes what the dense network does (`without_experts`)

    def __init__(
        self,
        *sizes: Any,
        adds_input: bool = False,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*sizes, **options)
        del self.dropout  # the dense module's may have this name
        self.output_dropout, self.adds_input = output_dropout, adds_input

    def new_experts(self, config: MPOEConfig, options: dict) -> nn.Module:
        """`NeuronExperts` of ``config.neurons`` each; ``options`` as in `RoutedFeedForward`."""
        assert config.neurons is not None  # settled at construction
        options["bias"] = options["bias"] or config.expert_bias
        options["init_std"] = options["init_std"].get("up")
        sizes = (self.in_features, config.num_experts, config.neurons, config.latent)
        return NeuronExperts(*sizes, backend=config.backend, **options)

    def around(self, dense: nn.Module, projections: Mapping[str, nn.Module]) -> None:
        """Become ``dense``, with the experts added; ``dense`` must not be used any more.

        ``projections``: by kind; those that are not in `names` are in other modules.

        Raises:
            ValueError: the dense module has something else under a name that the layer needs.
        """
        _check_names(self, dense)
        state = vars(self)
        for name, value in vars(dense).items():
            if name in ("_parameters", "_buffers", "_modules"):
                state[name].update(value)
            elif name not in _OWN_FORWARDS:
                # Hooks are in the dense module's very dictionaries, so that their handles still
                # remove them.
                state[name] = value
        dense_class: Any = type(dense)
        neuron_class: Any = _class_around(dense_class)
        self.__class__ = neuron_class  # after this, its forward finds the dense module's
        self.adopt(projections)

    def forward(
        self, hidden_states: Tensor, *others: Any, token_mask: Tensor | None = None
    ) -> Tensor:
        """The dense network's result plus that of every token's experts.

        Args:
            hidden_states, others: what the dense module takes.
            token_mask: bool like the tokens, ``False`` = padding, which has no experts and is not
                counted; as in `MPOEFeedForward.forward`.

        Raises:
            ValueError: sizes that do not fit.
        """
        # super() is the dense module's class, see `_class_around`
        if self.adds_input:
            x, *others_left = others
            added = x + self._added(x, token_mask, x)
            return super().forward(hidden_states, added, *others_left)
        y = super().forward(hidden_states, *others)
        return y + self._added(hidden_states, token_mask, y)

    def _added(self, hidden_states: Tensor, token_mask: Tensor | None, like: Tensor) -> Tensor:
        """The experts' results for tokens ``[..., I]``, in the dtype of ``like``."""
        if not self.adds_experts:
            return torch.zeros_like(like)
        x, token_mask = self.tokens(hidden_states, token_mask)
        joined = self._joined(hidden_states.shape, token_mask)
        if joined is None and self.skips_ops(NeuronExperts) and not is_recorded():
            routed = self.experts.routed(self.router, x, token_mask)
            if routed is not None:
                return routed.view(hidden_states.shape).to(like.dtype)
        gates, index = self._decision(x, token_mask, joined)
        o = self.experts(self.cast(x), gates, index)
        for rate in (self.expert_dropout, self.output_dropout):
            if self.training and rate:
                o = nn.functional.dropout(o, rate)
        return o.view(hidden_states.shape).to(like.dtype)

    def _joined(self, shape: torch.Size, token_mask: Tensor | None) -> Joined | None:
        """What joins the logits of tokens of hidden states of this shape with their requests'."""
        config = None if self.router is None else self.router.config
        if config is None or not config.request_weight:
            return None
        call = current_routing()
        evidence = None if call is None else call.evidence
        if evidence is None:
            evidence = Evidence()  # of this layer's tokens alone
        size = shape[-3:-1] if len(shape) > 2 else shape[:1]

        def joined(logits: Tensor) -> Tensor:
            return join_request(logits, config.request_weight, evidence, size, token_mask)

        return joined

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """P and Q, if there are any."""
        return self.experts.shared

    def relative_flops(self, top_k: int) -> float:
        """1 + k m / F; with a latent size 1 + l / F + k l m / (I F), where l / F is 2 l / (3 F) if
        gated."""
        m, latent = self.experts.neurons, self.experts.latent
        if latent is None:
            return 1 + top_k * m / self.hidden_features
        matrices = 2 if self.experts.gate_proj is None else 3
        shared = 2 * latent / (matrices * self.hidden_features)
        return 1 + shared + top_k * latent * m / (self.in_features * self.hidden_features)

    def described(self) -> tuple[str, str]:
        latent = self.experts.latent
        return f"{self.experts.neurons} neurons", "-" if latent is None else str(latent)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class that was made here has no name to be found by
        if self.dense_class is None:
            return super().__reduce_ex__(protocol)
        return _bare, (self.dense_class,), self.__getstate__()


@contextlib.contextmanager
def without_experts(model: nn.Module) -> Iterator[None]:
    """Inside, a model with neurons beside its networks computes what the dense model does."""
    layers = [module for module in model.modules() if isinstance(module, NeuronFeedForward)]
    before = [layer.adds_experts for layer in layers]
    try:
        for layer in layers:
            layer.adds_experts = False
        yield
    finally:
        for layer, added in zip(layers, before, strict=True):
            layer.adds_experts = added


def _check_names(layer: nn.Module, dense: nn.Module) -> None:
    """Refuse a dense module that has an attribute, submodule or method under the name of another
    one of the layer's."""
    names = set(dir(layer)) & set(dir(dense)) - set(dir(nn.Module()))
    for name in sorted(names):
        ours = getattr(layer, name)
        theirs = getattr(dense, name)
        is_plain = type(ours) is type(theirs) and not isinstance(ours, Tensor)
        if ours is not theirs and not (is_plain and ours == theirs):
            raise ValueError(
                f"{type(dense).__name__} cannot get neurons: its attribute {name!r} has the name "
                "of one that the layer needs"
            )


@functools.cache
def _class_around(dense: type[nn.Module]) -> type[nn.Module]:
    """The class of a `NeuronFeedForward` around a module of class ``dense``."""
    bases = (NeuronFeedForward, dense)
    return type(f"Neuron{dense.__name__}", bases, {"dense_class": dense, "__module__": __name__})


def _bare(dense: type[nn.Module]) -> nn.Module:
    """An instance without attributes, to be unpickled or copied into."""
    made = _class_around(dense)  # type: ignore[arg-type]
    return made.__new__(made)
