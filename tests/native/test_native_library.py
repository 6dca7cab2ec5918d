"""The library itself: its refusals are clear, its conversions exact; ties and NaN in the router."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.testing import assert_close

from mpoe_kernels import MPOShape, Routing, combine, dispatch, route
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.experts.native import forward as hidden_forward
from mpoe_kernels.experts.native import forward as neurons_forward
from mpoe_kernels.experts.op import HiddenCall, NeuronCall
from mpoe_kernels.linear import native as kernels
from mpoe_kernels.linear.native import linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.routing import native as routing
from mpoe_kernels.routing.gating import best_experts, native_gating
from mpoe_kernels.routing.op import RouteCall
from tests.assertions import refuses
from tests.cases import in_half_precision, in_two_dtypes
from tests.expert_problems import HiddenProblem

SHAPE = MPOShape((4, 3, 1), (1, 5, 2), max_bond=3)


def forward_call(**changes):
    blocks, routing = (
        random_blocks(SHAPE, 2, torch.float32),
        route(torch.tensor([[0], [1], [1]]), 2),
    )
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


def backward_call():
    shared = ForwardCall.__dataclass_fields__.keys() & BackwardCall.__dataclass_fields__.keys()
    given = {name: getattr(forward_call(), name) for name in shared}
    slots, bond = 3, given["right"].shape[1]
    rows = torch.randn(slots, SHAPE.out_features)
    return BackwardCall(
        **given, grad=rows, h=torch.randn(slots * 5, bond), saved=rows, need=[True] * 4 + [False]
    )


def plain(error):
    assert type(error.value) is ValueError
    assert "csrc" not in str(error.value)
    assert ".cpp" not in str(error.value)


def offsets(*values):
    return torch.tensor(values)


META = torch.empty(3, SHAPE.in_features, device="meta")
OTHER = random_blocks(MPOShape((2, 3, 2), (2, 5, 2), max_bond=3), 2, torch.float32)
NOT_SEPARABLE = {
    "left": OTHER.left,
    "central": OTHER.central,
    "right": OTHER.right,
    "out_features": 20,
}
DOUBLE = {
    name: getattr(forward_call(), name).double() for name in ("x", "left", "central", "right")
}
ROUTING = route(torch.tensor([[0], [1], [0]]), 2)
ROWS, ONES, CHOSEN = torch.randn(3, 4), torch.ones(3, 1), torch.zeros(3, 1).long()
GIVEN = (ROUTING.expert_offsets, ROUTING.token_of_slot, ROUTING.slot_of_token)
CORE, WEIGHTS = torch.ones(2, 1, 2, 2), torch.ones(2, 5, 4)
# A kernel and a call that it takes; below, what of the call is exchanged, and what the kernel says.
KERNELS = {
    "forward": (linear_forward, forward_call()),
    "backward": (linear_backward, backward_call()),
    "route": (routing.route, RouteCall(CHOSEN, 2, None, None, "native")),
    "hidden": (
        hidden_forward,
        HiddenCall(ROWS, ONES, CHOSEN, CORE, CORE, None, None, None, "relu", "native"),
    ),
    "neurons": (
        neurons_forward,
        NeuronCall(ROWS, ONES, CHOSEN, WEIGHTS, WEIGHTS, None, None, "relu", "native"),
    ),
}
REFUSED = [
    ("forward", {"x": META}, r"x must be on the CPU; got float32 \[3, 12\] on meta"),
    (
        "forward",
        {"out_features": 11},
        "blocks are smaller than the weight: they give 12 x 10, wanted are 12 x 11",
    ),
    ("forward", {"out_features": 0}, "in_features and out_features must be positive"),
    ("forward", {"activation": "tanh"}, "unknown activation tanh"),
    ("forward", {"strategy": "guess"}, "no native kernel for strategy guess"),
    ("forward", NOT_SEPARABLE, "strategy separable needs blocks with jL = iR = 1"),
    ("forward", DOUBLE, "x must be float32 or bfloat16; got float64"),
    (
        "forward",
        {name: value.long() for name, value in DOUBLE.items()},
        r"dtype must be float32, bfloat16, float16 or float64; got torch\.int64",
    ),
    (
        "forward",
        {"expert_offsets": offsets(0, 1, 4)},
        "must start at 0, not fall, and end at 3 at most; got 4",
    ),
    ("forward", {"row_index": offsets(0, 1, 3)}, r"row_index must lie in 0\.\.2; got 3"),
    ("backward", {"h": torch.zeros(3, 3)}, r"h must be float32 \[15, 2\]; got float32 \[3, 3\]"),
    ("route", {"top_k_index": CHOSEN[:, :0]}, r"with K >= 1; got \[3, 0\]"),
    ("route", {"num_experts": 0}, "num_experts must be"),
    ("hidden", {"u": ROWS[:, :3]}, "right must have blocks that divide 3"),
    ("hidden", {"u_gate": ROWS}, "right_gate must be given with u_gate"),
    (
        "neurons",
        {"x": ROWS.double(), "up": WEIGHTS.double(), "down": WEIGHTS.double()},
        "x must be float32 or bfloat16; got float64",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused_plainly(number):
    name, changes, message = REFUSED[number]
    kernel, call = KERNELS[name]
    kernel(call)
    with pytest.raises(ValueError, match=message) as error:
        kernel(replace(call, **changes))
    plain(error)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_blocks_without_elements(sizes):
    none = {
        "left": torch.ones(sizes),
        "central": torch.ones(sizes[3], 1, 1, 1),
        "right": torch.ones(sizes[0], 1, 1, 1),
    }
    where = {"expert_offsets": torch.zeros(sizes[0] + 1, dtype=torch.int32), "row_index": None}
    call = forward_call(
        **none, **where, x=torch.ones(3, 2), in_features=2, out_features=3, strategy="rebuild"
    )
    refuses(ValueError, r"^blocks must not have an axis of size 0$", linear_forward, call)


@pytest.fixture
def fresh_arguments():
    """Arguments that no other call made, and that no later call gets."""
    kernels._sizes.cache_clear()
    yield
    kernels._sizes.cache_clear()


@pytest.mark.usefixtures("fresh_arguments")
@pytest.mark.parametrize(
    "operands, message",
    [
        (("", "L", "C", "R"), "an operand of the chain must be 0, 1 or 2; got 3"),
        (({"L", "C"}, "R"), "the chain must meet left, central and right once each"),
    ],
)
def test_a_chain_in_no_order(operands, message, monkeypatch):
    class Numbers:
        def index(self, operand):
            return next(number for number, names in enumerate(operands) if operand in names)

    monkeypatch.setattr(kernels, "OPERANDS", Numbers())
    with pytest.raises(ValueError, match=message) as error:
        linear_forward(forward_call(strategy="chain"))
    plain(error)


@pytest.mark.usefixtures("fresh_arguments")
@pytest.mark.parametrize("order", list(permutations("LCR")), ids="".join)
def test_a_chain_takes_the_order_that_it_is_given(order, monkeypatch):
    """The planner decides; every other order has bits of its own."""
    shape = MPOShape((3, 4, 5), (5, 3, 4), max_bond=7)
    blocks = random_blocks(shape, 2, torch.float32)
    same = {
        "left": blocks.left,
        "central": blocks.central,
        "right": blocks.right,
        "strategy": "chain",
        "save": False,
    }
    call = forward_call(**same, x=torch.randn(3, 60), in_features=60, out_features=60)
    planned, *_ = linear_forward(call)
    was = BlockDims.of_shape(shape).chain_order
    kernels._sizes.cache_clear()
    monkeypatch.setattr(BlockDims, "chain_order", order)
    y, *_ = linear_forward(call)
    assert_close(y, planned)
    assert torch.equal(y, planned) == (order == was)


def test_no_memory_is_a_memory_error():
    refuses(
        MemoryError,
        "the native kernels got no memory for what they compute with",
        NATIVE_LIBRARY.functions.dispatch,
        0,
        0,
        1 << 50,
        4,
        4,
        4,
        None,
        None,
        None,
        None,
    )


SIZES = kernels.linear_sizes(forward_call()) if not NATIVE_LIBRARY.reasons else None
MEMORY = [None] * 4


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (
            "linear_forward",
            (SIZES, 1, 1, 2, None, MEMORY[:3], *MEMORY, None, None),
            "must be int32 or int64",
        ),
        (
            "linear_forward",
            (SIZES, 1, 2, 4, 0, [0] * 3, 0, None, None, None, None, None),
            "as many slots as rows of x",
        ),
        (
            "routed_ffn",
            ("float32", (1, 1, -1), 0, *MEMORY[:3], [], (SIZES, MEMORY), 0),
            "one projection of x, or two",
        ),
        (
            "routed_ffn",
            ("float32", (1, 1, -1), 0, *MEMORY[:3], [(SIZES, MEMORY)], (SIZES, MEMORY), 0),
            "the projections of a network must fit each other",
        ),
        (
            "gating",
            ("float64", "float32", (1, 1, 1), 1, False, *[None] * 5),
            "x and weight must not be float64",
        ),
        (
            "gating",
            ("float32", "float32", (1, 1, 1), 2, False, *[None] * 5),
            r"top_k must lie in 1\.\.1; got 2",
        ),
        ("best_experts", ((1, 1, 2), None, None), r"top_k must lie in 1\.\.1; got 2"),
    ],
)
def test_the_library_refuses_what_no_caller_gives_it(function, arguments, message):
    if (
        function == "linear_forward" and arguments[3] == 4
    ):  # the first refusal needs no offsets, the second does
        offsets = torch.zeros(3, dtype=torch.int32)
        arguments = (*arguments[:6], offsets.data_ptr(), *arguments[7:])
    with pytest.raises(ValueError, match=message) as error:
        getattr(NATIVE_LIBRARY.functions, function)(*arguments)
    plain(error)


def test_addresses_are_integers():
    for wrong in (1.0, -1, "1", 1 << 64):
        refuses(
            TypeError,
            "incompatible function arguments",
            NATIVE_LIBRARY.functions.combine,
            "float32",
            (0, 1, 0, 1),
            wrong,
            None,
            None,
            None,
        )


@in_two_dtypes
def test_few_rows_of_hidden_experts(dtype):
    """Whole vectors of columns, single ones and the rest."""
    wide = {"top_k": 2, "experts": 4, "groups": 1, "block": 84, "per_group": True, "gated": True}
    HiddenProblem(tokens=2, **wide, dtype=dtype).check("native")
    shared = {"top_k": 1, "experts": 5, "groups": 2, "block": 40, "with_bias": True}
    HiddenProblem(tokens=3, **shared, dtype=dtype).check("native")


# ------------------------------------------------------------------ rounding, ties, NaN


@in_half_precision
def test_every_value_of_two_bytes_survives(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    routing = route(torch.zeros(values.shape[0], 1, dtype=torch.int64), 1)
    got = combine(values, routing, torch.ones(values.shape[0], 1), backend="native")
    nan = values.isnan()
    assert torch.equal(got[~nan], values[~nan])
    assert bool(got[nan].isnan().all())


@in_half_precision
def test_rounding_is_that_of_torch(dtype):
    """A gate times one is rounded as torch rounds that float32: also ties, overflow, subnormals and
    NaN."""
    rows = 200_000
    bits = torch.randint(-(2**31), 2**31, (rows, 1), dtype=torch.int64)
    near_limits = torch.tensor(
        [65504.0, 65519.99, 65520.0, 65536.0, 2**-14, 2**-24, 2**-25, 2**-25 * 1.01, 0.0, -0.0]
    )
    ties = (
        torch.randint(-(2**15), 2**15, (rows, 1), dtype=torch.int32).short().view(dtype)
    ).float() * (1 + 2**-9)
    gates = torch.cat(
        [bits.int().view(torch.float32), ties, near_limits.view(-1, 1), -near_limits.view(-1, 1)]
    )
    routing = route(torch.zeros(gates.shape[0], 1, dtype=torch.int64), 1)
    got = combine(torch.ones(gates.shape[0], 1, dtype=dtype), routing, gates, backend="native")
    want = gates.to(dtype)
    nan = gates.isnan()
    assert torch.equal(got[~nan], want[~nan])
    assert bool(got[nan].isnan().all())


def test_offsets_may_be_int64_and_rows_int32():
    wide = Routing(ROUTING.expert_offsets.long(), *GIVEN[1:])
    assert torch.equal(
        dispatch(ROWS, wide, backend="native"), dispatch(ROWS, ROUTING, backend="native")
    )
    call = forward_call()
    other = replace(call, expert_offsets=call.expert_offsets.long(), row_index=call.row_index.int())
    assert torch.equal(linear_forward(other)[0], linear_forward(call)[0])


def decided(logits, top_k, raw=False):
    """Experts and gates of tokens whose logits these are."""
    found = native_gating(torch.eye(len(logits)), logits.T.contiguous(), top_k, raw)
    assert torch.equal(found.logits.nan_to_num(7), logits.nan_to_num(7))
    return found.top_k_index, found.top_k_weights


def test_ties_at_top_k_3_go_to_the_first_experts():
    logits = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 1.0, 2.0, 2.0],
            [3.0, 1.0, 1.0, 1.0, 3.0],
            [0.0, 1.0, 2.0, 1.0, 1.0],
            [-1.0, -1.0, -2.0, -1.0, -1.0],
        ]
    )
    index, gates = decided(logits, 3)
    assert index.tolist() == [[0, 1, 2], [1, 3, 4], [0, 4, 1], [2, 1, 3], [0, 1, 3]]
    want = torch.softmax(logits.gather(1, index), 1)
    assert_close(gates, want)
    _, raw = decided(logits, 3, raw=True)
    assert_close(raw, torch.softmax(logits, 1).gather(1, index))


@pytest.mark.parametrize("expert", range(4))
def test_the_nan_guard_of_the_router(expert):
    """Wherever the NaN is, the token gets different experts in range, and NaN for its gates; other
    tokens nothing."""
    logits = torch.randn(4, 4)
    spoiled = logits.clone()
    spoiled[1, expert] = torch.nan
    # A product would spread the NaN, so the logits are the tokens themselves.
    found = native_gating(spoiled, torch.eye(4), 3, False)
    clean = native_gating(logits, torch.eye(4), 3, False)
    assert found.top_k_index[1].tolist() == [0, 1, 2]
    assert bool(found.top_k_weights[1].isnan().all())
    for t in (0, 2, 3):
        assert torch.equal(found.top_k_index[t], clean.top_k_index[t])
        assert torch.equal(found.top_k_weights[t], clean.top_k_weights[t])


@pytest.mark.parametrize(
    "tokens, experts, top_k", [(0, 3, 2), (1, 1, 1), (7, 5, 5), (600, 128, 8), (33, 1024, 16)]
)
def test_the_best_experts_are_those_of_topk(tokens, experts, top_k):
    scores = torch.randn(tokens, experts, requires_grad=True)
    for given in (scores, scores.t().contiguous().t()):
        assert torch.equal(best_experts(given, top_k), scores.topk(top_k).indices)
        assert torch.equal(best_experts(given, top_k, "eager"), scores.topk(top_k).indices)


def test_the_best_experts_of_equal_scores_and_of_nan():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0], [0.0, 3.0, nan, 4.0], [nan] * 4, [-inf, -inf, -1.0, -inf]]
    )
    assert best_experts(scores, 2).tolist() == [[1, 2], [2, 3], [0, 1], [2, 0]]
