"""Model outputs with router outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from torch import Tensor
from transformers.utils.generic import ModelOutput

ROUTING_FIELDS = ("task_loss", "aux_loss", "router_logits", "expert_load")


@dataclass
class RoutingFields:
    """Fields that every MPOE model adds to its family's output.

    Attributes:
        task_loss: the loss without ``aux_loss``; present when labels are given.
        aux_loss: weighted sum over layers of the load-balancing and z-losses, float32 scalar.
        router_logits: raw logits per layer in order of execution, float32 ``[B * S, E]`` each.
        expert_load: slots each expert worked on, int64 ``[layers, E]``, detached; padding and dropped tokens are not
            counted.
    """

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    expert_load: Tensor | None = None


@functools.cache
def output_with_routing(dense: type[ModelOutput]) -> type[ModelOutput]:
    """``dense`` with `RoutingFields`, named ``MPOE<dense>``."""
    documentation = f"`{dense.__name__}` with `RoutingFields`."
    made = type(f"MPOE{dense.__name__}", (RoutingFields, dense), {"__doc__": documentation, "__module__": __name__})
    return dataclass(made)


def output_of(forward: Callable[..., Any]) -> type[ModelOutput]:
    """The output class of a dense model's ``forward``, by its annotation, with `RoutingFields`."""
    annotation = get_type_hints(forward)["return"]
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return output_with_routing(next(kind for kind in found if issubclass(kind, ModelOutput)))
