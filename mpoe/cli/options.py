"""Options of the commands beside the Trainer's own, as dataclasses, and what they build."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig

MOE_TYPES = ("switch", "none")


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

    moe_type: str = field(default="switch", metadata=_help("switch (routed experts) or none (stay dense)"))
    expert_type: str = field(default="mpo", metadata=_help("mpo, or dense: the Switch baseline of full experts"))
    num_experts: int = field(default=8, metadata=_help("experts per layer"))
    shape: str = field(default="separable", metadata=_help("separable, paper, light, or JSON: kind -> MPOShape"))
    max_bond: int | None = field(default=None, metadata=_help("cap of every bond dimension; none = lossless"))
    separable_left: int | None = field(default=None, metadata=_help("left core of a separable up projection"))
    separable_right: int | None = field(default=None, metadata=_help("right core of a separable up projection"))
    light_p: int = field(default=64, metadata=_help("product i * j of a light shape's outer cores"))
    gauge: str = field(default="symmetric", metadata=_help("symmetric or orthogonal"))
    auxiliary_noise: float = field(default=0.0, metadata=_help("relative noise on auxiliary cores at conversion"))
    target_modules: list[str] = field(default_factory=lambda: ["ffn"], metadata=_help("ffn and/or attention"))
    exclude_modules: list[str] = field(default_factory=list, metadata=_help("modules that stay dense"))
    layers_to_transform: list[int] = field(default_factory=list, metadata=_help("layers to convert; none given = all"))
    attention_max_bond: int | None = field(default=None, metadata=_help("cap of the bonds of attention projections"))
    backend: str | None = field(default=None, metadata=_help("kernel backend; none = chosen per call"))
    top_k: int = field(default=1, metadata=_help("experts per token"))
    is_scale_prob: bool = field(default=False, metadata=_help("scale an expert's output by the raw gate probability"))
    capacity_factor: float | None = field(default=None, metadata=_help("training capacity; none = no token is dropped"))
    eval_capacity_factor: float | None = field(default=None, metadata=_help("capacity in evaluation"))
    jitter: float = field(default=0.0, metadata=_help("noise on the router's input in training"))
    balance_loss_weight: float = field(default=1e-2, metadata=_help("weight of the load-balancing loss"))
    z_loss_weight: float = field(default=0.0, metadata=_help("weight of the router's z-loss"))
    expert_dropout: float | None = field(
        default=None, metadata=_help("dropout inside experts", "--switch_dropout", "--switch-dropout")
    )
    init_scale: float = field(default=0.1, metadata=_help("scale of the router's initial weights"))

    def build(self) -> MPOEConfig | None:
        """The `MPOEConfig`, checked, or None for ``moe_type none``.

        Raises:
            ValueError, TypeError: a field that does not fit, named.
        """
        from mpoe.config import MPOEConfig, RouterConfig
        from mpoe_kernels import available_backends, backend_reasons

        if self.moe_type not in MOE_TYPES:
            raise CommandError(f"moe_type must be one of {', '.join(MOE_TYPES)}; got {self.moe_type!r}")
        if self.moe_type == "none":
            return None
        if self.backend not in (None, "auto", *available_backends()):
            reasons = backend_reasons().get(str(self.backend))
            why = f": it cannot run here: {'; '.join(reasons)}" if reasons else ""
            raise CommandError(f"backend must be one of {', '.join(available_backends())}; got {self.backend!r}{why}")
        shape: Any = self.shape
        if shape.lstrip().startswith("{"):
            try:
                shape = json.loads(shape)
            except json.JSONDecodeError as error:
                raise CommandError(f"shape: bad JSON at character {error.pos}: {error.msg}") from None
        router = RouterConfig(
            top_k=self.top_k,
            is_scale_prob=self.is_scale_prob,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            jitter=self.jitter,
            balance_loss_weight=self.balance_loss_weight,
            z_loss_weight=self.z_loss_weight,
            expert_dropout=self.expert_dropout,
            init_scale=self.init_scale,
        )
        return MPOEConfig(
            num_experts=self.num_experts,
            expert_type=self.expert_type,
            shape=shape,
            max_bond=self.max_bond,
            separable_left=self.separable_left,
            separable_right=self.separable_right,
            light_p=self.light_p,
            gauge=self.gauge,
            auxiliary_noise=self.auxiliary_noise,
            router=router,
            target_modules=self.target_modules if len(self.target_modules) > 1 else self.target_modules[0],
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform or None,
            attention_max_bond=self.attention_max_bond,
            backend=None if self.backend == "auto" else self.backend,
        )
