"""`MPOEConfig` and `RouterConfig`: what decides how a converted model looks, checked at construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mpoe_kernels import MPOShape

EXPERT_TYPES = ("mpo", "dense")
GAUGES = ("symmetric", "orthogonal")
KINDS = ("up", "gate_proj", "down")
NAMED_SHAPES = ("separable", "paper", "light")
TARGETS = ("ffn", "attention")


def _hint(value: object, known: Sequence[str]) -> str:
    close = get_close_matches(str(value), list(known), n=3, cutoff=0.4)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}{_hint(value, known)}")


def _integer(name: str, value: object, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    wanted = "an integer or None" if optional else "an integer"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
    if not inside:
        bounds = f"greater than {low}" if open_low else f"at least {low}"
        raise ValueError(f"{name} must be {bounds}{'' if high == math.inf else f' and at most {high}'}; got {value}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__} {value!r}")


def _known_fields(cls: type, values: Mapping[str, Any], what: str) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be a mapping; got {type(values).__name__} {values!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{what} has no field {name!r}{_hint(name, known)}; it has {', '.join(known)}")


@dataclass
class RouterConfig:
    """How tokens find their experts.

    Attributes:
        top_k: experts per token.
        is_scale_prob: multiply an expert's output by the raw probability p. By default top-1 multiplies by
            p / stop_grad(p) (value 1, gradient p's) and top-k renormalises its weights to sum 1.
        capacity_factor: training capacity of an expert, ``ceil(factor * T * K / E)`` slots; ``None`` = dropless.
        eval_capacity_factor: the same in eval mode.
        jitter: in training the router's input is multiplied by noise uniform in ``[1 - jitter, 1 + jitter]``
            (Switch Transformers, section 2.4).
        balance_loss_weight: weight of every layer's load-balancing loss (Switch Transformers, eq. 4-6).
        z_loss_weight: weight of every layer's router z-loss (ST-MoE, eq. 5).
        expert_dropout: dropout rate between an expert's projections (Switch's "expert dropout", the original's
            ``switch_dropout``); ``None`` = the rate of the dense model's FFN.
        init_scale: router weights start from a truncated normal of variance ``init_scale / in_features``.
    """

    top_k: int = 1
    is_scale_prob: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    jitter: float = 0.0
    balance_loss_weight: float = 1e-2
    z_loss_weight: float = 0.0
    expert_dropout: float | None = None
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _integer("top_k", self.top_k, 1)
        _flag("is_scale_prob", self.is_scale_prob)
        for name in ("capacity_factor", "eval_capacity_factor"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0.0, open_low=True)
        _number("jitter", self.jitter, 0.0)
        if self.jitter >= 1:
            raise ValueError(f"jitter must be below 1; got {self.jitter}")
        _number("balance_loss_weight", self.balance_loss_weight, 0.0)
        _number("z_loss_weight", self.z_loss_weight, 0.0)
        if self.expert_dropout is not None:
            _number("expert_dropout", self.expert_dropout, 0.0)
            if self.expert_dropout >= 1:
                raise ValueError(f"expert_dropout must be below 1; got {self.expert_dropout}")
        _number("init_scale", self.init_scale, 0.0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterConfig:
        """Inverse of `to_dict`; unknown fields are refused with the closest known ones."""
        _known_fields(cls, values, "RouterConfig")
        return cls(**values)


@dataclass
class MPOEConfig:
    """What `convert_to_mpoe` makes of a model.

    Attributes:
        num_experts: experts of a layer, E.
        expert_type: ``"mpo"``, or ``"dense"``: the Switch-style baseline with E full weights.
        shape: ``"separable"`` (cheapest to run), ``"paper"`` (the original's factors), ``"light"`` (smallest
            auxiliary cores), or a mapping from ``"up"``, ``"down"`` and, optionally, ``"gate_proj"`` to `MPOShape`s
            (or their dicts).
        max_bond: cap of every bond of the named shapes; ``None`` = full bonds, lossless.
        separable_left, separable_right: sizes of the outer cores of a separable up projection; ``None`` = automatic.
        light_p: product ``i * j`` of a light shape's outer cores.
        gauge: ``"symmetric"`` or ``"orthogonal"``, see `mpoe_kernels.decompose`.
        auxiliary_noise: relative Gaussian noise on the experts' auxiliary cores at conversion. 0 = equal copies,
            which keeps the conversion lossless.
        router: a `RouterConfig` (or its dict).
        target_modules: ``"ffn"``, ``"attention"`` (each projection becomes one `MPOLinear`), or a list of them.
        exclude_modules: names (or ends of names) of modules that stay dense.
        layers_to_transform: indices of the layers to convert; ``None`` = all. T5 counts encoder and decoder alike.
        attention_max_bond: cap of the bonds of attention projections (shape ``paper``).
        backend: name of a kernel backend; ``None`` = chosen per call.
        rate_ratios: for every MPO module, RMS(core) / RMS(weight) in chain order, measured at conversion; per-core
            learning rates are scaled by it. Filled in by `convert_to_mpoe`.
    """

    num_experts: int = 8
    expert_type: str = "mpo"
    shape: Any = "separable"
    max_bond: int | None = None
    separable_left: int | None = None
    separable_right: int | None = None
    light_p: int = 64
    gauge: str = "symmetric"
    auxiliary_noise: float = 0.0
    router: RouterConfig = field(default_factory=RouterConfig)
    target_modules: Any = "ffn"
    exclude_modules: list[str] = field(default_factory=list)
    layers_to_transform: list[int] | None = None
    attention_max_bond: int | None = None
    backend: str | None = None
    rate_ratios: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _integer("num_experts", self.num_experts, 1)
        _choice("expert_type", self.expert_type, EXPERT_TYPES)
        self.shape = self._checked_shape(self.shape)
        _integer("max_bond", self.max_bond, 1, optional=True)
        _integer("separable_left", self.separable_left, 1, optional=True)
        _integer("separable_right", self.separable_right, 1, optional=True)
        _integer("light_p", self.light_p, 1)
        _choice("gauge", self.gauge, GAUGES)
        _number("auxiliary_noise", self.auxiliary_noise, 0.0)
        if isinstance(self.router, Mapping):
            self.router = RouterConfig.from_dict(self.router)
        if not isinstance(self.router, RouterConfig):
            raise TypeError(f"router must be a RouterConfig or its dict; got {type(self.router).__name__}")
        if self.router.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}; got {self.router.top_k}")
        self._check_targets()
        _integer("attention_max_bond", self.attention_max_bond, 1, optional=True)
        if self.backend is not None and not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name or None; got {type(self.backend).__name__} {self.backend!r}")
        if not isinstance(self.rate_ratios, Mapping):
            raise TypeError(f"rate_ratios must be a mapping; got {type(self.rate_ratios).__name__}")
        self.rate_ratios = {name: [float(r) for r in ratios] for name, ratios in self.rate_ratios.items()}

    @staticmethod
    def _checked_shape(shape: Any) -> Any:
        if isinstance(shape, str):
            _choice("shape", shape, NAMED_SHAPES)
            return shape
        if not isinstance(shape, Mapping):
            raise TypeError(
                f"shape must be one of {', '.join(map(repr, NAMED_SHAPES))} or a mapping from {list(KINDS)} to "
                f"MPOShape; got {type(shape).__name__} {shape!r}"
            )
        shapes = {}
        for kind, value in shape.items():
            _choice("shape's keys", kind, KINDS)
            shapes[kind] = value if isinstance(value, MPOShape) else MPOShape.from_dict(value)
        missing = {"up", "down"} - set(shapes)
        if missing:
            raise ValueError(f"shape must give 'up' and 'down'; missing {sorted(missing)}")
        return shapes

    def _check_targets(self) -> None:
        targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(targets, Sequence) or not targets:
            raise TypeError(f"target_modules must be a name or a non-empty list of names; got {self.target_modules!r}")
        for target in targets:
            _choice("target_modules", target, TARGETS)
        if isinstance(self.exclude_modules, str) or not isinstance(self.exclude_modules, Sequence):
            raise TypeError(f"exclude_modules must be a list of module names; got {self.exclude_modules!r}")
        self.exclude_modules = list(self.exclude_modules)
        for name in self.exclude_modules:
            if not isinstance(name, str) or not name:
                raise TypeError(f"exclude_modules must hold module names; got {name!r}")
        if self.layers_to_transform is not None:
            if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
                self.layers_to_transform = [self.layers_to_transform]
            if not isinstance(self.layers_to_transform, Sequence) or isinstance(self.layers_to_transform, str):
                raise TypeError(f"layers_to_transform must be a list of indices; got {self.layers_to_transform!r}")
            self.layers_to_transform = list(self.layers_to_transform)
            for index in self.layers_to_transform:
                _integer("layers_to_transform", index, 0)

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` as a tuple."""
        return (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)

    def shape_for(self, kind: str, in_features: int, out_features: int) -> MPOShape:
        """Shape of one projection of an FFN.

        Args:
            kind: ``"up"``, ``"gate_proj"`` (both model size -> hidden size) or ``"down"``.
            in_features, out_features: true sizes of the weight ``[in_features, out_features]``.

        Raises:
            ValueError: an unknown kind, or a given `MPOShape` of other sizes.
        """
        _choice("kind", kind, KINDS)
        if isinstance(self.shape, dict):
            shape: MPOShape = self.shape.get(kind) or self.shape["up"]
            if (shape.in_features, shape.out_features) != (in_features, out_features):
                raise ValueError(
                    f"shape[{kind!r}] must be for a weight [{in_features}, {out_features}]; got one for "
                    f"[{shape.in_features}, {shape.out_features}]"
                )
            return shape
        if self.shape == "paper":
            return MPOShape.paper(in_features, out_features, max_bond=self.max_bond)
        if self.shape == "light":
            return MPOShape.light(in_features, out_features, self.light_p, max_bond=self.max_bond)
        if kind == "down":
            return self.shape_for("up", out_features, in_features).mirrored()
        return MPOShape.separable(
            in_features, out_features, self.separable_left, self.separable_right, max_bond=self.max_bond
        )

    def attention_shape(self, in_features: int, out_features: int) -> MPOShape:
        """Shape of an attention projection (one expert, so nothing but truncation saves parameters)."""
        return MPOShape.paper(in_features, out_features, max_bond=self.attention_max_bond)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["router"] = self.router.to_dict()
        if isinstance(self.shape, dict):
            values["shape"] = {kind: shape.to_dict() for kind, shape in self.shape.items()}
        values["target_modules"] = self.target_modules if isinstance(self.target_modules, str) else list(self.targets)
        values["exclude_modules"] = list(self.exclude_modules)
        values["layers_to_transform"] = None if self.layers_to_transform is None else list(self.layers_to_transform)
        values["rate_ratios"] = {name: list(ratios) for name, ratios in self.rate_ratios.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MPOEConfig:
        """Inverse of `to_dict`; unknown fields are refused with the closest known ones."""
        _known_fields(cls, values, "MPOEConfig")
        return cls(**values)
