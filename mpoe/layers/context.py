"""The context of one model call: token masks travel down to the MPOE layers, router outputs travel
up; in a `global_batch`, losses are over the tokens of all processes.

Feed-forward modules of Hugging Face models receive only hidden states. The model that owns them
opens a `RoutingContext` for the duration of its forward; every `MPOEFeedForward` below it reads its
mask there and stores its router's output. Contexts are per thread, and activation checkpointing
restores them when it recomputes a layer.
"""

import dataclasses
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpoe.layers.request import Evidence
from mpoe_kernels.checks import check_dense


def check_mask(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """Require a mask of this shape, bool or of the integers 0 and 1; returns it as bool.

    An additive mask, 0 for what counts, would mean the opposite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor {list(shape)}; got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(
            f"{name} must be bool (or integers), True for tokens and False for padding, not "
            f"additive; got {value.dtype}"
        )
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
    return value.bool()


@dataclass(frozen=True)
class RouterRecord:
    """What one layer's router did in one call.

    Attributes:
        stream: ``"encoder"``, ``"decoder"`` or ``"main"``.
        logits: raw router logits, float32 ``[T, E]``.
        top_k_index: the chosen experts that the balancing loss counts, int64 ``[T, K]``.
        expert_load: slots that every expert processed, int32 ``[E]``, without padding and dropped
            tokens.
        token_mask: bool ``[T]`` or ``None``.
    """

    stream: str
    logits: Tensor
    top_k_index: Tensor
    expert_load: Tensor
    token_mask: Tensor | None


@dataclass
class RoutingContext:
    """Masks for the layers below, and the records that they store.

    Attributes:
        masks: for every stream, bool ``[B, S]`` (``False`` = padding) or ``None``.
        records: one `RouterRecord` per MPOE layer in order of execution; ``None`` = do not record
            (recomputation, generation).
        is_generating: inside `generate`, which reads nothing of a routing.
        evidence: of the requests, for routers with a ``request_weight``; ``None``: a layer's own.
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    records: list[RouterRecord] | None = field(default_factory=list)
    is_generating: bool = False
    evidence: Evidence | None = None


class _Current(threading.local):
    """One value per thread. torch.compile can trace reads and writes of a ``threading.local``, but
    not of a ``ContextVar``."""

    routing: RoutingContext | None = None
    groups: tuple[dist.ProcessGroup | None, ...] = ()  # of the `global_batch`, if there is one


_current = _Current()


def current_routing() -> RoutingContext | None:
    """The context of the model call in progress in this thread, if any."""
    return _current.routing


def is_recorded() -> bool:
    """Whether the model call in progress asks for the routers' records."""
    call = current_routing()
    return call is not None and call.records is not None


class Entered(AbstractContextManager["RoutingContext | None"]):
    """Makes a context current; may be entered again, also in another thread."""

    def __init__(self, context: RoutingContext | None) -> None:
        self._context = context
        self._previous = context

    def __enter__(self) -> RoutingContext | None:
        self._previous, _current.routing = _current.routing, self._context
        return self._context

    def __exit__(self, *exc: object) -> None:
        _current.routing = self._previous


def routing_context(
    masks: Mapping[str, Tensor | None] | None = None, record: bool = True
) -> AbstractContextManager[RoutingContext]:
    """Run MPOE layers with token masks, and collect their routers' records.

    Example::

        with routing_context({"main": attention_mask.bool()}) as routing:
            y = feed_forward(x)
        loss = load_balancing_loss(routing.records[0].logits, routing.records[0].top_k_index)
    """
    return Entered(RoutingContext(dict(masks or {}), [] if record else None))  # type: ignore[return-value]


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` for `torch.utils.checkpoint.checkpoint` (non-reentrant).

    Called in the forward pass; the recomputation, which autograd may run in another thread, sees
    the same masks and stores no second record.
    """
    captured = current_routing()
    if captured is not None:
        captured = dataclasses.replace(captured, records=None, evidence=None)
    return nullcontext(), Entered(captured)


@contextmanager
def _joined(outer: AbstractContextManager, inner: AbstractContextManager) -> Iterator[None]:
    with outer, inner:
        yield


def checkpoint_arguments(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for `torch.utils.checkpoint.checkpoint`: the user's, with our contexts around the
    user's."""
    chosen = {"use_reentrant": False, **(kwargs or {})}
    users: Any = chosen.get("context_fn")
    if chosen["use_reentrant"]:
        # A reentrant checkpoint recomputes layers without the masks of the call, and its routers
        # get no gradient.
        warnings.warn(
            "MPOE models checkpoint activations with use_reentrant=False, which gives the same "
            "gradients; use_reentrant=True is not used",
            stacklevel=3,
        )

    def both() -> tuple[AbstractContextManager, ...]:
        return tuple(_joined(*pair) for pair in zip(checkpoint_contexts(), users(), strict=True))

    contexts = checkpoint_contexts if users is None else both
    return {**chosen, "use_reentrant": False, "context_fn": contexts}


# ------------------------------------------------------------ the global batch


@contextmanager
def global_batch(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside this context, models compute their router losses over the tokens of all ranks.

    ``aux_loss`` of a rank is then its share: the *average* over ranks, as DDP and FSDP average
    gradients, is the loss that one process computes on the whole batch. Every rank must run the
    same number of forward passes inside; with one process, or without `torch.distributed`, nothing
    changes. `MPOETrainer` opens it for training steps.

    Args:
        group: the ranks; default: all.

    Example::

        with global_batch():
            model(**batch).loss.backward()
    """
    previous = _current.groups
    _current.groups = (group,)
    try:
        yield
    finally:
        _current.groups = previous


def sum_over_ranks(counts: Tensor) -> tuple[Tensor, int]:
    """Counts summed over the ranks of the current `global_batch`, and the number of ranks; outside
    it, ``counts`` and 1."""
    if not (_current.groups and dist.is_available() and dist.is_initialized()):
        return counts, 1
    (group,) = _current.groups
    counts = counts.clone()
    dist.all_reduce(counts, group=group)
    return counts, dist.get_world_size(group)
