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
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.layers.cores import MPOCores
from mpoe_kernels import MPOBlocks, MPOShape, expert_weights, plan_contraction

# Full weights are used if the cores need more than WORTH times as many FLOPs as the full weights' product and the
# reading of these, which counts as READ FLOPs for each number. Less does not justify the memory; separable shapes never
# reach it. On two cores of an EPYC, paper shape with bond 64: one row took 1/1.2 to 1/4 of the time with the cores, at
# 15 times the FLOPs; two to four rows in float32 up to 1.4 times as long.
WORTH = 2
READ = 16
# Passes of a layer with folded blocks before full weights are built, so that an answer amortises them: built at the
# second token they seemed to slow an answer of three tokens by 8%, built at the eighth one of twelve by 5% (shape
# light, one text; single runs, noise 5%). An encoder, which runs once for a whole text, never gets there, and leaves
# the room to the decoder.
PATIENCE = 14

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


def _no_weights(cores: MPOCores, dtype: torch.dtype) -> Tensor:
    """Room for ``[E, I, F]``, contiguous along the longer axis: products with one row then read it in long runs."""
    experts, rows, columns = cores.num_experts, cores.in_features, cores.out_features
    if rows <= columns:
        return torch.zeros(experts, rows, columns, dtype=dtype)
    return torch.zeros(experts, columns, rows, dtype=dtype).mT


class KeptExperts:
    """What a cache keeps of one layer: its blocks, and dense experts for all its experts or for none.

    A mixed pass, with full weights for some experts and cores for the rest, takes longer than one with only cores. Room
    for all of them is reserved at once; each is built when it is first needed.

    Attributes:
        blocks: the folded chains, by kind of projection.
    """

    def __init__(self, cache: ExpertCache, layer: Any, blocks: Mapping[str, MPOBlocks]) -> None:
        self._cache, self._layer, self.blocks = cache, layer, blocks
        self._passes, self._is_refused = 0, False
        self._dense: Any = None
        self._built: set[int] = set()

    def has_dense(self, slots: int, dtype: torch.dtype) -> bool:
        """Whether a pass with so many slots in ``dtype`` has dense experts; decided once, after `PATIENCE` passes in
        which they pay."""
        if self._is_refused or not self._layer.full_weights_pay(slots, dtype):
            return False
        if self._dense is None:
            self._passes += 1
            if self._passes <= PATIENCE:
                return False
            elements = sum(chain.in_features * chain.out_features * len(chain.left) for chain in self.blocks.values())
            self._is_refused = not self._cache.reserves(elements * dtype.itemsize)
            if self._is_refused:
                return False
            self._dense = self._layer.as_dense(lambda cores: _no_weights(cores, dtype))
        return bool(self._dense.dtype == dtype)

    def dense_for(self, expert_offsets: Tensor) -> Any:
        """The dense experts, after `has_dense`, with the weights of those that have slots."""
        for expert in set(expert_offsets.diff().nonzero().flatten().tolist()) - self._built:
            self._build(expert)
        return self._dense

    @torch.no_grad()
    def _build(self, expert: int) -> None:
        for kind, chain in self.blocks.items():
            # In float32 for half precision, in which an intermediate would be rounded twice.
            work = torch.promote_types(chain.central.dtype, torch.float32)
            left, centre, right = (b.to(work) for b in (chain.left[[expert]], chain.central, chain.right[[expert]]))
            whole = expert_weights(MPOBlocks(left, centre, right, chain.in_features, chain.out_features))
            self._dense.projections()[kind].weight[expert] = whole[0]
        self._built.add(expert)

    @property
    def built(self) -> int:
        """Number of experts whose full weights are there."""
        return len(self._built)


class ExpertCache:
    """Folded blocks and full expert weights of several layers, together at most ``max_bytes``.

    Layers that come first stay: the layers of a model run in a cycle, so evicting the least recently used layer would
    evict the one needed next.

    Args:
        max_bytes: bound.
        layers: the layers that it serves.

    Attributes:
        reserved: bytes kept or promised: folded blocks unless they are views of the cores, and full weights.
    """

    def __init__(self, max_bytes: int, layers: Sequence[nn.Module]) -> None:
        self.max_bytes, self.reserved = max_bytes, 0
        self.layers: dict[nn.Module, KeptExperts | None] = {}
        self._served = frozenset(layers)

    @contextmanager
    def in_use(self) -> Iterator[ExpertCache]:
        """Serve the passes of this thread."""
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
        """What is kept of an `MPOExperts`; None if it is not served, or without room for its blocks."""
        if layer not in self._served:
            return None
        if layer not in self.layers:
            blocks = {kind: cores.blocks() for kind, cores in layer.projections().items()}
            cores = [core for each in layer.projections().values() for core in each.cores()]
            views = {core.untyped_storage().data_ptr() for core in cores}
            sides = [side for chain in blocks.values() for side in (chain.left, chain.right)]
            fits = self.reserves(sum(s.nbytes for s in sides if s.untyped_storage().data_ptr() not in views))
            self.layers[layer] = KeptExperts(self, layer, blocks) if fits else None
        return self.layers[layer]


def kept_experts(layer: nn.Module) -> KeptExperts | None:
    """What the `generate` of this thread keeps of a layer; compiled graphs and passes with gradients use its cores."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    cache = _in_use.get()
    return None if cache is None else cache.of(layer)
