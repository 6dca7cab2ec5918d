"""GPT-2 with mixtures of experts."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from mpoe.models.base import IGNORED_AT_INFERENCE, MPOEModelMixin, checked_mpoe_dict
from mpoe.models.outputs import MPOECausalLMOutput, MPOEModelOutputWithPast


class MPOEGPT2Config(GPT2Config):
    """`GPT2Config` with a field ``mpoe``: the dict of an `mpoe.MPOEConfig`."""

    model_type = "mpoe_gpt2"
    keys_to_ignore_at_inference = IGNORED_AT_INFERENCE

    def __init__(self, mpoe: Any = None, **kwargs: Any) -> None:
        self.mpoe = checked_mpoe_dict(mpoe)
        super().__init__(**kwargs)


class MPOEGPT2Model(MPOEModelMixin, GPT2Model):
    """`GPT2Model` whose feed-forward networks are mixtures of experts."""

    config_class = MPOEGPT2Config
    config: MPOEGPT2Config
    mpoe_family = "gpt2"
    mpoe_output = MPOEModelOutputWithPast

    def __init__(self, config: MPOEGPT2Config) -> None:
        super().__init__(config)
        self.install_experts()

    @functools.wraps(GPT2Model.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)


class MPOEGPT2LMHeadModel(MPOEModelMixin, GPT2LMHeadModel):
    """`GPT2LMHeadModel` whose feed-forward networks are mixtures of experts."""

    config_class = MPOEGPT2Config
    config: MPOEGPT2Config
    mpoe_family = "gpt2"
    mpoe_output = MPOECausalLMOutput
    accepts_loss_kwargs = True

    def __init__(self, config: MPOEGPT2Config) -> None:
        super().__init__(config)
        # Transformers derives no loss type from this class name, warns, and breaks fullgraph compilation.
        self.loss_type = "ForCausalLM"
        self.install_experts()

    @functools.wraps(GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)
