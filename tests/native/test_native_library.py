"""The library itself: what it is given, its threads are torch's, its refusals are clear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor

from mpoe_kernels import MPOShape, route
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.hidden_experts.native import forward as hidden_forward
from mpoe_kernels.hidden_experts.op import HiddenCall
from mpoe_kernels.linear import native as kernels
from mpoe_kernels.linear.native import linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.neurons.native import forward as neurons_forward
from mpoe_kernels.neurons.op import NeuronCall
from mpoe_kernels.routing import native as routing
from mpoe_kernels.routing.op import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall

SHAPE = MPOShape((4, 3, 1), (1, 5, 2), max_bond=3)


@pytest.fixture(autouse=True)
def _native(native_library: None) -> None:
    assert not NATIVE_LIBRARY.reasons


def forward_call(**changes: Any) -> ForwardCall:
    blocks, routing = random_blocks(SHAPE, 2, torch.float32), route(torch.tensor([[0], [1], [1]]), 2)
    call = ForwardCall(
        x=torch.randn(3, SHAPE.in_features),
        left=blocks.left,
        central=blocks.central,
        right=blocks.right,
        expert_offsets=routing.expert_offsets,
        bias=None,
        row_index=routing.token_of_slot,
        in_features=SHAPE.in_features,
        out_features=SHAPE.out_features,
        activation="none",
        strategy="separable",
        backend="native",
        save=True,
    )
    return replace(call, **changes)


def backward_call(**changes: Any) -> BackwardCall:
    shared = ForwardCall.__dataclass_fields__.keys() & BackwardCall.__dataclass_fields__.keys()
    given = {name: getattr(forward_call(), name) for name in shared}
    slots, bond = 3, given["right"].shape[1]
    rows = torch.randn(slots, SHAPE.out_features)
    own = {"grad": rows, "h": torch.randn(slots * 5, bond), "saved": rows, "need": [True] * 4 + [False]}
    return BackwardCall(**{**given, **own, **changes})


def plain(error: pytest.ExceptionInfo[ValueError]) -> None:
    assert type(error.value) is ValueError
    assert "csrc" not in str(error.value)
    assert ".cpp" not in str(error.value)


META = torch.empty(3, SHAPE.in_features, device="meta")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": META}, r"x must be on the CPU; got float32 \[3, 12\] on meta"),
        ({"x": torch.zeros(3, 13)}, r"x must be \[T, 12\]; got float32 \[3, 13\]"),
        ({"left": torch.zeros(2, 4, 1)}, "left, central and right must have 4 axes; got 3, 4, 4"),
        ({"left": torch.zeros(2, 4, 1, 9)}, r"blocks must be left \[E, iL, jL, a\]"),
        ({"central": torch.zeros(3, 3, 5, 3).double()}, "central must have the dtype of x"),
        ({"right": torch.zeros(3, 3, 1, 2)}, r"blocks must be left"),
        (
            {"in_features": 12, "out_features": 11},
            "blocks are smaller than the weight: they give 12 x 10, wanted are 12 x 11",
        ),
        ({"out_features": 0}, "in_features and out_features must be positive"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"strategy": "guess"}, "no native kernel for strategy guess"),
        ({"expert_offsets": torch.tensor([0, 1, 2, 3])}, r"expert_offsets must be \[3\]; got int64 \[4\]"),
        ({"expert_offsets": torch.tensor([[0, 1, 3]])}, r"expert_offsets must be \[E \+ 1\]; got int64 \[1, 3\]"),
        (
            {"expert_offsets": torch.tensor([0, 1, 4])},
            "expert_offsets must start at 0, not fall, and end at 3 at most; got 4",
        ),
        (
            {"expert_offsets": torch.tensor([0, 2, 1])},
            "expert_offsets must start at 0, not fall, and end at 3 at most; got 1",
        ),
        ({"expert_offsets": torch.tensor([1, 2, 3])}, "expert_offsets must start at 0, not fall"),
        ({"expert_offsets": torch.tensor([-1, 2, 3])}, "expert_offsets must start at 0, not fall"),
        ({"row_index": torch.tensor([0, 1, 3])}, r"row_index must lie in 0\.\.2; got 3"),
        ({"row_index": torch.tensor([[0, 1, 2]])}, "row_index must have 1 axes; got"),
        ({"bias": torch.zeros(4)}, r"bias must be float32 \[10\]; got float32 \[4\]"),
        ({"bias": torch.zeros(10).double()}, r"bias must be float32 \[10\]; got float64 \[10\]"),
    ],
)
def test_a_forward_is_refused_plainly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        linear_forward(forward_call(**changes))
    plain(error)


def test_only_the_dtypes_with_kernels_compute() -> None:
    call = forward_call()
    double = {name: getattr(call, name).double() for name in ("x", "left", "central", "right")}
    with pytest.raises(ValueError, match="x must be float32 or bfloat16; got float64") as error:
        linear_forward(replace(call, **double))
    plain(error)
    whole = {name: value.long() for name, value in double.items()}
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16, float16 or float64; got torch\.int64"):
        linear_forward(replace(call, **whole))


def test_separable_asks_for_its_shape() -> None:
    shape = MPOShape((2, 3, 2), (2, 5, 2), max_bond=3)
    blocks = random_blocks(shape, 2, torch.float32)
    changes = {"left": blocks.left, "central": blocks.central, "right": blocks.right, "out_features": 20}
    with pytest.raises(ValueError, match="strategy separable needs blocks with jL = iR = 1"):
        linear_forward(forward_call(**changes))


@pytest.fixture
def fresh_arguments() -> Iterator[None]:
    """Arguments that no other call made, and that no later call gets."""
    kernels._sizes.cache_clear()
    yield
    kernels._sizes.cache_clear()


@pytest.mark.usefixtures("fresh_arguments")
@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (("", "L", "C", "R"), "an operand of the chain must be 0, 1 or 2; got 3"),
        (({"L", "C"}, "R"), "the chain must meet left, central and right once each"),
    ],
)
def test_a_chain_in_no_order(operands: tuple, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers:
        def index(self, operand: str) -> int:
            return next(number for number, names in enumerate(operands) if operand in names)

    monkeypatch.setattr(kernels, "OPERANDS", Numbers())
    with pytest.raises(ValueError, match=message) as error:
        linear_forward(forward_call(strategy="chain"))
    plain(error)


@pytest.mark.usefixtures("fresh_arguments")
@pytest.mark.parametrize("order", permutations("LCR"), ids="".join)
def test_a_chain_takes_the_order_that_it_is_given(order: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner decides; every other order has bits of its own."""
    shape = MPOShape((3, 4, 5), (5, 3, 4), max_bond=7)
    blocks = random_blocks(shape, 2, torch.float32)
    same = {"left": blocks.left, "central": blocks.central, "right": blocks.right, "strategy": "chain", "save": False}
    call = forward_call(**same, x=torch.randn(3, 60), in_features=60, out_features=60)
    planned, *_ = linear_forward(call)
    was = BlockDims.of_shape(shape).chain_order
    kernels._sizes.cache_clear()
    monkeypatch.setattr(BlockDims, "chain_order", order)
    y, *_ = linear_forward(call)
    torch.testing.assert_close(y, planned)
    assert torch.equal(y, planned) == (order == was)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(2, 10)}, r"grad must be float32 \[3, 10\]; got float32 \[2, 10\]"),
        ({"grad": torch.zeros(3, 10).double()}, r"grad must be float32 \[3, 10\]; got float64 \[3, 10\]"),
        ({"activation": "gelu", "saved": torch.zeros(3, 9)}, r"saved must be float32 \[3, 10\]; got"),
        ({"h": torch.zeros(3, 3)}, r"h must be float32 \[15, 2\]; got float32 \[3, 3\]"),
        (
            {"expert_offsets": torch.tensor([0, 1, 4])},
            "expert_offsets must start at 0, not fall, and end at 3 at most; got 4",
        ),
    ],
)
def test_a_backward_is_refused_plainly(changes: dict[str, Any], message: str) -> None:
    linear_backward(backward_call())
    with pytest.raises(ValueError, match=message) as error:
        linear_backward(backward_call(**changes))
    plain(error)


def test_without_row_index_slots_are_rows() -> None:
    call = forward_call()
    there = replace(call, x=call.x[call.row_index], row_index=None)
    assert torch.equal(linear_forward(there)[0], linear_forward(call)[0])


def test_what_lies_apart_is_brought_together() -> None:
    """Strided operands, int64 offsets and int32 rows give the same result."""
    call = forward_call()
    apart = {name: apart_of(getattr(call, name)) for name in ("x", "left", "central", "right")}
    other = replace(call, **apart, expert_offsets=call.expert_offsets.long(), row_index=call.row_index.int())
    assert not other.x.is_contiguous()
    assert torch.equal(linear_forward(other)[0], linear_forward(call)[0])


def apart_of(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


ROUTING = route(torch.tensor([[0], [1], [0]]), 2)
ROWS, ONES = torch.randn(3, 4), torch.ones(3, 1)
GIVEN = (ROUTING.expert_offsets, ROUTING.token_of_slot, ROUTING.slot_of_token)


@pytest.mark.parametrize(
    ("kernel", "call", "message"),
    [
        (
            routing.route,
            RouteCall(torch.zeros(3, dtype=torch.int64), 2, None, None, "native"),
            "top_k_index must have 2 axes",
        ),
        (
            routing.route,
            RouteCall(torch.zeros(3, 0, dtype=torch.int64), 2, None, None, "native"),
            r"with K >= 1; got \[3, 0\]",
        ),
        (
            routing.route,
            RouteCall(torch.zeros(3, 1, dtype=torch.int64), 2, None, torch.ones(3), "native"),
            r"token_mask must be bool \[3\]",
        ),
        (routing.dispatch, DispatchCall(torch.zeros(3), *GIVEN, "native"), r"x must have 2 axes; got float32 \[3\]"),
        (routing.dispatch, DispatchCall(META, *GIVEN, "native"), "x must be on the CPU"),
        (
            routing.dispatch,
            DispatchCall(ROWS, torch.tensor([0, 4, 3]), *GIVEN[1:], "native"),
            "expert_offsets must start at 0, not fall",
        ),
        (
            routing.dispatch_backward,
            DispatchBackwardCall(torch.zeros(3), GIVEN[2], "native"),
            r"grad must have 2 axes; got float32 \[3\]",
        ),
        (
            routing.dispatch_backward,
            DispatchBackwardCall(ROWS.long(), GIVEN[2], "native"),
            "grad must be float32, float64, bfloat16 or float16; got int64",
        ),
        (
            routing.combine,
            CombineCall(ROWS, *GIVEN, torch.ones(3, 2), "native"),
            r"top_k_weights must be \[3, 1\]; got float32 \[3, 2\]",
        ),
        (
            routing.combine_backward,
            CombineBackwardCall(ROWS[:2], ROWS, *GIVEN[1:], ONES, True, True, "native"),
            r"grad must be float32 \[3, 4\]; got",
        ),
        (
            routing.combine_backward,
            CombineBackwardCall(ROWS.double(), ROWS, *GIVEN[1:], ONES, True, True, "native"),
            r"grad must be float32 \[3, 4\]; got",
        ),
    ],
)
def test_routing_is_refused_plainly(kernel: Any, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        kernel(call)
    plain(error)


U, GATES, EXPERT, CORE = (
    torch.randn(3, 4),
    torch.ones(3, 1),
    torch.zeros(3, 1, dtype=torch.int64),
    torch.ones(2, 1, 2, 2),
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (U[0], GATES, EXPERT, CORE, CORE, None, None, None, "relu"),
            r"u must have 2 axes and right 4; got float32 \[4\]",
        ),
        ((U, GATES, EXPERT, CORE, CORE, None, U, None, "relu"), "right_gate must be given with u_gate"),
        (
            (U, GATES[:2], EXPERT, CORE, CORE, None, None, None, "relu"),
            r"gates and top_k_index must be \[T, K\] with T = 3",
        ),
        ((U, GATES, EXPERT, CORE, CORE[:1], None, None, None, "relu"), r"left must be float32 \[2, 1, 2, 2\]; got"),
        ((U, GATES, EXPERT + 2, CORE, CORE, None, None, None, "relu"), r"top_k_index must lie in -1\.\.1; got 2"),
        ((U[:, :3], GATES, EXPERT, CORE, CORE, None, None, None, "relu"), "right must have blocks that divide 3"),
        ((U, GATES, EXPERT, CORE, CORE, None, None, None, "tanh"), "unknown activation tanh"),
    ],
)
def test_hidden_experts_are_refused_plainly(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        hidden_forward(HiddenCall(*arguments, "native"))
    plain(error)


def test_no_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="the native kernels got no memory for what they compute with"):
        NATIVE_LIBRARY.functions.dispatch(0, 0, 1 << 50, 4, 4, 4, None, None, None, None)


SIZES = kernels.linear_sizes(forward_call()) if not NATIVE_LIBRARY.reasons else None
MEMORY = [None] * 4


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("linear_forward", (SIZES, 1, 1, 2, None, MEMORY[:3], *MEMORY, None, None), "must be int32 or int64"),
        ("linear_forward", (SIZES, 1, 2, 4, 0, [0] * 3, 0, None, None, None, None, None), "as many slots as rows of x"),
        ("routed_ffn", ("float32", (1, 1, -1), 0, *MEMORY[:3], [], (SIZES, MEMORY), 0), "one projection of x, or two"),
        (
            "routed_ffn",
            ("float32", (1, 1, -1), 0, *MEMORY[:3], [(SIZES, MEMORY)], (SIZES, MEMORY), 0),
            "the projections of a network must fit each other",
        ),
        ("gating", ("float64", "float32", (1, 1, 1), 1, False, *[None] * 5), "x and weight must not be float64"),
        ("gating", ("float32", "float32", (1, 1, 1), 2, False, *[None] * 5), r"top_k must lie in 1\.\.1; got 2"),
        ("best_experts", ((1, 1, 2), None, None), r"top_k must lie in 1\.\.1; got 2"),
    ],
)
def test_the_library_refuses_what_no_caller_gives_it(function: str, arguments: tuple, message: str) -> None:
    if function == "linear_forward" and arguments[3] == 4:  # the first refusal needs no offsets, the second does
        offsets = torch.zeros(3, dtype=torch.int32)
        arguments = (*arguments[:6], offsets.data_ptr(), *arguments[7:])
    with pytest.raises(ValueError, match=message) as error:
        getattr(NATIVE_LIBRARY.functions, function)(*arguments)
    plain(error)


def test_addresses_are_integers() -> None:
    for wrong in (1.0, -1, "1", 1 << 64):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            NATIVE_LIBRARY.functions.combine("float32", (0, 1, 0, 1), wrong, None, None, None)


X, GATES, EXPERT, WEIGHTS = torch.ones(3, 4), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), torch.ones(2, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X[0], GATES, EXPERT, WEIGHTS, WEIGHTS, None, None, "relu"),
            r"x must have 2 axes, up and down 3; got",
        ),
        (
            (X, GATES[:2], EXPERT, WEIGHTS, WEIGHTS, None, None, "relu"),
            r"gates and top_k_index must be \[T, K\] with T = 3",
        ),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS[:1], None, None, "relu"), r"down must be float32 \[2, 5, 4\]; got"),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS, GATES, None, "relu"), r"bias must be float32 \[2, 5\]; got"),
        ((X, GATES, EXPERT + 2, WEIGHTS, WEIGHTS, None, None, "relu"), r"top_k_index must lie in -1\.\.1; got 2"),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS, None, None, "tanh"), "unknown activation tanh"),
        (
            (X.double(), GATES, EXPERT, WEIGHTS.double(), WEIGHTS.double(), None, None, "relu"),
            "x must be float32 or bfloat16; got float64",
        ),
    ],
)
def test_neuron_experts_are_refused_plainly(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neurons_forward(NeuronCall(*arguments, "native"))
