"""neuron_experts on every backend: values and gradients against float64, poisoned memory, opcheck, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from mpoe_bench.cases import relative_error
from torch import Tensor
from torch.library import opcheck

from mpoe_kernels import neuron_experts
from mpoe_kernels.neurons import eager
from tests.assertions import torch_threads
from tests.cases import pairwise
from tests.expert_problems import NeuronProblem as Problem

from .backend_cases import on_every_backend, require

SHAPES = [
    {"tokens": 0},
    {"tokens": 0, "gated": True},  # a tensor without rows has no address
    {"tokens": 12, "top_k": 8, "experts": 1, "width": 32, "out": 32, "neurons": 32},
    {"tokens": 1, "top_k": 8, "experts": 64, "none_share": 0.0, "width": 48, "out": 40, "neurons": 16},
    {"tokens": 33, "top_k": 1, "experts": 8, "width": 33, "out": 65, "neurons": 35},
    {"tokens": 65, "experts": 64, "width": 16, "out": 100, "neurons": 8},
    {"tokens": 70, "top_k": 4, "experts": 4, "width": 64, "out": 64, "neurons": 32},
    {"tokens": 60, "top_k": 8, "experts": 9, "width": 15, "out": 3, "neurons": 1},
    {"tokens": 130, "top_k": 2, "experts": 6, "width": 7, "out": 31, "neurons": 64, "none_share": 0.5},
    {"tokens": 270, "top_k": 2, "experts": 2, "width": 40, "out": 24, "neurons": 17},  # blocks of one expert
    {"tokens": 40, "top_k": 16, "experts": 3, "width": 8, "out": 8, "neurons": 100},
    {"tokens": 9, "none_share": 1.0},
]


@on_every_backend
@pytest.mark.parametrize(
    ("case", "dtype", "gated"),
    pairwise(range(len(SHAPES)), [torch.float64, torch.float32, torch.bfloat16, torch.float16], [False, True]),
)
def test_against_reference(backend: str, dtype: torch.dtype, case: int, gated: bool) -> None:
    require(backend, "neuron_experts", dtype)
    kind = {"gated": gated, "with_bias": case % 4 != 3, "activation": "silu" if gated else "gelu"}
    Problem(**(kind | SHAPES[case]), dtype=dtype).check(backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "experts", "neurons"), [(16, 1024, 8), (3, 4, 512)])
def test_the_largest_sizes(backend: str, dtype: torch.dtype, top_k: int, experts: int, neurons: int) -> None:
    require(backend, "neuron_experts", dtype)
    Problem(tokens=24, top_k=top_k, experts=experts, width=8, out=12, neurons=neurons, dtype=dtype).check(backend)


@on_every_backend
@pytest.mark.parametrize(
    ("activation", "dtype", "gated"),
    pairwise(
        ["relu", "gelu", "gelu_new", "silu", "none"], [torch.float64, torch.float32, torch.bfloat16], [False, True]
    ),
)
def test_every_activation(backend: str, dtype: torch.dtype, activation: str, gated: bool) -> None:
    require(backend, "neuron_experts", dtype)
    problem = Problem(
        tokens=60, experts=4, width=16, neurons=32, gated=gated, activation=activation, dtype=dtype, with_bias=True
    )
    if activation == "relu" and dtype != torch.float64:
        # relu's gradient jumps at zero, so rounding must not decide the side: multiples of 1/4 multiply and add without
        # rounding.
        problem.inputs = {n: None if x is None else (x * 4).round() / 4 for n, x in problem.inputs.items()}
    problem.check(backend)


@on_every_backend
@budget(max_examples=20)
@given(data=st.data())
def test_random_problems(backend: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    require(backend, "neuron_experts", dtype)
    Problem(
        tokens=data.draw(st.integers(0, 60)),
        experts=data.draw(st.sampled_from([1, 2, 5, 64])),
        top_k=data.draw(st.integers(1, 8)),
        width=data.draw(st.integers(1, 50)),
        out=data.draw(st.integers(1, 50)),
        neurons=data.draw(st.integers(1, 70)),
        gated=data.draw(st.booleans()),
        with_bias=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(["gelu", "silu", "gelu_new"])),
        dtype=dtype,
        none_share=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=data.draw(st.integers(0, 5)),
    ).check(backend, 3)


@on_every_backend
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(backend: str, gated: bool) -> None:
    require(backend, "neuron_experts", torch.float32)
    problem = Problem(gated=gated, with_bias=gated, dtype=torch.float32)
    opcheck(torch.ops.mpoe.neuron_experts.default, problem.arguments(backend))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in problem.arguments(backend)]
    for need in ([True] * 6, [False, True, False, True, False, True]):
        opcheck(torch.ops.mpoe.neuron_experts_backward.default, (*detached, problem.grad, need))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [3, 12])  # blocks of one row, and of several
def test_gradcheck(gated: bool, tokens: int) -> None:
    problem = Problem(tokens=tokens, experts=2, gated=gated, with_bias=True, width=3, out=2, neurons=3)
    *inputs, activation, backend = problem.arguments()

    def op(*floats: Tensor) -> Tensor:
        rest = iter(floats)
        full = [x if x is None or not x.is_floating_point() else next(rest) for x in inputs]
        return torch.ops.mpoe.neuron_experts(*full, activation, backend)

    torch.autograd.gradcheck(op, tuple(x for x in inputs if x is not None and x.is_floating_point()))


@on_every_backend
@pytest.mark.parametrize("needed", Problem.NAMES)
def test_one_gradient_alone(backend: str, needed: str) -> None:
    """Gradients that are not requested are not computed, and the others do not change."""
    require(backend, "neuron_experts", torch.float32)
    problem = Problem(tokens=50, gated=True, with_bias=True, dtype=torch.float32)
    everything = problem.run(neuron_experts, torch.float32, backend=backend)
    values = [x.detach() if isinstance(x, Tensor) else x for x in problem.arguments(backend)]
    need = [name == needed for name in Problem.NAMES]
    grads = torch.ops.mpoe.neuron_experts_backward(*values, problem.grad, need)
    for name, grad in zip(Problem.NAMES, grads, strict=True):
        if name == needed:
            assert torch.equal(grad, everything[f"d{name}"])
        else:
            assert grad.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 6, 40])  # the neurons of one expert are shared out too
def test_native_bits_do_not_depend_on_threads(dtype: torch.dtype, experts: int) -> None:
    require("native", "neuron_experts", dtype)
    problem = Problem(
        tokens=130, experts=experts, width=48, out=200, neurons=100, gated=True, with_bias=True, dtype=dtype
    )
    with torch_threads(1):
        one = problem.run(neuron_experts, dtype, backend="native")
    with torch_threads(2):
        two = problem.run(neuron_experts, dtype, backend="native")
    for name, value in one.items():
        assert torch.equal(two[name], value), name


def test_more_tokens_than_hidden_neurons_are_kept_for() -> None:
    """Native computes 2^23 hidden neurons at a time, eager 2^22 elements."""
    require("native", "neuron_experts", torch.float32)
    problem = Problem(
        tokens=1100, top_k=16, experts=3, width=9, out=5, neurons=512, dtype=torch.float32, none_share=0.0
    )
    assert 1100 * 16 * 512 > 1 << 23 > eager.PIECE
    native, plain = (problem.run(neuron_experts, torch.float32, backend=name) for name in ("native", "eager"))
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
@pytest.mark.parametrize("experts", [2, 40])
def test_rows_without_an_expert_may_hold_anything(backend: str, experts: int) -> None:
    require(backend, "neuron_experts", torch.float32)
    problem = Problem(tokens=40, experts=experts, dtype=torch.float32, none_share=0.0, with_bias=True)
    problem.index[0] = problem.index[3:6] = -1
    clean = problem.run(neuron_experts, torch.float32, backend=backend)
    for name in ("x", "gates"):
        problem.inputs[name][0] = problem.inputs[name][3:6] = float("nan")
    problem.grad[0] = problem.grad[3:6] = float("nan")
    dirty = problem.run(neuron_experts, torch.float32, backend=backend)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    assert not dirty["o"][3:6].any()


@on_every_backend
def test_an_expert_chosen_twice_counts_twice(backend: str) -> None:
    require(backend, "neuron_experts", torch.float32)
    problem = Problem(experts=9, dtype=torch.float32)
    problem.index[:, 1] = problem.index[:, 0]
    problem.check(backend)


@on_every_backend
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_other_layouts_of_memory(backend: str, layout: str) -> None:
    from .backend_cases import LAYOUTS

    require(backend, "neuron_experts", torch.float32)
    problem = Problem(tokens=30, gated=True, with_bias=True, dtype=torch.float32)
    dense = problem.run(neuron_experts, torch.float32, backend=backend)
    problem.inputs = {n: None if x is None else LAYOUTS[layout](x) for n, x in problem.inputs.items()}
    for name, value in problem.run(neuron_experts, torch.float32, backend=backend).items():
        assert torch.equal(value, dense[name]), name


def test_one_graph() -> None:
    problem = Problem(gated=True, with_bias=True, dtype=torch.float32)
    compiled = torch.compile(neuron_experts, fullgraph=True, backend="aot_eager")
    plain = problem.run(neuron_experts, torch.float32)
    for name, value in problem.run(compiled, torch.float32).items():
        assert torch.equal(value, plain[name]), name


def test_autocast_casts_all_but_the_gates() -> None:
    problem = Problem(gated=True, with_bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = problem.run(neuron_experts, torch.float32)
    assert out["o"].dtype == torch.bfloat16
    assert {out[f"d{name}"].dtype for name in Problem.NAMES} == {torch.float32}
    rounded = Problem(gated=True, with_bias=True, dtype=torch.bfloat16)
    rounded.inputs["gates"] = problem.inputs["gates"]
    assert torch.equal(out["o"], rounded.run(neuron_experts, torch.bfloat16)["o"])


WRONG = {
    "x": ({"x": torch.ones(2, 3, 4)}, r"x must be \[T, I\]"),
    "x dtype": ({"x": torch.ones(7, 12, dtype=torch.int64)}, "x must have a floating dtype"),
    "gates": ({"gates": torch.ones(6, 2)}, r"gates must be \[T, K\] with T = 7"),
    "index": ({"top_k_index": torch.zeros(7, 3, dtype=torch.int64)}, r"top_k_index must be \[7, 2\] like gates"),
    "index range": ({"top_k_index": torch.full((7, 2), 5)}, r"top_k_index must lie in -1\.\.4; got 5"),
    "index below": ({"top_k_index": torch.full((7, 2), -2)}, r"top_k_index must lie in -1\.\.4; got -2"),
    "up axes": ({"up": torch.ones(4, 4)}, r"up must be \[E, m, I\]"),
    "up width": ({"up": torch.ones(5, 6, 11)}, "up must be .* I = 12"),
    "up empty": ({"up": torch.ones(0, 6, 12)}, "E, m, I >= 1"),
    "down axes": ({"down": torch.ones(4, 4)}, r"down must be \[E, m, O\]"),
    "down": ({"down": torch.ones(5, 7, 9)}, r"down must be \[E, m, O\] = \[5, 6\] and O >= 1"),
    "bias": ({"bias": torch.ones(6)}, r"bias must be \[E, m\]"),
    "bias size": ({"bias": torch.ones(5, 7)}, r"bias must be \[E, m\] = \[5, 6\]"),
    "gate_up": ({"gate_up": torch.ones(5, 6, 9)}, r"gate_up must be \[5, 6, 12\] like up"),
    "activation": ({"activation": "gelo"}, "activation must be one of .*did you mean 'gelu'"),
    "dtype": ({"x": torch.ones(7, 12, dtype=torch.float32)}, "up must have the dtype of x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    problem = Problem()
    change, message = WRONG[case]
    values = {**problem.inputs, "top_k_index": problem.index, "activation": "gelu", **change}
    with pytest.raises((ValueError, TypeError), match=message):
        neuron_experts(**values)
