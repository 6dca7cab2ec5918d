"""Configurations of converted models, derived from the dense ones by a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from mpoe.config import MPOEConfig
from mpoe.models.outputs import ROUTING_FIELDS
from mpoe.models.table import CLASS_PREFIX, TYPE_PREFIX

IGNORED_AT_INFERENCE = ["cache", "past_key_values", *ROUTING_FIELDS]

if TYPE_CHECKING:
    _Config = PreTrainedConfig
else:
    _Config = object


def checked_mpoe_dict(value: Any) -> dict[str, Any]:
    """The ``mpoe`` field of a Hugging Face config: a validated, JSON-able dict.

    Raises:
        TypeError, ValueError: anything `MPOEConfig` refuses.
    """
    if isinstance(value, MPOEConfig):
        return value.to_dict()
    return MPOEConfig.from_dict(value or {}).to_dict()


class MPOEConfigMixin(_Config):
    """Goes before the dense configuration in the bases. ``mpoe`` is the dict of an `mpoe.MPOEConfig`."""

    mpoe: dict[str, Any]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: `MPOEModelMixin.save_pretrained` writes the remote code itself."""


class RoutedConfigMixin(MPOEConfigMixin):
    """Configuration of a model with our routers; Transformers' mixtures have these options already.

    ``output_router_logits`` is Transformers' option of that name: ``None`` (the default) and ``True`` return the
    routers' outputs, ``False`` leaves out the fields of `mpoe.models.outputs.RoutingFields`; the loss always contains
    the auxiliary losses. The expert-parallel plan is empty: experts and routers are replicated on every rank.
    """

    base_model_ep_plan: ClassVar[Any] = {}

    @property
    def router_aux_loss_coef(self) -> float:
        """Transformers' name of the router's ``balance_loss_weight``."""
        return float(self.mpoe["router"]["balance_loss_weight"])

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        self.mpoe = checked_mpoe_dict({**self.mpoe, "router": {**self.mpoe["router"], "balance_loss_weight": value}})


def config_class_for(dense: type[PreTrainedConfig], module: str, routed: bool = True) -> type[PreTrainedConfig]:
    """The configuration class of converted ``dense`` models, with our routers unless ``routed`` is False."""

    def __init__(self: Any, mpoe: Any = None, **kwargs: Any) -> None:
        coefficient = kwargs.pop("router_aux_loss_coef", None) if routed else None
        self.mpoe = checked_mpoe_dict(mpoe)
        dense.__init__(self, **kwargs)
        if coefficient is not None:
            self.router_aux_loss_coef = coefficient

    ignored = [*IGNORED_AT_INFERENCE, *(getattr(dense, "keys_to_ignore_at_inference", None) or [])]
    return type(
        f"{CLASS_PREFIX}{dense.__name__}",
        (RoutedConfigMixin if routed else MPOEConfigMixin, dense),
        {
            "__init__": __init__,
            "__module__": module,
            "__doc__": f"`{dense.__name__}` with a field ``mpoe``: the dict of an `mpoe.MPOEConfig`.",
            "model_type": f"{TYPE_PREFIX}{dense.model_type}",
            "keys_to_ignore_at_inference": list(dict.fromkeys(ignored)),
        },
    )
