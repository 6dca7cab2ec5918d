"""`ExpertCache`: caches what inference would recompute in every call: folded blocks and experts' full weights.

Off by default. It trades memory for time while decoding, where every call folds the cores of all experts and rebuilds
the weights of the same few experts for a token or two. The contents are not parameters, are never saved, and are
checked against the cores at every use. A layer caches full weights for all its experts or for none: a mixed pass, with
full weights for some experts and cores for the rest, takes longer than one with only cores.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from mpoe.layers.cores import MPOCores
from mpoe_kernels import MPOBlocks, MPOShape, expert_weights, plan_contraction
from mpoe_kernels.planner import planned_threads
from mpoe_kernels.planner.machine import Source, source

# Full weights are used if the cores are predicted to take this many times as long, with one or more rows for each
# expert. Less does not justify the memory; separable shapes never reach it. On two cores of an EPYC, paper shape with
# bond 64: one row took 1/1.2 to 1/4 of the time with the cores (predicted 1/1.5), two to four rows in float32 up to 1.4
# times as long (predicted 1/1.7 to 1/2.2): the library's short products are slower than predicted.
WORTH_ONE_ROW = 1.25
WORTH = 2.5


def full_weights_pay(shapes: tuple[MPOShape, ...], experts: int, slots: int, dtype: torch.dtype) -> bool:
    """Whether products with full weights are predicted to be much faster than with the cores, on this CPU.

    Args:
        shapes: of an expert's projections.
        experts: number of experts that have slots.
        slots: total number of their slots.
        dtype: of activations and weights.
    """
    return _pay(shapes, experts, slots, dtype, planned_threads(), source())


@lru_cache(maxsize=4096)
def _pay(
    shapes: tuple[MPOShape, ...], experts: int, slots: int, dtype: torch.dtype, _threads: int, _constants: Source
) -> bool:
    by_cores = by_weights = 0.0
    for shape in shapes:
        # For the planner, a full weight is an expert's own core next to a shared core with a single element.
        full = MPOShape((1, shape.in_features), (1, shape.out_features), central=0)
        by_cores += plan_contraction(shape, experts, slots, dtype).seconds
        by_weights += plan_contraction(full, experts, slots, dtype).seconds
    return by_cores > (WORTH_ONE_ROW if slots == experts else WORTH) * by_weights


@dataclass(frozen=True)
class ExpertCacheReport:
    """Contents and statistics of a cache.

    Attributes:
        max_bytes: the bound.
        bytes: current size: full weights, and folded blocks unless they are views of the cores.
        experts: number of experts whose full weights are cached, over all layers.
        hits: how often an expert's full weights were found.
        built: how often they were computed and cached.
        refused: passes of layers without room for all their experts, which used the cores.
    """

    max_bytes: int
    bytes: int
    experts: int
    hits: int
    built: int
    refused: int

    def __str__(self) -> str:
        return (
            f"{self.experts} experts in {self.bytes / 1e6:.1f} of {self.max_bytes / 1e6:.1f} MB: "
            f"{self.hits} hits, {self.built} built, {self.refused} without room"
        )


def _full_weight(blocks: MPOBlocks, expert: int, dtype: torch.dtype) -> Tensor:
    """``W_e [I, F]``, rounded to ``dtype`` once, contiguous along its longer axis.

    Products with one row then read it in long runs.
    """
    # Half precision rebuilds in float32: a half-precision intermediate would be rounded twice.
    work = torch.promote_types(blocks.central.dtype, torch.float32)
    left, central, right = (block.to(work) for block in (blocks.left[[expert]], blocks.central, blocks.right[[expert]]))
    own = MPOBlocks(left, central, right, blocks.in_features, blocks.out_features)
    weight = expert_weights(own)[0].to(dtype)
    return weight.contiguous() if own.in_features <= own.out_features else weight.t().contiguous().t()


def _own_bytes(blocks: Mapping[str, MPOBlocks], cores: Sequence[Tensor]) -> int:
    """Memory of the folded sides that are not views of the cores."""
    views = {core.untyped_storage().data_ptr() for core in cores}
    sides = [side for chain in blocks.values() for side in (chain.left, chain.right)]
    return sum(side.nbytes for side in sides if side.untyped_storage().data_ptr() not in views)


@dataclass
class HeldLayer:
    """The cache of one layer's experts.

    Attributes:
        cache: the `ExpertCache` whose bound applies.
        cores: aliases of the source parameters: while they live, no other tensor can have their addresses.
        versions: the cores' version counters at that time; every in-place change increases them.
        blocks: the folded chains, by kind of projection.
        blocks_bytes: their size, without views of the cores.
        experts: E.
        kept: whether there was room for the blocks.
        waited: passes counted against ``patience`` so far.
        promised: bytes reserved for full weights of all experts, by dtype; 0: no room.
        full: for each expert and dtype, the weights ``[I, F]`` by kind of projection.
    """

    cache: ExpertCache
    cores: tuple[Tensor, ...]
    versions: tuple[int, ...]
    blocks: Mapping[str, MPOBlocks]
    blocks_bytes: int
    experts: int
    kept: bool = True
    waited: int = 0
    promised: dict[torch.dtype, int] = field(default_factory=dict)
    full: dict[tuple[int, torch.dtype], dict[str, Tensor]] = field(default_factory=dict)

    def is_of(self, cores: Sequence[Tensor]) -> bool:
        """Whether these are the same, unchanged cores: same memory, dtype and layout, and no change since."""
        return all(
            (now._version, now.data_ptr(), now.dtype, now.device, now.shape, now.stride())
            == (version, then.data_ptr(), then.dtype, then.device, then.shape, then.stride())
            for now, then, version in zip(cores, self.cores, self.versions, strict=True)
        )

    def refuses(self, dtype: torch.dtype) -> bool:
        """Whether there is already known to be no room for full weights in ``dtype``."""
        return self.cache._refuses(self, dtype)

    def has_room(self, dtype: torch.dtype) -> bool:
        """Whether all experts' full weights in ``dtype`` fit; decided once, after ``patience`` passes, and then
        reserved."""
        return self.cache._has_room(self, dtype)

    def weights(self, expert: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """An expert's weights ``[I, F]`` in ``dtype`` by kind of projection, built at the first call.

        Raises:
            RuntimeError: no room was reserved by `has_room`.
        """
        return self.cache._weights(self, expert, dtype)

    @property
    def elements(self) -> int:
        """Numbers in the full weights of one expert."""
        return sum(chain.in_features * chain.out_features for chain in self.blocks.values())

    @property
    def bytes(self) -> int:
        """Held now."""
        return self.blocks_bytes + self.elements * sum(dtype.itemsize for _, dtype in self.full)

    @property
    def reserved(self) -> int:
        """Held at most."""
        return self.blocks_bytes + sum(self.promised.values())


class ExpertCache:
    """Folded blocks and full expert weights of any number of layers, together at most ``max_bytes``.

    Layers that come first stay cached: the layers of a model run in a cycle, so evicting the least recently used layer
    would evict the one needed next. Nothing is cached in a layer's first pass: an encoder, which runs once for a whole
    text, would take the room from the decoder, which runs for every token. From the second pass on, room for the full
    weights of all experts of a layer is reserved if available, and each is built when it is first needed; folded blocks
    are cached for every layer where they fit. Copies and pickles are empty. A change of a core is detected by PyTorch's
    version counter or by its memory address; an in-place change through ``core.data`` cannot be detected: call `clear`
    after it.

    Args:
        max_bytes: bound, at least 1.
        patience: number of passes in which full weights would have paid before room for them is reserved. Building them
            takes as long as several passes, which a short answer would not amortise.

    Raises:
        TypeError, ValueError: ``max_bytes`` is not a positive integer.
    """

    def __init__(self, max_bytes: int, patience: int = 0) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be an integer or None; got {type(max_bytes).__name__} {max_bytes!r}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1 (0 or None: no cache); got {max_bytes}")
        self.max_bytes, self.patience = max_bytes, patience
        self._layers: WeakKeyDictionary[nn.Module, HeldLayer] = WeakKeyDictionary()
        self._met: WeakSet[nn.Module] = WeakSet()
        self._hits = self._built = self._refused = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, max_bytes: int | None) -> ExpertCache | None:
        """A cache; ``None`` for ``None`` or 0."""
        if max_bytes is None or (max_bytes == 0 and not isinstance(max_bytes, bool)):
            return None
        return cls(max_bytes)

    def __reduce__(self) -> tuple[type[ExpertCache], tuple[int, int]]:
        return ExpertCache, (self.max_bytes, self.patience)

    def layer(self, owner: nn.Module, projections: Mapping[str, MPOCores]) -> HeldLayer | None:
        """The cache of the layer with these projections; ``None`` if this is its first pass.

        Without room for the blocks, they are returned but not cached. Cores made in inference mode have no version to
        check, so nothing is cached for them: ``None``.
        """
        cores = [core for projection in projections.values() for core in projection.cores()]
        if any(core.is_inference() for core in cores):
            return None
        with self._lock:
            held = self._layers.get(owner)
            if held is not None and held.is_of(cores):
                return held
            self._layers.pop(owner, None)
            if owner not in self._met:
                self._met.add(owner)
                return None
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                blocks = {kind: projection.blocks() for kind, projection in projections.items()}
                aliases = tuple(core.detach() for core in cores)
            versions = tuple(core._version for core in cores)
            experts = next(iter(projections.values())).num_experts
            held = HeldLayer(self, aliases, versions, blocks, _own_bytes(blocks, cores), experts)
            held.kept = self._reserved() + held.blocks_bytes <= self.max_bytes
            if held.kept:
                self._layers[owner] = held
            return held

    def drop(self, owner: nn.Module) -> None:
        """Forget one layer."""
        with self._lock:
            self._layers.pop(owner, None)
            self._met.discard(owner)

    def clear(self) -> None:
        """Forget everything; the bound stays."""
        with self._lock:
            self._layers.clear()
            self._met.clear()

    def report(self) -> ExpertCacheReport:
        """Contents and usage statistics."""
        with self._lock:
            experts = sum(len({expert for expert, _ in held.full}) for held in self._layers.values())
            return ExpertCacheReport(self.max_bytes, self._bytes(), experts, self._hits, self._built, self._refused)

    def _bytes(self) -> int:
        return sum(held.bytes for held in self._layers.values())

    def _reserved(self) -> int:
        return sum(held.reserved for held in self._layers.values())

    def _refuses(self, held: HeldLayer, dtype: torch.dtype) -> bool:
        with self._lock:
            refused = not held.kept or held.promised.get(dtype) == 0
            self._refused += refused
            return refused

    def _has_room(self, held: HeldLayer, dtype: torch.dtype) -> bool:
        with self._lock:
            if dtype not in held.promised and held.waited < self.patience:
                held.waited += 1
                return False
            if dtype not in held.promised:
                wanted = held.experts * held.elements * dtype.itemsize
                fits = held.kept and self._reserved() + wanted <= self.max_bytes
                held.promised[dtype] = wanted if fits else 0
                self._refused += not held.promised[dtype]
            return held.promised[dtype] > 0

    def _weights(self, held: HeldLayer, expert: int, dtype: torch.dtype) -> dict[str, Tensor]:
        key = (expert, dtype)
        with self._lock:
            if key in held.full:
                self._hits += 1
                return held.full[key]
            if not held.promised.get(dtype):
                raise RuntimeError(f"full weights in {dtype} need room that has_room reserved; there is none")
            self._built += 1
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                full = {kind: _full_weight(chain, expert, dtype) for kind, chain in held.blocks.items()}
            held.full[key] = full
            return full
