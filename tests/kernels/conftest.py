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


class StandIn:
    """A kernel that computes nothing."""

    def __init__(self, name):
        self.name = name

    def __call__(self, call):
        return None


@pytest.fixture
def seconds(monkeypatch):
    """Times of two stand-ins, ``first`` (preferred) and ``second``, by name of backend."""
    times = {"first": 0.002, "second": 0.001}

    def candidates_of(name):
        return lambda plan: [Candidate(name, plan.strategy, plan.strategy, StandIn(name))]

    def timed(runs, device):
        """Of `functools.partial` of stand-ins; the second best strategy takes 1 ms more."""
        return [times[run.func.name] + 0.001 * (place > 1) for place, run in enumerate(runs)]

    for name in times:
        backend = Backend(name, {}, candidates=candidates_of(name))
        monkeypatch.setitem(backends.BACKENDS, name, backend)
    monkeypatch.setitem(backends.PREFERRED, "cpu", tuple(times))
    monkeypatch.setattr(autotune, "_seconds", timed)
    return times
