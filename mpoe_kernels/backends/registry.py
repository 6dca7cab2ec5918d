"""Who computes: the registry of backends and the choice among them.

A backend is a table of kernels, one per op, that share the op's argument list. It answers with *reasons* when it
cannot run a request; the error for a named backend lists them all, and nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

AUTO = "auto"


class BackendError(RuntimeError):
    """No backend can run a request, or the named one cannot; the message lists the reasons."""


@dataclass(frozen=True)
class Request:
    """What a kernel is asked to run on.

    Attributes:
        op: name of the op without its namespace, e.g. ``grouped_mpo_linear``.
        device_type: ``cpu``, ``cuda``, ...
        dtype: dtype of the activations.
        sizes: op-specific sizes (block dims, experts, slots) for cost prediction.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    sizes: Mapping[str, Any] = field(default_factory=dict)


def _nothing(_: Request) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """A named table of kernels.

    Attributes:
        name: as users write it in ``backend=``.
        kernels: op name -> function with the op's arguments.
        unavailable_reasons: why this backend cannot run at all here (empty list: it can).
        request_reasons: why it cannot run one request (empty list: it can).
        predicted_cost: relative cost of a request; the cheapest backend is chosen.
    """

    name: str
    kernels: Mapping[str, Callable[..., Any]]
    unavailable_reasons: Callable[[], list[str]] = list
    request_reasons: Callable[[Request], list[str]] = _nothing
    predicted_cost: Callable[[Request], float] = lambda _: 1.0

    def unsupported_reasons(self, request: Request) -> list[str]:
        """Every reason why this backend cannot run ``request``; empty when it can."""
        reasons = list(self.unavailable_reasons())
        if request.op not in self.kernels:
            reasons.append(f"it has no kernel for {request.op}")
        return reasons + list(self.request_reasons(request))


_BACKENDS: dict[str, Backend] = {}
_override: ContextVar[str] = ContextVar("mpoe_backend", default=AUTO)
# What torch.compile reads instead: before torch 2.15 it cannot trace `ContextVar.get`.
_traced_override = [AUTO]


def register_backend(backend: Backend) -> None:
    """Add a backend; a name is taken once."""
    if backend.name in _BACKENDS or backend.name == AUTO:
        raise ValueError(f"backend name {backend.name!r} is already taken")
    _BACKENDS[backend.name] = backend


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(name for name, backend in _BACKENDS.items() if not backend.unavailable_reasons())


def backend_reasons() -> dict[str, list[str]]:
    """Every known backend with the reasons why it cannot run here (empty list: it can)."""
    return {name: backend.unavailable_reasons() for name, backend in _BACKENDS.items()}


def check_backend(name: str | None) -> None:
    """Refuse the name of an unknown backend."""
    if name is not None and name != AUTO and name not in _BACKENDS:
        raise ValueError(f"backend must be one of {[AUTO, *_BACKENDS]}; got {name!r}")


def requested_backend(name: str | None) -> str:
    """The argument if given, else what `use_backend` set, else ``"auto"``."""
    check_backend(name)
    if name is not None:
        return name
    return _traced_override[0] if torch.compiler.is_dynamo_compiling() else _override.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of this context (and its backward) on one backend; ``"auto"`` restores the choice.

    Raises:
        ValueError: unknown name.
        BackendError: the backend cannot run on this machine.
    """
    check_backend(name)
    if name != AUTO:
        reasons = _BACKENDS[name].unavailable_reasons()
        if reasons:
            raise BackendError(f"backend {name!r} cannot run here: {'; '.join(reasons)}")
    token, traced = _override.set(name), _traced_override[0]
    _traced_override[0] = name
    try:
        yield
    finally:
        _override.reset(token)
        _traced_override[0] = traced


def select(request: Request, name: str = AUTO) -> Callable[..., Any]:
    """Kernel of the named backend, or of the one with the lowest predicted cost.

    Raises:
        BackendError: with all reasons, when the named backend or every backend cannot run the request.
    """
    if name != AUTO:
        reasons = _BACKENDS[name].unsupported_reasons(request)
        if reasons:
            raise BackendError(f"backend {name!r} cannot run {request.op}: {'; '.join(reasons)}")
        return _BACKENDS[name].kernels[request.op]
    refused, best = {}, None
    for backend in _BACKENDS.values():
        reasons = backend.unsupported_reasons(request)
        if reasons:
            refused[backend.name] = reasons
            continue
        cost = backend.predicted_cost(request)
        if best is None or cost < best[0]:
            best = (cost, backend)
    if best is None:
        listing = "; ".join(f"{n}: {', '.join(r)}" for n, r in refused.items())
        raise BackendError(f"no backend can run {request.op} on {request.device_type} {request.dtype}: {listing}")
    return best[1].kernels[request.op]
