"""The choice by one timing: what is timed, what it depends on, and where nothing is timed.

The fixture `seconds` (conftest.py) replaces the clock and the CPU's backends. ``first``, the
preferred stand-in, takes 2 ms and ``second`` 1 ms for the best strategy, and 1 ms more for the
second-ranked one. So a timing chooses ``second``, and the ranking alone ``first``.
"""

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
DIMS = BlockDims(
    iL=8, jL=8, a=64, iC=12, jC=48, b=64, iR=8, jR=8, in_features=768, out_features=3072
)
PROBLEM = Problem(LINEAR, DIMS, num_experts=8, slots=64, dtype=torch.float32, device="cpu")
pytestmark = pytest.mark.usefixtures("empty_cache")


def resolved():
    """Backend and strategy of what runs."""
    candidate = resolve_contraction(PROBLEM)
    return candidate.backend, candidate.strategy


def first_ranked():
    """What runs where nothing is timed: the best strategy with the preferred backend."""
    return "first", PROBLEM.rounded().plans()[0].strategy


@pytest.fixture
def counted_timings(seconds, monkeypatch):
    """Of every timing of stand-ins, the number of candidates."""
    counts = []
    time_stand_ins = autotune._seconds

    def counted(runs, device):
        counts.append(len(runs))
        return time_stand_ins(runs, device)

    monkeypatch.setattr(autotune, "_seconds", counted)
    return counts


def test_the_fastest_is_kept(seconds, empty_cache):
    strategy = first_ranked()[1]
    assert resolved() == ("second", strategy)
    assert list(choices().values()) == [f"second {strategy}"]
    assert json.loads(empty_cache.read_text()) == {"version": 1, "choices": choices()}
    seconds["second"] = 3.0
    assert resolved()[0] == "second", "from memory"
    autotune.forget()
    assert resolved()[0] == "second", "from the file"
    empty_cache.unlink()
    autotune.forget()
    assert resolved()[0] == "first", "timed again"


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
        "backend": {"backend": "second"},
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


def test_the_setting_turns_timing_off(seconds, monkeypatch):
    monkeypatch.setenv("MPOE_AUTOTUNE", "0")
    kept.add_choices({autotune._key(PROBLEM): f"second {first_ranked()[1]}"})
    assert resolved() == first_ranked(), "the file does not count either"
    ran = " ".join(first_ranked())
    assert list(choices().values()) == [ran], "a resumed run needs to know it"


def test_deterministic_programs_rank_alone(seconds):
    assert resolved()[0] == "second"
    adopt({autotune._key(PROBLEM): f"second {first_ranked()[1]}"})
    torch.use_deterministic_algorithms(True)
    try:
        assert resolved() == first_ranked()
    finally:
        torch.use_deterministic_algorithms(False)
    assert resolved()[0] == "second"


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
        assert resolved() == first_ranked()
        assert choices() == {}
    assert resolved()[0] == "second", "and nothing of it is remembered"


def test_several_ranks_rank_alone_or_take_what_was_adopted(seconds, monkeypatch):
    assert resolved()[0] == "second"
    made = choices()
    monkeypatch.setattr(timing, "has_ranks", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert resolved() == first_ranked(), "what one rank timed before does not count"
    monkeypatch.setattr(autotune, "processor_name", lambda: "another rank's")
    adopt(made)
    assert resolved()[0] == "second", "ranks on unlike machines agree"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    autotune.forget()
    assert resolved()[0] == "second", "one rank times"


def test_adopted_choices_come_before_timing(seconds, empty_cache):
    assert resolved()[0] == "second"
    made = choices()
    autotune.forget()
    empty_cache.unlink()
    seconds["second"] = 3.0
    adopt(made)
    assert choices() == made
    assert resolved()[0] == "second"
    autotune.forget()
    adopt(dict.fromkeys(made, "abacus chain") | {"unknown": "native chain"})
    assert resolved()[0] == "first", "one that cannot run here is timed again"
    assert set(choices()) == {*made, "unknown"}


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"a": 1}, {1: "a"}], ids=str)
def test_what_cannot_be_adopted(wrong):
    refuses(TypeError, r"choices must (be a mapping of|map) strings to strings; got", adopt, wrong)


def test_what_fails_when_it_is_timed_does_not_run():
    seconds = autotune._seconds([partial(torch.ones(2).view, 3), lambda: None], "cpu")
    assert seconds[0] == float("inf")
    assert seconds[1] < 1


@pytest.mark.parametrize("threads, clock", [(1, "thread_time"), (2, "perf_counter")])
@named_cases(
    "milliseconds, calls",
    {
        # Once and in all 20 rounds, which take 60 ms; 3 ms are hopeless beside 1 ms.
        "all rounds, and one that is hopeless": ((1, 2, 3), (21, 21, 1)),
        # Two rounds take 162 ms, which is less than 200 ms, so a third one follows.
        "until 200 ms are spent": ((40, 41), (4, 4)),
        "one round is enough": ((300, 301), (2, 2)),
    },
)
def test_how_often_candidates_are_timed(milliseconds, calls, threads, clock, monkeypatch):
    """Once each, then in turn for 20 rounds or 200 ms of all together."""
    ran = []
    monkeypatch.setattr(autotune, "time", SimpleNamespace(**{clock: lambda: sum(ran) / 1000}))
    with torch_threads(threads):
        seconds = autotune._seconds([partial(ran.append, took) for took in milliseconds], "cpu")
    assert seconds == pytest.approx([took / 1000 for took in milliseconds])
    assert tuple(map(ran.count, milliseconds)) == calls


@named_cases(
    "rows, share, of_one_thread, of_two",
    {
        "all fit": (256, 1, (8, 64), (8, 64)),
        # One thread may take 1/4 of the FLOPs, so of the experts and slots; two threads 2/4.
        "too many FLOPs": (256, 0.25, (2, 16), (4, 32)),
        # One thread may take 16 of the 64 rows, which is 1/4.
        "too many rows": (16, 1, (2, 16), (4, 32)),
        # 4 of the 64 rows are those of half an expert. One is taken all the same, with 4 of its 8
        # slots. Two threads may take 8 rows, those of one expert, and take two with 4 slots each.
        "not one expert's rows a thread": (4, 1, (1, 4), (2, 8)),
    },
)
def test_a_timed_call_is_short(rows, share, of_one_thread, of_two, monkeypatch):
    """Of 8 experts with 64 slots, so many are timed if a thread may take ``rows`` rows and
    ``share`` of the problem's FLOPs."""
    monkeypatch.setitem(autotune.ROWS, "cpu", rows)
    monkeypatch.setitem(autotune.FLOPS, "cpu", share * PROBLEM.plans()[0].flops)
    for threads, sizes in ((1, of_one_thread), (2, of_two)):
        with torch_threads(threads):
            assert autotune._timed_sizes(PROBLEM) == sizes, f"{threads} threads"


@pytest.mark.parametrize("slots, fit", [(64, [True, True]), (4096, [True, False])])
def test_what_holds_too_much_memory_is_not_timed(slots, fit, counted_timings):
    """Both backends compute both strategies of the shortlist. The second-ranked strategy holds more
    than MOST_BYTES at 4,096 slots."""
    problem = PROBLEM._replace(slots=slots)
    held = [plan.held_bytes for plan in problem.plans()[:2]]
    assert [size <= autotune.MOST_BYTES for size in held] == fit
    resolve_contraction(problem)
    assert counted_timings == [2 * sum(fit)]


@either("training")
@pytest.mark.parametrize("name", ["light", "separable", "padded"])
def test_a_first_use_is_timed_and_leaves_no_trace(name, training):
    """A timing inside the op draws no random numbers, and the op has its gradient."""
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
    for choice in choices().values():
        backend, strategy = choice.split()
        assert backend in ("native", "eager")
        assert strategy in STRATEGIES


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


def test_of_four_threads_at_once_one_times(counted_timings):
    assert in_threads(4, lambda _: resolve_contraction(PROBLEM).backend) == ["second"] * 4
    assert len(counted_timings) == 1
