"""The choice by one timing: what is timed, what it depends on, and where nothing is timed."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

from mpoe_kernels import grouped_mpo_linear
from mpoe_kernels.contract import STRATEGIES, BlockDims, autotune, kept, timing
from mpoe_kernels.contract.autotune import adopt, choices, resolve_contraction
from mpoe_kernels.contract.ranking import Problem
from mpoe_kernels.native_library import NATIVE_LIBRARY
from tests.assertions import in_threads, refuses, torch_threads
from tests.cases import SMALL_SHAPES, either, named_cases

LINEAR = "grouped_mpo_linear"
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)
pytestmark = pytest.mark.usefixtures("empty_cache")
PROBLEM = Problem(LINEAR, DIMS, 8, 64, torch.float32, "cpu")


def test_the_fastest_is_kept(seconds, empty_cache):
    chosen = resolve_contraction(PROBLEM)
    assert chosen.backend == "second"
    assert chosen.strategy == PROBLEM.plans()[0].strategy
    assert list(choices().values()) == [f"second {chosen.strategy}"]
    assert json.loads(empty_cache.read_text()) == {"version": 1, "choices": choices()}
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "from memory"
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second", "from the file"
    empty_cache.unlink()
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "first", "timed again"


def test_one_choice_for_rows_up_to_a_power_of_two(seconds):
    for slots in (33, 50, 64):
        resolve_contraction(PROBLEM._replace(slots=slots))
    assert len(choices()) == 1
    resolve_contraction(PROBLEM._replace(slots=65))
    assert len(choices()) == 2
    assert PROBLEM._replace(slots=0).rounded().slots == 0


@pytest.mark.usefixtures("seconds")
@named_cases(
    "change",
    {
        "sizes of blocks": {"dims": DIMS._replace(a=32)},
        "experts": {"num_experts": 4},
        "dtype": {"dtype": torch.bfloat16},
        "phase": {"op": f"{LINEAR}_backward"},
        "gradients": {"need": (True, True, False, True)},
        "strategy": {"strategy": "chain"},
    },
)
def test_another_problem_is_another_choice(change):
    resolve_contraction(PROBLEM)
    resolve_contraction(PROBLEM._replace(**change))
    assert len(choices()) == 2


def library_with(**info):
    return replace(NATIVE_LIBRARY, info={**NATIVE_LIBRARY.info, **info})


@pytest.mark.usefixtures("seconds")
@named_cases(
    "owner, name, value",
    {
        "threads": (torch, "get_num_threads", lambda: 99),
        "torch": (torch, "__version__", "9.9"),
        "mpoe": (autotune, "__version__", "another"),
        "processor": (autotune, "processor_name", lambda: "another"),
        "torch's instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        "our instructions": (autotune, "NATIVE_LIBRARY", library_with(isa_used="another")),
        "our build": (autotune, "NATIVE_LIBRARY", library_with(build="another")),
    },
)
def test_another_machine_is_another_choice(owner, name, value, monkeypatch):
    resolve_contraction(PROBLEM)
    monkeypatch.setattr(owner, name, value)
    resolve_contraction(PROBLEM)
    assert len(choices()) == 2


def ranked():
    candidate = resolve_contraction(PROBLEM)
    return candidate.backend, candidate.strategy


def first_of():
    return "first", PROBLEM.rounded().plans()[0].strategy


def test_the_setting_turns_timing_off(seconds, monkeypatch):
    monkeypatch.setenv("MPOE_AUTOTUNE", "0")
    kept.add_choices({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    assert ranked() == first_of(), "the file does not count either"
    assert list(choices().values()) == [" ".join(first_of())], "what ran is told, for a resumed run"


def test_deterministic_programs_rank_alone(seconds):
    assert ranked()[0] == "second"
    adopt({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    torch.use_deterministic_algorithms(True)
    try:
        assert ranked() == first_of()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ranked()[0] == "second"


@pytest.mark.usefixtures("seconds")
@named_cases(
    "conditions",
    {
        "traced": ["torch.compiler.is_compiling"],
        "captured": ["torch.cuda.is_initialized", "torch.cuda.is_current_stream_capturing"],
    },
)
def test_under_capture_and_tracing_nothing_is_timed(conditions, monkeypatch):
    with monkeypatch.context() as patched:
        for condition in conditions:
            patched.setattr(condition, lambda: True)
        assert ranked() == first_of()
        assert choices() == {}
    assert ranked()[0] == "second", "and nothing of it is remembered"


def test_several_ranks_rank_alone_or_take_what_was_adopted(seconds, monkeypatch):
    assert ranked()[0] == "second"
    told = choices()
    monkeypatch.setattr(timing, "has_ranks", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert ranked() == first_of(), "what one rank timed before does not count"
    monkeypatch.setattr(autotune, "processor_name", lambda: "another rank's")
    adopt(told)
    assert ranked()[0] == "second", "ranks on unlike machines agree"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    autotune.forget()
    seconds["second"] = 0.0005
    assert ranked()[0] == "second", "one rank times"


def test_adopted_choices_come_before_timing(seconds, empty_cache):
    assert ranked()[0] == "second"
    told = choices()
    autotune.forget()
    empty_cache.unlink()
    seconds["second"] = 3.0
    adopt(told)
    assert choices() == told
    assert ranked()[0] == "second"
    autotune.forget()
    adopt(dict.fromkeys(told, "abacus chain") | {"unknown": "native chain"})
    assert ranked()[0] == "first", "one that cannot run here is timed again"
    assert set(choices()) == {*told, "unknown"}


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"a": 1}, {1: "a"}], ids=str)
def test_what_cannot_be_adopted(wrong):
    refuses(TypeError, r"choices must (be a mapping of|map) strings to strings; got", adopt, wrong)


def test_what_fails_when_it_is_timed_does_not_run():
    seconds = autotune._seconds([partial(torch.ones(2).view, 3), lambda: None], "cpu")
    assert seconds[0] == float("inf")
    assert seconds[1] < 1


@pytest.mark.parametrize("threads, clock", [(1, "thread_time"), (2, "perf_counter")])
@pytest.mark.parametrize(
    "takes, calls", [((1, 2, 3), (21, 21, 1)), ((40, 41), (4, 4)), ((300, 301), (2, 2))]
)
def test_how_often_candidates_are_timed(takes, calls, threads, clock, monkeypatch):
    """Once, then in turn for 20 rounds or 200 ms together: of 40 and 41 ms three times more, as
    two rounds take 162 ms. One of 3 ms is hopeless beside one of 1 ms."""
    ran = []
    monkeypatch.setattr(autotune, "time", SimpleNamespace(**{clock: lambda: sum(ran) / 1000}))
    with torch_threads(threads):
        seconds = autotune._seconds([partial(ran.append, took) for took in takes], "cpu")
    assert seconds == pytest.approx([took / 1000 for took in takes])
    assert tuple(map(ran.count, takes)) == calls


@pytest.mark.parametrize(
    "rows, share, of_one_thread, of_two",
    [
        (256, 1, (8, 64), (8, 64)),
        (256, 0.25, (2, 16), (4, 32)),
        (16, 1, (2, 16), (4, 32)),
        (4, 1, (1, 4), (2, 8)),
    ],
)
def test_a_timed_call_is_short(rows, share, of_one_thread, of_two, monkeypatch):
    """Experts and slots, of 8 and 64, if a thread may take so many rows and this share of the
    problem's FLOPs: a quarter of these leaves one thread 2 experts with their 16 slots."""
    monkeypatch.setitem(autotune.ROWS, "cpu", rows)
    monkeypatch.setitem(autotune.FLOPS, "cpu", share * PROBLEM.plans()[0].flops)
    for threads, sizes in ((1, of_one_thread), (2, of_two)):
        with torch_threads(threads):
            assert autotune._timed_sizes(PROBLEM) == sizes, f"{threads} threads"


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("slots, strategies", [(64, 2), (4096, 1)])
def test_what_holds_too_much_memory_is_not_timed(slots, strategies, monkeypatch):
    """Both backends compute every strategy that is timed: the second one's rows of 4,096 slots are
    too many."""
    numbers = []

    def timed(runs, device):
        numbers.append(len(runs))
        return [1.0] * len(runs)

    monkeypatch.setattr(autotune, "_seconds", timed)
    problem = PROBLEM._replace(slots=slots)
    resolve_contraction(problem)
    first, second = [plan.held_bytes for plan in problem.plans()[:2]]
    assert numbers == [2 * strategies]
    assert (second > autotune.MOST_BYTES > first) == (strategies == 1)


@either("training")
@pytest.mark.parametrize("name", ["light", "separable", "padded"])
def test_a_first_use_is_timed_and_leaves_no_trace(name, training):
    """Through the op: the random numbers go on, and so does the gradient."""
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 3, torch.float32, requires_grad=training)
    x, offsets = torch.ones(8, shape.in_features), torch.tensor([0, 2, 2, 8], dtype=torch.int32)
    state = torch.get_rng_state()
    y = grouped_mpo_linear(x, blocks, offsets)
    if training:
        y.sum().backward()
        assert blocks.central.grad is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert len(choices()) == 1 + training
    assert set(choices().values()) <= {f"{b} {s}" for b in ("native", "eager") for s in STRATEGIES}


def small_product():
    shape = SMALL_SHAPES["light"]
    blocks, offsets = random_blocks(shape, 2, torch.float32), torch.tensor([0, 2, 4])
    return partial(grouped_mpo_linear, torch.ones(4, shape.in_features), blocks, offsets)


def test_fake_tensors_are_not_timed():
    with FakeTensorMode():
        y = small_product()()
    assert y.shape == (4, SMALL_SHAPES["light"].out_features)
    assert choices() == {}


def test_a_compiled_graph_times_when_it_runs():
    product = small_product()
    compiled = torch.compile(lambda: product(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), product())
    assert len(choices()) == 1


def test_two_threads_at_once(seconds, monkeypatch):
    numbers = []
    timing = autotune._seconds

    def timed(runs, device):
        numbers.append(len(runs))
        return timing(runs, device)

    monkeypatch.setattr(autotune, "_seconds", timed)
    assert in_threads(4, lambda _: resolve_contraction(PROBLEM).backend) == ["second"] * 4
    assert len(numbers) == 1
