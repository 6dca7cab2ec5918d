"""Hidden-side experts by the emulated CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoe_kernels import BackendError
from mpoe_kernels.backends import Request
from mpoe_kernels.hidden_experts.cuda import MOST_UNITS, HiddenKernels
from tests.assertions import poisoned_memory
from tests.expert_problems import HiddenProblem, arguments_of

from .emulation import DTYPES, HIDDEN, OPS, REFUSED, SCHEDULES, Schedule, library, limits, schedule, stats

ALL = [True] * len(HiddenProblem.NAMES)


@pytest.fixture(autouse=True)
def _loaded() -> None:
    library()


def run(problem: HiddenProblem, need: list[bool] = ALL) -> dict[str, Tensor]:
    """``o`` and every gradient; results are initialised with NaN."""
    with poisoned_memory():
        out = HIDDEN.forward(problem.call())
        grads = HIDDEN.backward(problem.backward_call(need))
    given_inputs = {name for name, value in problem.inputs.items() if value is not None}
    return {"o": out, **{f"d{n}": g for n, g in zip(HiddenProblem.NAMES, grads, strict=True) if n in given_inputs}}


def check(problem: HiddenProblem, factor: float = 2) -> None:
    problem.check_results(run(problem), "emulated", factor)


# Blocks of 16 and 64 units are copied 16 bytes at a time, others element by element.
CASES: dict[str, dict[str, Any]] = {
    "top-1": {"tokens": 33, "top_k": 1, "experts": 3, "groups": 2, "block": 16, "gated": True},
    "top-2": {"tokens": 21, "experts": 5, "groups": 3, "block": 5, "per_group": True, "with_bias": True},
    "top-4": {"tokens": 19, "top_k": 4, "experts": 4, "groups": 1, "block": 64, "gated": True, "with_bias": True},
    "parts of a tile": {"tokens": 37, "experts": 2, "groups": 2, "block": 40, "per_group": True, "gated": True},
    "many experts": {"tokens": 9, "top_k": 8, "experts": 64, "groups": 5, "block": 8, "with_bias": True},
    "one token": {"tokens": 1, "top_k": 2, "experts": 8, "groups": 2, "block": 16, "none_share": 0.0},
    "blocks wider than a tile": {"tokens": 9, "experts": 2, "groups": 2, "block": 72, "gated": True, "with_bias": True},
    "one unit": {"tokens": 5, "experts": 2, "groups": 3, "block": 1, "per_group": True},
    "no expert": {"tokens": 4, "none_share": 1.0, "with_bias": True, "groups": 1},
    "no token": {"tokens": 0, "gated": True, "with_bias": True},
}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    check(HiddenProblem(**CASES[name], dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_form(name: str, per_group: bool, gated: bool, dtype: torch.dtype) -> None:
    case = {**CASES[name], "gated": gated, "per_group": per_group, "with_bias": True}
    check(HiddenProblem(**case, dtype=dtype, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_more_tokens_than_a_tile_holds(dtype: torch.dtype) -> None:
    """More slots of an expert than the weights' kernel looks up together."""
    sizes: dict[str, Any] = {"experts": 2, "groups": 2, "block": 8, "gated": True, "with_bias": True}
    check(HiddenProblem(**sizes, tokens=1100, dtype=dtype))
    check(HiddenProblem(**sizes, tokens=150, per_group=True, dtype=dtype))


@pytest.mark.parametrize("multiprocessors", [1, 100])
def test_shares_of_the_groups(multiprocessors: int) -> None:
    """Blocks shared by the groups: a single share writes its sums directly, several are added up."""
    with limits(multiprocessors=multiprocessors):
        check(HiddenProblem(tokens=11, experts=4, groups=9, block=4, gated=True, with_bias=True, dtype=torch.float32))


@pytest.mark.parametrize("per_group", [False, True])
def test_as_many_groups_at_a_time_as_the_cache_holds(per_group: bool) -> None:
    """Of five groups all, two at a time (the last is alone), or one; only sums over groups may round differently."""
    sizes: dict[str, Any] = {"tokens": 30, "experts": 3, "groups": 5, "block": 8, "per_group": per_group}
    problem = HiddenProblem(**sizes, gated=True, with_bias=True, dtype=torch.float32)
    bytes_of_group = 3 * 30 * 2 * 8 * 4  # h and two gradients of every slot
    found, launches = [], []
    for groups in (5, 2, 1):
        with limits(cache_bytes=3 * groups * bytes_of_group):
            stats()
            found.append(run(problem))
            launches.append(stats()["launches"])
    assert launches == [2 + 1 + 3 * slices + 1 for slices in (1, 3, 5)], "rows, weights and biases of every slice"
    problem.check_results(found[1], "emulated", 2)
    for name, value in found[0].items():
        if per_group or name not in ("dright", "dleft", "dright_gate"):
            assert torch.equal(found[1][name], value), name
            assert torch.equal(found[2][name], value), name


def test_all_tokens_to_one_expert() -> None:
    problem = HiddenProblem(tokens=71, top_k=1, experts=5, groups=1, block=16, dtype=torch.bfloat16)
    problem.index[:] = 3
    check(problem)
    found = run(problem)
    for name in ("dright", "dleft"):
        assert not found[name][:3].any()
        assert not found[name][4].any()


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
def test_schedules(timing: Schedule) -> None:
    problem = HiddenProblem(
        tokens=40, experts=3, groups=2, block=24, gated=True, with_bias=True, dtype=torch.bfloat16, per_group=True
    )
    usual = run(problem)
    with schedule(*timing):
        check(problem)
        for name, value in run(problem).items():
            assert torch.equal(value, usual[name]), name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_tanh", "none", "silu"])
def test_every_activation(activation: str, gated: bool) -> None:
    problem = HiddenProblem(tokens=9, experts=2, groups=1, gated=gated, activation=activation, dtype=torch.float32)
    if activation == "relu":  # multiples of 1/4: rounding must not decide the side of zero
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    check(problem)


def test_an_expert_chosen_twice_and_rows_of_nan_without_one() -> None:
    problem = HiddenProblem(tokens=17, experts=2, groups=1, dtype=torch.float32, none_share=0.0, with_bias=True)
    problem.index[:, 1] = problem.index[:, 0]
    problem.index[3:6] = -1
    check(problem)
    clean = run(problem)
    for name in ("u", "gates"):
        problem.inputs[name][3:6] = float("nan")  # type: ignore[index]
    for name, value in run(problem).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoiled_token_spoils_no_other(value: float, dtype: torch.dtype) -> None:
    """Nor the gradients of experts that it did not choose."""
    problem = HiddenProblem(
        tokens=70, experts=3, groups=2, block=24, gated=True, with_bias=True, dtype=dtype, none_share=0.0
    )
    problem.index[:, 1] = (problem.index[:, 0] + 1) % 3
    clean = run(problem)
    spoiled = problem.inputs["u"]
    assert spoiled is not None
    spoiled[5] = value
    others = [t for t in range(70) if t != 5]
    left_out = 3 - int(problem.index[5].sum())
    found = run(problem)
    assert not found["o"][5].isfinite().any()
    for name, each in found.items():
        kept = left_out if each.shape[0] == 3 else others
        assert torch.equal(each[kept], clean[name][kept]), name


def test_indices_out_of_range_are_no_expert() -> None:
    """On a GPU the op does not check them, because that would wait for the device; memory must stay intact."""
    problem = HiddenProblem(tokens=13, experts=3, groups=2, dtype=torch.float32, none_share=0.4)
    expected = run(problem)
    none = problem.index < 0
    problem.index[none] = torch.where(torch.arange(int(none.sum())) % 2 == 0, 3 << 40, -7)
    for name, value in run(problem).items():
        assert torch.equal(value, expected[name]), name


def test_each_gradient_alone() -> None:
    problem = HiddenProblem(tokens=5, experts=2, groups=3, gated=True, with_bias=True, dtype=torch.float32)
    everything = run(problem)
    for needed in HiddenProblem.NAMES:
        alone = run(problem, [name == needed for name in HiddenProblem.NAMES])
        for name in HiddenProblem.NAMES:
            value = alone[f"d{name}"]
            assert torch.equal(value, everything[f"d{name}"]) if name == needed else value.numel() == 0


def test_launches() -> None:
    """Sorting takes one launch for few pairs and three for more."""
    problem = HiddenProblem(tokens=40, experts=3, groups=4, gated=True, with_bias=True, dtype=torch.float32)
    whole = HiddenProblem(tokens=40, experts=3, groups=4, per_group=True, dtype=torch.float32)

    def launches(of: HiddenProblem, need: list[bool] | None) -> int:
        stats()
        HIDDEN.forward(of.call()) if need is None else HIDDEN.backward(of.backward_call(need))
        return stats()["launches"]

    assert launches(problem, None) == 2
    assert launches(HiddenProblem(tokens=600, groups=1, dtype=torch.float32), None) == 4
    assert launches(problem, ALL) == 5
    assert launches(whole, [True, False, True, True, True, True, True]) == 3  # nothing to add up
    assert launches(problem, [True, False, False, False, False, True, False]) == 2
    assert launches(problem, [False] * len(HiddenProblem.NAMES)) == 0


def test_half_precision_runs_on_tensor_cores() -> None:
    problem = HiddenProblem(tokens=8, experts=2, groups=1, block=16, dtype=torch.bfloat16)
    stats()
    run(problem)
    assert stats()["mma"] > 0


@settings(max_examples=15)
@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    check(
        HiddenProblem(
            tokens=data.draw(st.integers(0, 20)),
            experts=data.draw(st.integers(1, 20)),
            top_k=data.draw(st.integers(1, 4)),
            groups=data.draw(st.integers(1, 3)),
            block=data.draw(st.integers(1, 20)),
            per_group=data.draw(st.booleans()),
            gated=data.draw(st.booleans()),
            with_bias=data.draw(st.booleans()),
            activation=data.draw(st.sampled_from(["gelu", "silu", "gelu_new"])),
            dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
            none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
            seed=data.draw(st.integers(0, 5)),
        ),
        3,
    )


# ------------------------------------------------------------------ what cannot be computed


def test_larger_blocks_are_a_reason_and_refused_by_the_kernels() -> None:
    reason = HIDDEN.reasons(Request("hidden_experts", "cuda", torch.float32, {"block": MOST_UNITS + 1}))
    assert reason == ["it computes hidden_experts with blocks of at most 512 hidden units, not of 513"]
    assert HiddenKernels(OPS).reasons(Request("hidden_experts", "cuda", torch.float32, {"block": MOST_UNITS})) == []
    problem = HiddenProblem(tokens=2, experts=1, groups=1, block=513, dtype=torch.float32)
    with pytest.raises(REFUSED, match="1 to 512 hidden units of an expert in a group; got 513"):
        HIDDEN.forward(problem.call())
    call, backward = (arguments_of(each) for each in (problem.call("cuda"), problem.backward_call(ALL, "cuda")))
    for op, arguments in ((torch.ops.mpoe.hidden_experts, call), (torch.ops.mpoe.hidden_experts_backward, backward)):
        with pytest.raises(BackendError, match="at most 512 hidden units, not of 513"):
            op(*arguments)


def test_a_device_with_too_little_shared_memory() -> None:
    problem = HiddenProblem(tokens=40, groups=1, block=64, gated=True, dtype=torch.float32)
    with (
        limits(shared_bytes=47 << 10),
        pytest.raises(REFUSED, match=r"64 hidden units need \d+ bytes of shared memory"),
    ):
        HIDDEN.forward(problem.call())
    with limits(shared_bytes=48 << 10):
        HIDDEN.forward(problem.call())
