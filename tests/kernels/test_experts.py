"""hidden_experts and neuron_experts on every backend, and mpo_embedding, against the float64
reference."""

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mpoe_bench.cases import random_blocks, relative_error

from mpoe_kernels import hidden_experts, mpo_embedding
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.embedding import eager as by_eager
from mpoe_kernels.experts import eager
from tests.assertions import torch_threads
from tests.cases import SMALL_SHAPES, in_half_precision, in_two_dtypes, pairwise
from tests.expert_problems import HiddenProblem, NeuronProblem
from tests.expert_scenarios import CASES, case
from tests.linear_problem import LAYOUTS, check_embedding

from .backend_cases import DTYPES, on_every_backend, require

PROBLEMS = {"hidden_experts": HiddenProblem, "neuron_experts": NeuronProblem}
# Those of a GPU's kernels, and more rows than are processed at once.
LARGER = {
    HiddenProblem: [
        case(65, 2, 64, groups=2, block=16),
        case(14, 8, 9, groups=5, block=3),
        case(130, 2, 6, groups=2, block=64, none_share=0.5),
        case(210, 2, 3, groups=1, block=64),
    ],
    NeuronProblem: [
        case(65, 2, 64, width=16, out=100, neurons=8),
        case(130, 2, 6, width=7, out=31, neurons=64, none_share=0.5),
        case(270, 2, 2, width=40, out=24, neurons=17),
        case(40, 16, 3, width=8, out=8, neurons=100),
    ],
}
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMED = [(kind, case) for kind, named in CASES.items() for case in named.values()]
SIZES = [*NAMED, *((kind, case) for kind, cases in LARGER.items() for case in cases)]
PLACES = range(len(SIZES))


@cache
def problem(number, gated, dtype):
    """One for all backends, which are compared with one result of the reference."""
    kind, case = SIZES[number]
    own = {"per_group": number % 2 == 0} if kind is HiddenProblem else {}
    form = {
        "gated": gated,
        "with_bias": number % 4 != 3,
        "activation": "silu" if gated else "gelu",
        **own,
    }
    return kind(
        **{**case, **form}, dtype=dtype, seed=2
    )  # others find one gate of one token at an unlucky place


@on_every_backend
@pytest.mark.parametrize(
    "number, gated, dtype",
    [
        *pairwise(PLACES[: len(NAMED)], [False, True], FLOATS),  # of native's dtypes each has one
        *pairwise(PLACES[len(NAMED) :], [False, True], FLOATS[1::2]),
    ],
)
def test_against_reference(backend, number, gated, dtype):
    require(backend, SIZES[number][0].OP.__name__, dtype)
    problem(number, gated, dtype).check(backend)


@on_every_backend
@in_two_dtypes
@pytest.mark.parametrize("top_k, experts, neurons", [(16, 1024, 8), (3, 4, 512)])
def test_the_largest_sizes(backend, dtype, top_k, experts, neurons):
    require(backend, "neuron_experts", dtype)
    size = {
        "tokens": 24,
        "top_k": top_k,
        "experts": experts,
        "width": 8,
        "out": 12,
        "neurons": neurons,
    }
    NeuronProblem(**size, dtype=dtype).check(backend)


@on_every_backend
@pytest.mark.parametrize(
    "op, activation, gated, dtype",
    pairwise(
        list(PROBLEMS),
        ["relu", "gelu", "gelu_new", "silu", "none"],
        [False, True],
        [FLOATS[0], *FLOATS[1::2]],
    ),
)
def test_every_activation(backend, op, activation, gated, dtype):
    require(backend, op, dtype)
    own = (
        {"groups": 2, "block": 16, "per_group": True}
        if op == "hidden_experts"
        else {"width": 16, "neurons": 32}
    )
    form = {
        "gated": gated,
        "activation": activation,
        "dtype": dtype,
        "with_bias": op != "hidden_experts",
    }
    problem = PROBLEMS[op](tokens=40, experts=4, **form, **own)
    (problem.on_quarters() if activation == "relu" and dtype != torch.float64 else problem).check(
        backend
    )


@on_every_backend
@pytest.mark.parametrize("op", PROBLEMS)
@budget(max_examples=15)
@given(data=st.data())
def test_random_problems(backend, op, data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    require(backend, op, dtype)
    size = {
        "hidden_experts": {
            "groups": st.integers(1, 4),
            "block": st.integers(1, 20),
            "per_group": st.booleans(),
        },
        "neuron_experts": {
            "width": st.integers(1, 50),
            "out": st.integers(1, 50),
            "neurons": st.integers(1, 70),
        },
    }[op]
    PROBLEMS[op](
        tokens=data.draw(st.integers(0, 60 if op == "neuron_experts" else 20)),
        experts=data.draw(st.sampled_from([1, 2, 5, 64])),
        top_k=data.draw(st.integers(1, 8)),
        gated=data.draw(st.booleans()),
        with_bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["gelu", "silu", "gelu_new"])),
        dtype=dtype,
        none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=data.draw(st.integers(0, 5)),
        **{name: data.draw(values) for name, values in size.items()},
    ).check(backend, 3)


THREADS = [  # the neurons of one expert are shared out too
    *(
        ("hidden_experts", {"experts": 6, "groups": 11, "block": 16, "per_group": own})
        for own in (True, False)
    ),
    *(
        ("neuron_experts", {"experts": e, "width": 48, "out": 200, "neurons": 100, "gated": True})
        for e in (1, 6, 40)
    ),
]


@in_two_dtypes
@pytest.mark.parametrize("op, options", THREADS)
def test_native_bits_do_not_depend_on_threads(op, options, dtype):
    require("native", op, dtype)
    problem, found = PROBLEMS[op](tokens=130, with_bias=True, dtype=dtype, **options), []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append(problem.run(problem.OP, dtype, backend="native"))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize(
    "op, options",
    [
        # With blocks of 1,024, a tile of sums holds 256 tokens; groups of a part that follow each
        # other share sums.
        ("hidden_experts", {"tokens": 300, "groups": 1, "block": 1024}),
        (
            "hidden_experts",
            {"tokens": 1100, "groups": 20, "block": 64, "per_group": True, "with_bias": True},
        ),
        # Native computes 2^23 hidden neurons at a time, eager 2^22 elements.
        (
            "neuron_experts",
            {"tokens": 1100, "top_k": 16, "width": 9, "out": 5, "neurons": 512, "none_share": 0.0},
        ),
    ],
)
def test_more_than_is_computed_at_once(op, options):
    require("native", op, torch.float32)
    assert 1100 * 16 * 512 > 1 << 23 > eager.PIECE
    problem = PROBLEMS[op](experts=3, dtype=torch.float32, **options)
    native, plain = (
        problem.run(problem.OP, torch.float32, backend=name) for name in ("native", "eager")
    )
    for name, value in native.items():
        assert relative_error(value, plain[name]) < 1e-5, name


@pytest.mark.parametrize(
    "elements, tokens, sizes",
    [(170, 28, [(2, 4)] * 3 + [(1, 4)]), (10, 28, [(1, 4)] * 7), (10**6, 2100, [(21, 128)])],
)
def test_what_neurons_gather_at_once(elements, tokens, sizes, monkeypatch):
    """Blocks of 4 rows if an expert has 4, of 128 at most; they and their expert take 4 x 10 + 20
    elements."""
    monkeypatch.setattr(eager, "PIECE", elements)
    pieces = eager._pieces(torch.arange(tokens)[:, None] % 7, 7, 10, 20)
    assert [piece.slots.shape for piece in pieces] == sizes


# ------------------------------------------------------------------ hidden-side experts alone


@on_every_backend
@in_half_precision
def test_sums_of_half_precision_are_wide(backend, dtype):
    """Of eight experts whose terms cancel but for what half precision would lose, and of a gate's
    gradient."""
    require(backend, "hidden_experts", dtype)
    tokens, experts = 3, 8
    u, eye = (
        torch.ones(tokens, 4, dtype=dtype),
        torch.eye(4, dtype=dtype).expand(experts, 1, 4, 4).contiguous(),
    )
    index = torch.arange(experts).expand(tokens, experts)
    large = 512.0 if dtype == torch.float16 else 256.0
    gates = (
        torch.tensor([large, *[0.125] * 6, -large])
        .expand(tokens, experts)
        .contiguous()
        .requires_grad_()
    )
    y = hidden_experts(u, gates, index, eye, eye, activation="none", backend=backend)
    assert torch.equal(y, torch.full_like(y, 0.75))
    # A row's sum of 1 + 3 * 2^-12 is no number of half precision.
    grad = torch.tensor([1.0, 2**-12, 2**-12, 2**-12], dtype=dtype).expand(tokens, 4)
    (found,) = torch.autograd.grad(y, gates, grad)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full_like(found, 1 + 3 * 2**-12))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_identity_blocks_and_gate_one_change_no_bit(backend, dtype, experts):
    if backend not in ("auto", "eager", "native"):
        pytest.skip("promised on the CPU alone")
    require(backend, "hidden_experts", dtype)
    u = torch.randn(37, 48).to(dtype)
    eye = torch.eye(16, dtype=dtype).expand(experts, 3, 16, 16)
    index = torch.randint(0, experts, (37, 1))
    out = hidden_experts(u, torch.ones(37, 1), index, eye, eye, activation="relu", backend=backend)
    assert torch.equal(out, torch.relu(u))


def test_shared_blocks_need_no_axis_of_groups():
    problem = HiddenProblem()
    four = problem.run(hidden_experts, torch.float64)
    for name in ("right", "left"):
        problem.inputs[name] = problem.inputs[name][:, 0]
    three = problem.run(hidden_experts, torch.float64)
    assert torch.equal(four["o"], three["o"])
    assert torch.equal(four["dright"][:, 0], three["dright"])


# ------------------------------------------------------------------ mpo_embedding


@pytest.mark.parametrize(
    "rebuilt, name, rows",
    pairwise(
        [None, False, True],
        "light padded one_core centre_last seven_cores separable".split(),
        [0, 1, 5, 400],
    ),
)
def test_embedding_against_reference(rebuilt, name, rows, monkeypatch):
    """By the way that is chosen in every dtype and layout; by both ways."""
    if rebuilt is not None:
        monkeypatch.setattr(by_eager, "_is_rebuilt", lambda *_: rebuilt)
    shape = SMALL_SHAPES[name]
    cases = [(torch.float64, "dense")]
    if rebuilt is None:
        cases = product(DTYPES, LAYOUTS)
    for dtype, layout in cases:
        check_embedding(shape, rows, dtype, layout)
    found = mpo_embedding(torch.zeros(rows, 1, dtype=torch.int32), random_blocks(shape, 1))
    assert found.shape == (rows, 1, shape.out_features)


@pytest.mark.parametrize(
    "sizes, rows",
    [((4, 2, 3, 4, 4, 3, 4, 3, 64, 24), 40), ((2, 2, 4, 4, 2, 30, 5, 6, 40, 24), 10)],
)
def test_for_more_rows_the_table_is_rebuilt(sizes, rows):
    """The second shape's gathered slices take more memory than its table before they take more
    FLOPs."""
    dims = BlockDims(*sizes)
    assert not by_eager._is_rebuilt(dims, rows)
    assert by_eager._is_rebuilt(dims, rows + 1)
    assert by_eager._is_rebuilt(dims, 1, "cuda")


def test_pytorch_computes_it_whichever_backend_is_named():
    blocks, ids = random_blocks(SMALL_SHAPES["padded"], 1, torch.float32), torch.tensor([3, 0, 10])
    for name in ("eager", "native", "triton", "cuda"):
        assert torch.equal(mpo_embedding(ids, blocks, backend=name), mpo_embedding(ids, blocks))
