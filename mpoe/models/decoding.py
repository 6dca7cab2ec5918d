"""The cache of `generate`: folded blocks and rebuilt weights, by default in as much memory as dense layers take."""

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


def _may_cache(layer: MPOExperts, on_gpus: bool) -> bool:
    """Whether a cache may serve a layer: in evaluation, with cores that are neither adapted nor sharded."""
    projections = layer.projections().values()
    if layer.training or any(type(cores) is not MPOCores for cores in projections):
        return False
    devices = ("cpu", "cuda") if on_gpus else ("cpu",)
    weights = [core for cores in projections for core in cores.cores()]
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
    layers = [module for module in model.modules() if isinstance(module, MPOExperts)]
    layers = (
        [] if torch.compiler.is_compiling() else [layer for layer in layers if _may_cache(layer, max_bytes is not None)]
    )
    bound = decoding_bytes(layers) if max_bytes is None else max_bytes
    if bound == 0 or not layers or torch.compiler.is_compiling():
        yield None
        return
    if max_bytes is None and any(
        layer.full_weights_may_pay(layer.num_experts) for layer in layers
    ):  # other blocks are views of cores
        logger.info_once(
            f"generate keeps rebuilt weights of experts in up to {bound / 1e6:.1f} MB, the size of the dense layers, "
            "until it returns; model.cache_experts(max_bytes) sets another limit, model.cache_experts(0) keeps nothing"
        )
    with ExpertCache(bound, layers).in_use() as cache:
        yield cache
