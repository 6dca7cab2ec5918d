"""Choosing by timing with stand-ins, in an empty cache."""

import pytest

from mpoe_kernels import backends
from mpoe_kernels.backends import Backend, Candidate
from mpoe_kernels.contract import autotune


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Timing is on, nothing is known."""
    monkeypatch.delenv("MPOE_AUTOTUNE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune.forget()
    yield tmp_path / "mpoe/choices.json"
    autotune.forget()


@pytest.fixture
def seconds(monkeypatch):
    """Times of two stand-ins, ``first`` (preferred) and ``second``, by name of backend; their calls
    compute nothing."""
    found = {"first": 2.0, "second": 1.0}

    def backend(name):
        # A kernel by which `_seconds` below can tell whose it is.
        return Backend(
            name,
            {},
            candidates=lambda plan: [Candidate(name, plan.strategy, plan.strategy, name.index)],
        )

    for name in found:
        monkeypatch.setitem(backends.BACKENDS, name, backend(name))
    monkeypatch.setitem(backends.PREFERRED, "cpu", tuple(found))
    monkeypatch.setattr(
        autotune,
        "_seconds",
        lambda runs, device: [found[run.func.__self__] + (k > 1) for k, run in enumerate(runs)],
    )
    return found
