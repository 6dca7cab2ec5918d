"""Llama and its kin (SmolLM2 among them) with mixtures of gated experts."""

from __future__ import annotations

import functools
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from mpoe.models.base import IGNORED_AT_INFERENCE, MPOEModelMixin, checked_mpoe_dict
from mpoe.models.outputs import MPOECausalLMOutput


class MPOELlamaConfig(LlamaConfig):
    """`LlamaConfig` with a field ``mpoe``: the dict of an `mpoe.MPOEConfig`."""

    model_type = "mpoe_llama"
    keys_to_ignore_at_inference = IGNORED_AT_INFERENCE

    def __init__(self, mpoe: Any = None, **kwargs: Any) -> None:
        self.mpoe = checked_mpoe_dict(mpoe)
        super().__init__(**kwargs)


class MPOELlamaForCausalLM(MPOEModelMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` whose feed-forward networks are mixtures of experts."""

    config_class = MPOELlamaConfig
    config: MPOELlamaConfig
    mpoe_family = "llama"
    mpoe_output = MPOECausalLMOutput
    accepts_loss_kwargs = True

    def __init__(self, config: MPOELlamaConfig) -> None:
        super().__init__(config)
        # Transformers knows the loss of a causal model by the name of its class; this one is not in its list.
        self.loss_type = "ForCausalLM"
        self.install_experts()

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)
