"""What the native library refuses, it refuses in plain words, without a file of its sources."""

from dataclasses import fields, replace

import pytest
import torch
from mpoe_bench.cases import random_blocks

from mpoe_kernels import MPOShape
from mpoe_kernels.experts import native as experts
from mpoe_kernels.experts.op import HiddenCall, NeuronCall
from mpoe_kernels.linear.native import linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, LinearCall
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.routing import native as routing
from mpoe_kernels.routing.op import RouteCall
from tests.assertions import refuses
from tests.cases import named_cases

from .calls import SHAPE, forward_call


def refuses_plainly(message, function, *arguments, **options):
    with pytest.raises(ValueError, match=message) as error:
        function(*arguments, **options)
    assert type(error.value) is ValueError
    assert "csrc" not in str(error.value)
    assert ".cpp" not in str(error.value)


# ------------------------------------------------------------------ calls of the ops


def backward_call():
    forward = forward_call()
    shared = {field.name: getattr(forward, field.name) for field in fields(LinearCall)}
    slots, bond = 3, forward.right.shape[1]
    rows = torch.randn(slots, SHAPE.out_features)
    h = torch.randn(slots * 5, bond)
    return BackwardCall(**shared, grad=rows, h=h, saved=rows, need=[True] * 4 + [False])


def route_call():
    return RouteCall(torch.zeros(3, 1).long(), 2, None, None, "native")


def tokens_of_experts():
    """Rows, gates and chosen experts."""
    return torch.randn(3, 4), torch.ones(3, 1), torch.zeros(3, 1).long()


def hidden_call():
    core = torch.ones(2, 1, 2, 2)
    return HiddenCall(*tokens_of_experts(), core, core, None, None, None, "relu", "native")


def neuron_call():
    weights = torch.ones(2, 5, 4)
    return NeuronCall(*tokens_of_experts(), weights, weights, None, None, "relu", "native")


@named_cases(
    "changes, message",
    {
        "x on another device": (
            {"x": torch.empty(3, SHAPE.in_features, device="meta")},
            r"x must be on the CPU; got float32 \[3, 12\] on meta",
        ),
        "too many features": (
            {"out_features": 11},
            "blocks are smaller than the weight: they give 12 x 10, wanted are 12 x 11",
        ),
        "no features": ({"out_features": 0}, "in_features and out_features must be positive"),
        "activation": ({"activation": "tanh"}, "unknown activation tanh"),
        "strategy": ({"strategy": "guess"}, "no native kernel for strategy guess"),
        "offsets beyond the slots": (
            {"expert_offsets": torch.tensor([0, 1, 4])},
            "must start at 0, not fall, and end at 3 at most; got 4",
        ),
        "a row beyond x": (
            {"row_index": torch.tensor([0, 1, 3])},
            r"row_index must lie in 0\.\.2; got 3",
        ),
    },
)
def test_a_forward_is_refused(changes, message):
    call = forward_call()
    linear_forward(call)
    refuses_plainly(message, linear_forward, replace(call, **changes))


@pytest.mark.parametrize(
    "dtype, message",
    [
        (torch.float64, "x must be float32 or bfloat16; got float64"),
        (
            torch.int64,
            r"dtype must be float32, bfloat16, float16 or float64; got torch\.int64",
        ),
    ],
)
def test_a_forward_in_another_dtype_is_refused(dtype, message):
    call = forward_call()
    tensors = {}
    for name in ("x", "left", "central", "right"):
        tensors[name] = getattr(call, name).to(dtype)
    refuses_plainly(message, linear_forward, replace(call, **tensors))


def test_separable_needs_separable_blocks():
    blocks = random_blocks(MPOShape((2, 3, 2), (2, 5, 2), max_bond=3), 2, torch.float32)
    call = forward_call(
        left=blocks.left, central=blocks.central, right=blocks.right, out_features=20
    )
    refuses_plainly("strategy separable needs blocks with jL = iR = 1", linear_forward, call)


@pytest.mark.parametrize(
    "shape, strategy, dtype, message",
    [
        (SHAPE, "rebuild", torch.float32, "only strategy separable takes a product with central"),
        (SHAPE, "separable", torch.bfloat16, "needs rows of whole units of 2"),
    ],
    ids=["another strategy", "odd rows of bfloat16"],
)
def test_a_product_with_central_is_refused(shape, strategy, dtype, message):
    blocks = random_blocks(shape, 2, dtype)
    call = forward_call(
        x=torch.randn(3, shape.in_features, dtype=dtype),
        left=blocks.left[..., :1].contiguous(),
        central=blocks.central[:1, ..., :1].contiguous(),
        right=blocks.right[:, :1].contiguous(),
        strategy=strategy,
        save=False,
    )
    refuses_plainly(message, linear_forward, call, around_product=True)


@named_cases(
    "kernel, make_call, changes, message",
    {
        "backward: h": (
            linear_backward,
            backward_call,
            {"h": torch.zeros(3, 3)},
            r"h must be float32 \[15, 2\]; got float32 \[3, 3\]",
        ),
        "route: no choice": (
            routing.route,
            route_call,
            {"top_k_index": torch.zeros(3, 0).long()},
            r"with K >= 1; got \[3, 0\]",
        ),
        "route: no expert": (routing.route, route_call, {"num_experts": 0}, "num_experts must be"),
        "hidden: width of u": (
            experts.forward,
            hidden_call,
            {"u": torch.zeros(3, 3)},
            "right must have blocks that divide 3",
        ),
        "hidden: half a gate": (
            experts.forward,
            hidden_call,
            {"u_gate": torch.zeros(3, 4)},
            "right_gate must be given with u_gate",
        ),
        "neurons: dtype": (
            experts.forward,
            neuron_call,
            {name: torch.ones(2, 5, 4).double() for name in ("up", "down")}
            | {"x": torch.ones(3, 4).double()},
            "x must be float32 or bfloat16; got float64",
        ),
    },
)
def test_a_call_is_refused(kernel, make_call, changes, message):
    call = make_call()
    kernel(call)
    refuses_plainly(message, kernel, replace(call, **changes))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_blocks_without_elements(sizes):
    experts, *_, bond = sizes
    call = forward_call(
        left=torch.ones(sizes),
        central=torch.ones(bond, 1, 1, 1),
        right=torch.ones(experts, 1, 1, 1),
        expert_offsets=torch.zeros(experts + 1, dtype=torch.int32),
        row_index=None,
        x=torch.ones(3, 2),
        in_features=2,
        out_features=3,
        strategy="rebuild",
    )
    refuses(ValueError, r"^blocks must not have an axis of size 0$", linear_forward, call)


# ------------------------------------------------------------------ what no caller gives it


def raw_sizes(*, chain=(0, 1, 2)):
    """Of `forward_call`; the order of the products need not be one."""
    dims = tuple(forward_call().dims)
    make = NATIVE_LIBRARY.functions.LinearSizes
    return make("float32", "none", "separable", 2, dims, chain, False, False)


def raw_linear_forward(*, slots=1, offset_bytes=4, product=None):
    """One row of x without a row_index, and no slot of any expert."""
    sizes = raw_sizes(), 1, slots, offset_bytes
    x = rows = bias = y = h = z = None
    blocks = [None] * 3
    offsets = torch.zeros(3, dtype=torch.int32)
    forward = NATIVE_LIBRARY.functions.linear_forward
    forward(*sizes, x, blocks, offsets.data_ptr(), rows, bias, y, h, z, product)


def raw_linear_backward(*, product):
    """The same, with no gradient wanted."""
    offsets = torch.zeros(3, dtype=torch.int32)
    sizes = raw_sizes(), 1, 1, offsets.itemsize
    x = rows = grad = h = saved = None
    backward = NATIVE_LIBRARY.functions.linear_backward
    memory = x, [None] * 3, offsets.data_ptr(), rows, grad, h, saved
    backward(*sizes, *memory, [None] * 5, product)


NO_PRODUCT = (lambda: None, [None] * 3)


def raw_routed_ffn(*, projections=1, experts_of_down=1, top_k=1):
    """Of one feature, one expert, and tokens enough that an array of -1 of each has no memory."""
    make = NATIVE_LIBRARY.functions.LinearSizes
    ones, order = (1,) * 10, ((0, 1, 2), False, False)
    up = make("float32", "none", "rebuild", 1, ones, *order), [None] * 4
    down = make("float32", "none", "rebuild", experts_of_down, ones, *order), [None] * 4
    sizes, raw = (100, top_k, -1), False
    x = weight = mask = y = None
    ffn = NATIVE_LIBRARY.functions.routed_ffn
    ffn("float32", sizes, raw, x, weight, mask, [up] * projections, down, y)


def raw_routed_neurons(*, top_k):
    """The same for experts of their own neurons."""
    counts, sizes, features, raw, scale = (100, 1, top_k), (1, 1, 1), 1, False, 1.0
    router = "float32", "float32", features, raw, scale, [None] * 4
    routed = NATIVE_LIBRARY.functions.routed_neuron_experts
    routed("float32", "relu", counts, sizes, [None] * 8, *router, None)


def raw_gating(*, dtype="float32", top_k=1):
    """Of one token, one feature and one expert."""
    sizes, raw = (1, 1, 1), False
    x = weight = logits = index = gates = None
    gating = NATIVE_LIBRARY.functions.gating
    gating(dtype, "float32", sizes, top_k, raw, x, weight, logits, index, gates)


def raw_best_experts(*, top_k):
    """Of one token and one expert."""
    NATIVE_LIBRARY.functions.best_experts((1, 1, top_k), None, None)


@pytest.mark.parametrize(
    "raw_call, argument, value, message",
    [
        (raw_sizes, "chain", [3, 0, 1], "an operand of the chain must be 0, 1 or 2; got 3"),
        (raw_sizes, "chain", [0, 0, 2], "the chain must meet left, central and right once each"),
        (raw_linear_forward, "offset_bytes", 2, "must be int32 or int64"),
        (raw_linear_forward, "slots", 2, "as many slots as rows of x"),
        (raw_linear_forward, "product", NO_PRODUCT, "needs memory for its rows"),
        (raw_linear_backward, "product", NO_PRODUCT, "needs memory for its rows"),
        (raw_routed_ffn, "projections", 0, "one projection of x, or two"),
        (raw_routed_ffn, "experts_of_down", 2, "the projections of a network must fit each other"),
        (raw_routed_ffn, "top_k", -1, r"top_k must lie in 1\.\.1; got -1"),
        (raw_routed_neurons, "top_k", -1, r"top_k must lie in 1\.\.1; got -1"),
        (raw_gating, "dtype", "float64", "x and weight must not be float64"),
        (raw_gating, "top_k", 2, r"top_k must lie in 1\.\.1; got 2"),
        (raw_best_experts, "top_k", 2, r"top_k must lie in 1\.\.1; got 2"),
    ],
)
def test_what_no_caller_gives(raw_call, argument, value, message):
    refuses_plainly(message, raw_call, **{argument: value})


def test_no_memory_is_a_memory_error():
    tokens = slots = 0
    experts = 1 << 50
    row_bytes = stride_bytes = offset_bytes = 4
    sizes = tokens, slots, experts, row_bytes, stride_bytes, offset_bytes
    message = "the native kernels got no memory for what they compute with"
    dispatch = NATIVE_LIBRARY.functions.dispatch
    refuses(MemoryError, message, dispatch, *sizes, None, None, None, None)


@pytest.mark.parametrize("address", [1.0, -1, "1", 1 << 64])
def test_addresses_are_integers(address):
    message = "incompatible function arguments"
    combine = NATIVE_LIBRARY.functions.combine
    refuses(TypeError, message, combine, "float32", (0, 1, 0, 1), address, None, None, None)
