"""What the public functions refuse: each error names the argument, what was expected and what came.

Other sizes are in tests/faults/test_public_names.py, other kinds of tensors in test_signatures.py.
"""

from dataclasses import replace

import pytest
import torch
from mpoe_bench.cases import random_blocks, random_cores, workload_shape

from mpoe_kernels import (
    BackendError,
    MPOBlocks,
    MPOShape,
    Routing,
    combine,
    decompose,
    dispatch,
    expert_weights,
    fold,
    grouped_mpo_linear,
    mpo_embedding,
    mpo_ffn,
    mpo_linear,
    plan_contraction,
    reconstruct,
    route,
    use_backend,
)
from mpoe_kernels.backends import Request, select
from mpoe_kernels.contract import BlockDims, Contraction
from mpoe_kernels.linear.ffn import placed_mpo_linear
from mpoe_kernels.linear.reference import activation_reference
from tests.assertions import refuses
from tests.cases import SMALL_SHAPES, either, every_refusal, resized
from tests.expert_problems import HiddenProblem, NeuronProblem

ONES = torch.ones
SHAPE, LIGHT, SEPARABLE = MPOShape((2, 3), (3, 2)), SMALL_SHAPES["light"], SMALL_SHAPES["separable"]
CORES = [ONES(1, 2, 3, 6), ONES(6, 3, 2, 1)]
ONE, TWO = fold(CORES, 1), fold([CORES[0].expand(2, -1, -1, -1, -1), CORES[1]], 1)
X, PAIRS, GATES = ONES(3, 6), torch.zeros(3, 1).long(), ONES(3, 1)
ROUTING = route(PAIRS, 1)
OFFSETS = torch.tensor([0, 1, 3]).int()
META = X.to("meta")
LINEAR = {
    "x": ONES(5, 12),
    "blocks": random_blocks(LIGHT, 2, torch.float32),
    "expert_offsets": torch.tensor([0, 3, 5]),
}
UP, DOWN, GATE = (
    random_blocks(shape, 2, torch.float32) for shape in (SEPARABLE, SEPARABLE.mirrored(), SEPARABLE)
)
NETWORK = ONES(3, 12), route(PAIRS, 2), GATES, UP, DOWN
BIG = torch.zeros(1 << 16, 1 << 15, dtype=torch.int64, device="meta")
PLACED = ONES(3, 12), UP, route(PAIRS, 2).expert_offsets, None, route(PAIRS, 2)


def lost(tensor):
    return resized(tensor, tensor.nbytes // 2)


def named(blocks, **changes):
    """With other sizes."""
    sizes = {"in_features": blocks.in_features, "out_features": blocks.out_features, **changes}
    return MPOBlocks(blocks.left, blocks.central, blocks.right, **sizes)


def blocks(left=(1, 2, 3, 4), central=(4, 1, 1, 4), right=(1, 4, 3, 2), **sizes):
    return MPOBlocks(
        ONES(left), ONES(central), ONES(right), **{"in_features": 6, "out_features": 6, **sizes}
    )


def shape(**changes):
    return MPOShape(**{"in_factors": (2, 2), "out_factors": (2, 2), **changes})


def linear(**changes):
    return grouped_mpo_linear(**(LINEAR | changes))


def plan(**changes):
    return plan_contraction(
        **{"shape": MPOShape.paper(8, 8), "num_experts": 2, "num_tokens": 4, **changes}
    )


def both(gates):
    """Gates of a token's rows, as they are placed and as they are combined."""
    return [lambda: placed_mpo_linear(*PLACED, gates, None), lambda: combine(X, PLACED[-1], gates)]


def without_an_axis(name, size):
    """Blocks one of whose axes is empty."""
    return [
        lambda axis=axis: blocks(**{name: (*size[:axis], 0, *size[axis + 1 :])})
        for axis in range(4)
    ]


cast_linear = torch.autocast("cpu")(mpo_linear)
CASES = {
    ValueError: {
        "left must have no axis of size 0": without_an_axis("left", (1, 2, 3, 4)),
        "central must have no axis of size 0": without_an_axis("central", (4, 3, 2, 5)),
        "right must have no axis of size 0": without_an_axis("right", (1, 5, 2, 2)),
        r"top_k_weights must be .*\[T, K\].* \[?3, (1\]|K = 1)": both(ONES(3, 2)),
        r"top_k_weights must be .*\[T, K\].*; got .* \[3\]": both(ONES(3)),
        # cores and blocks
        r"cores\[0\] and cores\[1\] must share a bond": lambda: fold([CORES[0], CORES[1][1:]]),
        "central must lie between 0 and the last of 2 cores = 1; got 3": lambda: fold(
            CORES, central=3
        ),
        r"cores\[0\] must be \[d, i, j, d'\] \(the central core is": lambda: fold(
            random_cores(LIGHT, 2), 0
        ),
        r"cores\[0\] must be": lambda: fold([ONES(2, 2), *CORES], 1),
        "auxiliary cores must agree in their number of experts": lambda: fold(
            [core[:k] if k == 1 else core for k, core in enumerate(random_cores(LIGHT, 2), 1)]
        ),
        "must equal the cores' expert axis, 2; got 3": lambda: fold(
            random_cores(LIGHT, 2), num_experts=3
        ),
        "num_experts must be at least 1; got 0": [
            lambda: fold(CORES, 1, num_experts=0),
            lambda: plan(num_experts=0),
            lambda: route(PAIRS, 0),
        ],
        "outer bonds .* must be 1; got 2": lambda: fold([ONES(2, 2, 3, 6), CORES[1]], 1),
        r"on one device; cores\[1\] is .*, cores\[2\]": lambda: fold(
            [ONES(1, 1, 1, 1), CORES[0], CORES[1].to("meta")], 1
        ),
        r"left .* must agree in a; got .*1, 2, 3, 5": lambda: blocks(left=(1, 2, 3, 5)),
        r"right .* must agree in b; got .*1, 5, 3, 2": lambda: blocks(right=(1, 5, 3, 2)),
        "left and right must hold the same number of experts": lambda: blocks(right=(2, 4, 3, 2)),
        r"in_features must lie between 1 and .* = 6; got 0": lambda: blocks(in_features=0),
        r"out_features must lie between 1 and .* = 6; got 13": lambda: blocks(out_features=13),
        "left must hold its values": lambda: expert_weights(replace(ONE, left=lost(ONE.left))),
        "x must hold its values": lambda: linear(x=lost(ONES(5, 12))),
        "grad must hold its values": lambda: linear(x=ONES(5, 12).requires_grad_()).backward(
            lost(ONES(5, 12))
        ),
        # plans
        "num_tokens must be at least 0": lambda: plan(num_tokens=-1),
        "top_k must be at least 1": lambda: plan(top_k=0),
        "strategy 'separable' needs blocks with jL = iR = 1": [
            lambda: contracted("separable"),
            lambda: linear(strategy="separable"),
        ],
        r"strategy must be one of .*got 'fast'": lambda: contracted("fast"),
        r"phase must be one of .*got 'sideways'": lambda: contracted("chain", "sideways"),
        # products
        "slot_of_token must be None without row_index; got": lambda: linear(
            slot_of_token=ONES(5, 1).long()
        ),
        "activation must be one of .*did you mean 'relu'": lambda: linear(activation="relo"),
        "strategy must be one of": lambda: linear(strategy="fast"),
        r"backend must be one of \['auto', .*'eager'.*got 'abacus'": lambda: linear(
            backend="abacus"
        ),
        "no reference for activation 'tanh'": lambda: activation_reference("tanh", X),
        r"x must be a tensor \[\.\.\., I\]; got": [
            lambda: mpo_linear(torch.tensor(1.0), ONE),
            lambda: mpo_linear([1.0], ONE),
        ],
        "one expert for mpo_linear; got 2": lambda: mpo_linear(X, TWO),
        "one expert .*; got 2": lambda: mpo_embedding(PAIRS, TWO),
        r"row_index must hold its values, in 20 bytes; got int32 \[5\]": lambda: linear(
            row_index=lost(torch.zeros(5, dtype=torch.int32))
        ),
        # routing
        "token_mask must be bool": lambda: route(PAIRS, 2, token_mask=ONES(2).bool()),
        r"T \* K <= 2147483647; got int64 \[65536, 32768\]": lambda: route(BIG, 2),
        "num_experts must lie between 1 and 1048576; got 9223372036854775808": lambda: route(
            PAIRS, 2**63
        ),
        "capacity must be at least 1; got 0": lambda: route(PAIRS, 2, capacity=0),
        r"backend must be one of .*; got \[\]": lambda: route(PAIRS, 1, backend=[]),
        r"expert_offsets must be .* with E >= 1": lambda: replace(
            ROUTING, expert_offsets=OFFSETS[:1]
        ),
        r"must have N = T \* K": lambda: replace(ROUTING, token_of_slot=torch.arange(4)),
        # networks
        "dropout must lie .*; got -1": lambda: mpo_ffn(*NETWORK, dropout=-1),
        r"dropout must lie .*; got 1\.5": lambda: mpo_ffn(*NETWORK, dropout=1.5),
        r"x must be of a floating dtype \[T, I\], T = 3, I = 11": lambda: mpo_ffn(
            *NETWORK, gate_proj=named(GATE, in_features=11)
        ),
        "have 10 out_features like up; got 9": lambda: mpo_ffn(
            *NETWORK, gate_proj=named(GATE, out_features=9)
        ),
        "activation must be one of": lambda: mpo_ffn(*NETWORK, gate_proj=GATE, activation="tanh"),
        r"out_index must be int32 or int64 \[N\], N = 2; got int64 \[3\]": lambda: (
            placed_mpo_linear(ONES(2, 12), *PLACED[1:], GATES, None)
        ),
    },
    TypeError: {
        r"expert_offsets must be int32 or int64 \[E \+ 1\]": lambda: replace(
            ROUTING, expert_offsets=OFFSETS.float()
        ),
        "central must be an integer; got str 'x'": lambda: fold(CORES, "x"),
        "top_k_weights must (have|be of) a floating dtype": both(PAIRS),
        "top_k_weights must be a tensor": both([1.0] * 3),
        # cores and blocks
        "cores must be a non-empty sequence": [lambda: fold(None), lambda: reconstruct(None)],
        "num_experts must be an integer; got str '2'": lambda: fold(CORES, 1, num_experts="2"),
        "shape must be an MPOShape or None; got int 3": lambda: reconstruct(CORES, 3),
        "in_features must be an integer": lambda: named(ONE, in_features="6"),
        "out_features must be an integer": lambda: named(ONE, out_features=6.0),
        r"blocks must be MPOBlocks .*; got tuple": lambda: expert_weights((1, 2)),
        "left, central and right must be of one dtype": lambda: expert_weights(
            replace(ONE, left=ONE.left.half())
        ),
        # plans
        "num_experts must be an integer; got float 2.0": lambda: plan(num_experts=2.0),
        "shape must be an MPOShape; got str": lambda: plan(shape="paper"),
        "dtype must be a floating torch.dtype; got torch.int32": lambda: plan(dtype=torch.int32),
        "got .float32.": lambda: plan(dtype="float32"),
        # products
        r"left must be of x's dtype .*\(bfloat16, or run under autocast\); got": lambda: linear(
            x=ONES(5, 12).bfloat16()
        ),
        "x must be a tensor; got int 3": lambda: linear(x=3),
        "blocks must be MPOBlocks": lambda: linear(blocks="no"),
        "bias must be a tensor; got int 3": lambda: linear(bias=3),
        "token_mask must be a tensor; got str 'x'": lambda: route(PAIRS, 2, token_mask="x"),
        r"bias must be of x's dtype \[F\], F = 12 \(float32, or": lambda: linear(
            bias=ONES(12).double()
        ),
        "blocks must be MPOBlocks .*; got int": lambda: mpo_embedding(PAIRS, 3),
        "ids must be an int32 or int64 tensor": lambda: mpo_embedding(X, ONE),
        # routing
        r"capacity must be an integer; got float 1\.5": lambda: route(PAIRS, 1, capacity=1.5),
        "name must be that of a backend; got None": lambda: use_backend(None).__enter__(),
        "expert_offsets must be a tensor": lambda: Routing(None, None, None),
        "routing must be a Routing": lambda: dispatch(X, None),
        # networks
        "routing must be a Routing .*; got NoneType": lambda: mpo_ffn(X, None, GATES, ONE, ONE),
        "dropout must be a number; got str 'x'": lambda: mpo_ffn(*NETWORK, dropout="x"),
        "up must be MPOBlocks .*; got int": lambda: mpo_ffn(*NETWORK[:3], 1, DOWN),
        "down must be MPOBlocks .*; got int": lambda: mpo_ffn(*NETWORK[:4], 1),
        r"gate_proj must be MPOBlocks .*; got": lambda: mpo_ffn(*NETWORK, gate_proj=GATE.left),
        # autocast leaves float64 alone, so it must not be mixed with other dtypes
        r"bias must be of x's .*\(float32; autocast leaves float64\); got float64": lambda: (
            cast_linear(X, ONE, ONES(6).double())
        ),
        r"left must be of x's dtype .*\(float64; autocast leaves float64\)": lambda: cast_linear(
            X.double(), ONE
        ),
        "left must be of x's dtype": lambda: cast_linear(X, replace(ONE, left=ONE.left.long())),
    },
    IndexError: {
        # products
        r"ids must lie in 0\.\.5; got -1": lambda: mpo_embedding(PAIRS - 1, ONE),
        r"ids must lie in 0\.\.5; got 6": lambda: mpo_embedding(PAIRS.expand(3, 200) + 6, ONE),
    },
    BackendError: {
        # routing
        "mpo_x .*eager: it has no kernel for mpo_x": lambda: select(
            Request("mpo_x", "cpu", torch.float32)
        )
    },
}
WRONG = {
    HiddenProblem: {
        "right must be of u's dtype": {"u": ONES(7, 12)},
        "b a divisor of F = 12": {
            "right": ONES(5, 1, 5, 5).double(),
            "left": ONES(5, 5, 5).double(),
        },
        "u_gate and right_gate must be given together; got one of them": {
            "u_gate": ONES(7, 12).double()
        },
        r"u_gate must be of u's dtype \[T, F\], T = 7, F = 12; got": {
            "u_gate": ONES(7, 8),
            "right_gate": ONES(5, 1, 4, 4),
        },
        r"bias must be of u's dtype \[E, F\], E = 5, F = 12; got": {"bias": ONES(6, 12)},
        r"right_gate must be of u's dtype .* G = 1, b = 4; got float64 \[5, 3, 4, 4\]": {
            "u_gate": ONES(7, 12).double(),
            "right_gate": ONES(5, 3, 4, 4).double(),
        },
    },
    NeuronProblem: {
        "up must be of x's dtype": {"x": ONES(7, 12)},
        "E must be at least 1; got": {
            "up": ONES(0, 6, 12).double(),
            "down": ONES(0, 6, 9).double(),
        },
        r"bias must be of x's dtype \[E, m\], E = 5, m = 6; got": {"bias": ONES(5, 7)},
    },
}


def contracted(strategy, phase="forward"):
    dims = BlockDims.of_shape(workload_shape("paper_16", 768, 3072))
    return Contraction(strategy, dims, 1, 1, torch.float32, phase)


@every_refusal(CASES)
def test_refused(kind, message, calls):
    for call in calls:
        refuses(kind, message, call)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_experts(kind):
    changes = WRONG[kind] | {
        r"top_k_index must lie in -1\.\.4; got 5": {"top_k_index": torch.full((7, 2), 5)},
        r"top_k_index must lie in -1\.\.4; got -2": {"top_k_index": torch.full((7, 2), -2)},
        "activation must be one of .*did you mean 'gelu'": {"activation": "gelo"},
    }
    problem = kind()
    fitting = {**problem.inputs, "top_k_index": problem.index, "activation": "gelu"}
    for message, change in changes.items():
        refuses((TypeError, ValueError), message, problem.OP, **fitting | change)


@either("autocast")
def test_tensors_on_two_devices(autocast):
    blocks, where, rows, elsewhere = TWO, OFFSETS, torch.arange(3), route(PAIRS.to("meta"), 2)
    calls = {
        "expert_offsets": lambda: grouped_mpo_linear(X, blocks, where.to("meta")),
        "row_index": lambda: grouped_mpo_linear(X, blocks, where, row_index=rows.to("meta")),
        "slot_of_token": lambda: grouped_mpo_linear(
            X, blocks, where, row_index=rows, slot_of_token=rows[:, None].to("meta")
        ),
        "left": lambda: mpo_embedding(rows.to("meta"), ONE),
        "token_mask": lambda: route(
            PAIRS, 3, token_mask=torch.ones(3, dtype=torch.bool, device="meta")
        ),
        "(expert_offsets)": lambda: dispatch(X, elsewhere),
        "top_k_weights": lambda: combine(X, ROUTING, GATES.to("meta")),
        "token_of_slot": lambda: replace(ROUTING, token_of_slot=ROUTING.token_of_slot.to("meta")),
        "central": lambda: expert_weights(replace(blocks, central=blocks.central.to("meta"))),
    }
    for name, call in calls.items():
        with (
            torch.autocast("cpu", enabled=autocast),
            pytest.raises(ValueError, match=f"^{name} must be on the device of"),
        ):
            call()


def test_ops_called_directly_with_tensors_on_two_devices():
    """PyTorch sends such a call to the op's fake, which must not return uninitialised memory."""
    tensors = (X, ONE.left, ONE.central, ONE.right, OFFSETS[:2].to("meta"))
    refuses(
        ValueError,
        "needs its tensors on one device",
        torch.ops.mpoe.grouped_mpo_linear,
        *tensors,
        None,
        None,
        6,
        6,
        "none",
        "auto",
        "auto",
        False,
    )
    refuses(
        ValueError,
        "needs its tensors on one device",
        torch.ops.mpoe.dispatch,
        X,
        OFFSETS[:2],
        torch.arange(3).to("meta"),
        PAIRS,
        "auto",
    )


def test_tracing_a_fold_is_refused_in_words():
    cores = (torch.ones(2, 1, 3, 3, 2), torch.ones(2, 2, 2, 1))
    with (
        pytest.raises(NotImplementedError, match=r"fold does not support torch\.jit\.trace"),
        pytest.warns(),
    ):
        torch.jit.trace(lambda core: fold([core, cores[1]], central=1).left, (cores[0],))


def test_what_is_at_the_edge_is_taken():
    assert route(PAIRS, 1, capacity=2**70).expert_load.tolist() == [3]
    most = torch.empty(2**31 - 1, 1, dtype=torch.int64, device="meta")
    assert route(most, 2**20).expert_offsets.shape == (2**20 + 1,)
    blocks = fold([core.to("meta") for core in CORES], 1)
    assert (blocks.left.device.type, blocks.num_experts) == ("meta", 1)
    assert mpo_linear(META, blocks).shape == (3, 6)
    assert reconstruct([core.to("meta") for core in CORES]).shape == (6, 6)
    with torch.autocast("cpu"):
        wide = fold([core.double() for core in CORES], 1)
        assert mpo_linear(X.double(), wide, ONES(6).double()).dtype == torch.float64
        assert mpo_linear(X, ONE, ONES(6).bfloat16()).dtype == torch.bfloat16
        cores = decompose(X[:, :3] + torch.eye(3), MPOShape((3, 1), (1, 3)))
    again = decompose(X[:, :3] + torch.eye(3), MPOShape((3, 1), (1, 3)))
    assert all(map(torch.equal, cores, again))
