"""Hidden-side experts and neurons by the emulated CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_kernels import BackendError
from mpoe_kernels.backends import Request
from mpoe_kernels.hidden_experts.cuda import MOST_UNITS
from tests.expert_problems import HiddenProblem, NeuronProblem
from tests.expert_scenarios import DTYPES, ExpertScenarios

from .emulation import HIDDEN, NEURONS, REFUSED, SCHEDULES, Schedule, limits, schedule, stats

KERNELS = {HiddenProblem: HIDDEN, NeuronProblem: NEURONS}
pytestmark = pytest.mark.usefixtures("registered")
of_each_kind = pytest.mark.parametrize("kind", KERNELS, ids=lambda kind: kind.__name__)


class TestScenarios(ExpertScenarios):
    backend, kernels = "emulated", KERNELS
    dtypes = (*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.exhaustive))  # default tests below have it too


@of_each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_tokens_to_one_expert(kind: type[Any], dtype: torch.dtype) -> None:
    problem = kind(tokens=140, top_k=1, gated=True, with_bias=True, dtype=dtype)
    problem.index[:] = 3
    problem.check("emulated")


@of_each_kind
def test_indices_out_of_range_are_no_expert(kind: type[Any]) -> None:
    """On a GPU the op does not check them, because that would wait for the device; memory must stay intact."""
    problem = kind(tokens=13, experts=3, dtype=torch.float32, none_share=0.4)
    expected, none = problem.computed("emulated"), problem.index < 0
    problem.index[none] = torch.where(torch.arange(int(none.sum())) % 2 == 0, 3 << 40, -7)
    for name, value in problem.computed("emulated").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_than_a_tile_holds(dtype: torch.dtype) -> None:
    """More slots of an expert than the weights' kernel looks up together."""
    sizes: dict[str, Any] = {"experts": 2, "groups": 2, "block": 8, "gated": True, "with_bias": True}
    HiddenProblem(**sizes, tokens=1100, dtype=dtype).check("emulated")
    HiddenProblem(**sizes, tokens=150, per_group=True, dtype=dtype).check("emulated")


@pytest.mark.parametrize("multiprocessors", [1, 100])
def test_shares_of_the_groups(multiprocessors: int) -> None:
    """Blocks shared by the groups: a single share writes its sums directly, several are added up."""
    problem = HiddenProblem(tokens=11, experts=4, groups=9, gated=True, with_bias=True, dtype=torch.float32)
    with limits(multiprocessors=multiprocessors):
        problem.check("emulated")


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
            found.append(problem.computed("emulated"))
            launches.append(stats()["launches"])
    assert launches == [2 + 1 + 3 * slices + 1 for slices in (1, 3, 5)], "rows, weights and biases of every slice"
    problem.check_results(found[1], "emulated")
    for name, value in found[0].items():
        if per_group or name not in ("dright", "dleft", "dright_gate"):
            assert torch.equal(found[1][name], value), name
            assert torch.equal(found[2][name], value), name


@of_each_kind
@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
def test_schedules(kind: type[Any], timing: Schedule) -> None:
    own = {"groups": 2, "block": 24, "per_group": True} if kind is HiddenProblem else {"width": 40, "neurons": 72}
    problem = kind(tokens=40, experts=3, gated=True, with_bias=True, dtype=torch.bfloat16, **own)
    usual = problem.computed("emulated")
    problem.check_results(usual, "emulated")
    with schedule(*timing):
        for name, value in problem.computed("emulated").items():
            assert torch.equal(value, usual[name]), name


def test_launches() -> None:
    """Sorting takes one launch for few pairs and three for more; rows, which add up each token's choices, one."""
    problem = HiddenProblem(tokens=40, experts=3, groups=4, gated=True, with_bias=True, dtype=torch.float32)
    whole = HiddenProblem(tokens=40, experts=3, groups=4, per_group=True, dtype=torch.float32)

    def launches(of: Any, need: list[bool] | None = None) -> int:
        stats()
        kernels = KERNELS[type(of)]
        kernels.forward(of.call()) if need is None else kernels.backward(of.backward_call(need))
        return stats()["launches"]

    assert launches(problem) == launches(NeuronProblem(tokens=40, gated=True, dtype=torch.bfloat16)) == 2
    assert launches(HiddenProblem(tokens=600, groups=1, dtype=torch.float32)) == 4
    assert launches(problem, [True] * 7) == 5
    assert launches(whole, [True, False, True, True, True, True, True]) == 3  # nothing to add up
    assert launches(problem, [True, False, False, False, False, True, False]) == 2
    assert launches(problem, [False] * 7) == 0


@of_each_kind
def test_half_precision_runs_on_tensor_cores(kind: type[Any]) -> None:
    stats()
    kind(tokens=8, experts=2, dtype=torch.bfloat16).computed("emulated")
    assert stats()["mma"] > 0


@of_each_kind
@settings(max_examples=15)
@given(data=st.data())
def test_random_problems(kind: type[Any], data: st.DataObject) -> None:
    def some(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    def one_of(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    if kind is HiddenProblem:
        own = {"groups": some(1, 3), "block": some(1, 20), "per_group": one_of(True, False)}
    else:
        own = {"width": some(1, 20), "out": some(1, 20), "neurons": some(1, 20)}
    flags = {"gated": one_of(True, False), "with_bias": one_of(True, False), "activation": one_of("gelu", "silu")}
    sizes = {"tokens": some(0, 20), "experts": some(1, 20), "top_k": some(1, 4), "seed": some(0, 5)}
    dtype, none_share = one_of(torch.float32, torch.bfloat16), one_of(0.0, 0.3, 1.0)
    kind(**sizes, **own, **flags, dtype=dtype, none_share=none_share).check("emulated", 3)


# ------------------------------------------------------------------ what cannot be computed


def test_larger_sizes_are_a_reason_and_refused_by_the_kernels() -> None:
    for kernels, op, size, words in (
        (HIDDEN, "hidden_experts", "block", "with blocks of at most 512 hidden units, not of 513"),
        (NEURONS, "neuron_experts", "neurons", "with at most 512 neurons of an expert, not with 513"),
    ):
        assert kernels.reasons(Request(op, "cuda", torch.float32, {size: MOST_UNITS + 1})) == [
            f"it computes {op} {words}"
        ]
        assert kernels.reasons(Request(op, "cuda", torch.float32, {size: MOST_UNITS})) == []
    NeuronProblem(tokens=2, neurons=MOST_UNITS, dtype=torch.float32).check("emulated")
    problem = HiddenProblem(tokens=2, experts=1, groups=1, block=513, dtype=torch.float32)
    with pytest.raises(REFUSED, match="1 to 512 hidden units of an expert in a group; got 513"):
        HIDDEN.forward(problem.call())
    for op, call in (("hidden_experts", problem.call("cuda")), ("hidden_experts_backward", problem.backward_call())):
        call.backend = "cuda"
        with pytest.raises(BackendError, match="at most 512 hidden units, not of 513"):
            getattr(torch.ops.mpoe, op)(*vars(call).values())


def test_more_experts_than_choices_can_be_sorted_by_are_refused() -> None:
    problem = NeuronProblem(tokens=1, top_k=4, experts=3000, width=1, out=1, neurons=1, dtype=torch.float32)
    with pytest.raises(REFUSED, match="routing takes at most 2999 experts; got 3000"):
        NEURONS.forward(problem.call())


def test_a_device_with_too_little_shared_memory() -> None:
    problem = HiddenProblem(tokens=40, groups=1, block=64, gated=True, dtype=torch.float32)
    with (
        limits(shared_bytes=47 << 10),
        pytest.raises(REFUSED, match=r"64 hidden units need \d+ bytes of shared memory"),
    ):
        HIDDEN.forward(problem.call())
    with limits(shared_bytes=48 << 10):
        HIDDEN.forward(problem.call())
