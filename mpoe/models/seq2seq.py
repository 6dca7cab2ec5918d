"""Additions to `MPOEModelMixin` for encoder-decoder models: a token mask for each side."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from mpoe.layers.context import Entered, RoutingContext
from mpoe.models.base import MPOEModelMixin, last_tokens


class MPOESeq2SeqMixin(MPOEModelMixin):
    """Mixture-of-experts part of T5, BART and similar models."""

    def token_masks(self, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Encoder: ``attention_mask``. Decoder: ``decoder_attention_mask``, else all tokens up to the last label !=
        -100.

        An ignored label in the middle of a target is not padding: its position is still attended to. Only a language
        model's labels are tokens. A model with only one side uses only ``attention_mask``.
        """
        main = last_tokens(kwargs.get("attention_mask"), kwargs, "input_ids", "inputs_embeds")
        if "decoder_input_ids" not in self._forward_names:
            return {"encoder": main, "decoder": main}
        labels, decoder_mask = kwargs.get("labels"), kwargs.get("decoder_attention_mask")
        if decoder_mask is None and labels is not None and self.can_generate():
            decoder = labels.ne(-100).flip(-1).cumsum(-1).flip(-1) > 0
        else:
            decoder = last_tokens(decoder_mask, kwargs, "decoder_input_ids", "decoder_inputs_embeds")
        return {"encoder": main, "decoder": decoder}

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which runs the encoder separately: it must also see which tokens are padding."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            pad, end = self.generation_config.pad_token_id, self.generation_config.eos_token_id
            pad = self.config.pad_token_id if pad is None else pad
            ends = end if isinstance(end, list) else [end]
            # As in Transformers: if padding and end of text are the same token, they cannot be told apart.
            if isinstance(ids, Tensor) and ids.dim() == 2 and pad is not None and pad not in ends:
                mask = ids.ne(pad)
        main = last_tokens(mask, {}, "", "")
        masks = {"encoder": main} if "decoder_input_ids" in self._forward_names else {}
        with Entered(RoutingContext(masks, None, is_generating=True)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
