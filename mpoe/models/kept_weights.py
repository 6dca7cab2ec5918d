"""What models keep of their experts: folded blocks while `generate` runs, full weights while a user
says that no weight changes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from mpoe.layers.cores import MPOCores
from mpoe.layers.expert_cache import ExpertCache, cache_of
from mpoe.layers.experts import MPOExperts


def _cacheable(model: nn.Module, on_gpus: bool) -> list[MPOExperts]:
    """Layers that a cache may serve: in evaluation, with cores that are neither adapted nor
    sharded."""
    devices = ("cpu", "cuda") if on_gpus else ("cpu",)

    def is_plain(layer: MPOExperts) -> bool:
        projections = layer.projections().values()
        if layer.training or any(type(cores) is not MPOCores for cores in projections):
            return False
        weights = (core for cores in projections for core in cores.cores())
        return all(type(core) is nn.Parameter and core.device.type in devices for core in weights)

    if torch.compiler.is_compiling():
        return []
    return [layer for layer in model.modules() if isinstance(layer, MPOExperts) and is_plain(layer)]


def dense_bytes(layers: list[MPOExperts]) -> int:
    """Size of a dense feed-forward network for each layer."""
    return sum(
        cores.in_features * cores.out_features * layer.dtype.itemsize
        for layer in layers
        for cores in layer.projections().values()
    )


def kept_while_generating(
    model: nn.Module, max_bytes: int | None
) -> AbstractContextManager[ExpertCache | None]:
    """A cache for the folded blocks of ``model``'s experts, gone at the end; ``None`` if it would
    not help, or within `full_weights_kept`.

    Args:
        model: of which `generate` is called.
        max_bytes: bound; ``None``: `dense_bytes`, on a CPU; 0: no cache.
    """
    layers = _cacheable(model, on_gpus=max_bytes is not None)
    bound = dense_bytes(layers) if max_bytes is None else max_bytes
    outer = [cache_of(layer) for layer in layers]
    if bound == 0 or all(cache is not None and cache.full_weights for cache in outer):
        return nullcontext()
    return ExpertCache(bound, layers).in_use()


def full_weights_kept(
    model: nn.Module, max_bytes: int | None
) -> AbstractContextManager[ExpertCache]:
    """A cache for the folded blocks and, where that pays, full weights of ``model``'s experts on a
    CPU, for all passes until its end; see `MPOEModelMixin.weights_kept`."""
    bound = math.inf if max_bytes is None else max_bytes
    return ExpertCache(bound, _cacheable(model, on_gpus=False), full_weights=True).in_use()
