"""mpo_ffn against the float64 reference, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import mpo_ffn, route, use_backend
from mpoe_kernels.reference import mpo_ffn_reference
from tests.assertions import assert_calibrated, poisoned_memory
from tests.cases import SMALL_SHAPES

from .backend_cases import cast, leaves, on_every_backend, require_strategies


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


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ffn_on_every_backend(backend: str, dtype: torch.dtype) -> None:
    """Dropped and masked tokens, idle experts: the network against the reference, calibrated in the same dtype."""
    up_shape = SMALL_SHAPES["padded_separable"]
    if "separable" not in require_strategies(backend, up_shape, dtype):
        pytest.skip(f"backend {backend} has no separable kernels")
    routing = route(expert_choice("some_idle", 11, 4, 2), 4, capacity=5, token_mask=torch.arange(11) % 4 != 1)
    blocks = [random_blocks(shape, 4, dtype) for shape in (up_shape, up_shape.mirrored())]
    x, weights = torch.randn(11, up_shape.in_features).to(dtype), torch.rand(11, 2).to(dtype)
    bias = torch.randn(up_shape.out_features).to(dtype)

    def run(function: Callable[..., Tensor], run_dtype: torch.dtype) -> list[Tensor]:
        up, down = (cast(block, run_dtype) for block in blocks)
        inputs = [t.to(run_dtype).requires_grad_() for t in (x, weights, bias)]
        y = function(inputs[0], routing, inputs[1], up, down, up_bias=inputs[2], activation="silu")
        return [y, *torch.autograd.grad(y.square().sum(), [*inputs, *leaves(up), *leaves(down)])]

    with use_backend(backend), poisoned_memory():
        actual = run(mpo_ffn, dtype)
    truth, same = run(mpo_ffn_reference, torch.float64), run(mpo_ffn_reference, dtype)
    names = ["y", "dx", "dweights", "dbias"] + [f"d{kind}.{k}" for kind in ("up", "down") for k in range(3)]
    for name, a, t, s in zip(names, actual, truth, same, strict=True):
        assert_calibrated(a, t, s, name, factor=3)
