"""Experts of their own neurons: every kernel and gradient against the float64 reference, and the launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpoe_kernels import neuron_experts
from mpoe_kernels.neurons import triton as launch
from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall
from mpoe_kernels.testing.launches import recorded
from mpoe_kernels.triton.start import Tile
from tests.expert_problems import NeuronProblem

CASES: dict[str, dict[str, Any]] = {
    "decoding": {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0, "width": 48, "out": 40, "neurons": 16},
    "no full tile": {"tokens": 37, "experts": 3, "width": 33, "out": 35, "neurons": 17, "with_bias": True},
    "gated": {"tokens": 40, "top_k": 3, "experts": 4, "gated": True, "with_bias": True, "activation": "silu"},
    "sixteen choices": {"tokens": 5, "top_k": 16, "experts": 70, "neurons": 8, "width": 8, "out": 8},
    "all to one": {"tokens": 40, "top_k": 1, "experts": 1, "none_share": 0.0},
    "many neurons": {"tokens": 20, "experts": 2, "neurons": 130, "with_bias": True},
    "no expert": {"tokens": 4, "none_share": 1.0, "with_bias": True},
    "no token": {"tokens": 0, "gated": True, "with_bias": True},
}
MANY = {"a thousand experts": {**CASES["sixteen choices"], "experts": 1024}}  # half a minute in the interpreter


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    NeuronProblem(**CASES[name], dtype=torch.float32).check("triton")


@pytest.mark.parametrize("on_chip", [0, 1000])
@pytest.mark.parametrize("name", ["no full tile", "gated"])
def test_both_ways_in_small_tiles(name: str, on_chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hidden neurons on chip or not; several tiles of every size."""
    tiles = dict.fromkeys((2, 4), (Tile(16, 32 if on_chip else 16, 16, 4),))
    monkeypatch.setattr(launch, "TILES", dict.fromkeys(launch.TILES, tiles))
    monkeypatch.setattr(launch, "ON_CHIP", dict.fromkeys((2, 4), on_chip))
    NeuronProblem(**CASES[name], dtype=torch.float32).check("triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [*CASES, *MANY])
def test_more_values_and_gradients(name: str, gated: bool, dtype: torch.dtype) -> None:
    NeuronProblem(**{**(CASES | MANY)[name], "gated": gated}, dtype=dtype).check("triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neurons", [24, 130])
def test_half_precision(dtype: torch.dtype, neurons: int) -> None:
    NeuronProblem(tokens=18, experts=2, gated=True, with_bias=True, neurons=neurons, dtype=dtype).check("triton")


@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("gelu_new", True), ("none", False)])
def test_every_activation(activation: str, gated: bool) -> None:
    problem = NeuronProblem(tokens=9, experts=1, gated=gated, activation=activation, dtype=torch.float32)
    if activation == "relu":  # multiples of 1/4: rounding must not decide the side of zero
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check("triton")


def test_a_few_pairs_do_not_wait_for_one_another() -> None:
    with recorded("sm_90") as started:
        launch.forward(call_of(NeuronProblem(tokens=8, top_k=8, experts=64, dtype=torch.bfloat16)))
    assert [one.arguments["TOP_K"] for one in started] == [1, 1]


@pytest.mark.parametrize("kernel", launch.TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_chip", [0, 1000])
def test_a_row_of_nan_with_an_expert_stays_alone_on_every_tile(
    kernel: str, dtype: torch.dtype, on_chip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = NeuronProblem(tokens=40, experts=2, dtype=dtype, gated=True, none_share=0.0)
    monkeypatch.setattr(launch, "ON_CHIP", dict.fromkeys((2, 4), on_chip))
    for tile in launch.TILES[kernel][dtype.itemsize]:
        monkeypatch.setitem(launch.TILES[kernel], dtype.itemsize, (tile,))
        clean = problem.run(neuron_experts, dtype, backend="triton")
        kept = problem.inputs["x"].clone()  # type: ignore[union-attr]
        problem.inputs["x"][7] = float("nan")  # type: ignore[index]
        dirty = problem.run(neuron_experts, dtype, backend="triton")
        problem.inputs["x"] = kept
        others = torch.arange(40) != 7
        for name in ("o", "dx", "dgates"):
            assert torch.equal(dirty[name][others], clean[name][others]), (tile, name)
        assert dirty["o"][7].isnan().all()


def call_of(problem: NeuronProblem, need: list[bool] | None = None) -> Any:
    given = {**problem.inputs, "top_k_index": problem.index, "activation": problem.activation, "backend": "triton"}
    return NeuronCall(**given) if need is None else NeuronBackwardCall(**given, grad=problem.grad, need=need)


def test_each_gradient_alone() -> None:
    problem = NeuronProblem(tokens=5, experts=2, gated=True, with_bias=True, dtype=torch.float32)
    everything = launch.backward(call_of(problem, [True] * 6))
    for needed in problem.NAMES:
        alone = launch.backward(call_of(problem, [n == needed for n in problem.NAMES]))
        for name, value, whole in zip(problem.NAMES, alone, everything, strict=True):
            assert torch.equal(value, whole) if name == needed else value.numel() == 0


def names(problem: NeuronProblem, need: list[bool] | None = None) -> list[str]:
    """Kernels that a call launches on a GPU."""
    with recorded("sm_90") as started:
        (launch.forward if need is None else launch.backward)(call_of(problem, need))
    return [one.name for one in started]


@pytest.mark.parametrize("gated", [False, True])
def test_launches(gated: bool) -> None:
    problem = NeuronProblem(tokens=50, gated=gated, with_bias=True, dtype=torch.float32)
    assert names(problem) == ["sort_kernel", "neurons_fused_kernel"]
    large = NeuronProblem(tokens=50, neurons=200, gated=gated, dtype=torch.float32)
    rows = ["sort_kernel", "neurons_hidden_kernel", "neurons_rows_kernel"]
    assert names(large) == rows
    assert names(problem, [True] * 6) == [*rows, "neurons_weights_kernel"]
    assert names(problem, [True, False, False, False, False, False]) == rows
    assert names(problem, [False] * 6) == names(NeuronProblem(tokens=0)) == []


def test_few_tokens_share_an_idle_device() -> None:
    """Programs for parts of the columns, each of which computes the hidden activations."""
    sizes = {"top_k": 2, "experts": 8, "width": 256, "out": 4096, "neurons": 32, "none_share": 0.0}
    grids = []
    for tokens in (1, 4096):
        with recorded("sm_90") as started:
            launch.forward(call_of(NeuronProblem(tokens=tokens, dtype=torch.bfloat16, **sizes)))
        grids += [one.grid for one in started if one.name == "neurons_fused_kernel"]
    (_, parts), (tiles, one) = grids
    assert parts > 32
    assert (tiles > 128, one) == (True, 1)
