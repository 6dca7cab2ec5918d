"""`ExpertCache`: what `generate` keeps while it runs, folded blocks and experts' full weights.

It trades memory for time: every pass would fold the cores of all experts and rebuild the weights of the same few
experts for a token or two. Cores do not change inside `generate`, so nothing is checked; and nothing outlives the call,
because no change of a core between calls can be told for certain (fused optimizers and ``parameter.data`` leave no
trace). Modules hold none of it, so copies and pickles do not either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpoe_kernels import MPOBlocks, MPOShape, expert_weights, plan_contraction

# Full weights are used if the cores need more than WORTH times as many FLOPs as the full weights' product and the
# reading of these, which counts as READ FLOPs for each number. Less does not justify the memory; separable shapes never
# reach it. On two cores of an EPYC, paper shape with bond 64: one row took 1/1.2 to 1/4 of the time with the cores, at
# 15 times the FLOPs; two to four rows in float32 up to 1.4 times as long.
WORTH = 2
READ = 16

_in_use: ContextVar[ExpertCache | None] = ContextVar("expert_cache", default=None)


@lru_cache(maxsize=4096)
def full_weights_pay(shapes: tuple[MPOShape, ...], experts: int, slots: int, dtype: torch.dtype) -> bool:
    """Whether products with full weights need so much less work than with the cores that keeping them pays.

    Args:
        shapes: of an expert's projections.
        experts: number of experts that have slots.
        slots: total number of their slots.
        dtype: of activations and weights.
    """
    by_cores = sum(plan_contraction(shape, experts, slots, dtype).flops for shape in shapes)
    elements = sum(shape.in_features * shape.out_features for shape in shapes)
    return by_cores > WORTH * (2 * slots + READ * experts) * elements


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products of tokens in this dtype on a CPU: autocast's, or their own."""
    lowers = torch.is_autocast_enabled("cpu") and dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if lowers else dtype


def _full_weights(chain: MPOBlocks, dtype: torch.dtype) -> Tensor:
    """``[E, I, F]``, contiguous along the longer axis: products with one row then read it in long runs."""
    # In float32 for half precision, in which an intermediate would be rounded twice.
    work = torch.promote_types(chain.central.dtype, torch.float32)
    left, central, right = (block.to(work) for block in (chain.left, chain.central, chain.right))
    whole = expert_weights(MPOBlocks(left, central, right, chain.in_features, chain.out_features)).to(dtype)
    return whole.contiguous() if chain.in_features <= chain.out_features else whole.mT.contiguous().mT


class KeptExperts(NamedTuple):
    """What a cache keeps of one layer: the folded chains by kind of projection, and dense experts or ``None``."""

    blocks: Mapping[str, MPOBlocks]
    dense: Any = None


class ExpertCache:
    """Folded blocks and full expert weights of several layers, together at most ``max_bytes``.

    First come the blocks of all layers, then full weights: a layer keeps those of all its experts or of none, because a
    mixed pass, with cores for the rest, takes longer than one with only cores.

    Args:
        max_bytes: bound.
        layers: the `MPOExperts` that it serves; the first ones have room first.
        rebuilds: whether to keep full weights where they pay, on a CPU.

    Attributes:
        reserved: bytes kept: folded blocks unless they are views of the cores, and full weights.
        layers: what is kept, by layer.
    """

    @torch.no_grad()
    def __init__(self, max_bytes: int, layers: Sequence[Any], rebuilds: bool = True) -> None:
        self.max_bytes, self.reserved = max_bytes, 0
        self.layers: dict[Any, KeptExperts] = {}
        for layer in layers:
            blocks = {kind: cores.blocks() for kind, cores in layer.projections().items()}
            views = {core.untyped_storage().data_ptr() for p in layer.projections().values() for core in p.cores()}
            sides = [side for chain in blocks.values() for side in (chain.left, chain.right)]
            if self._reserves(sum(s.nbytes for s in sides if s.untyped_storage().data_ptr() not in views)):
                self.layers[layer] = KeptExperts(blocks)
        for layer, kept in list(self.layers.items()) if rebuilds else ():
            dtype = computed_in(layer.dtype)
            elements = sum(chain.in_features * chain.out_features * len(chain.left) for chain in kept.blocks.values())
            fits = layer.up.central.device.type == "cpu" and layer.full_weights_pay(layer.num_experts, dtype)
            if fits and self._reserves(elements * dtype.itemsize):
                dense = layer.as_dense(lambda cores, dtype=dtype: _full_weights(cores.blocks(), dtype))
                self.layers[layer] = KeptExperts(kept.blocks, dense)

    def _reserves(self, wanted: int) -> bool:
        """Whether there is room for so many bytes, which are then taken."""
        fits = self.reserved + wanted <= self.max_bytes
        self.reserved += wanted if fits else 0
        return fits

    @contextmanager
    def in_use(self) -> Iterator[ExpertCache]:
        """Serve the passes of this thread."""
        token = _in_use.set(self)
        try:
            yield self
        finally:
            _in_use.reset(token)


def kept_experts(layer: nn.Module) -> KeptExperts | None:
    """What the `generate` of this thread keeps of a layer; compiled graphs and passes with gradients use its cores."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    cache = _in_use.get()
    return None if cache is None else cache.layers.get(layer)
