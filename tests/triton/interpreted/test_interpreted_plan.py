"""Launch plans: the same bits as without a plan, one recording per problem, and what makes a problem different."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoe_kernels import grouped_mpo_linear
from mpoe_kernels.linear.call import ForwardCall
from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.plan import ALIGNMENT
from mpoe_kernels.linear.triton import configs, kernels, plan
from mpoe_kernels.linear.triton.configs import Tile
from mpoe_kernels.linear.triton.plan import planned
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks
from mpoe_kernels.triton.tuning import autotuned

from .linear_runs import Case, strategies_of

WALK = Path(__file__).resolve().parents[3] / "tools" / "way_of_a_call.py"


def call_of(case: Case, strategy: str) -> ForwardCall:
    return ForwardCall(*case._common(strategy), True)


def recordings() -> int:
    return len(plan._PLANS)


@pytest.mark.parametrize("name", [pytest.param("light", marks=pytest.mark.exhaustive), "separable"])
def test_the_same_bits_as_without_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SMALL_SHAPES[name], tokens=4, experts=2, capacity=3)
    for strategy in strategies_of(case.shape):
        by_plan = case.run(strategy)
        with monkeypatch.context() as without:
            without.setattr(kernels, "planned", lambda kernel, *arguments: kernel(*arguments))
            directly = case.run(strategy)
        assert all(torch.equal(p, q) for p, q in zip(by_plan, directly, strict=True))


def test_a_problem_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    walk = steps.forward_by_steps
    monkeypatch.setattr(steps, "forward_by_steps", lambda *arguments: walked.append(1) or walk(*arguments))
    case = Case(SMALL_SHAPES["light"], tokens=5, experts=2)
    for _ in range(3):
        case.x = torch.randn_like(case.x)
        y, _, _ = case.forward("chain")
        torch.testing.assert_close(y, case.reference(torch.float32)[0], rtol=1e-4, atol=1e-4)
    assert len(walked) == recordings() == 1


def test_how_tensors_lie_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call with dense tensors finds its plan at once; other calls are made dense every time."""
    call = call_of(Case(SMALL_SHAPES["light"], tokens=5, experts=2), "chain")
    asked, prepared = [], steps.prepared
    monkeypatch.setattr(steps, "prepared", lambda *arguments: asked.append(1) or prepared(*arguments))
    first = kernels.forward_by_steps(call)
    assert asked
    asked.clear()
    assert torch.equal(kernels.forward_by_steps(call)[0], first[0])
    assert not asked
    apart = replace(call, x=torch.stack([call.x, call.x], 2)[:, :, 0])
    for _ in range(2):
        assert torch.equal(kernels.forward_by_steps(apart)[0], first[0])
    assert recordings() == 1


def test_plans_that_are_kept_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_PLANS", 2)
    call = call_of(Case(SMALL_SHAPES["light"], tokens=5, experts=2), "chain")
    for strategy in ("chain", "rebuild", "half_left", "half_right"):
        kernels.forward_by_steps(replace(call, strategy=strategy))
        assert 0 < recordings() <= 2


def wider(x: Tensor, times: int) -> Tensor:
    """The same rows, further apart."""
    return torch.cat([x] * times, 1)[:, : x.shape[1]]


def changes(call: ForwardCall) -> dict[str, dict[str, Any]]:
    """Changes to ``call`` that lead to different launches."""
    x = call.x
    assert call.row_index is not None
    return {
        "rows": {"x": torch.cat([x, x])},
        "slots": {"row_index": torch.cat([call.row_index, call.row_index])},
        "strides": {"x": wider(x, 2)},
        "address": {"x": torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)},
        "dtype of offsets": {"expert_offsets": call.expert_offsets.long()},
        "no bias": {"bias": None},
        "no index": {"row_index": None, "x": x[call.row_index]},
        "activation": {"activation": "silu"},
        "nothing saved": {"save": False, "activation": "silu"},
        "strategy": {"strategy": "rebuild"},
        "order of a block": {"left": call.left.transpose(1, 2).contiguous().transpose(1, 2)},
    }


@pytest.mark.parametrize("changed", changes(call_of(Case(SMALL_SHAPES["light"]), "chain")))
def test_what_launches_differently_is_another_problem(changed: str) -> None:
    case = Case(SMALL_SHAPES["light"], tokens=5, experts=2, top_k=1, capacity=None, activation="relu")
    call = call_of(case, "chain")
    kernels.forward_by_steps(call)
    other = replace(call, **changes(call)[changed])
    for _ in range(2):
        for found, wanted in zip(
            kernels.forward_by_steps(other), kernels._forward_by_steps(steps.prepared(other), False), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert recordings() == 2
    kernels.forward_by_steps(call)
    assert recordings() == 2


def test_rows_at_other_distances_are_another_problem() -> None:
    """Row strides make a problem different, except those of an axis with a single element."""
    call = call_of(Case(SMALL_SHAPES["light"], tokens=5, experts=2), "chain")
    wanted = kernels.forward_by_steps(call)[0]
    for times in (2, 3, 2):
        assert torch.equal(kernels.forward_by_steps(replace(call, x=wider(call.x, times)))[0], wanted)
    assert recordings() == 3
    assert call.row_index is not None
    one = replace(call, x=call.x[:1].clone(), row_index=torch.zeros_like(call.row_index))
    wanted = kernels.forward_by_steps(one)[0]
    assert torch.equal(kernels.forward_by_steps(replace(one, x=wider(one.x, 2)))[0], wanted)
    assert recordings() == 4


def test_launches_get_the_addresses_of_all_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of the call's tensors, the results and the scratch memory; the interpreter never uses them."""
    seen: list[tuple[list[Tensor], list[int]]] = []
    monkeypatch.setattr(plan, "start_steps", lambda steps, tensors, addresses: seen.append((tensors, addresses)))
    call = call_of(Case(SMALL_SHAPES["light"], tokens=5, experts=2), "rebuild")
    results = kernels.forward_by_steps(call)
    ((tensors, addresses),) = seen
    assert addresses == [tensor.data_ptr() for tensor in tensors]
    given = [value for value in vars(call).values() if isinstance(value, Tensor)]
    assert [id(tensor) for tensor in tensors[:-1]] == [id(tensor) for tensor in (*given, *results)]
    (kept,) = plan._PLANS.values()
    assert (tensors[-1].dtype, tensors[-1].shape) == (torch.uint8, (kept.scratch,))
    assert tensors[-1].untyped_storage().nbytes() == kept.scratch


def test_each_set_of_gradients_is_a_problem() -> None:
    case = Case(SMALL_SHAPES["light"], tokens=5, experts=2)
    y, h, z = case.forward("chain")
    before = recordings()
    for need in ([True] * 5, [True, True, False, True, True], [True] * 5):
        case.backward("chain", y, h, z, need)
    assert recordings() == before + 2


def test_slots_of_tokens_take_the_place_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two choices per token, some of them dropped."""
    case = Case(SMALL_SHAPES["separable"], tokens=7, experts=3, top_k=2, capacity=3)
    assert (case.routing.slot_of_token < 0).any()
    y, h, z = case.forward("separable")
    sorted_rows = case.backward("separable", y, h, z, [True] * 5, inverse=False)
    monkeypatch.setattr(kernels, "slots_by_token", lambda *_: pytest.fail("sorts"))
    monkeypatch.setattr(torch, "sort", lambda *_, **__: pytest.fail("sorts"))
    collected = case.backward("separable", y, h, z, [True] * 5)
    for found, wanted in zip(collected, sorted_rows, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_temporaries_lie_in_one_piece_of_memory_of_two_weights_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of experts."""
    case = Case(SMALL_SHAPES["paper"], experts=6)
    pieces = []
    empty = torch.empty_strided

    def counting(size: tuple[int, ...], *strides: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8:
            pieces.extend(size)
        return empty(size, *strides, **options)

    monkeypatch.setattr(torch, "empty_strided", counting)
    case.forward("rebuild")
    (piece,) = pieces
    weight = BlockDims.of_shape(case.shape).weight_elements * case.x.itemsize
    assert weight < piece <= 2 * weight + 2 * ALIGNMENT


def test_a_recording_refuses_what_it_would_not_repeat() -> None:
    case = Case(SMALL_SHAPES["light"])
    with pytest.raises(RuntimeError, match=r"a launch plan holds launches only; its recording met aten\.add"):
        planned(lambda call: (call.x + 1,), call_of(case, "chain"))


def test_no_slots() -> None:
    case = Case(SMALL_SHAPES["light"], tokens=0, experts=2)
    for strategy in strategies_of(case.shape):
        _, dx, *blocks, dbias = case.run(strategy)
        assert dx.shape == case.x.shape
        assert not any(gradient.any() for gradient in (*blocks, dbias))


@pytest.mark.parametrize("strategy", ["rebuild", "chain", None])
@pytest.mark.parametrize("name", ["bias", "row_index", "expert_offsets"])
def test_arguments_that_lie_apart(name: str, strategy: str | None) -> None:
    """Every other element of a longer tensor; reading the elements in between would change the result."""
    shape = SMALL_SHAPES["light"]
    arguments = {
        "bias": torch.randn(shape.out_features),
        "row_index": torch.tensor([0, 2, 1, 4, 3]),
        "expert_offsets": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    blocks, x = random_blocks(shape, 2, torch.float32), torch.randn(5, shape.in_features)

    def run(**changed: Tensor) -> Tensor:
        options = {"backend": "triton", "strategy": strategy, "activation": "gelu"}
        return grouped_mpo_linear(x, blocks, **{**arguments, **changed}, **options)

    apart = torch.stack([arguments[name], torch.zeros_like(arguments[name])], 1)[:, 0]
    assert torch.equal(run(**{name: apart}), run())


def test_tiles_are_measured_by_the_first_call_and_then_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiles = (Tile(64, 64, 64, 4, 1), Tile(16, 16, 16, 4, 1))
    monkeypatch.setitem(configs.TILES, "interpreter", dict.fromkeys(("rows", "outer", "blocks", "weights"), tiles))
    configs._fitted_tiles.cache_clear()
    measured = []

    def bench(run: Any) -> float:
        measured.append(run.args[-1])
        run()
        return 1.0 if run.args[-1].m == 16 else 2.0

    case = Case(SMALL_SHAPES["paper"], tokens=40, experts=2, capacity=None)
    plain = case.run("rebuild")
    with autotuned(bench, tmp_path / "tiles.json"):
        first = case.run("rebuild")
        count, before = len(measured), recordings()
        assert count > 0
        second = case.run("rebuild")
        assert len(measured) == count
        case.run("rebuild")
        assert recordings() == before + 2, "forward and backward, recorded after they were measured"
    configs._fitted_tiles.cache_clear()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    for found, wanted in zip(first, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_way_of_a_call_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the backend's table on; a return is a call into a file that was left before."""
    spec = importlib.util.spec_from_file_location("way_of_a_call", WALK)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(plan, "start_steps", lambda *_: None)
    for strategy in ("separable", "rebuild"):
        for walk in tool.walks("triton", strategy, cold=False).values():
            own = walk.steps[walk.steps.index("backends/triton.py") :]
            files = set(own) - {"linear/op.py"}  # the caller
            assert "linear/triton/plan.py" in files
            assert len(files) <= 6
            assert len(own) - len(set(own)) <= 3
