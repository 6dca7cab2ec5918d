"""Neurons of experts by the emulated CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_kernels.backends import BACKENDS, Request, add_kernels, register_backend
from mpoe_kernels.neurons import neuron_experts
from mpoe_kernels.neurons import op as neurons
from mpoe_kernels.neurons.cuda import MOST_UNITS
from tests.expert_problems import NeuronProblem

from .emulation import DTYPES, EMULATED, NEURONS, REFUSED, SCHEDULES, Schedule, library, schedule, stats


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    library()
    register_backend(EMULATED)
    add_kernels("emulated", NEURONS, neurons.FUNCTIONS)
    yield
    del BACKENDS["emulated"]


CASES: dict[str, dict[str, Any]] = {
    "odd sizes": {"tokens": 33, "experts": 3, "width": 33, "out": 65, "neurons": 35, "with_bias": True},
    "whole tiles": {"tokens": 70, "experts": 2, "width": 64, "out": 128, "neurons": 64, "gated": True},
    "many neurons": {
        "tokens": 20,
        "experts": 2,
        "width": 24,
        "out": 16,
        "neurons": 200,
        "gated": True,
        "with_bias": True,
    },
    "many experts": {"tokens": 40, "top_k": 16, "experts": 300, "width": 16, "out": 8, "neurons": 8},
    "one neuron": {"tokens": 9, "top_k": 8, "experts": 9, "width": 15, "out": 3, "neurons": 1, "gated": True},
    "one token": {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0, "width": 48, "out": 40, "neurons": 16},
    "no expert": {"tokens": 4, "none_share": 1.0, "with_bias": True},
    "no token": {"tokens": 0, "gated": True, "with_bias": True},
}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    NeuronProblem(**CASES[name], dtype=dtype).check("emulated")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_form(name: str, gated: bool, dtype: torch.dtype) -> None:
    NeuronProblem(**{**CASES[name], "gated": gated, "with_bias": True}, dtype=dtype, seed=1).check("emulated")


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_all_tokens_to_one_expert(dtype: torch.dtype) -> None:
    problem = NeuronProblem(tokens=140, top_k=1, experts=5, gated=True, with_bias=True, dtype=dtype)
    problem.index[:] = 3
    problem.check("emulated")


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
def test_schedules(timing: Schedule) -> None:
    problem = NeuronProblem(
        tokens=40, experts=3, width=40, neurons=72, gated=True, with_bias=True, dtype=torch.bfloat16
    )
    usual = problem.run(neuron_experts, torch.bfloat16, backend="emulated")
    with schedule(*timing):
        for name, value in problem.run(neuron_experts, torch.bfloat16, backend="emulated").items():
            assert torch.equal(value, usual[name]), name


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spoiled_token_spoils_no_other(value: float, dtype: torch.dtype) -> None:
    """Nor the gradients of experts that it did not choose."""
    problem = NeuronProblem(tokens=70, experts=3, gated=True, with_bias=True, dtype=dtype, none_share=0.0)
    problem.index[:, 1] = (problem.index[:, 0] + 1) % 3
    clean = problem.run(neuron_experts, dtype, backend="emulated")
    x = problem.inputs["x"]
    assert x is not None
    x[5] = value
    others = [t for t in range(70) if t != 5]
    left_out = 3 - int(problem.index[5].sum())
    found = problem.run(neuron_experts, dtype, backend="emulated")
    assert not found["o"][5].isfinite().any()
    for name, each in found.items():
        kept = left_out if each.shape[0] == 3 else others
        assert torch.equal(each[kept], clean[name][kept]), name


def test_indices_out_of_range_are_no_expert() -> None:
    """On a GPU the op does not check them, because that would wait for the device; memory must stay intact."""
    problem = NeuronProblem(tokens=13, experts=3, dtype=torch.float32, none_share=0.4)
    expected = problem.run(neuron_experts, torch.float32, backend="emulated")
    none = problem.index < 0
    problem.index[none] = torch.where(torch.arange(int(none.sum())) % 2 == 0, 3 << 40, -7)
    for name, value in problem.run(neuron_experts, torch.float32, backend="emulated").items():
        assert torch.equal(value, expected[name]), name


def test_the_forward_takes_two_launches() -> None:
    """Few pairs are sorted by one launch; then the neurons, which add up each token's choices."""
    problem = NeuronProblem(tokens=40, gated=True, with_bias=True, dtype=torch.bfloat16)
    stats()
    with torch.no_grad():
        arguments: dict[str, Any] = {**problem.inputs, "top_k_index": problem.index, "activation": "gelu"}
        neuron_experts(**arguments, backend="emulated")
    found = stats()
    assert found["launches"] == 2
    assert found["mma"] > 0


@settings(max_examples=15)
@given(data=st.data())
def test_random_problems(data: st.DataObject) -> None:
    NeuronProblem(
        tokens=data.draw(st.integers(0, 20)),
        experts=data.draw(st.sampled_from([1, 2, 5, 64])),
        top_k=data.draw(st.integers(1, 4)),
        width=data.draw(st.integers(1, 70)),
        out=data.draw(st.integers(1, 70)),
        neurons=data.draw(st.integers(1, 70)),
        gated=data.draw(st.booleans()),
        with_bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["gelu", "silu", "gelu_new"])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=data.draw(st.integers(0, 5)),
    ).check("emulated", 3)


def test_more_experts_than_choices_can_be_sorted_by_are_refused() -> None:
    problem = NeuronProblem(tokens=1, top_k=4, experts=3000, width=1, out=1, neurons=1, dtype=torch.float32)
    with pytest.raises(REFUSED, match="routing takes at most 2999 experts; got 3000"):
        NEURONS.ops.experts(*_raw(problem))


def test_more_neurons_are_a_reason_and_refused_by_the_kernels() -> None:
    reason = NEURONS.reasons(Request("neuron_experts", "cuda", torch.float32, {"neurons": MOST_UNITS + 1}))
    assert reason == ["it computes neuron_experts with at most 512 neurons of an expert, not with 513"]
    assert NEURONS.reasons(Request("neuron_experts", "cuda", torch.float32, {"neurons": MOST_UNITS})) == []
    problem = NeuronProblem(tokens=2, neurons=MOST_UNITS, dtype=torch.float32)
    problem.check("emulated")


def _raw(problem: NeuronProblem) -> tuple[Any, ...]:
    own = problem.inputs
    up, down = (value[:, None] for value in (own["up"], own["down"]) if value is not None)
    return own["x"], own["gates"], problem.index, up, down, None, None, None, True, "gelu"
