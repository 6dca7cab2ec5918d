"""T5 (v1.0 ReLU, v1.1 and Flan gated) with mixtures of experts in encoder and decoder."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from mpoe.layers.context import RoutingContext, enter_routing, leave_routing
from mpoe.models.base import IGNORED_AT_INFERENCE, MPOEModelMixin, checked_mpoe_dict, last_tokens
from mpoe.models.outputs import MPOESeq2SeqLMOutput


class MPOET5Config(T5Config):
    """`T5Config` with a field ``mpoe``: the dict of an `mpoe.MPOEConfig`."""

    model_type = "mpoe_t5"
    keys_to_ignore_at_inference = IGNORED_AT_INFERENCE

    def __init__(self, mpoe: Any = None, **kwargs: Any) -> None:
        self.mpoe = checked_mpoe_dict(mpoe)
        super().__init__(**kwargs)


class MPOET5ForConditionalGeneration(MPOEModelMixin, T5ForConditionalGeneration):
    """`T5ForConditionalGeneration` whose feed-forward networks are mixtures of experts."""

    config_class = MPOET5Config
    config: MPOET5Config
    mpoe_family = "t5"
    mpoe_output = MPOESeq2SeqLMOutput

    def __init__(self, config: MPOET5Config) -> None:
        super().__init__(config)
        self.install_experts()

    def token_masks(self, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Encoder: ``attention_mask``. Decoder: ``decoder_attention_mask``, else all up to the last label != -100.

        An ignored label in the middle of a target is not padding: its position is still attended to.
        """
        labels, decoder_mask = kwargs.get("labels"), kwargs.get("decoder_attention_mask")
        if decoder_mask is None and labels is not None:
            decoder = labels.ne(-100).flip(-1).cumsum(-1).flip(-1) > 0
        else:
            decoder = last_tokens(decoder_mask, kwargs, "decoder_input_ids", "decoder_inputs_embeds")
        encoder = last_tokens(kwargs.get("attention_mask"), kwargs, "input_ids", "inputs_embeds")
        return {"encoder": encoder, "decoder": decoder}

    @functools.wraps(T5ForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)

    @functools.wraps(T5ForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which runs the encoder by itself: it too must see which tokens are padding."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            pad, end = self.generation_config.pad_token_id, self.generation_config.eos_token_id
            pad = self.config.pad_token_id if pad is None else pad
            ends = end if isinstance(end, list) else [end]
            # As Transformers: where padding and the end of text are one token, nothing can be told apart.
            if isinstance(ids, Tensor) and ids.dim() == 2 and pad is not None and pad not in ends:
                mask = ids.ne(pad)
        token = enter_routing(RoutingContext({"encoder": last_tokens(mask, {}, "", "")}, None))
        try:
            return super().generate(*args, **kwargs)
        finally:
            leave_routing(token)
