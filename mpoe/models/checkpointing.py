"""Activation checkpointing: layers are recomputed inside the routing context of their call."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from mpoe.layers.context import checkpoint_contexts


class _Joined(AbstractContextManager[None]):
    """Enters several context managers, in order."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self._contexts, self._stack = contexts, ExitStack()

    def __enter__(self) -> None:
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)


def checkpoint_arguments(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for `torch.utils.checkpoint.checkpoint`: the user's, with our contexts around the user's."""
    chosen = {"use_reentrant": False, **(kwargs or {})}
    if chosen["use_reentrant"]:
        # A reentrant checkpoint recomputes layers without the masks of the call, and its routers get no gradient.
        warnings.warn(
            "MPOE models checkpoint activations with use_reentrant=False, which gives the same gradients; "
            "use_reentrant=True is not used",
            stacklevel=3,
        )
        chosen["use_reentrant"] = False
    users = chosen.get("context_fn")
    if users is None:
        chosen["context_fn"] = checkpoint_contexts
    else:

        def both() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            (forward, recompute), (forward_too, recompute_too) = checkpoint_contexts(), users()
            return _Joined(forward, forward_too), _Joined(recompute, recompute_too)

        chosen["context_fn"] = both
    return chosen
