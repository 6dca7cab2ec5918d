"""Which backends are measured."""

from __future__ import annotations

import torch

from mpoe_kernels import BackendError, available_backends, backend_reasons
from mpoe_kernels.backends import AUTO, Request, select

ALL = "all"
EAGER = "eager"
DEFAULT_BACKENDS = (AUTO, EAGER)


def runs_on(backend: str, device: str) -> bool:
    """Whether a backend has kernels for a type of device."""
    try:
        select(Request("dispatch", device, torch.float32), backend)
    except BackendError:
        return False
    return True


def backends_to_measure(names: str | None, suite: str = "full", device: str = "cpu") -> tuple[str, ...]:
    """The backends that a run measures.

    Args:
        names: ``None`` (auto, which users get, and eager, which every installation has), ``"all"`` (auto and every
            backend that runs here), or names separated by commas. ``auto`` is the package's own choice.
        suite: the suite to run; by default, quick measures only auto, and gpu all.
        device: what the backends of ``"all"`` must run on; named backends are checked only when they compute.

    Returns:
        Names, each once. Where eager is the only backend, auto means the same and eager is named instead.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    here = tuple(name for name in available_backends() if runs_on(name, device))
    if names is None and suite == "gpu":
        names = ALL
    if names is None or names == ALL:
        if here == (EAGER,):
            return here
        return (AUTO, *here) if names == ALL else (AUTO,) if suite == "quick" else DEFAULT_BACKENDS
    reasons = backend_reasons()
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name != AUTO and name not in reasons:
            raise ValueError(f"backend must be among {', '.join((ALL, AUTO, *reasons))}; got {name!r}")
        if name != AUTO and reasons[name]:
            raise ValueError(f"backend {name!r} cannot run here: {'; '.join(reasons[name])}")
    return chosen
