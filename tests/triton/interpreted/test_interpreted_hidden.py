"""Hidden-side experts: every kernel and gradient against the float64 reference, and the launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from mpoe_kernels import hidden_experts
from mpoe_kernels.hidden_experts import triton as launch
from mpoe_kernels.routing.triton import SortedSlots
from mpoe_kernels.testing.launches import recorded
from mpoe_kernels.triton.start import Tile
from tests.expert_problems import HiddenProblem, arguments_of

CASES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "top_k": 1, "experts": 1},
    "decoding": {"tokens": 1, "top_k": 4, "experts": 8, "groups": 1, "none_share": 0.0, "gated": True},
    "no full tile": {"tokens": 37, "experts": 3, "groups": 2, "block": 5, "per_group": True, "with_bias": True},
    "parts of a block": {"tokens": 19, "experts": 2, "groups": 1, "block": 24, "gated": True, "with_bias": True},
    "shared by groups": {"tokens": 20, "experts": 2, "groups": 5, "block": 4, "with_bias": True},
    "sixteen choices": {"tokens": 5, "top_k": 16, "experts": 70, "groups": 1, "block": 4},
    "all to one": {"tokens": 40, "top_k": 1, "experts": 1, "groups": 2, "none_share": 0.0},
    "no expert": {"tokens": 4, "none_share": 1.0, "with_bias": True, "groups": 1},
    "no token": {"tokens": 0, "gated": True, "with_bias": True},
}


@pytest.fixture(params=[2, 1000])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 units; programs of rows take one group, or with many programs several."""
    tiles = (Tile(16, 16, 16, 4),)
    monkeypatch.setattr(launch, "TILES", dict.fromkeys(launch.TILES, dict.fromkeys((2, 4), tiles)))
    monkeypatch.setattr(launch, "_share", lambda groups, *_: min(groups, request.param))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    HiddenProblem(**CASES[name], dtype=torch.float32).check("triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["no full tile", "parts of a block"])
def test_several_tiles_and_parts(name: str) -> None:
    HiddenProblem(**CASES[name], dtype=torch.float32).check("triton")


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_more_values_and_gradients(name: str, gated: bool) -> None:
    for per_group in (False, True):
        case = {**CASES[name], "gated": gated, "per_group": per_group}
        HiddenProblem(**case, dtype=torch.bfloat16).check("triton")
    HiddenProblem(**case, dtype=torch.float32).check("triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    HiddenProblem(tokens=18, experts=2, groups=1, block=16, gated=True, with_bias=True, dtype=dtype).check("triton")


@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", False), ("gelu_new", False), ("none", False), ("silu", True)]
)
def test_every_activation(activation: str, gated: bool) -> None:
    problem = HiddenProblem(tokens=9, experts=1, groups=1, gated=gated, activation=activation, dtype=torch.float32)
    if activation == "relu":  # multiples of 1/4: rounding must not decide the side of zero
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check("triton")


def test_an_expert_chosen_twice_and_rows_of_nan_without_one() -> None:
    problem = HiddenProblem(tokens=17, experts=2, groups=1, dtype=torch.float32, none_share=0.0)
    problem.index[:, 1] = problem.index[:, 0]
    problem.index[3:6] = -1
    problem.check("triton")
    clean = problem.run(hidden_experts, torch.float32, backend="triton")
    for name in ("u", "gates"):
        problem.inputs[name][3:6] = float("nan")  # type: ignore[index]
    dirty = problem.run(hidden_experts, torch.float32, backend="triton")
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("kernel", launch.TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_nan_with_an_expert_stays_alone_on_every_tile(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = HiddenProblem(tokens=40, experts=2, groups=2, block=8, dtype=dtype, gated=True, none_share=0.0)
    for tile in launch.TILES[kernel][dtype.itemsize]:
        monkeypatch.setitem(launch.TILES[kernel], dtype.itemsize, (tile,))
        clean = problem.run(hidden_experts, dtype, backend="triton")
        kept = problem.inputs["u"].clone()  # type: ignore[union-attr]
        problem.inputs["u"][7] = float("nan")  # type: ignore[index]
        dirty = problem.run(hidden_experts, dtype, backend="triton")
        problem.inputs["u"] = kept
        others = torch.arange(40) != 7
        for name in ("o", "du", "dgates", "du_gate"):
            assert torch.equal(dirty[name][others], clean[name][others]), (tile, name)
        assert dirty["o"][7].isnan().all()


@pytest.mark.parametrize("backward", [False, True])
def test_every_program_says_that_its_rows_are_written(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for one that does not would wait forever."""
    turns: list[dict[str, torch.Tensor]] = []
    made = SortedSlots.turns
    monkeypatch.setattr(SortedSlots, "turns", lambda *given: turns.append(made(*given)) or turns[-1])
    problem = HiddenProblem(tokens=37, experts=3, top_k=3, groups=2, none_share=0.3, gated=True, dtype=torch.float32)
    launch.backward(problem.backward_call([True] * 7)) if backward else launch.forward(problem.call())
    (found,) = turns
    used = found["tickets"] > 0
    assert used.any()
    assert (found["done"] == used * 37 * 3).all()


def test_each_gradient_alone() -> None:
    problem = HiddenProblem(tokens=3, experts=2, groups=1, gated=True, with_bias=True, dtype=torch.float32)
    everything = launch.backward(problem.backward_call([True] * 7))
    for needed in problem.NAMES:
        alone = launch.backward(problem.backward_call([n == needed for n in problem.NAMES]))
        for name, value, whole in zip(problem.NAMES, alone, everything, strict=True):
            assert torch.equal(value, whole) if name == needed else value.numel() == 0


def test_opcheck() -> None:
    problem = HiddenProblem(tokens=2, experts=2, top_k=1, groups=1, gated=True, with_bias=True, dtype=torch.float32)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.mpoe.hidden_experts.default, arguments_of(problem.call("triton")), test_utils=quick)
    call = arguments_of(problem.backward_call([True, False, True, True, True, False, True], "triton"))
    opcheck(torch.ops.mpoe.hidden_experts_backward.default, call, test_utils=quick)


@pytest.mark.slow
def test_opcheck_of_everything() -> None:
    problem = HiddenProblem(tokens=3, groups=1, gated=True, with_bias=True, dtype=torch.float32)
    opcheck(torch.ops.mpoe.hidden_experts.default, arguments_of(problem.call("triton")))


def names(problem: HiddenProblem, need: list[bool] | None) -> list[str]:
    """Kernels that a call launches on a GPU: the forward, or the needed gradients."""
    with recorded("sm_90") as started:
        if need is None:
            launch.forward(problem.call())
        else:
            launch.backward(problem.backward_call(need))
    return [one.name for one in started]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
def test_launches(per_group: bool, gated: bool) -> None:
    sizes = {"tokens": 50, "experts": 8, "groups": 3, "block": 4}
    problem = HiddenProblem(**sizes, per_group=per_group, gated=gated, with_bias=True, dtype=torch.float32)
    rows = ["sort_kernel", "hidden_rows_kernel"]
    assert names(problem, None) == rows
    assert names(problem, [True] * 7) == [*rows, "hidden_blocks_kernel"]
    assert names(problem, [True, False, False, False, False, True, False]) == rows
    assert names(problem, [False, False, True, True, True, False, True]) == ["sort_kernel", "hidden_blocks_kernel"]


def test_no_token_is_no_launch() -> None:
    problem = HiddenProblem(tokens=0)
    assert names(problem, None) == names(problem, [True] * 7) == []
