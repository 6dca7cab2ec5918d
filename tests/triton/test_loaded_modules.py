"""What Triton would load, by a driver that has no device: a captured graph must find every module
loaded."""

import pytest
import shipped_kernels as shipped
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mpoe_kernels.backends import BackendError
from mpoe_kernels.triton import start

pytestmark = pytest.mark.emulated
WAYS = 3  # in the longest table of tiles that are timed


class NoDevice:
    """As much of a driver as a launch asks before it looks up its kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Loads:
    """Kernels by everything that makes Triton load another module.

    Attributes:
        seen: so far.
        new: since `forget`.
        fastest: the number of the way that is.
        timed: how many ways were.
        captured: whether a graph is being captured.
    """

    def __init__(self):
        self.seen = set()
        self.new = []
        self.fastest, self.timed, self.captured = 0, 0, False

    def look_up(self, function, key, *_):
        if (function.__name__, key) not in self.seen:
            self.seen.add((function.__name__, key))
            self.new.append(function.__name__)

    def milliseconds(self, run):
        run()
        self.timed += 1
        return abs(self.timed % WAYS - self.fastest)


@pytest.fixture
def loads():
    found, launch = Loads(), start._launch
    with shipped.as_on_gpu("sm_90", only_ours=True), pytest.MonkeyPatch.context() as patches:
        patches.setattr(driver, "_active", NoDevice())
        look_up = lambda function, *given: found.look_up(function, *given)  # noqa: E731  # it becomes a method
        patches.setattr(triton.runtime.jit.JITFunction, "_do_compile", look_up)
        for name, value in (
            ("_launch", launch),
            ("_device_of", lambda _: -1),
            ("_may_time", lambda: True),
            ("_FASTEST", {}),
            ("_milliseconds", found.milliseconds),
            ("is_traced", lambda: found.captured),
        ):
            patches.setattr(start, name, value)
        yield found


SHAPE = shipped.shapes()["paper 64"][0]
SEPARABLE = shipped.shapes()["separable"][0]
# What runs for some tokens, by name.
OPS = {
    "neurons": lambda tokens: shipped.run_neurons(768, tokens, torch.bfloat16, True, 64, 8, 64),
    "many neurons": lambda tokens: shipped.run_neurons(
        768, tokens, torch.bfloat16, False, 8, 2, 512
    ),
    "hidden": lambda tokens: shipped.run_hidden(3072, tokens, torch.bfloat16, True, 8, 2, True, 64),
    "fused": lambda tokens: shipped.run_linear(SHAPE, 8, tokens, torch.bfloat16, "rebuild", "relu"),
    "grouped": lambda tokens: shipped.run_linear(
        SEPARABLE, 8, tokens, torch.bfloat16, "separable", "gelu"
    ),
    "routing": lambda tokens: shipped.run_routing(64, tokens, 8, 768, torch.bfloat16, False),
}


@pytest.mark.parametrize("fastest", range(WAYS))
@pytest.mark.parametrize("name", OPS)
def test_a_captured_graph_loads_nothing_after_tuning(name, fastest, loads):
    """Whichever tile was the fastest; nor for other tokens, whether their power of two was timed or
    not."""
    loads.fastest = fastest
    OPS[name](4096)
    assert loads.timed > 0 or name == "routing"
    assert loads.new
    loads.captured, loads.new, timed = True, [], loads.timed
    for tokens in (4096, 4099, 2500, 9001):
        OPS[name](tokens)
        assert loads.new == [], tokens
    assert loads.timed == timed


def test_every_power_of_two_of_tokens_and_every_width_is_timed(loads):
    for width, tokens in ((768, 4096), (768, 9000), (1024, 4096)):
        timed = loads.timed
        shipped.run_neurons(width, tokens, torch.bfloat16, False, 64, 8, 64)
        assert loads.timed > timed
    timed = loads.timed
    shipped.run_neurons(768, 5000, torch.bfloat16, False, 64, 8, 64)
    assert loads.timed == timed


def test_a_launch_of_another_kind_would_be_seen(loads, monkeypatch):
    """As a captured launch was once: with its options in another order and one more."""
    OPS["neurons"](4096)
    loads.captured, loads.new = True, []
    launch = start._launch
    monkeypatch.setattr(
        start, "_launch", lambda k, grid, given: launch(k, grid, {**given, "num_ctas": 1})
    )
    OPS["neurons"](4096)
    assert "neurons_fused_kernel" in loads.new


def test_no_tile_fits(loads, monkeypatch):
    """One that does not is passed over; where none does, the last refusal is raised."""

    def refuse(run):
        raise BackendError("out of resources")

    monkeypatch.setattr(start, "_milliseconds", refuse)
    with pytest.raises(BackendError, match="out of resources"):
        OPS["neurons"](4096)
    times = iter([refuse, loads.milliseconds] * WAYS)
    monkeypatch.setattr(start, "_milliseconds", lambda run: next(times)(run))
    OPS["neurons"](4096)
    assert loads.timed > 0
