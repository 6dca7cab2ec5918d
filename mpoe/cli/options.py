"""Options of the commands beside the Trainer's own, as dataclasses, and what they build."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError, close_matches

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig

MOE_TYPES = ("switch", "moe", "none")
# the original's names of components -> target_modules
MPO_LAYERS = {"word_embed": "embedding", "mlp": "ffn", "attention": "attention", "pooler": "pooler"}
NO_MPO = "nompo"
# fields of `RouterConfig`; those left at None are what the moe_type says
ROUTER_FIELDS = (
    "top_k",
    "is_scale_prob",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "second_policy",
    "eval_second_policy",
    "second_threshold",
    "jitter",
    "balance_loss_weight",
    "z_loss_weight",
    "expert_dropout",
    "init_scale",
)


def _help(text: str, *aliases: str) -> dict[str, Any]:
    return {"help": text, **({"aliases": list(aliases)} if aliases else {})}


@dataclass
class ModelOptions:
    """Which model a command starts from."""

    _argument_group_name = "model"

    model: str = field(
        default="t5",
        metadata=_help(
            "t5 or gpt2 (the tiny pretrained stand-ins of the package), a folder, or a hub name",
            "--model_name_or_path",
            "--model-name-or-path",
        ),
    )


@dataclass
class ExpertOptions:
    """How the feed-forward layers become experts; the fields of `MPOEConfig` and `RouterConfig`."""

    _argument_group_name = "experts"

    moe_type: str = field(
        default="switch",
        metadata=_help("switch (routed experts), moe (GShard's top-2 gating), none (no router, one expert)"),
    )
    expert_type: str = field(
        default="mpo",
        metadata=_help("mpo, or dense: the baselines of full experts (with moe_type none: the model as is)"),
    )
    num_experts: int = field(default=8, metadata=_help("experts per layer"))
    shape: str = field(default="separable", metadata=_help("separable, paper, light, or JSON: kind -> MPOShape"))
    shape_pattern: str | None = field(
        default=None, metadata=_help("JSON: pattern of module names -> shape, bond cap or MPOShape; wins over shape")
    )
    max_bond: int | None = field(
        default=None,
        metadata=_help("cap of the experts' bond dimensions; none = lossless", "--linear_trunc", "--linear-trunc"),
    )
    separable_left: int | None = field(default=None, metadata=_help("left core of a separable up projection"))
    separable_right: int | None = field(default=None, metadata=_help("right core of a separable up projection"))
    light_p: int = field(default=64, metadata=_help("product i * j of a light shape's outer cores"))
    gauge: str = field(default="symmetric", metadata=_help("symmetric, orthogonal, or (at full bonds) identity"))
    auxiliary_noise: float = field(default=0.0, metadata=_help("relative noise on auxiliary cores at conversion"))
    target_modules: list[str] = field(
        default_factory=list, metadata=_help("ffn (default), attention, embedding, pooler: what to convert")
    )
    mpo_layers: list[str] = field(
        default_factory=list,
        metadata=_help(
            "components in MPO form, by the original's names: word_embed, mlp, attention, pooler, or nompo; without "
            "mlp the experts are dense"
        ),
    )
    exclude_modules: list[str] = field(default_factory=list, metadata=_help("modules that stay dense"))
    layers_to_transform: list[int] = field(default_factory=list, metadata=_help("layers to convert; none given = all"))
    attention_max_bond: int | None = field(
        default=None,
        metadata=_help("cap of the bonds of attention projections", "--attention_trunc", "--attention-trunc"),
    )
    embedding_max_bond: int | None = field(
        default=None, metadata=_help("cap of the bonds of the embedding", "--emb_trunc", "--emb-trunc")
    )
    pooler_max_bond: int | None = field(
        default=None, metadata=_help("cap of the bonds of BERT's pooler", "--pooler_trunc", "--pooler-trunc")
    )
    backend: str | None = field(default=None, metadata=_help("kernel backend; none = chosen per call"))
    top_k: int | None = field(default=None, metadata=_help("experts per token (1; moe: 2)"))
    is_scale_prob: bool = field(default=False, metadata=_help("scale an expert's output by the raw gate probability"))
    capacity_factor: float | None = field(
        default=None, metadata=_help("training capacity; none = no token is dropped (moe: 1.25)")
    )
    eval_capacity_factor: float | None = field(default=None, metadata=_help("capacity in evaluation (moe: 2)"))
    min_capacity: int | None = field(default=None, metadata=_help("least capacity in slots (1; moe: 4)"))
    second_policy: str | None = field(
        default=None, metadata=_help("moe: second experts kept in training: random (default), all, none or threshold")
    )
    eval_second_policy: str | None = field(default=None, metadata=_help("the same in evaluation (all)"))
    second_threshold: float | None = field(
        default=None, metadata=_help("gate of the second expert that threshold and random compare with (0.2)")
    )
    jitter: float = field(default=0.0, metadata=_help("noise on the router's input in training"))
    balance_loss_weight: float = field(default=1e-2, metadata=_help("weight of the load-balancing loss"))
    z_loss_weight: float = field(default=0.0, metadata=_help("weight of the router's z-loss"))
    expert_dropout: float | None = field(
        default=None, metadata=_help("dropout inside experts", "--switch_dropout", "--switch-dropout")
    )
    init_scale: float = field(default=0.1, metadata=_help("scale of the router's initial weights"))

    def build(self) -> MPOEConfig | None:
        """The `MPOEConfig`, checked, or None where everything stays dense.

        Raises:
            ValueError, TypeError: a field that does not fit, named.
        """
        from mpoe.config import MPOEConfig
        from mpoe_kernels import available_backends, backend_reasons

        if self.moe_type not in MOE_TYPES:
            raise CommandError(f"moe_type must be one of {', '.join(MOE_TYPES)}; got {self.moe_type!r}")
        targets, expert_type = self._targets()
        if not targets:
            return None
        if self.backend not in (None, "auto", *available_backends()):
            reasons = backend_reasons().get(str(self.backend))
            why = f": it cannot run here: {'; '.join(reasons)}" if reasons else ""
            raise CommandError(f"backend must be one of {', '.join(available_backends())}; got {self.backend!r}{why}")
        shape = _json("shape", self.shape) if self.shape.lstrip().startswith("{") else self.shape
        values = {name: getattr(self, name) for name in ROUTER_FIELDS}
        router: Any = {name: value for name, value in values.items() if value is not None}
        return MPOEConfig(
            moe_type=self.moe_type,
            num_experts=self.num_experts,
            expert_type=expert_type,
            shape=shape,
            shape_pattern={} if self.shape_pattern is None else _json("shape_pattern", self.shape_pattern),
            max_bond=self.max_bond,
            separable_left=self.separable_left,
            separable_right=self.separable_right,
            light_p=self.light_p,
            gauge=self.gauge,
            auxiliary_noise=self.auxiliary_noise,
            router=router,
            target_modules=targets if len(targets) > 1 else targets[0],
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform or None,
            attention_max_bond=self.attention_max_bond,
            embedding_max_bond=self.embedding_max_bond,
            pooler_max_bond=self.pooler_max_bond,
            backend=None if self.backend == "auto" else self.backend,
        )

    def _targets(self) -> tuple[list[str], str]:
        """`MPOEConfig`'s target_modules and expert_type; no targets = the model stays as it is."""
        if not self.mpo_layers:
            targets, expert_type = self.target_modules or ["ffn"], self.expert_type
        else:
            if self.target_modules or self.expert_type != "mpo":
                raise CommandError("mpo_layers says what target_modules and expert_type say; give one or the other")
            layers = [part.strip() for value in self.mpo_layers for part in value.split(",") if part.strip()]
            for name in layers:
                if name not in (*MPO_LAYERS, NO_MPO):
                    known = (*MPO_LAYERS, NO_MPO)
                    raise CommandError(
                        f"mpo_layers must be among {', '.join(known)}; got {name!r}{close_matches(name, known)}"
                    )
            if NO_MPO in layers and len(layers) > 1:
                raise CommandError(f"mpo_layers must be {NO_MPO} alone or names of components; got {', '.join(layers)}")
            expert_type = "mpo" if "mlp" in layers else "dense"
            targets = ["ffn", *(MPO_LAYERS[name] for name in layers if name not in (NO_MPO, "mlp"))]
        if self.moe_type == "none" and expert_type == "dense":
            targets = [target for target in targets if target != "ffn"]  # one dense expert is what is there already
        return targets, expert_type


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"{name}: bad JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{name}: bad JSON: {error}") from None
