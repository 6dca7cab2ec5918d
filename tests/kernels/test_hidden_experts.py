"""hidden_experts on every backend: values and gradients against float64, poisoned memory, opcheck, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mpoe_bench.cases import relative_error
from torch import Tensor
from torch.library import opcheck

from mpoe_kernels import hidden_experts
from tests.assertions import torch_threads
from tests.cases import pairwise
from tests.expert_problems import HiddenProblem as Problem

from .backend_cases import BACKENDS, on_every_backend, require

SHAPES = [
    {"tokens": 0},
    {"tokens": 1, "top_k": 1, "experts": 1},
    {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0},
    {"tokens": 33, "top_k": 1, "experts": 8},
    {"tokens": 65, "experts": 64, "groups": 2, "block": 16},
    {"tokens": 70, "top_k": 4, "experts": 4, "groups": 1, "block": 32},
    {"tokens": 14, "top_k": 8, "experts": 9, "groups": 5, "block": 3},
    {"tokens": 19, "top_k": 2, "experts": 3, "groups": 7, "block": 1},
    {"tokens": 130, "top_k": 2, "experts": 6, "groups": 2, "block": 64, "none_share": 0.5},
    {"tokens": 210, "top_k": 2, "experts": 3, "groups": 1, "block": 64},  # more rows than are processed at once
    {"tokens": 9, "none_share": 1.0},
    {"tokens": 0, "gated": True},  # a tensor without rows has no address
]


@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    pairwise(range(len(SHAPES)), [torch.float64, torch.float32, torch.bfloat16, torch.float16], BACKENDS),
)
def test_against_reference(backend: str, dtype: torch.dtype, case: int) -> None:
    require(backend, "hidden_experts", dtype)
    kind = {"per_group": case % 2 == 0, "gated": case % 3 == 1, "with_bias": case % 4 != 3}
    Problem(**(kind | SHAPES[case]), dtype=dtype).check(backend)


@on_every_backend
@pytest.mark.parametrize(
    ("activation", "dtype", "gated"),
    pairwise(
        ["relu", "gelu", "gelu_new", "silu", "none"], [torch.float64, torch.float32, torch.bfloat16], [False, True]
    ),
)
def test_every_activation(backend: str, dtype: torch.dtype, activation: str, gated: bool) -> None:
    require(backend, "hidden_experts", dtype)
    problem = Problem(
        tokens=24, experts=4, groups=2, block=16, gated=gated, activation=activation, dtype=dtype, per_group=True
    )
    if activation == "relu" and dtype != torch.float64:
        # relu's gradient jumps at zero, so rounding must not decide the side: multiples of 1/4 multiply and add without
        # rounding.
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check(backend)


@on_every_backend
@budget(max_examples=10)
@given(data=st.data())
def test_random_problems(backend: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    require(backend, "hidden_experts", dtype)
    Problem(
        tokens=data.draw(st.integers(0, 20)),
        experts=data.draw(st.integers(1, 64)),
        top_k=data.draw(st.integers(1, 8)),
        groups=data.draw(st.integers(1, 4)),
        block=data.draw(st.integers(1, 20)),
        per_group=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        with_bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["gelu", "silu", "gelu_new"])),
        dtype=dtype,
        none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=data.draw(st.integers(0, 5)),
    ).check(backend, 3)


def arguments(problem: Problem, backend: str = "eager") -> tuple:
    """The arguments of `mpoe::hidden_experts`."""
    values = {n: None if x is None else x.detach().requires_grad_() for n, x in problem.inputs.items()}
    head = (values["u"], values["gates"], problem.index, values["right"], values["left"])
    return (*head, values["bias"], values["u_gate"], values["right_gate"], problem.activation, backend)


@on_every_backend
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(backend: str, gated: bool) -> None:
    require(backend, "hidden_experts", torch.float32)
    problem = Problem(gated=gated, with_bias=gated, dtype=torch.float32)
    opcheck(torch.ops.mpoe.hidden_experts.default, arguments(problem, backend))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments(problem, backend)]
    for need in ([True] * 7, [False, True, False, True, False, False, True]):
        call = (*detached, problem.grad, need)
        opcheck(torch.ops.mpoe.hidden_experts_backward.default, call)


@pytest.mark.parametrize("kind", ["plain", "gated", "per_group", "masked"])
def test_gradcheck(kind: str) -> None:
    problem = Problem(tokens=4, gated=kind == "gated", with_bias=True, per_group=kind == "per_group")
    if kind == "masked":
        problem = Problem(tokens=4, experts=2, top_k=2, with_bias=True)
    *inputs, activation, backend = arguments(problem)

    def op(*floats: Tensor) -> Tensor:
        rest = iter(floats)
        full = [x if x is None or not x.is_floating_point() else next(rest) for x in inputs]
        return torch.ops.mpoe.hidden_experts(*full, activation, backend)

    torch.autograd.gradcheck(op, tuple(x for x in inputs if x is not None and x.is_floating_point()))


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
@pytest.mark.parametrize("needed", Problem.NAMES)
def test_one_gradient_alone(backend: str, needed: str) -> None:
    """Gradients that are not requested are not computed, and the others do not change."""
    require(backend, "hidden_experts", torch.float32)
    problem = Problem(gated=True, with_bias=True, dtype=torch.float32)
    everything = problem.run(hidden_experts, torch.float32, backend=backend)
    values = [x.detach() if isinstance(x, Tensor) else x for x in arguments(problem, backend)]
    need = [name == needed for name in Problem.NAMES]
    grads = torch.ops.mpoe.hidden_experts_backward(*values, problem.grad, need)
    for name, grad in zip(Problem.NAMES, grads, strict=True):
        if name == needed:
            assert torch.equal(grad, everything[f"d{name}"])
        else:
            assert grad.numel() == 0


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
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


@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_bits_do_not_depend_on_threads(per_group: bool, dtype: torch.dtype) -> None:
    require("native", "hidden_experts", dtype)
    problem = Problem(tokens=130, experts=6, groups=11, block=16, per_group=per_group, with_bias=True, dtype=dtype)
    with torch_threads(1):
        one = problem.run(hidden_experts, dtype, backend="native")
    with torch_threads(2):
        two = problem.run(hidden_experts, dtype, backend="native")
    for name, value in one.items():
        assert torch.equal(two[name], value), name


def test_more_tokens_than_a_tile_holds() -> None:
    """With blocks of 1024, a tile of sums holds 256 tokens."""
    require("native", "hidden_experts", torch.float32)
    problem = Problem(tokens=300, experts=3, groups=1, block=1024, dtype=torch.float32)
    native, eager = (problem.run(hidden_experts, torch.float32, backend=name) for name in ("native", "eager"))
    for name, value in native.items():
        assert relative_error(value, eager[name]) < 1e-5, name


@on_every_backend
@pytest.mark.parametrize("experts", [2, 40])
def test_rows_without_an_expert_may_hold_anything(backend: str, experts: int) -> None:
    require(backend, "hidden_experts", torch.float32)
    problem = Problem(tokens=20, experts=experts, dtype=torch.float32, none_share=0.0)
    problem.index[3:6] = -1
    clean = problem.run(hidden_experts, torch.float32, backend=backend)
    for name in ("u", "gates"):
        problem.inputs[name][3:6] = float("nan")
    dirty = problem.run(hidden_experts, torch.float32, backend=backend)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    assert not dirty["o"][3:6].any()


@on_every_backend
def test_an_expert_chosen_twice_counts_with_both_gates(backend: str) -> None:
    require(backend, "hidden_experts", torch.float64)
    problem = Problem(experts=9)
    problem.index[:, 1] = problem.index[:, 0]
    problem.check(backend)


@pytest.mark.parametrize("gated", [False, True])
def test_one_graph(gated: bool) -> None:
    problem = Problem(gated=gated, with_bias=True, dtype=torch.float32)
    compiled = torch.compile(hidden_experts, fullgraph=True, backend="aot_eager")
    eager = problem.run(hidden_experts, torch.float32)
    for name, value in problem.run(compiled, torch.float32).items():
        assert torch.equal(value, eager[name]), name


def test_autocast_casts_all_but_the_gates() -> None:
    problem = Problem(gated=True, with_bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(hidden_experts, torch.float32)
    assert out["o"].dtype == torch.bfloat16
    assert {out[f"d{name}"].dtype for name in Problem.NAMES} == {torch.float32}
    rounded = Problem(gated=True, with_bias=True, dtype=torch.bfloat16)
    rounded.inputs["gates"] = problem.inputs["gates"]
    assert torch.equal(out["o"], rounded.run(hidden_experts, torch.bfloat16)["o"])


def test_shared_blocks_need_no_axis_of_groups() -> None:
    problem = Problem()
    four = problem.run(hidden_experts, torch.float64)
    for name in ("right", "left"):
        problem.inputs[name] = problem.inputs[name][:, 0]
    three = problem.run(hidden_experts, torch.float64)
    assert torch.equal(four["o"], three["o"])
    assert torch.equal(four["dright"][:, 0], three["dright"])


WRONG = {
    "u": ({"u": torch.ones(2, 3, 4)}, r"u must be \[T, F\]"),
    "u dtype": ({"u": torch.ones(7, 12, dtype=torch.int64)}, "u must have a floating dtype"),
    "gates": ({"gates": torch.ones(6, 2)}, r"gates must be \[T, K\] with T = 7"),
    "index": ({"top_k_index": torch.zeros(7, 3, dtype=torch.int64)}, r"top_k_index must be \[7, 2\] like gates"),
    "index range": ({"top_k_index": torch.full((7, 2), 5)}, r"top_k_index must lie in -1..4; got 5"),
    "index below": ({"top_k_index": torch.full((7, 2), -2)}, r"top_k_index must lie in -1..4; got -2"),
    "right dims": ({"right": torch.ones(4, 4)}, r"right must be a tensor \[E, b, b\]"),
    "right size": ({"right": torch.ones(5, 1, 5, 5)}, "b a divisor of F = 12"),
    "right square": (
        {"right": torch.ones(5, 4, 3)},
        r"right must be \[E, G', b, b\] with E, G', b >= 1; got .*5, 4, 3",
    ),
    "no experts": ({"left": torch.ones(0, 4, 4)}, r"left must be \[E, G', b, b\] with E, G', b >= 1; got .*0, 4, 4"),
    "left": ({"left": torch.ones(5, 3, 4, 4, dtype=torch.float64)}, r"left must be \[5, 1, 4, 4\] like right"),
    "gate alone": ({"u_gate": torch.ones(7, 12)}, "right_gate must be given with u_gate"),
    "u_gate": (
        {"u_gate": torch.ones(7, 8), "right_gate": torch.ones(5, 1, 4, 4)},
        r"u_gate must be \[7, 12\] like u",
    ),
    "right_gate": (
        {"u_gate": torch.ones(7, 12), "right_gate": torch.ones(5, 3, 4, 4)},
        r"right_gate must be \[5, 1, 4, 4\] like right",
    ),
    "bias": ({"bias": torch.ones(12)}, r"bias must be \[E, F\]"),
    "bias of more experts": ({"bias": torch.ones(6, 12)}, r"bias must be \[E, F\] = \[5, 12\]"),
    "bias size": ({"bias": torch.ones(4, 12)}, r"bias must be \[E, F\] = \[5, 12\]"),
    "activation": ({"activation": "gelo"}, "activation must be one of .*did you mean 'gelu'"),
    "dtype": ({"u": torch.ones(7, 12, dtype=torch.float32)}, "right must have the dtype of u"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    problem = Problem()
    change, message = WRONG[case]
    values = {**problem.inputs, "top_k_index": problem.index, "activation": "gelu", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        hidden_experts(**values)
