"""Options of the commands beside the Trainer's own, as dataclasses, and what they build."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.parsing import option

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig

# the original's names of components -> target_modules
MPO_LAYERS = {"word_embed": "embedding", "mlp": "ffn", "attention": "attention", "pooler": "pooler"}
NO_MPO = "nompo"


@dataclass
class ModelOptions:
    """Which model a command starts from."""

    _argument_group_name = "model"

    model: str = option(
        "t5", "t5 or gpt2 (the tiny pretrained stand-ins of the package), a folder, or a hub name", "model_name_or_path"
    )


@dataclass
class ExpertOptions:
    """How the feed-forward layers become experts; the fields of `MPOEConfig` and `RouterConfig`."""

    _argument_group_name = "experts"

    moe_type: str = option(
        "switch", "switch (routed experts), moe (GShard's top-2 gating), none (no router, one expert)"
    )
    expert_type: str = option(
        "mpo", "mpo, or dense: the baselines of full experts (with moe_type none: the model as is)"
    )
    num_experts: int = option(8, "experts per layer")
    shape: str = option("separable", "separable, paper, light, or JSON: kind -> MPOShape")
    shape_pattern: str | None = option(
        None, "JSON: pattern of module names -> shape, bond cap or MPOShape; wins over shape"
    )
    max_bond: int | None = option(None, "cap of the experts' bond dimensions; none = lossless", "linear_trunc")
    separable_left: int | None = option(None, "left core of a separable up projection")
    separable_right: int | None = option(None, "right core of a separable up projection")
    light_p: int = option(64, "product i * j of a light shape's outer cores")
    gauge: str = option("symmetric", "symmetric, orthogonal, or (at full bonds) identity")
    auxiliary_noise: float = option(0.0, "relative noise on auxiliary cores at conversion")
    target_modules: list[str] = option([], "ffn (default), attention, embedding, pooler: what to convert")
    mpo_layers: list[str] = option(
        [],
        "components in MPO form, by the original's names: word_embed, mlp, attention, pooler, or nompo; without "
        "mlp the experts are dense",
    )
    exclude_modules: list[str] = option([], "modules that stay dense")
    layers_to_transform: list[int] = option([], "layers to convert; none given = all")
    attention_max_bond: int | None = option(None, "cap of the bonds of attention projections", "attention_trunc")
    embedding_max_bond: int | None = option(None, "cap of the bonds of the embedding", "emb_trunc")
    pooler_max_bond: int | None = option(None, "cap of the bonds of BERT's pooler", "pooler_trunc")
    backend: str | None = option(None, "kernel backend; none = chosen per call")
    top_k: int | None = option(None, "experts per token (1; moe: 2)")
    is_scale_prob: bool = option(False, "scale an expert's output by the raw gate probability")
    capacity_factor: float | None = option(None, "training capacity; none = no token is dropped (moe: 1.25)")
    eval_capacity_factor: float | None = option(None, "capacity in evaluation (moe: 2)")
    min_capacity: int | None = option(None, "least capacity in slots (1; moe: 4)")
    second_policy: str | None = option(
        None, "moe: second experts kept in training: random (default), all, none or threshold"
    )
    eval_second_policy: str | None = option(None, "the same in evaluation (all)")
    second_threshold: float | None = option(
        None, "gate of the second expert that threshold and random compare with (0.2)"
    )
    jitter: float = option(0.0, "noise on the router's input in training")
    balance_loss_weight: float = option(1e-2, "weight of the load-balancing loss")
    z_loss_weight: float = option(0.0, "weight of the router's z-loss")
    expert_dropout: float | None = option(None, "dropout inside experts", "switch_dropout")
    init_scale: float = option(0.1, "scale of the router's initial weights")

    def build(self) -> MPOEConfig | None:
        """The `MPOEConfig`, checked, or None where everything stays dense.

        Raises:
            ValueError, TypeError: a field that does not fit, named.
        """
        from mpoe.config import MPOEConfig, RouterConfig
        from mpoe.config.mixture import MOE_TYPES
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
        given = {name: value for name, value in vars(self).items() if value not in (None, [])}
        values = {f.name: given[f.name] for f in fields(MPOEConfig) if f.name in given}
        values |= {"expert_type": expert_type, "target_modules": targets if len(targets) > 1 else targets[0]}
        values |= {"router": {f.name: given[f.name] for f in fields(RouterConfig) if f.name in given}}
        if self.shape.lstrip().startswith("{"):
            values["shape"] = _json("shape", self.shape)
        if self.shape_pattern is not None:
            values["shape_pattern"] = _json("shape_pattern", self.shape_pattern)
        if self.backend == "auto":
            values["backend"] = None
        return MPOEConfig(**values)

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
