"""The public interface of grouped_mpo_linear and mpo_linear: refusals, autocast, activations, cost of a masked core."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import MPOBlocks, backends, grouped_mpo_linear, mpo_linear
from mpoe_kernels.linear.op import ACTIVATIONS
from mpoe_kernels.reference import grouped_mpo_linear_reference, weight_reference
from tests.cases import SMALL_SHAPES
from tests.linear_problem import leaves

from .backend_cases import candidate_backend, eager_kernel, on_every_backend, require


@pytest.mark.parametrize("name", ["paper", "separable"])
def test_masked_central_core_is_never_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached central core reaches the backward kernel as "not needed", and its gradient stays None."""
    seen: list[list[bool]] = []
    kernels = {op: eager_kernel(op) for op in backends.CONTRACTIONS}
    backward = kernels["grouped_mpo_linear_backward"]
    kernels["grouped_mpo_linear_backward"] = lambda call: (seen.append(call.need), backward(call))[1]
    monkeypatch.setitem(backends.BACKENDS, "seen", candidate_backend("seen", kernels))
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("seen", "eager"))
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 2, requires_grad=True)
    masked = MPOBlocks(blocks.left, blocks.central.detach(), blocks.right, shape.in_features, shape.out_features)
    x = torch.randn(5, shape.in_features, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 5])
    strategy = "separable" if shape.is_separable else "half_left"  # unforced, masked ones may choose another
    grouped_mpo_linear(x, masked, offsets, strategy=strategy).sum().backward()
    assert seen == [[True, True, False, True, False]]
    assert blocks.central.grad is None
    masked_grads = [blocks.left.grad.clone(), blocks.right.grad.clone(), x.grad.clone()]
    blocks.left.grad = blocks.right.grad = x.grad = None
    grouped_mpo_linear(x, blocks, offsets, strategy=strategy).sum().backward()
    assert blocks.central.grad is not None
    for got, want in zip(masked_grads, [blocks.left.grad, blocks.right.grad, x.grad], strict=True):
        assert torch.equal(got, want)


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


def test_nothing_is_kept_for_a_backward_that_cannot_follow() -> None:
    shape = SMALL_SHAPES["separable"]
    blocks, x, offsets = random_blocks(shape, 1), torch.randn(4, shape.in_features).double(), torch.tensor([0, 4])
    saved: list[bool] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.mpoe.grouped_mpo_linear.default:
                saved.append(arguments[-1])
            return function(*arguments, **(options or {}))

    with Seen():
        grouped_mpo_linear(x, blocks, offsets)
        grouped_mpo_linear(x, blocks, offsets, torch.ones(shape.out_features).double().requires_grad_())
        with torch.no_grad():
            grouped_mpo_linear(x.clone().requires_grad_(), blocks, offsets)
    assert saved == [False, True, False]


@on_every_backend
def test_autocast_casts_the_bias_too(backend: str) -> None:
    """The result equals that of the op on tensors of autocast's dtype, bit for bit."""
    require(backend, "grouped_mpo_linear", torch.bfloat16)
    shape = SMALL_SHAPES["separable"]
    blocks, x, bias = (
        random_blocks(shape, 1, torch.float32),
        torch.randn(60, shape.in_features),
        torch.randn(shape.out_features),
    )
    low = MPOBlocks(*(t.bfloat16() for t in leaves(blocks)), shape.in_features, shape.out_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = mpo_linear(x, blocks, bias, backend=backend)
    assert torch.equal(y, mpo_linear(x.bfloat16(), low, bias.bfloat16(), backend=backend))
    assert not torch.equal(bias.bfloat16().float(), bias), "the cast changes it"


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
        ({"slot_of_token": torch.ones(5, 1).long()}, ValueError, r"slot_of_token must be None without row_index; got"),
        (
            {"row_index": torch.arange(5), "slot_of_token": torch.ones(4, 1).long()},
            ValueError,
            r"slot_of_token must be \[T, K\] with T = 5; got int64 \[4, 1\]",
        ),
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


def test_every_public_activation_has_a_reference() -> None:
    shape = SMALL_SHAPES["light"]
    blocks = random_blocks(shape, 1)
    x, offsets = torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 4])
    for name, formula in ACTIVATIONS.items():
        got = grouped_mpo_linear(x, blocks, offsets, activation=name)
        assert torch.allclose(got, grouped_mpo_linear_reference(x, blocks, offsets, activation=formula))


@pytest.mark.parametrize("x", [torch.tensor(1.0), [1.0]], ids=["no axis", "a list"])
def test_one_weight_needs_a_tensor_with_an_axis(x: object) -> None:
    with pytest.raises(ValueError, match=r"x must be a tensor \[\.\.\., I\]; got"):
        mpo_linear(x, random_blocks(SMALL_SHAPES["light"], 1))  # type: ignore[arg-type]
