"""Experts that own blocks only on the hidden side of a feed-forward network, whose projections stay
unchanged."""

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers.cores import Device, DType, FromInitialValues
from mpoe.layers.drop_in import is_conv1d
from mpoe.layers.experts import check_activation, sizes_by_kind
from mpoe.layers.feed_forward import KeptFeedForward, MPOEFeedForward, is_observed
from mpoe.layers.router import RouterOutput, TopKRouter
from mpoe_kernels.experts import ACTIVATIONS, hidden_experts, routed_hidden


class HiddenExperts(FromInitialValues):
    """The blocks of E experts: ``o = sum_k gate_k act(u R_e + bias_e) L_e``, within groups of b
    hidden units.

    They start as identities, which do not change the result.

    Args:
        hidden_features: F.
        num_experts: E.
        block_size: b, a divisor of F.
        per_group: each of the F / b groups has its own blocks; otherwise all groups share one.
        activation: see `ACTIVATIONS`.
        gated: the network is ``act(u_gate R^gate_e) * (u R_e)``.
        bias: every expert has its own bias before the activation.
        backend: name of a kernel backend, or ``None``.

    Attributes:
        auxiliary: ``right``, ``left`` and, if gated, ``right_gate``: ``[E, G', b, b]``, G' = F / b
            or 1.
        bias: ``[E, F]`` or ``None``.
    """

    def __init__(
        self,
        hidden_features: int,
        num_experts: int,
        block_size: int,
        per_group: bool = True,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = False,
        backend: str | None = None,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        self.hidden_features = hidden_features
        self.num_experts = num_experts
        self.block_size = block_size
        self.backend = backend
        options: dict = {"device": device, "dtype": dtype}
        groups = hidden_features // block_size if per_group else 1
        size = (num_experts, groups, block_size, block_size)
        names = ("right", "left", "right_gate") if gated else ("right", "left")
        self.auxiliary = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(size, **options)) for name in names}
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, hidden_features, **options)) if bias else None
        )
        self.reset_parameters()

    @property
    def own_cores(self) -> list[nn.Parameter]:
        """The blocks: what has the rate of auxiliary cores."""
        return list(self.auxiliary.values())

    @property
    def is_gated(self) -> bool:
        return "right_gate" in self.auxiliary

    @property
    def per_group(self) -> bool:
        return self.block_size < self.hidden_features and self.auxiliary["right"].shape[1] > 1

    @property
    def dtype(self) -> torch.dtype:
        return self.auxiliary["right"].dtype

    def initial_values(self) -> dict[str, Tensor]:
        """Identity blocks and zero biases, by parameter name."""
        values = {
            f"auxiliary.{name}": torch.eye(self.block_size, device=core.device).expand(core.shape)
            for name, core in self.auxiliary.items()
        }
        if self.bias is not None:
            values["bias"] = torch.zeros(self.bias.shape, device=self.bias.device)
        return values

    def forward(
        self, u: Tensor, gates: Tensor, index: Tensor, u_gate: Tensor | None = None
    ) -> Tensor:
        """``[T, F] -> [T, F]``, see `mpoe_kernels.hidden_experts`."""
        blocks = self.auxiliary
        return hidden_experts(
            u,
            gates,
            index,
            blocks["right"],
            blocks["left"],
            self.bias,
            activation=self.activation,
            u_gate=u_gate,
            right_gate=blocks["right_gate"] if self.is_gated else None,
            backend=self.backend,
        )

    def routed(
        self,
        router: TopKRouter,
        x: Tensor,
        u: Tensor,
        u_gate: Tensor | None = None,
        overwrites: bool = False,
    ) -> tuple[Tensor, RouterOutput] | None:
        """Route tokens ``x [T, I]`` and compute their experts; returns the result and the router's
        decision.

        One native call replaces both forwards, see `RoutedFeedForward.skips_ops`. Returns None with
        autocast. ``overwrites``: nobody needs ``u`` any more, the result may take its place.
        """
        blocks: dict = self.auxiliary._parameters
        if not router.can_gate_natively(x, u, u_gate, *blocks.values(), self.bias):
            return None
        results = routed_hidden(
            x,
            router.weight,
            router.top_k,
            router.config.is_scale_prob,
            u,
            blocks,
            self.bias,
            u_gate,
            ACTIVATIONS[self.activation],
            overwrites,
        )
        return None if results is None else (results[0], RouterOutput(*results[1]))

    def extra_repr(self) -> str:
        blocks = f"block_size={self.block_size}, per_group={self.per_group}"
        return f"num_experts={self.num_experts}, {blocks}"


class HiddenFeedForward(KeptFeedForward):
    """``down(experts(up x))`` in place of a dense network, whose projections it takes over.

    Only this module's forward is new. If the down projection is in another module (BERT), the
    result is that projection's input.

    Arguments as of `KeptFeedForward`, with ``config.shape="hidden"``.
    """

    shape = "hidden"

    def new_experts(self, config: MPOEConfig, options: dict) -> HiddenExperts:
        """`HiddenExperts`."""
        return HiddenExperts(
            self.hidden_features,
            config.num_experts,
            config.hidden_block(self.hidden_features),
            config.block_per_group,
            options["activation"],
            options["gated"],
            config.expert_bias,
            config.backend,
            device=options["device"],
            dtype=options["dtype"],
        )

    def relative_flops(self, top_k: int) -> float:
        """1 + k b / I."""
        return 1 + top_k * self.experts.block_size / self.in_features

    def described(self) -> tuple[str, str]:
        size = self.experts.block_size
        owner = "own" if self.experts.per_group else "shared"
        return f"{self.hidden_features // size} blocks, {owner}", str(size)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Route every token, and compute its experts between the dense products.

        Args:
            hidden_states: ``[..., I]``, floating.
            token_mask: bool ``[...]``, ``False`` = padding, as in `MPOEFeedForward.forward`.

        Returns:
            ``[..., I]``, or ``[..., F]`` if the down projection is in another module.

        Raises:
            ValueError: sizes that do not fit.
        """
        x, token_mask = self.tokens(hidden_states, token_mask)
        # Multiply in the same shape as the dense model, so that the result is bit-identical.
        # Nothing holds u while the next product runs, so its memory is reused.
        shaped = hidden_states if token_mask is None else x.view(hidden_states.shape)
        if token_mask is None and self.skips_ops(HiddenExperts):
            o = self._routed(x, *self._hidden(shaped))
        else:
            gates, index = self._decision(x, token_mask)
            o = self._between(*self._hidden(shaped), gates, index)
        if "down" not in self.names:
            return self.dropped(o)
        down = getattr(self, self.names["down"])
        wanted = getattr(down, "weight", o).dtype  # Transformers keeps T5's `wo` in float32
        if wanted.is_floating_point and not torch.is_autocast_enabled(o.device.type):
            o = o.to(wanted)
        y = down(o)
        if token_mask is not None:
            y = y.masked_fill(~token_mask.view(y.shape[:-1])[..., None], 0.0)
        return self.dropped(y)

    def _routed(self, x: Tensor, u: Tensor, u_gate: Tensor | None) -> Tensor:
        """Like `_between`, for tokens ``x [T, I]`` that are not routed yet; without gradients."""
        up = getattr(
            self, self.names["up"]
        )  # of no other kind of module is it known that nobody else has its result
        overwrites = (type(up) is nn.Linear or is_conv1d(up)) and not is_observed(up)
        routed = self.experts.routed(self.router, x, u, u_gate, overwrites)
        if routed is None:
            return self._between(u, u_gate, *self._decision(x, None))
        self.record(routed[1], None)
        return routed[0]

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``u [..., F]`` and, if gated, the gate's."""
        up = self.names["up"]
        gate = self.names.get("gate_proj")
        u = getattr(self, up)(x)
        if gate is None:
            return u, None
        if gate != up:
            return u, getattr(self, gate)(x)
        u_gate = u[..., self.columns["gate_proj"]].contiguous()
        return u[..., self.columns["up"]].contiguous(), u_gate

    def _between(self, u: Tensor, u_gate: Tensor | None, gates: Tensor, index: Tensor) -> Tensor:
        """``u [..., F]`` through the experts and the dropout between the projections."""
        dtype = u.dtype if torch.is_autocast_enabled(u.device.type) else self.experts.dtype
        flat = [
            None if value is None else value.to(dtype).reshape(-1, value.shape[-1])
            for value in (u, u_gate)
        ]
        o = self.experts(flat[0], gates, index, flat[1]).view(u.shape)
        if self.training and self.expert_dropout:
            o = nn.functional.dropout(o, self.expert_dropout)
        return o

    @torch.no_grad()
    def expert_weights(self, kind: str, rows: Tensor | None = None) -> Tensor:
        """Every expert's full weight ``[E, I, F]`` (``down``: ``[E, F, I]``), or what its blocks
        make of other rows ``[n, F]`` of an up or gate projection: for export and inspection."""
        names = {"up": "right", "gate_proj": "right_gate", "down": "left"}
        core = self.experts.auxiliary[names[kind]]
        weight = (self.central_weight(kind) if rows is None else rows).to(core.dtype)
        size = self.experts.block_size
        groups = self.hidden_features // size
        blocks = core.expand(-1, groups, -1, -1)
        if kind == "down":
            whole = torch.einsum("egab,gbi->egai", blocks, weight.view(groups, size, -1))
            return whole.flatten(1, 2)
        whole = torch.einsum("iga,egab->eigb", weight.reshape(-1, groups, size), blocks)
        return whole.flatten(2, 3)


class HiddenMixture(HiddenFeedForward, MPOEFeedForward):
    """An `MPOEFeedForward` of the shape "hidden": hidden-side experts between projections of its
    own."""

    def new_experts(self, config: MPOEConfig, options: dict) -> HiddenExperts:
        """`HiddenExperts`; also makes the projections."""
        kinds = sizes_by_kind(self.in_features, self.hidden_features, options["gated"])
        self.keep({kind: kind for kind in kinds}, {})
        made = {}
        for kind, size in kinds.items():
            bias = options["bias"] and kind != "gate_proj"
            made[kind] = nn.Linear(*size, bias, options["device"], options["dtype"])
        for kind, std in options["init_std"].items():
            nn.init.normal_(made[kind].weight, std=std)
        self.adopt(made)
        return HiddenFeedForward.new_experts(self, config, options)
