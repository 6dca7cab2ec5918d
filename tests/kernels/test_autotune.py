"""The choice by one timing: what is timed, what a choice depends on, and where nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

from mpoe.config import MPOEConfig
from mpoe.layers import MPOEFeedForward
from mpoe_kernels import BackendError, backends, grouped_mpo_linear
from mpoe_kernels.backends import Backend, Candidate
from mpoe_kernels.contract import STRATEGIES, BlockDims, Contraction, autotune, kept
from mpoe_kernels.contract.autotune import adopt, choices, resolve_contraction
from mpoe_kernels.contract.ranking import Problem, rank, shortlist
from tests.assertions import in_threads, torch_threads
from tests.cases import SMALL_SHAPES

from .backend_cases import require

LINEAR = "grouped_mpo_linear"
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)
pytestmark = pytest.mark.usefixtures("empty_cache")
PROBLEM = Problem(LINEAR, DIMS, 8, 64, torch.float32, "cpu")


def test_the_fastest_is_kept(seconds: dict[str, float], empty_cache: Path) -> None:
    chosen = resolve_contraction(PROBLEM)
    assert chosen.backend == "second"
    assert chosen.strategy == PROBLEM.plans()[0].strategy
    assert list(choices().values()) == [f"second {chosen.strategy}"]
    assert json.loads(empty_cache.read_text())["choices"] == choices()
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "from memory"
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second", "from the file"
    empty_cache.unlink()
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "first", "timed again"


def test_one_choice_for_rows_up_to_a_power_of_two(seconds: dict[str, float]) -> None:
    for slots in (33, 50, 64):
        resolve_contraction(PROBLEM._replace(slots=slots))
    assert len(choices()) == 1
    resolve_contraction(PROBLEM._replace(slots=65))
    assert len(choices()) == 2
    assert PROBLEM._replace(slots=0).rounded().slots == 0


@pytest.mark.parametrize(
    "change",
    [
        {"dims": DIMS._replace(a=32)},
        {"num_experts": 4},
        {"dtype": torch.bfloat16},
        {"op": f"{LINEAR}_backward"},
        {"need": (True, True, False, True)},
        {"strategy": "chain"},
    ],
)
def test_what_a_choice_depends_on(seconds: dict[str, float], change: dict[str, object]) -> None:
    resolve_contraction(PROBLEM)
    resolve_contraction(PROBLEM._replace(**change))
    assert len(choices()) == 2


def test_threads_versions_and_instructions_are_part_of_the_key(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch_threads(1):
        resolve_contraction(PROBLEM)
    with torch_threads(2):
        resolve_contraction(PROBLEM)
    assert len(choices()) == 2
    for name in ("__version__", "processor_name"):
        value = "another" if name == "__version__" else lambda: "another"
        monkeypatch.setattr(autotune, name, value)
        resolve_contraction(PROBLEM)
    monkeypatch.setattr(torch, "__version__", "9.9")
    resolve_contraction(PROBLEM)
    monkeypatch.setitem(autotune.NATIVE_LIBRARY.info, "build", "of another state of the sources")
    resolve_contraction(PROBLEM)
    assert len(choices()) == 6


def ranked(problem: Problem = PROBLEM) -> tuple[str, str]:
    found = resolve_contraction(problem)
    return found.backend, found.strategy


def first_of(problem: Problem = PROBLEM) -> tuple[str, str]:
    return "first", problem.rounded().plans()[0].strategy


def test_the_setting_turns_timing_off(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPOE_AUTOTUNE", "0")
    kept.add_choices({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    assert ranked() == first_of(), "the file does not count either"
    assert list(choices().values()) == [" ".join(first_of())], "what ran is told, for a resumed run"


def test_deterministic_programs_rank_alone(seconds: dict[str, float]) -> None:
    assert ranked()[0] == "second"
    adopt({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    torch.use_deterministic_algorithms(True)
    try:
        assert ranked() == first_of()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ranked()[0] == "second"


@pytest.mark.parametrize("how", ["is_compiling", "capturing"])
def test_under_capture_and_tracing_nothing_is_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with monkeypatch.context() as patched:
        if how == "is_compiling":
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
        else:
            patched.setattr(torch.cuda, "is_initialized", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert ranked() == first_of()
        assert choices() == {}
    assert ranked()[0] == "second", "and nothing of it is remembered"


def test_several_ranks_rank_alone_or_take_what_was_adopted(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranked()[0] == "second"
    told = choices()
    monkeypatch.setattr(autotune, "_has_ranks", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert ranked() == first_of(), "what one rank timed before does not count"
    monkeypatch.setattr(autotune, "processor_name", lambda: "another rank's")
    adopt(told)
    assert ranked()[0] == "second", "ranks on unlike machines agree"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    autotune.forget()
    seconds["second"] = 0.5
    assert ranked()[0] == "second", "one rank times"


def test_adopted_choices_come_before_timing(seconds: dict[str, float], empty_cache: Path) -> None:
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


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"a": 1}, {1: "a"}])
def test_what_cannot_be_adopted(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"choices must (be a mapping of|map) strings to strings; got"):
        adopt(wrong)  # type: ignore[arg-type]


def test_what_waits_for_a_gpu_runs_only_without_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPOE_AUTOTUNE", "0")
    monkeypatch.setattr(autotune, "_key", str)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def backend(name: str, waits: bool, dtype: torch.dtype) -> Backend:
        return Backend(
            name,
            {},
            candidates=lambda plan: [Candidate(name, plan.strategy, plan.strategy, len, waits)],
            contraction_reasons=lambda plan: [] if plan.dtype == dtype or waits else ["not this dtype"],
        )

    def either(plan: Contraction) -> list[Candidate]:
        return [Candidate("both", plan.strategy, plan.strategy, len, waits) for waits in (True, False)]

    monkeypatch.setitem(backends.BACKENDS, "both", Backend("both", {}, candidates=either))
    both = {"waiting": backend("waiting", True, torch.bfloat16), "going": backend("going", False, torch.bfloat16)}
    for name, each in both.items():
        monkeypatch.setitem(backends.BACKENDS, name, each)
    monkeypatch.setitem(backends.PREFERRED, "cuda", tuple(both))
    on_gpu = PROBLEM._replace(device="cuda:0", dtype=torch.bfloat16)
    assert ranked(on_gpu)[0] == "going"
    assert ranked(on_gpu._replace(backend="waiting"))[0] == "waiting"
    assert [c.waits for c in rank(on_gpu._replace(backend="both"))] == [False] * 4 + [True] * 4
    assert ranked(on_gpu._replace(dtype=torch.float32))[0] == "waiting", "there is no other"
    assert ranked(on_gpu._replace(strategy="chain")) == ("going", "chain")


def test_at_most_four_are_timed() -> None:
    def each(backend: str, strategy: str, name: str | None = None) -> Candidate:
        return Candidate(backend, name or strategy, strategy, len)

    able = [each(b, s) for s in ("rebuild", "chain", "half_left") for b in ("native", "eager", "third")]
    found = shortlist(able)
    assert [(c.backend, c.strategy) for c in found] == [
        *(("native", "rebuild"), ("eager", "rebuild"), ("native", "chain"), ("eager", "chain"))
    ]
    variants = [each("triton", "rebuild", "rebuild on chip"), each("triton", "rebuild"), each("triton", "chain")]
    names = [c.name for c in shortlist(variants)]
    assert names == ["rebuild on chip", "chain", "rebuild"], "variants of a pair come last"


def test_what_fails_when_it_is_timed_does_not_run() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    found = autotune._seconds([fails, lambda: None], "cpu")
    assert found[0] == float("inf")
    assert found[1] < 1


@pytest.mark.parametrize(("slots", "strategies"), [(64, 2), (4096, 1)])
def test_what_holds_too_much_memory_is_not_timed(
    slots: int, strategies: int, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(autotune, "_seconds", lambda runs, device: timed.append(len(runs)) or [1.0] * len(runs))
    problem = PROBLEM._replace(slots=slots)
    resolve_contraction(problem)
    held = [plan.temporary_bytes + plan.activation_bytes for plan in problem.plans()[:2]]
    assert timed == [2 * strategies]
    assert (held[1] > autotune.MOST_BYTES > held[0]) == (strategies == 1)


@pytest.mark.parametrize(("experts", "slots"), [(8, 64), (64, 8), (48, 1024), (4, 4096), (1, 100_000), (1, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_timed_call_is_short(experts: int, slots: int, threads: int) -> None:
    problem = PROBLEM._replace(num_experts=experts, slots=slots)
    with torch_threads(threads):
        fewer, rows = autotune._timed_sizes(problem)
    assert min(experts, threads) <= fewer <= experts
    assert 1 <= rows <= min(slots, 256 * threads)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["light", "separable", "padded"])
def test_a_first_use_is_timed_and_leaves_no_trace(name: str, training: bool) -> None:
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


def test_fake_tensors_are_not_timed() -> None:
    shape = SMALL_SHAPES["light"]
    with FakeTensorMode():
        blocks = random_blocks(shape, 2, torch.float32)
        y = grouped_mpo_linear(torch.ones(4, shape.in_features), blocks, torch.tensor([0, 2, 4]))
    assert y.shape == (4, shape.out_features)
    assert choices() == {}


def test_a_compiled_graph_times_when_it_runs() -> None:
    shape = SMALL_SHAPES["light"]
    blocks, offsets = random_blocks(shape, 2, torch.float32), torch.tensor([0, 2, 4])
    x = torch.ones(4, shape.in_features)
    compiled = torch.compile(lambda: grouped_mpo_linear(x, blocks, offsets), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), grouped_mpo_linear(x, blocks, offsets))
    assert len(choices()) == 1


def test_two_threads_at_once(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    timing: Callable[..., list[float]] = autotune._seconds
    monkeypatch.setattr(autotune, "_seconds", lambda *given: (timed.append(1), timing(*given))[1])
    assert in_threads(4, lambda _: resolve_contraction(PROBLEM).backend) == ["second"] * 4
    assert timed == [1]


def test_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.PREFERRED, "cpu", ())
    with pytest.raises(BackendError, match=r"no backend can run grouped_mpo_linear on cpu torch\.float32"):
        resolve_contraction(PROBLEM)


def test_training_goes_on_with_another_number_of_threads(empty_cache: Path) -> None:
    """Native kernels and a fixed plan: a run saved on one thread and resumed on two ends as it would have on one."""
    require("native")
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    config = MPOEConfig(num_experts=8, shape="paper")
    start = MPOEFeedForward(64, 256, config).state_dict()

    def steps(state: dict[str, torch.Tensor], count: int, threads: int) -> dict[str, torch.Tensor]:
        layer = MPOEFeedForward(64, 256, config)
        layer.load_state_dict(state)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        with torch_threads(threads):
            for _ in range(count):
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
        return {name: value.clone() for name, value in layer.state_dict().items()}

    torch.use_deterministic_algorithms(True)
    try:
        whole = steps(start, 3, 1)
        resumed = steps(steps(start, 2, 1), 1, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, start[name]) for name, value in whole.items())
    assert not empty_cache.exists()
