"""`MPOEConfig`: how `convert_to_mpoe` converts a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mpoe.config import checks, shapes
from mpoe.config.router import GSHARD, ONE_EXPERT, RouterConfig

if TYPE_CHECKING:
    from mpoe_kernels import MPOShape

MOE_TYPES = ("switch", "moe", "none")
_CHOICES = {
    "moe_type": MOE_TYPES,
    "expert_type": ("mpo", "dense"),
    "gauge": ("symmetric", "orthogonal", "identity"),
}
TARGETS = ("ffn", "attention", "embedding", "pooler")
# Fields that apply only to MPO cores.
OF_CORES = frozenset({"max_bond", "separable_left", "separable_right", "light_p", "gauge"})
# fields of earlier versions, which mattered at conversion alone
OBSOLETE = frozenset({"auxiliary_noise", "existing_experts"})
_OTHER = " (shape='separable' takes it)"
DEFAULT_NEURONS = 64


@checks.refuse_unknown_fields
@dataclass
class MPOEConfig:
    """How `convert_to_mpoe` converts a model.

    Attributes:
        moe_type: ``"switch"`` (every token goes to its ``router.top_k`` experts), ``"moe"``
            (GShard's top-2 gating, see `RouterConfig.gshard`), or ``"none"``: no router and one
            expert, whatever ``num_experts`` is; the feed-forward network is then only put into MPO
            form.
        num_experts: experts of a layer, E.
        expert_type: ``"mpo"``, or ``"dense"``: the Switch-style baseline with E full weights.
        shape: of the experts: ``"hidden"``, ``"neurons"``, ``"separable"``, ``"paper"``,
            ``"light"``, or a mapping from ``"up"``, ``"down"`` and, optionally, ``"gate_proj"`` to
            `MPOShape`s (or their dicts); ``None`` = ``"hidden"``, or ``"separable"`` if an option
            is set that only other shapes have. Hidden: experts own blocks only on the hidden side,
            between the dense projections, which stay unchanged, so several experts per token cost
            little more than one. Neurons: experts own hidden neurons beside the dense network,
            which stays as it is, and their results are added to its own. Separable: MPO cores that
            are cheap to run; paper: the original's factors; light: smallest auxiliary cores.
            ``None`` takes what gained most with eight experts (docs/evidence.md), and two of them
            per token. Options that only other shapes have: ``max_bond``, ``separable_left``,
            ``separable_right``, ``light_p``, ``gauge``, a capacity, a bond in ``shape_pattern``, a
            ``moe_type`` other than ``"switch"``, dense experts. The attribute holds the chosen
            name.
        block_size: size b of hidden-side blocks, a divisor of the hidden size F; ``None`` = its
            largest divisor that is at most 64.
        block_per_group: each of the F / b groups of hidden units has its own blocks; otherwise all
            groups share one, a plain MPO core.
        neurons: hidden neurons of each expert, m, of the shape ``"neurons"``, which alone takes it;
            ``None`` = 64.
        latent: size l of a space that the experts of the shape ``"neurons"`` read and write,
            between two matrices that they share; ``None`` = they read and write the model's own.
        expert_bias: hidden-side experts have their own biases before the activation, initialised to
            0; neurons have them also without it if the dense network's have.
        expert_output_bias: dense experts have their own biases after the down projection, if the
            network has one.
        shape_pattern: shapes of individual modules, by regular expressions on their names or ends
            of names (the first match counts): a cap of the bonds, the name of a shape, an
            `MPOShape` (attention projections, embedding, pooler), or a mapping as for ``shape``
            (experts). Like ``rank_pattern`` in PEFT.
        max_bond: cap of every bond of the named shapes; ``None`` = full bonds, lossless.
        separable_left: size of the left core of a separable up projection; ``None`` = automatic.
        separable_right: of its right core.
        light_p: product ``i * j`` of a light shape's outer cores.
        gauge: ``"symmetric"``, ``"orthogonal"`` or, at full bonds, ``"identity"``: the central core
            is then the weight itself, and every expert starts with identities around it. See
            `mpoe_kernels.decompose_with_errors`.
        router: a `RouterConfig`, or its dict, whose missing fields take the defaults of
            ``moe_type``.
        target_modules: ``"ffn"``, ``"attention"`` (each projection becomes one `MPOLinear`),
            ``"embedding"`` (the table of the vocabulary becomes an `MPOEmbedding`; a tied head uses
            its transpose), ``"pooler"`` (BERT's), or a list of them.
        exclude_modules: names (or ends of names) of modules that stay dense.
        layers_to_transform: indices of the layers to convert; ``None`` = all. In a T5 they apply to
            both encoder and decoder. Embedding and pooler belong to no layer: only
            ``target_modules`` decides about them.
        attention_max_bond: cap of the bonds of attention projections (shape ``paper``).
        embedding_max_bond: of the embedding.
        pooler_max_bond: of the pooler.
        backend: name of a kernel backend; ``None`` = chosen per call.
        rate_ratios: for every MPO module, RMS(core) / RMS(weight) in chain order, measured at
            conversion; per-core learning rates are scaled by it. Set by `convert_to_mpoe`.
        tied_head: whether the language-model head is the transpose of the MPO embedding. Set by
            `convert_to_mpoe`.
    """

    moe_type: str = "switch"
    num_experts: int = 8
    expert_type: str = "mpo"
    shape: Any = None
    shape_pattern: dict[str, Any] = field(default_factory=dict)
    max_bond: int | None = None
    separable_left: int | None = None
    separable_right: int | None = None
    light_p: int = 64
    gauge: str = "symmetric"
    router: RouterConfig = field(default=None)  # type: ignore[assignment]
    target_modules: Any = "ffn"
    exclude_modules: list[str] = field(default_factory=list)
    layers_to_transform: list[int] | None = None
    attention_max_bond: int | None = None
    embedding_max_bond: int | None = None
    pooler_max_bond: int | None = None
    backend: str | None = None
    rate_ratios: dict[str, list[float]] = field(default_factory=dict)
    tied_head: bool = True
    block_size: int | None = None
    block_per_group: bool = True
    expert_bias: bool = False
    expert_output_bias: bool = False
    neurons: int | None = None
    latent: int | None = None
    _given: ClassVar[frozenset[str]] = frozenset()  # per instance: the fields that were given

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            checks.check_choice(name, getattr(self, name), known)
        checks.check_counts_and_flags(self)
        checks.check_type("backend", self.backend, str | None, "a name or None")
        if self.shape is not None:
            self.shape = shapes.checked_shape(self.shape)
        self.shape_pattern = shapes.checked_patterns(self.shape_pattern)
        self.rate_ratios = checks.checked_ratios(self.rate_ratios)
        self._check_router()
        self._check_kept()
        self._check_targets()

    def _check_router(self) -> None:
        if self.router is None or isinstance(self.router, Mapping):
            defaults = GSHARD if self.moe_type == "moe" else {}
            self.router = RouterConfig.from_dict({**defaults, **(self.router or {})})
        checks.check_type("router", self.router, RouterConfig, "a RouterConfig or its dict")
        if self.moe_type == "none":
            self.num_experts = 1
            self.router = dataclasses.replace(
                self.router, top_k=1, second_policy=None, eval_second_policy=None
            )
        if self.router.is_gshard != (self.moe_type == "moe"):
            wanted = "second_policy None"
            if self.moe_type == "moe":
                wanted = "a second_policy (see RouterConfig.gshard)"
            raise ValueError(
                f"moe_type {self.moe_type!r} needs a router with {wanted}; got "
                f"{self.router.second_policy!r}"
            )
        if self.shape is None:
            self.shape = shapes.SEPARABLE if self._needs_cores() else shapes.HIDDEN
        self._top_k_is_default = self.router.top_k is None
        if self.router.top_k is None:
            self.router = dataclasses.replace(self.router, top_k=self._default_top_k())
        if self.router.request_weight and not self.is_neurons:
            raise ValueError(
                f"request_weight needs the shape 'neurons'; got {self.router.request_weight} for "
                f"{self.shape!r}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts = {self.num_experts}; got {self.top_k}"
            )
        if self.is_neurons and self.router.routed_scaling_factor is None:
            factor = 1.0 if self.router.is_scale_prob else float(self.top_k)
            self.router = dataclasses.replace(self.router, routed_scaling_factor=factor)

    def _default_top_k(self) -> int:
        """Two; of neurons one in eight experts, two to eight; one of experts in place of the dense
        network."""
        if self.is_neurons:
            return min(self.num_experts, 8, max(2, self.num_experts // 8))
        return min(2, self.num_experts) if self.is_hidden else 1

    def _needs_cores(self) -> bool:
        """Whether an option is set that experts of the shape "hidden" cannot use."""
        return bool(
            self.moe_type != "switch"
            or self.expert_type != "mpo"
            or self._given & OF_CORES
            or any(isinstance(value, int) for value in self.shape_pattern.values())
            or self.router.capacity_factor is not None
            or self.router.eval_capacity_factor is not None
        )

    def with_cores(self) -> MPOEConfig:
        """This configuration, or one with separable experts if its shape is "hidden" by default:
        for networks that hidden-side blocks do not support."""
        if not self.is_hidden or "shape" in self._given:
            return self
        top_k = None if self._top_k_is_default else self.top_k
        router = dataclasses.replace(self.router, top_k=top_k)
        return dataclasses.replace(self, shape=shapes.SEPARABLE, router=router)

    @property
    def top_k(self) -> int:
        """Experts per token."""
        assert self.router.top_k is not None  # settled at construction
        return self.router.top_k

    @property
    def is_hidden(self) -> bool:
        """Whether the experts own only hidden-side blocks. Dense experts have no shape."""
        return self.shape == shapes.HIDDEN and self.expert_type == "mpo"

    @property
    def is_neurons(self) -> bool:
        """Whether the experts own hidden neurons beside the dense network."""
        return self.shape == shapes.NEURONS and self.expert_type == "mpo"

    @property
    def keeps_network(self) -> bool:
        """Whether the dense network's projections stay."""
        return self.is_hidden or self.is_neurons

    def _check_kept(self) -> None:
        if self.is_neurons and self.neurons is None:
            self.neurons = DEFAULT_NEURONS
        kinds = (self.shape, *self.shape_pattern.values())
        if self.block_size is not None and shapes.HIDDEN not in kinds:
            raise ValueError(f"block_size needs shape 'hidden'; got {self.shape!r}")
        if shapes.NEURONS not in kinds:
            for name in ("neurons", "latent"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs shape 'neurons'; got {self.shape!r}")
        if not self.is_neurons and self.router.routed_scaling_factor not in (None, 1.0):
            raise ValueError(
                "router.routed_scaling_factor needs shape 'neurons', as it would scale the whole "
                f"network; got {self.router.routed_scaling_factor}"
            )
        if not self.keeps_network:
            return
        if self.moe_type == "moe":
            raise ValueError(
                f"shape {self.shape!r} needs moe_type 'switch' or 'none'; got "
                f"{self.moe_type!r}{_OTHER}"
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self.router, name)
            if value is not None:
                raise ValueError(
                    f"shape {self.shape!r} needs router.{name} None: no expert is ever full; got "
                    f"{value}{_OTHER}"
                )

    def hidden_block(self, hidden_features: int) -> int:
        """Size b of the hidden-side blocks in a hidden layer of this size: ``block_size``, or its
        largest divisor that is at most 64.

        Raises:
            ValueError: ``block_size`` does not divide it.
        """
        if self.block_size is None:
            sizes = range(min(shapes.LARGEST_BLOCK, hidden_features), 0, -1)
            return next(size for size in sizes if hidden_features % size == 0)
        if hidden_features % self.block_size:
            raise ValueError(
                f"block_size must divide the hidden size {hidden_features}; got {self.block_size}"
            )
        return self.block_size

    def _check_targets(self) -> None:
        if not isinstance(self.target_modules, Sequence) or not self.target_modules:
            raise TypeError(
                "target_modules must be a name or a non-empty list of names; got "
                f"{self.target_modules!r}"
            )
        for target in self.targets:
            checks.check_choice("target_modules", target, TARGETS)
        names = self.exclude_modules
        layers = self.layers_to_transform
        checks.check_list("exclude_modules", names, "module names")
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"exclude_modules must be a list of module names; got {names!r}")
        self.exclude_modules = list(names)
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else layers
            checks.check_list("layers_to_transform", layers, "indices")
            self.layers_to_transform = list(layers)
            for index in self.layers_to_transform:
                checks.check_integer("layers_to_transform", index, 0)

    @property
    def targets(self) -> tuple[str, ...]:
        """`target_modules` as a tuple."""
        targets = self.target_modules
        return (targets,) if isinstance(targets, str) else tuple(targets)

    def shape_for(self, kind: str, in_features: int, out_features: int) -> MPOShape:
        """Shape of one projection of an FFN.

        Args:
            kind: ``"up"``, ``"gate_proj"`` (both model size -> hidden size) or ``"down"``.
            in_features, out_features: true sizes of the weight ``[in_features, out_features]``.

        Raises:
            ValueError: an unknown kind, a shape that keeps the projections, or a given `MPOShape`
                of other sizes.
        """
        checks.check_choice("kind", kind, shapes.KINDS)
        if self.shape in shapes.KEPT_SHAPES:
            raise ValueError(
                f"shape {self.shape!r} needs a dense network that stays (see convert_to_mpoe): it "
                "has no MPO"
            )
        if isinstance(self.shape, dict):
            shape = self.shape.get(kind) or self.shape["up"]
            return shapes.check_sizes(f"shape[{kind!r}]", shape, in_features, out_features)
        sizes = (in_features, out_features)
        if self.shape != "separable":
            return shapes.named_shape(self.shape, *sizes, self.max_bond, self.light_p)
        if kind == "down":
            return self.shape_for("up", *sizes[::-1]).mirrored()
        from mpoe_kernels import MPOShape

        sides = (self.separable_left, self.separable_right)
        return MPOShape.separable(*sizes, *sides, max_bond=self.max_bond)

    def _pattern_for(self, name: str) -> Any:
        for pattern, value in self.shape_pattern.items():
            if shapes.pattern_matches(pattern, name):
                return value
        return None

    def for_experts(self, name: str) -> MPOEConfig:
        """This configuration with the shape that ``shape_pattern`` gives the feed-forward network
        ``name``.

        Raises:
            ValueError: the pattern gives a single `MPOShape` instead of one for each projection.
        """
        pattern = self._pattern_for(name)
        if pattern is None:
            return self
        from mpoe_kernels import MPOShape

        if isinstance(pattern, MPOShape):
            raise ValueError(
                f"shape_pattern must give the feed-forward network {name} a mapping with 'up' and "
                "'down'"
            )
        change: dict[str, Any] = {"max_bond" if isinstance(pattern, int) else "shape": pattern}
        if self.is_neurons and change.get("shape", shapes.NEURONS) != shapes.NEURONS:
            router = dataclasses.replace(self.router, routed_scaling_factor=None)
            change |= {"neurons": None, "latent": None, "router": router}
        if change.get("shape", self.shape) != shapes.HIDDEN:
            change["block_size"] = None
        return dataclasses.replace(self, **change)

    def linear_shape(
        self, component: str, name: str, in_features: int, out_features: int
    ) -> MPOShape:
        """Shape of a module that is a single matrix, so only truncation saves parameters.

        Args:
            component: ``"attention"``, ``"embedding"`` or ``"pooler"``.
            name: of the module, for ``shape_pattern``.
            in_features, out_features: sizes of its weight; vocabulary and model size of an
                embedding.

        Raises:
            ValueError: the pattern's shape is for experts, or for other sizes.
        """
        sizes = (in_features, out_features)
        pattern = self._pattern_for(name)
        if isinstance(pattern, dict):
            raise ValueError(
                f"shape_pattern must give {name}, which is one matrix, an MPOShape, a name or a "
                "bond"
            )
        from mpoe_kernels import MPOShape

        if isinstance(pattern, MPOShape):
            return shapes.check_sizes(f"shape_pattern for {name}", pattern, *sizes)
        if pattern in shapes.KEPT_SHAPES:
            raise ValueError(
                f"shape_pattern must not give {name}, which is one matrix, the shape {pattern!r}"
            )
        cap = pattern if isinstance(pattern, int) else getattr(self, f"{component}_max_bond")
        kind = pattern if isinstance(pattern, str) else "paper"
        return shapes.named_shape(kind, *sizes, cap, self.light_p)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["shape"] = shapes.shape_to_json(self.shape)
        values["shape_pattern"] = {
            pattern: shapes.shape_to_json(value) for pattern, value in self.shape_pattern.items()
        }
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.targets)
        return copy.deepcopy({**values, "router": self.router.to_dict()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MPOEConfig:
        """Inverse of `to_dict`; unknown fields are refused with the closest known ones.

        Fields missing from a saved configuration have the meaning of the time when it was written:
        without ``shape`` its experts are separable, without ``top_k`` a token has one expert, and
        ``block_size`` has no effect on other shapes than "hidden".
        """
        if isinstance(values, Mapping):
            policy = values.get("existing_experts", "keep")
            if policy != "keep":
                raise ValueError(
                    "existing_experts must be 'keep': mixtures are not converted any more; got "
                    f"{policy!r}"
                )
            values = {name: value for name, value in values.items() if name not in OBSOLETE}
        checks.check_fields(cls, values, "MPOEConfig")
        router = values.get("router")
        if values.get("moe_type") != "moe" and (router is None or isinstance(router, Mapping)):
            values = {**values, "router": {**ONE_EXPERT, **(router or {})}}
        values = {"shape": shapes.SEPARABLE, **values}
        patterns = values.get("shape_pattern")
        kinds = list(patterns.values()) if isinstance(patterns, Mapping) else []
        if shapes.HIDDEN not in [values["shape"], *kinds]:
            values["block_size"] = None
        return cls(**values)
