"""hidden_experts and neuron_experts on every backend: values and gradients against float64, opcheck, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mpoe_bench.cases import relative_error
from torch import Tensor
from torch.library import opcheck

from mpoe_kernels import BackendError, hidden_experts
from mpoe_kernels.hidden_experts.cuda import MOST_BINS
from mpoe_kernels.neurons import eager
from tests.assertions import torch_threads
from tests.cases import pairwise
from tests.expert_problems import HiddenProblem, NeuronProblem
from tests.linear_problem import LAYOUTS

from .backend_cases import on_every_backend, require

PROBLEMS: dict[str, type[Any]] = {"hidden_experts": HiddenProblem, "neuron_experts": NeuronProblem}
# A tensor without rows has no address; one expert has several blocks of rows; more rows than are processed at once.
SIZES: dict[str, list[dict[str, Any]]] = {
    "hidden_experts": [
        {"tokens": 0},
        {"tokens": 0, "gated": True},
        {"tokens": 1, "top_k": 1, "experts": 1},
        {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0},
        {"tokens": 33, "top_k": 1, "experts": 8},
        {"tokens": 65, "experts": 64, "groups": 2, "block": 16},
        {"tokens": 70, "top_k": 4, "experts": 4, "groups": 1, "block": 32},
        {"tokens": 14, "top_k": 8, "experts": 9, "groups": 5, "block": 3},
        {"tokens": 19, "top_k": 2, "experts": 3, "groups": 7, "block": 1},
        {"tokens": 130, "top_k": 2, "experts": 6, "groups": 2, "block": 64, "none_share": 0.5},
        {"tokens": 210, "top_k": 2, "experts": 3, "groups": 1, "block": 64},
        {"tokens": 9, "none_share": 1.0},
    ],
    "neuron_experts": [
        {"tokens": 0},
        {"tokens": 0, "gated": True},
        {"tokens": 12, "top_k": 8, "experts": 1, "width": 32, "out": 32, "neurons": 32},
        {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0, "width": 48, "out": 40, "neurons": 16},
        {"tokens": 33, "top_k": 1, "experts": 8, "width": 33, "out": 65, "neurons": 35},
        {"tokens": 65, "experts": 64, "width": 16, "out": 100, "neurons": 8},
        {"tokens": 70, "top_k": 4, "experts": 4, "width": 64, "out": 64, "neurons": 32},
        {"tokens": 60, "top_k": 8, "experts": 9, "width": 15, "out": 3, "neurons": 1},
        {"tokens": 130, "top_k": 2, "experts": 6, "width": 7, "out": 31, "neurons": 64, "none_share": 0.5},
        {"tokens": 270, "top_k": 2, "experts": 2, "width": 40, "out": 24, "neurons": 17},
        {"tokens": 40, "top_k": 16, "experts": 3, "width": 8, "out": 8, "neurons": 100},
        {"tokens": 9, "none_share": 1.0},
    ],
}
CASES = [(op, number) for op, sizes in SIZES.items() for number in range(len(sizes))]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

of_each_op = pytest.mark.parametrize("op", PROBLEMS)


def problem_of(op: str, **options: Any) -> Any:
    return PROBLEMS[op](**options)


@on_every_backend
@pytest.mark.parametrize(("case", "dtype", "gated"), pairwise(CASES, FLOATS, [False, True]))
def test_against_reference(backend: str, case: tuple[str, int], dtype: torch.dtype, gated: bool) -> None:
    op, number = case
    require(backend, op, dtype)
    kind = {"gated": gated, "with_bias": number % 4 != 3, "activation": "silu" if gated else "gelu"}
    if op == "hidden_experts":
        kind["per_group"] = number % 2 == 0
    problem_of(op, **(kind | SIZES[op][number]), dtype=dtype).check(backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "experts", "neurons"), [(16, 1024, 8), (3, 4, 512)])
def test_the_largest_sizes(backend: str, dtype: torch.dtype, top_k: int, experts: int, neurons: int) -> None:
    require(backend, "neuron_experts", dtype)
    size = {"tokens": 24, "top_k": top_k, "experts": experts, "width": 8, "out": 12, "neurons": neurons}
    problem = NeuronProblem(**size, dtype=dtype)
    if backend in ("cuda", "emulated") and top_k * (experts + 1) > MOST_BINS:
        with pytest.raises(BackendError, match="it sorts at most 12,000 choices x"):
            problem.check(backend)
    else:
        problem.check(backend)


@on_every_backend
@pytest.mark.parametrize(
    ("op", "activation", "dtype", "gated"),
    pairwise(list(PROBLEMS), ["relu", "gelu", "gelu_new", "silu", "none"], FLOATS[:3], [False, True]),
)
def test_every_activation(backend: str, op: str, dtype: torch.dtype, activation: str, gated: bool) -> None:
    require(backend, op, dtype)
    own = {"groups": 2, "block": 16, "per_group": True} if op == "hidden_experts" else {"width": 16, "neurons": 32}
    problem = problem_of(
        op,
        tokens=40,
        experts=4,
        gated=gated,
        activation=activation,
        dtype=dtype,
        with_bias=op != "hidden_experts",
        **own,
    )
    if activation == "relu" and dtype != torch.float64:
        # relu's gradient jumps at zero, so rounding must not decide the side: multiples of 1/4 multiply and add without
        # rounding.
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check(backend)


@on_every_backend
@of_each_op
@budget(max_examples=15)
@given(data=st.data())
def test_random_problems(backend: str, op: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    require(backend, op, dtype)
    size = {
        "hidden_experts": {"groups": st.integers(1, 4), "block": st.integers(1, 20), "per_group": st.booleans()},
        "neuron_experts": {"width": st.integers(1, 50), "out": st.integers(1, 50), "neurons": st.integers(1, 70)},
    }[op]
    problem_of(
        op,
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


def raw(op: str) -> tuple[Any, Any]:
    """The op behind it, and that of its gradients."""
    return getattr(torch.ops.mpoe, op).default, getattr(torch.ops.mpoe, f"{op}_backward").default


@on_every_backend
@of_each_op
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(backend: str, op: str, gated: bool) -> None:
    require(backend, op, torch.float32)
    problem = problem_of(op, gated=gated, with_bias=gated, dtype=torch.float32)
    forward, backward = raw(op)
    opcheck(forward, problem.arguments(backend))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in problem.arguments(backend)]
    names = problem.NAMES
    for need in ([True] * len(names), [place % 2 == 1 for place in range(len(names))]):
        opcheck(backward, (*detached, problem.grad, need))


@on_every_backend
@pytest.mark.parametrize(("op", "needed"), [(op, name) for op, kind in PROBLEMS.items() for name in kind.NAMES])
def test_one_gradient_alone(backend: str, op: str, needed: str) -> None:
    """Gradients that are not requested are not computed, and the others do not change."""
    require(backend, op, torch.float32)
    problem = problem_of(op, tokens=50, gated=True, with_bias=True, dtype=torch.float32)
    everything = problem.run(problem.OP, torch.float32, backend=backend)
    values = [x.detach() if isinstance(x, Tensor) else x for x in problem.arguments(backend)]
    grads = raw(op)[1](*values, problem.grad, [name == needed for name in problem.NAMES])
    for name, grad in zip(problem.NAMES, grads, strict=True):
        assert torch.equal(grad, everything[f"d{name}"]) if name == needed else grad.numel() == 0


THREADS = [  # the neurons of one expert are shared out too
    *(("hidden_experts", {"experts": 6, "groups": 11, "block": 16, "per_group": own}) for own in (True, False)),
    *(("neuron_experts", {"experts": e, "width": 48, "out": 200, "neurons": 100, "gated": True}) for e in (1, 6, 40)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "options"), THREADS)
def test_native_bits_do_not_depend_on_threads(op: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    require("native", op, dtype)
    problem, found = problem_of(op, tokens=130, with_bias=True, dtype=dtype, **options), []
    for threads in (1, 2):
        with torch_threads(threads):
            found.append(problem.run(problem.OP, dtype, backend="native"))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize(
    ("op", "options"),
    [
        # With blocks of 1,024, a tile of sums holds 256 tokens.
        ("hidden_experts", {"tokens": 300, "groups": 1, "block": 1024}),
        # Native computes 2^23 hidden neurons at a time, eager 2^22 elements.
        ("neuron_experts", {"tokens": 1100, "top_k": 16, "width": 9, "out": 5, "neurons": 512, "none_share": 0.0}),
    ],
)
def test_more_than_is_computed_at_once(op: str, options: dict[str, Any]) -> None:
    require("native", op, torch.float32)
    assert 1100 * 16 * 512 > 1 << 23 > eager.PIECE
    problem = problem_of(op, experts=3, dtype=torch.float32, **options)
    native, plain = (problem.run(problem.OP, torch.float32, backend=name) for name in ("native", "eager"))
    for name, value in native.items():
        assert relative_error(value, plain[name]) < 1e-5, name


@pytest.mark.parametrize(("tokens", "rows"), [(4, 1), (12, 4), (400, 128), (4000, 128)])
def test_pieces_are_bounded(tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a power of two of rows, below the mean of an expert's; no more of them at once than fit."""
    monkeypatch.setattr(eager, "PIECE", 1 << 13)
    index = torch.arange(tokens * 2).remainder(5).view(tokens, 2)
    pieces = list(eager._pieces(index, 5, per_row=24, per_expert=100))
    assert {piece.tokens.shape[1] for piece in pieces} == {rows}
    blocks = sum(-(-count // rows) for count in torch.bincount(index.view(-1)).tolist())
    most = min(blocks, (1 << 13) // (rows * 24 + 100))
    assert [len(piece.experts) for piece in pieces[:-1]] == [most] * (len(pieces) - 1)
    assert sum(len(piece.experts) for piece in pieces) == blocks


@on_every_backend
@of_each_op
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_other_layouts_of_memory(backend: str, op: str, layout: str) -> None:
    require(backend, op, torch.float32)
    problem = problem_of(op, tokens=30, gated=True, with_bias=True, dtype=torch.float32)
    dense = problem.run(problem.OP, torch.float32, backend=backend)
    problem.inputs = {n: None if x is None else LAYOUTS[layout](x) for n, x in problem.inputs.items()}
    for name, value in problem.run(problem.OP, torch.float32, backend=backend).items():
        if backend == "eager":  # torch's own products may round differently there
            assert relative_error(value, dense[name]) < 1e-6, name
        else:
            assert torch.equal(value, dense[name]), name


@of_each_op
def test_autocast_casts_all_but_the_gates(op: str) -> None:
    problem = problem_of(op, gated=True, with_bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(problem.OP, torch.float32)
    assert out["o"].dtype == torch.bfloat16
    assert {out[f"d{name}"].dtype for name in problem.NAMES} == {torch.float32}
    rounded = problem_of(op, gated=True, with_bias=True, dtype=torch.bfloat16)
    rounded.inputs["gates"] = problem.inputs["gates"]
    assert torch.equal(out["o"], rounded.run(problem.OP, torch.bfloat16)["o"])


# ------------------------------------------------------------------ hidden-side experts alone


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_wide(backend: str, dtype: torch.dtype) -> None:
    """Of eight experts whose terms cancel but for what half precision would lose, and of a gate's gradient."""
    require(backend, "hidden_experts", dtype)
    tokens, experts = 3, 8
    u, eye = torch.ones(tokens, 4, dtype=dtype), torch.eye(4, dtype=dtype).expand(experts, 1, 4, 4).contiguous()
    index = torch.arange(experts).expand(tokens, experts)
    large = 512.0 if dtype == torch.float16 else 256.0
    gates = torch.tensor([large, *[0.125] * 6, -large]).expand(tokens, experts).contiguous().requires_grad_()
    y = hidden_experts(u, gates, index, eye, eye, activation="none", backend=backend)
    assert torch.equal(y, torch.full_like(y, 0.75))
    # A row's sum of 1 + 3 * 2^-12 is no number of half precision.
    grad = torch.tensor([1.0, 2**-12, 2**-12, 2**-12], dtype=dtype).expand(tokens, 4)
    (found,) = torch.autograd.grad(y, gates, grad)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full_like(found, 1 + 3 * 2**-12))


@on_every_backend
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_identity_blocks_and_gate_one_change_no_bit(backend: str, dtype: torch.dtype, experts: int) -> None:
    if backend not in ("auto", "eager", "native"):
        pytest.skip("promised on the CPU alone")
    require(backend, "hidden_experts", dtype)
    u = torch.randn(37, 48).to(dtype)
    eye = torch.eye(16, dtype=dtype).expand(experts, 3, 16, 16)
    index = torch.randint(0, experts, (37, 1))
    out = hidden_experts(u, torch.ones(37, 1), index, eye, eye, activation="relu", backend=backend)
    assert torch.equal(out, torch.relu(u))


def test_shared_blocks_need_no_axis_of_groups() -> None:
    problem = HiddenProblem()
    four = problem.run(hidden_experts, torch.float64)
    for name in ("right", "left"):
        problem.inputs[name] = problem.inputs[name][:, 0]
    three = problem.run(hidden_experts, torch.float64)
    assert torch.equal(four["o"], three["o"])
    assert torch.equal(four["dright"][:, 0], three["dright"])


# ------------------------------------------------------------------ refusals

ONES = torch.ones
OF_BOTH = [
    ({"gates": ONES(6, 2)}, r"gates must be \[T, K\] with T = 7"),
    ({"top_k_index": torch.zeros(7, 3).long()}, r"top_k_index must be \[7, 2\] like gates"),
    ({"top_k_index": torch.full((7, 2), 5)}, r"top_k_index must lie in -1\.\.4; got 5"),
    ({"top_k_index": torch.full((7, 2), -2)}, r"top_k_index must lie in -1\.\.4; got -2"),
    ({"activation": "gelo"}, "activation must be one of .*did you mean 'gelu'"),
]
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "hidden_experts": [
        *OF_BOTH,
        ({"u": ONES(2, 3, 4)}, r"u must be \[T, F\]"),
        ({"u": ONES(7, 12).long()}, "u must have a floating dtype"),
        ({"u": ONES(7, 12)}, "right must have the dtype of u"),
        ({"right": ONES(4, 4)}, r"right must be a tensor \[E, b, b\]"),
        ({"right": ONES(5, 1, 5, 5)}, "b a divisor of F = 12"),
        ({"right": ONES(5, 4, 3)}, r"right must be \[E, G', b, b\] with E, G', b >= 1; got .*5, 4, 3"),
        ({"left": ONES(0, 4, 4)}, r"left must be \[E, G', b, b\] with E, G', b >= 1; got .*0, 4, 4"),
        ({"left": ONES(5, 3, 4, 4).double()}, r"left must be \[5, 1, 4, 4\] like right"),
        ({"u_gate": ONES(7, 12)}, "right_gate must be given with u_gate"),
        ({"u_gate": ONES(7, 8), "right_gate": ONES(5, 1, 4, 4)}, r"u_gate must be \[7, 12\] like u"),
        ({"u_gate": ONES(7, 12), "right_gate": ONES(5, 3, 4, 4)}, r"right_gate must be \[5, 1, 4, 4\] like right"),
        ({"bias": ONES(12)}, r"bias must be \[E, F\]"),
        ({"bias": ONES(6, 12)}, r"bias must be \[E, F\] = \[5, 12\]"),
    ],
    "neuron_experts": [
        *OF_BOTH,
        ({"x": ONES(2, 3, 4)}, r"x must be \[T, I\]"),
        ({"x": ONES(7, 12).long()}, "x must have a floating dtype"),
        ({"x": ONES(7, 12)}, "up must have the dtype of x"),
        ({"up": ONES(4, 4)}, r"up must be \[E, m, I\]"),
        ({"up": ONES(5, 6, 11)}, "up must be .* I = 12"),
        ({"up": ONES(0, 6, 12)}, "E, m, I >= 1"),
        ({"down": ONES(4, 4)}, r"down must be \[E, m, O\]"),
        ({"down": ONES(5, 7, 9)}, r"down must be \[E, m, O\] = \[5, 6\] and O >= 1"),
        ({"bias": ONES(6)}, r"bias must be \[E, m\]"),
        ({"bias": ONES(5, 7)}, r"bias must be \[E, m\] = \[5, 6\]"),
        ({"gate_up": ONES(5, 6, 9)}, r"gate_up must be \[5, 6, 12\] like up"),
    ],
}


@pytest.mark.parametrize(
    ("op", "number"), [(op, number) for op, every in WRONG.items() for number in range(len(every))]
)
def test_refusals(op: str, number: int) -> None:
    problem = problem_of(op)
    change, message = WRONG[op][number]
    values = {**problem.inputs, "top_k_index": problem.index, "activation": "gelu", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        problem.OP(**values)
