"""Hidden-side experts: every tile and gradient against the float64 reference, and the number of launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from mpoe_kernels import hidden_experts
from mpoe_kernels.hidden_experts import triton as launch
from mpoe_kernels.hidden_experts.triton.tiles import Tile, best_row_tile, row_cost, shipped_tiles
from mpoe_kernels.testing.launches import recorded
from tests.expert_problems import HiddenProblem, arguments_of

TILES = {"all rows": Tile(16, 16, 16, 16, 4), "collected": Tile(32, 16, 32, 16, 4)}
CASES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "top_k": 1, "experts": 1},
    "decoding": {"tokens": 1, "top_k": 4, "experts": 8, "groups": 1, "none_share": 0.0, "gated": True},
    "no full tile": {"tokens": 37, "experts": 3, "groups": 2, "block": 5, "per_group": True, "with_bias": True},
    "parts of a block": {"tokens": 19, "experts": 2, "groups": 1, "block": 24, "gated": True, "with_bias": True},
    "shared by groups": {"tokens": 20, "experts": 2, "groups": 5, "block": 4, "with_bias": True},
    "no expert": {"tokens": 4, "none_share": 1.0, "with_bias": True, "groups": 1},
    "no token": {"tokens": 0, "gated": True, "with_bias": True},
}


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Every row kernel uses this tile; with shared blocks, the groups are split into three shares."""
    found = TILES[request.param]
    monkeypatch.setattr(launch, "best_row_tile", lambda *_, **__: found)
    monkeypatch.setattr(launch, "units_of", lambda _: 2)
    return found


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, tile: Tile) -> None:
    if tile.collects or name in ("no full tile", "decoding"):
        HiddenProblem(**CASES[name], dtype=torch.float32).check("triton")


@pytest.mark.slow
@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_more_values_and_gradients(name: str, gated: bool) -> None:
    for per_group in (False, True):
        case = {**CASES[name], "gated": gated, "per_group": per_group}
        HiddenProblem(**case, dtype=torch.bfloat16).check("triton")
    HiddenProblem(**case, dtype=torch.float32).check("triton")


def test_half_precision(tile: Tile) -> None:
    dtype = torch.bfloat16 if tile.collects else torch.float16
    HiddenProblem(tokens=18, experts=2, groups=1, block=16, gated=True, with_bias=True, dtype=dtype).check("triton")


@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", False), ("gelu_new", False), ("none", False), ("silu", True)]
)
def test_every_activation(activation: str, gated: bool) -> None:
    problem = HiddenProblem(tokens=9, experts=1, groups=1, gated=gated, activation=activation, dtype=torch.float32)
    if activation == "relu":  # multiples of 1/4: rounding must not decide the side of zero
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check("triton")


@pytest.mark.usefixtures("tile")
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


def test_each_gradient_alone() -> None:
    problem = HiddenProblem(tokens=3, experts=2, groups=1, gated=True, with_bias=True, dtype=torch.float32)
    everything = launch.backward(problem.backward_call([True] * 7))
    for needed in HiddenProblem.NAMES:
        alone = launch.backward(problem.backward_call([n == needed for n in HiddenProblem.NAMES]))
        for name, value, whole in zip(HiddenProblem.NAMES, alone, everything, strict=True):
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
@pytest.mark.parametrize("tokens", [1, 300])
def test_forward_is_one_launch_and_backward_at_most_three(tokens: int, per_group: bool, gated: bool) -> None:
    sizes = {"tokens": tokens, "experts": 8, "groups": 3, "block": 4}
    problem = HiddenProblem(**sizes, per_group=per_group, gated=gated, with_bias=True, dtype=torch.float32)
    assert names(problem, None) == ["hidden_forward_kernel"]
    backward = ["hidden_rows_kernel", "hidden_blocks_kernel", "hidden_sums_kernel"]
    assert names(problem, [True] * 7) == backward
    assert names(problem, [True, False, False, False, False, True, False]) == backward[:1]
    assert names(problem, [False, False, True, True, True, False, False])[0] == backward[0], "it sorts the slots"
    if per_group:  # each group's gradients are complete
        assert names(problem, [True, False, True, True, True, True, True]) == backward[:2]


def test_no_token_is_no_launch() -> None:
    problem = HiddenProblem(tokens=0)
    assert names(problem, None) == names(problem, [True] * 7) == []


def chosen(tokens: int, experts: int, top_k: int) -> Tile:
    sizes = {"groups": 48, "block": 64, "products": 2}
    tiles = shipped_tiles("forward", "sm_90", torch.bfloat16, 64)
    return best_row_tile(tiles, 132, tokens=tokens, experts=experts, top_k=top_k, **sizes)


def test_rows_are_collected_where_many_experts_share_them() -> None:
    assert not chosen(4096, 1, 1).collects
    assert not chosen(4096, 4, 4).collects
    assert chosen(4096, 8, 1).collects
    assert chosen(4096, 64, 2).tokens == 256
    assert chosen(1, 64, 8).tokens == 16
    assert row_cost(chosen(4096, 8, 2), 8, 2, 64, 2) < row_cost(Tile(64, 64, 64, 64, 4), 8, 2, 64, 2)
