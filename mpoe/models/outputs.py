"""Model outputs with what the routers did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)

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


@dataclass
class MPOESeq2SeqLMOutput(RoutingFields, Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with `RoutingFields`."""


@dataclass
class MPOECausalLMOutput(RoutingFields, CausalLMOutputWithCrossAttentions):
    """`CausalLMOutputWithCrossAttentions` with `RoutingFields`."""


@dataclass
class MPOEModelOutputWithPast(RoutingFields, BaseModelOutputWithPastAndCrossAttentions):
    """`BaseModelOutputWithPastAndCrossAttentions` with `RoutingFields`."""


@dataclass
class MPOEModelOutputWithPooling(RoutingFields, BaseModelOutputWithPoolingAndCrossAttentions):
    """`BaseModelOutputWithPoolingAndCrossAttentions` with `RoutingFields`."""


@dataclass
class MPOESequenceClassifierOutput(RoutingFields, SequenceClassifierOutput):
    """`SequenceClassifierOutput` with `RoutingFields`."""


@dataclass
class MPOEMaskedLMOutput(RoutingFields, MaskedLMOutput):
    """`MaskedLMOutput` with `RoutingFields`."""
