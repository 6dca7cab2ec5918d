"""Models are built and loaded by one thread at a time.

While Transformers loads a model it changes global state: initialisers, the default dtype, the tying of weights. A model
that another thread builds meanwhile would stay uninitialised.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_LOCK = threading.RLock()


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: ``function`` waits until no other thread is inside any decorated function."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return function(*args, **kwargs)

    return alone
