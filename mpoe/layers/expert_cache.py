"""`ExpertCache`: what is kept of experts while their weights do not change, folded blocks and full
weights.

It trades memory for time: every pass would fold the cores of all experts and rebuild the weights of
the same few experts for a token or two. Folding pays in every answer of more than one token, so
`generate` keeps blocks by itself, until it returns. Building full weights pays after some hundred
tokens, so these are kept only where a user says that no weight changes. Modules hold none of it, so
copies and pickles do not either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mpoe_kernels import MPOBlocks, MPOShape, expert_weights, plan_contraction

# Full weights are used if the cores need more than WORTH times as many FLOPs as the full weights'
# product and the reading of these, which counts as READ FLOPs for each number. Less does not
# justify the memory; separable shapes never reach it. On two cores of an EPYC, paper shape with
# bond 64: one row took 1/1.2 to 1/4 of the time with the cores, at 15 times the FLOPs; two to four
# rows in float32 up to 1.4 times as long.
WORTH = 2
READ = 16

_in_use: ContextVar[ExpertCache | None] = ContextVar("expert_cache", default=None)


@lru_cache(maxsize=4096)
def full_weights_pay(
    shapes: tuple[MPOShape, ...], experts: int, slots: int, dtype: torch.dtype
) -> bool:
    """Whether products with full weights need so much less work than with the cores that keeping
    them pays.

    Args:
        shapes: of an expert's projections.
        experts: number of experts that have slots.
        slots: total number of their slots.
        dtype: of activations and weights.
    """
    by_cores = sum(plan_contraction(shape, experts, slots, dtype).flops for shape in shapes)
    elements = sum(shape.in_features * shape.out_features for shape in shapes)
    return by_cores > WORTH * (2 * slots + READ * experts) * elements


def _full_weights(chain: MPOBlocks, dtype: torch.dtype) -> Tensor:
    """``[E, I, F]``, contiguous along the longer axis: products with one row then read it in long
    runs."""
    # In float32 for half precision, in which an intermediate would be rounded twice.
    work = torch.promote_types(chain.central.dtype, torch.float32)
    left, centre, right = (block.to(work) for block in (chain.left, chain.central, chain.right))
    whole = expert_weights(
        MPOBlocks(left, centre, right, chain.in_features, chain.out_features)
    ).to(dtype)
    return (
        whole.contiguous() if chain.in_features <= chain.out_features else whole.mT.contiguous().mT
    )


def weight_versions(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Of every weight: where it is, and how often it was written in place (not counted of a tensor
    that was made in inference mode)."""
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


class KeptExperts:
    """What a cache keeps of one layer: its folded chains and, where that pays, dense experts.

    These are for all its experts or for none, as a pass with full weights for some and cores for
    the rest takes longer than one with only cores.

    Attributes:
        blocks: the folded chains, by kind of projection.
        weights: cores and biases that all of it was made of; while they are held, no other tensor
            takes their place in memory.
        versions: theirs.
        built: number of experts whose full weights are there.
    """

    def __init__(self, cache: ExpertCache, layer: Any, blocks: Mapping[str, MPOBlocks]) -> None:
        self._cache = cache
        self._layer = layer
        self.blocks = blocks
        self.weights = layer.weights()
        self.versions = weight_versions(self.weights)
        self.built = 0
        self._is_decided = False
        self._dense: Any = None

    def dense(self, slots: int, dtype: torch.dtype) -> Any:
        """The dense experts for a pass with so many slots in ``dtype``; None: it uses the chains.

        Decided once, in the first pass in which they pay.
        """
        if not self._cache.full_weights or not self._layer.full_weights_pay(slots, dtype):
            return None
        if not self._is_decided:
            self._is_decided = True
            wanted = 0
            for chain in self.blocks.values():
                wanted += chain.in_features * chain.out_features * chain.num_experts
            if self._cache.reserves(wanted * dtype.itemsize):
                self._dense = self._layer.as_dense(
                    lambda cores: _full_weights(cores.blocks(), dtype)
                )
                self.built = self._layer.num_experts
        return self._dense if self._dense is not None and self._dense.dtype == dtype else None


class ExpertCache:
    """Folded blocks and full expert weights of several layers, together at most ``max_bytes``.

    Layers that come first stay: the layers of a model run in a cycle, so evicting the least
    recently used layer would evict the one needed next.

    Args:
        max_bytes: bound.
        layers: the layers that it serves.
        full_weights: whether it keeps these too, and refuses passes that contradict that no weight
            changes.

    Attributes:
        reserved: bytes kept or promised: folded blocks unless they are views of the cores, and full
            weights.
    """

    def __init__(
        self, max_bytes: float, layers: Sequence[nn.Module], full_weights: bool = False
    ) -> None:
        self.max_bytes = max_bytes
        self.full_weights = full_weights
        self.reserved = 0
        self.layers: dict[nn.Module, KeptExperts | None] = {}
        self.outer: ExpertCache | None = None
        self.served = frozenset(layers)

    @contextmanager
    def in_use(self) -> Iterator[ExpertCache]:
        """Serve the passes of this thread; those of other layers are still served by the cache that
        was in use before."""
        self.outer = _in_use.get()
        token = _in_use.set(self)
        try:
            yield self
        finally:
            _in_use.reset(token)

    def reserves(self, wanted: int) -> bool:
        """Whether there is room for so many bytes, which are then taken."""
        fits = self.reserved + wanted <= self.max_bytes
        self.reserved += wanted if fits else 0
        return fits

    def of(self, layer: Any) -> KeptExperts | None:
        """What is kept of an `MPOExperts` that it serves; None without room for its blocks.

        Raises:
            RuntimeError: with ``full_weights``, a weight has changed since.
        """
        if layer not in self.layers:
            blocks = layer.blocks()
            views = {weight.untyped_storage().data_ptr() for weight in layer.weights()}
            sides = [side for chain in blocks.values() for side in (chain.left, chain.right)]
            fits = self.reserves(
                sum(s.nbytes for s in sides if s.untyped_storage().data_ptr() not in views)
            )
            self.layers[layer] = KeptExperts(self, layer, blocks) if fits else None
        kept = self.layers[layer]
        if kept is None or not self.full_weights:
            return kept
        if kept.versions != weight_versions(layer.weights()):
            raise RuntimeError(
                "weights must not change inside weights_kept(); an expert's weight has been "
                "written: leave the block before"
            )
        return kept


def cache_of(layer: nn.Module) -> ExpertCache | None:
    """What serves the passes of a layer in this thread: the innermost cache that does."""
    cache = _in_use.get()
    while cache is not None and layer not in cache.served:
        cache = cache.outer
    return cache


def kept_experts(layer: nn.Module) -> KeptExperts | None:
    """What this thread keeps of a layer; compiled graphs and passes with gradients use its cores.

    Raises:
        RuntimeError: inside `weights_kept`, a pass with gradients, or after a weight changed.
    """
    cache = None if torch.compiler.is_compiling() else cache_of(layer)
    if cache is None:
        return None
    if torch.is_grad_enabled():
        if cache.full_weights:
            raise RuntimeError(
                "weights_kept() is for passes without gradients; got one with: use "
                "torch.inference_mode(), or leave the block before you train"
            )
        return None
    return cache.of(layer)
