"""The context of one model call: token masks travel down to the MPOE layers, router outputs travel up.

Feed-forward modules of Hugging Face models receive hidden states only. The model that owns them opens a
`RoutingContext` for the duration of its forward; every `MPOEFeedForward` under it reads its mask there and leaves its
router's output. Contexts are per thread, and activation checkpointing restores them when it recomputes a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterRecord:
    """What one layer's router did in one call.

    Attributes:
        stream: ``"encoder"``, ``"decoder"`` or ``"main"``.
        logits: raw router logits, float32 ``[T, E]``.
        top_k_index: chosen experts, int64 ``[T, K]``.
        expert_load: slots that every expert worked on, int32 ``[E]``: no padding, no dropped tokens.
        token_mask: bool ``[T]`` or ``None``.
    """

    stream: str
    logits: Tensor
    top_k_index: Tensor
    expert_load: Tensor
    token_mask: Tensor | None


@dataclass
class RoutingContext:
    """Masks for the layers below, and the records they leave.

    Attributes:
        masks: for every stream, bool ``[B, S]`` (``False`` = padding) or ``None``.
        records: one `RouterRecord` per MPOE layer in order of execution; ``None`` = do not record (recomputation).
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    records: list[RouterRecord] | None = field(default_factory=list)


class _CurrentContext:
    """A `ContextVar` that ``torch.compile`` can trace.

    Dynamo reads a `ContextVar` but cannot set one. While it compiles, the value sits in a plain attribute, whose
    mutation it does trace; set and reset happen within one compiled forward, so nothing is left behind.
    """

    def __init__(self) -> None:
        self._variable: ContextVar[RoutingContext | None] = ContextVar("mpoe_routing", default=None)
        self._traced: RoutingContext | None = None
        self._tracing = False

    def get(self) -> RoutingContext | None:
        return self._traced if self._tracing else self._variable.get()

    def set(self, value: RoutingContext | None) -> Token[RoutingContext | None] | None:
        if torch.compiler.is_dynamo_compiling():
            self._traced, self._tracing = value, True
            return None
        return self._variable.set(value)

    def reset(self, token: Token[RoutingContext | None] | None) -> None:
        if token is None:
            self._traced, self._tracing = None, False
        else:
            self._variable.reset(token)


_current = _CurrentContext()


def current_routing() -> RoutingContext | None:
    """The context of the model call in progress in this thread, if any."""
    return _current.get()


def enter_routing(context: RoutingContext | None) -> Any:
    """Make ``context`` current; hand the returned token to `leave_routing` in a ``finally``."""
    return _current.set(context)


def leave_routing(token: Any) -> None:
    """Restore what was current before `enter_routing`."""
    _current.reset(token)


@contextmanager
def routing_context(masks: Mapping[str, Tensor | None] | None = None, record: bool = True) -> Iterator[RoutingContext]:
    """Run MPOE layers with token masks and collect what their routers did.

    Example::

        with routing_context({"main": attention_mask.bool()}) as routing:
            y = feed_forward(x)
        loss = load_balancing_loss(routing.records[0].logits, routing.records[0].top_k_index)
    """
    context = RoutingContext(dict(masks or {}), [] if record else None)
    token = enter_routing(context)
    try:
        yield context
    finally:
        leave_routing(token)


class _Restored(AbstractContextManager[None]):
    """Re-enters a captured context, without recording, possibly in another thread."""

    def __init__(self, captured: RoutingContext | None) -> None:
        self._context = None if captured is None else RoutingContext(captured.masks, None)
        self._token: Any = None

    def __enter__(self) -> None:
        self._token = enter_routing(self._context)

    def __exit__(self, *exc: object) -> None:
        leave_routing(self._token)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """``context_fn`` for `torch.utils.checkpoint.checkpoint` (non-reentrant).

    Called in the forward pass; the recomputation, which autograd may run in a thread of its own, sees the same masks
    and leaves no second record.
    """
    return nullcontext(), _Restored(current_routing())
