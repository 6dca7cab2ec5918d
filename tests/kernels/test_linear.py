"""grouped_mpo_linear, mpo_linear, mpo_ffn and mpo_embedding against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear, mpo_embedding, mpo_ffn, mpo_linear, route
from mpoe_kernels.backends.eager.cost import IMPLEMENTED as STRATEGIES
from mpoe_kernels.ops.mpo_linear import ACTIVATIONS
from mpoe_kernels.reference import (
    grouped_mpo_linear_reference,
    mpo_embedding_reference,
    mpo_ffn_reference,
    weight_reference,
)
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory, relative_error
from mpoe_kernels.testing.cases import SMALL_SHAPES, expert_choice, random_blocks

ALL_SHAPES = list(SMALL_SHAPES)


def strategies_of(shape: MPOShape) -> list[str]:
    return [s for s in STRATEGIES if s != "separable" or shape.is_separable]


def leaves(blocks: MPOBlocks) -> list[Tensor]:
    return [blocks.left, blocks.central, blocks.right]


def cast(blocks: MPOBlocks, dtype: torch.dtype) -> MPOBlocks:
    left, central, right = (t.detach().to(dtype).requires_grad_() for t in leaves(blocks))
    return MPOBlocks(left, central, right, blocks.in_features, blocks.out_features)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL_SHAPES),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from(["uniform", "zipf", "all_to_one", "some_idle"]),
    st.sampled_from([None, "relu", "gelu", "gelu_new", "silu"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
    st.data(),
)
def test_forward_and_backward_against_reference(
    name: str,
    tokens: int,
    experts: int,
    top_k: int,
    kind: str,
    activation: str | None,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    shape = SMALL_SHAPES[name]
    strategy = data.draw(st.sampled_from(strategies_of(shape)))
    capacity = data.draw(st.none() | st.integers(1, 5))
    with_bias, gathered = data.draw(st.booleans()), data.draw(st.booleans())
    index = expert_choice(kind, tokens, experts, min(top_k, experts))
    mask = torch.rand(tokens) > 0.2 if data.draw(st.booleans()) else None
    routing = route(index, experts, capacity, mask)
    rows = tokens if gathered else routing.token_of_slot.shape[0]

    x64 = torch.randn(rows, shape.in_features, dtype=torch.float64)
    bias64 = torch.randn(shape.out_features, dtype=torch.float64) if with_bias else None
    blocks64 = random_blocks(shape, experts)
    grad64 = torch.randn(routing.token_of_slot.shape[0], shape.out_features, dtype=torch.float64)
    # All runs start from the same rounded numbers.
    x64, grad64 = x64.to(dtype).double(), grad64.to(dtype).double()
    bias64 = None if bias64 is None else bias64.to(dtype).double()
    blocks64 = cast(cast(blocks64, dtype), torch.float64)

    if activation == "relu":  # its gradient jumps at zero: rounding must not decide which side a value is on
        rows_of = {"row_index": routing.token_of_slot if gathered else None}
        z = grouped_mpo_linear_reference(x64, blocks64, routing.expert_offsets, bias64, **rows_of)
        grad64 = grad64 * (z.detach().abs() > 0.1)

    def run(function: Callable[..., Tensor], run_dtype: torch.dtype, **options: object) -> list[Tensor]:
        x = x64.to(run_dtype).requires_grad_()
        bias = None if bias64 is None else bias64.to(run_dtype).requires_grad_()
        blocks = cast(blocks64, run_dtype)
        row_index = routing.token_of_slot if gathered else None
        y = function(x, blocks, routing.expert_offsets, bias, row_index=row_index, activation=activation, **options)
        inputs = [x, *leaves(blocks)] + ([] if bias is None else [bias])
        if y.requires_grad:  # the reference of no rows at all depends on nothing
            grads = torch.autograd.grad(y, inputs, grad64.to(run_dtype), allow_unused=True)
        else:
            grads = (None,) * len(inputs)
        return [y, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))]

    with poisoned_memory():
        actual = run(grouped_mpo_linear, dtype, strategy=strategy)
    truth = run(grouped_mpo_linear_reference, torch.float64)
    same = run(grouped_mpo_linear_reference, dtype)
    names = ["y", "dx", "dleft", "dcentral", "dright", "dbias"]
    # float64 is compared at the rounding of the reference's other order of summation.
    for label, a, t, s in zip(names, actual, truth, same, strict=False):
        if dtype == torch.float64:  # the truth itself has this rounding
            assert relative_error(a, t) < 1e-13, f"{label} ({strategy})"
        else:
            assert_calibrated(a, t, s, f"{label} ({strategy})")
    empty = int(routing.expert_offsets[-1])
    assert bool((actual[0][empty:] == 0).all())


@pytest.mark.parametrize("name", ["paper_bond_4", "separable", "padded", "one_core"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(name: str, activation: str | None) -> None:
    shape = SMALL_SHAPES[name]
    routing = route(torch.tensor([[0, 1], [1, 2], [1, 0]]), 3, capacity=2)
    bias = torch.randn(shape.out_features, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, shape.in_features, dtype=torch.float64, requires_grad=True)
    blocks = random_blocks(shape, 3, requires_grad=True)
    for strategy in strategies_of(shape):

        def function(x, left, central, right, bias, strategy=strategy):
            return grouped_mpo_linear(
                x,
                MPOBlocks(left, central, right, shape.in_features, shape.out_features),
                routing.expert_offsets,
                bias,
                row_index=routing.token_of_slot,
                activation=activation,
                strategy=strategy,
            )

        assert gradcheck(function, (x, *leaves(blocks), bias), fast_mode=True)


@pytest.mark.parametrize("name", ["paper", "separable", "padded_separable", "centre_last"])
def test_opcheck(name: str) -> None:
    shape = SMALL_SHAPES[name]
    routing = route(expert_choice("uniform", 6, 3), 3, capacity=2)
    blocks = random_blocks(shape, 3, torch.float32, requires_grad=True)
    x = torch.randn(6, shape.in_features, requires_grad=True)
    sizes = (shape.in_features, shape.out_features)
    for strategy in ("auto", *strategies_of(shape)):
        for activation in ("none", "relu", "gelu"):
            arguments = (x, *leaves(blocks), routing.expert_offsets, torch.randn(sizes[1]), routing.token_of_slot)
            opcheck(torch.ops.mpoe.grouped_mpo_linear.default, (*arguments, *sizes, activation, strategy, "auto", True))
        opcheck(
            torch.ops.mpoe.grouped_mpo_linear.default,
            (x, *leaves(blocks), routing.expert_offsets, None, None, *sizes, "silu", strategy, "auto", False),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_opcheck_backward_and_embedding() -> None:
    shape = SMALL_SHAPES["light"]
    routing = route(expert_choice("uniform", 6, 3), 3)
    left, central, right = (t.detach() for t in leaves(random_blocks(shape, 3, torch.float32)))
    x, grad, empty = torch.randn(6, 12), torch.randn(6, 12), torch.empty(0)
    for need in ([True] * 5, [True, False, False, False, False], [False, True, False, True, True]):
        opcheck(
            torch.ops.mpoe.grouped_mpo_linear_backward.default,
            (grad, x, left, central, right, routing.expert_offsets, torch.zeros(12), routing.token_of_slot)
            + (empty, empty, 12, 12, "none", "rebuild", "auto", need),
        )
    left, central, right = leaves(random_blocks(shape, 1, torch.float32, requires_grad=True))
    ids = torch.tensor([3, 0, 11, 3])
    opcheck(torch.ops.mpoe.mpo_embedding.default, (ids, left, central, right, 12, 12, "auto"))
    detached = tuple(t.detach() for t in (left, central, right))
    opcheck(torch.ops.mpoe.mpo_embedding_backward.default, (torch.randn(4, 12), ids, *detached, 12, 12, "auto"))


@pytest.mark.parametrize("name", ["paper", "separable"])
def test_masked_central_core_is_never_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached central core reaches the backward kernel as "not needed", and its gradient stays None."""
    from mpoe_kernels import backends
    from mpoe_kernels.backends.eager import EAGER

    seen: list[list[bool]] = []
    kernel = EAGER.kernels["grouped_mpo_linear_backward"]
    monkeypatch.setitem(
        EAGER.kernels, "grouped_mpo_linear_backward", lambda *args: (seen.append(args[-1]), kernel(*args))[1]
    )
    assert backends is not None
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 2, requires_grad=True)
    masked = MPOBlocks(blocks.left, blocks.central.detach(), blocks.right, shape.in_features, shape.out_features)
    x = torch.randn(5, shape.in_features, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 5])
    grouped_mpo_linear(x, masked, offsets).sum().backward()
    assert seen == [[True, True, False, True, False]]
    assert blocks.central.grad is None
    masked_grads = [blocks.left.grad.clone(), blocks.right.grad.clone(), x.grad.clone()]
    blocks.left.grad = blocks.right.grad = x.grad = None
    grouped_mpo_linear(x, blocks, offsets).sum().backward()
    assert blocks.central.grad is not None
    for got, want in zip(masked_grads, [blocks.left.grad, blocks.right.grad, x.grad], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(needed: int) -> None:
    """Asking for one gradient gives what asking for all gives, for every strategy."""
    for name in ("light", "separable"):
        shape = SMALL_SHAPES[name]
        blocks = random_blocks(shape, 2)
        inputs = [torch.randn(5, shape.in_features, dtype=torch.float64), *leaves(blocks)]
        inputs.append(torch.randn(shape.out_features, dtype=torch.float64))
        for strategy in strategies_of(shape):

            def gradient(which: set[int], shape=shape, inputs=inputs, strategy=strategy) -> list[Tensor]:
                tensors = [t.detach().clone().requires_grad_(k in which) for k, t in enumerate(inputs)]
                x, left, central, right, bias = tensors
                own = MPOBlocks(left, central, right, shape.in_features, shape.out_features)
                y = grouped_mpo_linear(x, own, torch.tensor([0, 3, 4]), bias, strategy=strategy)
                return list(torch.autograd.grad(y.square().sum(), [tensors[k] for k in sorted(which)]))

            assert torch.equal(gradient({needed})[0], gradient(set(range(5)))[needed])


def test_non_contiguous_input_and_gradient() -> None:
    shape = SMALL_SHAPES["paper"]
    blocks = random_blocks(shape, 2)
    x = torch.randn(shape.in_features, 5, dtype=torch.float64).T
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    left = blocks.left.transpose(1, 2).contiguous().transpose(1, 2)
    strided = MPOBlocks(left, blocks.central, blocks.right, shape.in_features, shape.out_features)
    for strategy in strategies_of(shape):
        leaf = x.clone().requires_grad_()
        y = grouped_mpo_linear(leaf.T.contiguous().T, strided, offsets, strategy=strategy)
        assert torch.allclose(y, grouped_mpo_linear_reference(x, blocks, offsets))
        y.sum().backward()  # the gradient of a sum is expanded: stride 0
        assert torch.allclose(leaf.grad[0], weight_reference(blocks, 0).sum(1))


def test_dtypes_under_autocast() -> None:
    shape = SMALL_SHAPES["separable"]
    blocks = random_blocks(shape, 2, torch.float32, requires_grad=True)
    x = torch.randn(6, shape.in_features, requires_grad=True)
    offsets = torch.tensor([0, 4, 6])
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            y = grouped_mpo_linear(x, blocks, offsets)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), [x, *leaves(blocks)])
        assert {g.dtype for g in grads} == {torch.float32}
        assert torch.allclose(y.float(), grouped_mpo_linear(x, blocks, offsets), atol=0.1)
    with pytest.raises(TypeError, match="left must have the dtype of x, bfloat16"):
        grouped_mpo_linear(x.bfloat16(), blocks, offsets)


@pytest.mark.parametrize("gated", [False, True])
def test_ffn_against_reference(gated: bool) -> None:
    up_shape = SMALL_SHAPES["separable"]
    down_shape = up_shape.mirrored()
    routing = route(expert_choice("zipf", 7, 3, 2), 3, capacity=3)
    up, down, gate = (random_blocks(s, 3, requires_grad=True) for s in (up_shape, down_shape, up_shape))
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    up_bias = torch.randn(10, dtype=torch.float64, requires_grad=True)
    down_bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    options = {"gate_proj": gate if gated else None, "up_bias": up_bias, "down_bias": down_bias, "activation": "silu"}
    inputs = [x, weights, up_bias, down_bias, *leaves(up), *leaves(down), *(leaves(gate) if gated else [])]
    results = []
    for function in (mpo_ffn, mpo_ffn_reference):
        y = function(x, routing, weights, up, down, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want)


def test_ffn_dropout_drops_hidden_activations() -> None:
    shape = SMALL_SHAPES["separable"]
    up, down = random_blocks(shape, 2), random_blocks(shape.mirrored(), 2)
    routing = route(torch.zeros(4, 1, dtype=torch.int64), 2)
    x, weights = torch.randn(4, 12, dtype=torch.float64), torch.ones(4, 1)
    plain = mpo_ffn(x, routing, weights, up, down)
    assert not torch.equal(mpo_ffn(x, routing, weights, up, down, dropout=0.5), plain)
    assert bool((mpo_ffn(x, routing, weights, up, down, dropout=1.0) == 0).all())


def test_compiled_ffn_fullgraph() -> None:
    shape = SMALL_SHAPES["separable"]
    up = random_blocks(shape, 4, torch.float32, requires_grad=True)
    down = random_blocks(shape.mirrored(), 4, torch.float32, requires_grad=True)

    def ffn(x: Tensor, logits: Tensor) -> Tensor:
        weights, index = logits.softmax(-1).topk(1)
        return mpo_ffn(x, route(index, 4), weights, up, down, activation="gelu_new")

    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        x, logits = torch.randn(tokens, 12, requires_grad=True), torch.randn(tokens, 4, requires_grad=True)
        inputs = [x, logits, *leaves(up), *leaves(down)]
        expected, got = ffn(x, logits), compiled(x, logits)
        assert torch.equal(got, expected)
        pairs = zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        )
        assert all(torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["light", "padded", "one_core", "centre_last", "seven_cores", "separable"])
@pytest.mark.parametrize("rows", [0, 1, 5, 400])
def test_embedding_against_reference(name: str, rows: int) -> None:
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 1, requires_grad=True)
    ids = torch.randint(0, shape.in_features, (rows,))
    with poisoned_memory():
        got = mpo_embedding(ids, blocks)
        grad = torch.randn(got.shape, dtype=torch.float64)
        grads = torch.autograd.grad(got, leaves(blocks), grad)
    want = mpo_embedding_reference(ids, blocks)
    assert torch.allclose(got, want)
    for a, b in zip(grads, torch.autograd.grad(want, leaves(blocks), grad), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert mpo_embedding(ids.view(-1, 1).int(), blocks).shape == (rows, 1, shape.out_features)


def test_linear_keeps_leading_dimensions_and_transposed_blocks_are_the_tied_head() -> None:
    shape = SMALL_SHAPES["padded"]
    blocks = random_blocks(shape, 1)
    weight = weight_reference(blocks, 0)
    x = torch.randn(2, 3, shape.in_features, dtype=torch.float64)
    bias = torch.randn(shape.out_features, dtype=torch.float64)
    assert torch.allclose(mpo_linear(x, blocks, bias), x @ weight + bias)
    hidden = torch.randn(4, shape.out_features, dtype=torch.float64)
    assert torch.allclose(mpo_linear(hidden, blocks.transposed()), hidden @ weight.T)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(5, 7)}, ValueError, r"x must be \[T, I\] with I = 12; got float32 \[5, 7\]"),
        ({"x": torch.ones(5, 12, dtype=torch.int64)}, TypeError, "x must have a floating dtype"),
        ({"blocks": "no"}, TypeError, "blocks must be MPOBlocks"),
        ({"expert_offsets": torch.tensor([0, 5])}, ValueError, r"expert_offsets must be \[E \+ 1\] with E = 2"),
        ({"expert_offsets": torch.tensor([0.0, 1.0, 5.0])}, TypeError, "expert_offsets must be int32 or int64"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must be \[F\] with F = 12; got float32 \[3\]"),
        ({"bias": torch.ones(12).double()}, TypeError, "bias must have the dtype of x"),
        ({"row_index": torch.ones(5)}, TypeError, "row_index must be int32 or int64"),
        ({"activation": "relo"}, ValueError, r"activation must be one of .*did you mean 'relu'"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of"),
        ({"strategy": "separable"}, ValueError, "strategy 'separable' needs blocks with jL = iR = 1"),
        ({"backend": "abacus"}, ValueError, r"backend must be one of \['auto', .*'eager'.*got 'abacus'"),
    ],
)
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "x": torch.ones(5, 12),
        "blocks": random_blocks(SMALL_SHAPES["light"], 2, torch.float32),
        "expert_offsets": torch.tensor([0, 3, 5]),
    }
    with pytest.raises(error, match=message):
        grouped_mpo_linear(**(arguments | change))


def test_second_derivatives_and_vmap_are_refused_clearly() -> None:
    shape = SMALL_SHAPES["light"]
    blocks = random_blocks(shape, 1)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(mpo_linear(x, blocks).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of MPO ops are not supported"):
        torch.autograd.grad(dx.sum(), x)
    with pytest.raises(NotImplementedError, match=r"does not support torch\.vmap"):
        torch.vmap(lambda t: mpo_linear(t, blocks))(torch.randn(2, 3, 12, dtype=torch.float64))


def test_every_public_activation_has_a_reference() -> None:
    shape = SMALL_SHAPES["light"]
    blocks = random_blocks(shape, 1)
    x, offsets = torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 4])
    for name, formula in ACTIVATIONS.items():
        got = grouped_mpo_linear(x, blocks, offsets, activation=name)
        assert torch.allclose(got, grouped_mpo_linear_reference(x, blocks, offsets, activation=formula))


@pytest.mark.parametrize("rows", [1, 500])
@pytest.mark.parametrize("bad", [-1, 11])
def test_embedding_refuses_ids_outside_the_table(rows: int, bad: int) -> None:
    blocks = random_blocks(SMALL_SHAPES["padded"], 1)
    ids = torch.full((rows,), bad)
    with pytest.raises(IndexError):
        mpo_embedding(ids, blocks)
