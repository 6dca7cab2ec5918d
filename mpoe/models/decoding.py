"""Generation: what `generate` keeps, folded blocks and rebuilt weights, by default in as much memory as dense layers
take; and the token masks of both sides of an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from mpoe.layers.cores import MPOCores
from mpoe.layers.expert_cache import ExpertCache
from mpoe.layers.experts import MPOExperts
from mpoe.models.base import MPOEModelMixin, last_tokens

logger = logging.get_logger(__name__)


def _may_cache(layer: MPOExperts, on_gpus: bool) -> bool:
    """Whether a cache may serve a layer: in evaluation, with cores that are neither adapted nor sharded."""
    projections = layer.projections().values()
    if layer.training or any(type(cores) is not MPOCores for cores in projections):
        return False
    devices = ("cpu", "cuda") if on_gpus else ("cpu",)
    weights = (core for cores in projections for core in cores.cores())
    return all(type(weight) is nn.Parameter and weight.device.type in devices for weight in weights)


def decoding_bytes(layers: list[MPOExperts]) -> int:
    """Bound of `generate`'s cache unless `cache_experts` sets one.

    Returns:
        The size of one dense feed-forward network for each layer, in its dtype; less where cores and cache together
        would take more than dense experts.
    """
    total = 0
    for layer in layers:
        projections = layer.projections().values()
        dense = sum(cores.in_features * cores.out_features for cores in projections) * layer.dtype.itemsize
        own = sum(core.nbytes for cores in projections for core in cores.cores())
        total += max(min(dense, layer.num_experts * dense - own), 0)
    return total


@contextmanager
def kept_while_generating(model: nn.Module, max_bytes: int | None) -> Iterator[ExpertCache | None]:
    """A cache for the experts of ``model``, gone at the end; ``None`` if it would not help.

    Args:
        model: of which `generate` is called.
        max_bytes: bound; ``None``: `decoding_bytes`, on a CPU; 0: no cache.
    """
    experts = (module for module in model.modules() if isinstance(module, MPOExperts))
    layers = [] if torch.compiler.is_compiling() else [e for e in experts if _may_cache(e, max_bytes is not None)]
    bound = decoding_bytes(layers) if max_bytes is None else max_bytes
    if bound == 0 or not layers:
        yield None
        return
    # other blocks are views of cores
    if max_bytes is None and any(layer.full_weights_pay(layer.num_experts, layer.dtype) for layer in layers):
        logger.info_once(
            f"generate keeps rebuilt weights of experts in up to {bound / 1e6:.1f} MB, the size of the dense layers, "
            "until it returns; model.cache_experts(max_bytes) sets another limit, model.cache_experts(0) keeps nothing"
        )
    with ExpertCache(bound, layers).in_use() as cache:
        yield cache


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

    def generation_masks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Transformers runs the encoder separately: it must also see which tokens are padding."""
        if "decoder_input_ids" not in self._forward_names:
            return {}
        mask = kwargs.get("attention_mask")
        if mask is None:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            pad, end = self.generation_config.pad_token_id, self.generation_config.eos_token_id
            pad = self.config.pad_token_id if pad is None else pad
            ends = end if isinstance(end, list) else [end]
            # As in Transformers: if padding and end of text are the same token, they cannot be told apart.
            if isinstance(ids, Tensor) and ids.dim() == 2 and pad is not None and pad not in ends:
                mask = ids.ne(pad)
        return {"encoder": last_tokens(mask, {}, "", "")}
