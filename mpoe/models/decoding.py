"""The default cache of `generate`: folded blocks and rebuilt weights, in as much memory as the dense layers took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging

from mpoe.layers.cores import MPOCores
from mpoe.layers.expert_cache import ExpertCache
from mpoe.layers.experts import MPOExperts

logger = logging.get_logger(__name__)

# Passes with folded blocks before full weights are built, so that an answer amortises them: built at the second token
# they seemed to slow an answer of three tokens by 8%, built at the eighth one of twelve by 5% (shape light, one text;
# single runs, noise 5%).
PATIENCE = 14


def _may_cache(layer: MPOExperts) -> bool:
    """Whether a cache may serve a layer: on the CPU, with cores that are neither adapted nor sharded."""
    projections = layer.projections().values()
    plain = all(type(cores) is MPOCores for cores in projections)
    weights = [core for cores in projections for core in cores.cores()] if plain else []
    usable = all(type(w) is nn.Parameter and w.device.type == "cpu" and not w.is_inference() for w in weights)
    return plain and usable and not layer.training


def decoding_bytes(layers: list[MPOExperts]) -> int:
    """Bound of `generate`'s default cache.

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
def kept_while_generating(model: nn.Module) -> Iterator[ExpertCache | None]:
    """A cache for the experts of ``model``, freed at the end; ``None`` if it would not help or the user has set one.

    It does not outlive the call, because it cannot detect weights that are swapped through ``parameter.data``, as
    weight averaging does for an evaluation.
    """
    layers = [module for module in model.modules() if isinstance(module, MPOExperts)]
    chosen = any(layer.expert_cache is not None for layer in layers)
    layers = [] if chosen or torch.compiler.is_compiling() else [layer for layer in layers if _may_cache(layer)]
    bound = decoding_bytes(layers)
    if bound == 0:
        yield None
        return
    if any(layer.full_weights_may_pay() for layer in layers):  # the others' folded blocks are views of their cores
        logger.info_once(
            f"generate keeps rebuilt weights of experts in up to {bound / 1e6:.1f} MB, the size of the dense layers, "
            "until it returns; model.cache_experts(max_bytes) keeps more, and between calls, model.cache_experts(0) "
            "nothing"
        )
    cache = ExpertCache(bound, PATIENCE)
    for layer in layers:
        layer.expert_cache = cache
    try:
        yield cache
    finally:
        for layer in layers:
            if layer.expert_cache is cache:
                layer.expert_cache = None
