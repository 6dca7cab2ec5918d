"""mpo_ffn against the float64 reference, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks, relative_error
from torch import Tensor

from mpoe_kernels import MPOBlocks, mpo_ffn, route, use_backend
from mpoe_kernels.reference import mpo_ffn_reference
from tests.assertions import assert_calibrated, poisoned_memory
from tests.cases import SMALL_SHAPES

from .backend_cases import cast, leaves, on_every_backend, require_strategies


def test_ffn_dropout_drops_hidden_activations() -> None:
    shape = SMALL_SHAPES["separable"]
    up, down = random_blocks(shape, 2), random_blocks(shape.mirrored(), 2)
    routing = route(torch.zeros(4, 1, dtype=torch.int64), 2)
    x, weights = torch.randn(4, 12, dtype=torch.float64), torch.ones(4, 1)
    plain = mpo_ffn(x, routing, weights, up, down)
    assert not torch.equal(mpo_ffn(x, routing, weights, up, down, dropout=0.5), plain)
    assert bool((mpo_ffn(x, routing, weights, up, down, dropout=1.0) == 0).all())


@pytest.mark.parametrize("gated", [False, True])
def test_compiled_ffn_fullgraph(gated: bool) -> None:
    shape = SMALL_SHAPES["separable"]
    up, gate = (random_blocks(shape, 4, torch.float32, requires_grad=True) for _ in range(2))
    down = random_blocks(shape.mirrored(), 4, torch.float32, requires_grad=True)
    gate_proj = gate if gated else None

    def ffn(x: Tensor, logits: Tensor) -> Tensor:
        weights, index = logits.softmax(-1).topk(1)
        return mpo_ffn(x, route(index, 4), weights, up, down, gate_proj=gate_proj, activation="gelu_new")

    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        x, logits = torch.randn(tokens, 12, requires_grad=True), torch.randn(tokens, 4, requires_grad=True)
        inputs = [x, logits, *leaves(up), *leaves(down), *(leaves(gate) if gated else [])]
        expected, got = ffn(x, logits), compiled(x, logits)
        assert torch.equal(got, expected)
        pairs = zip(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        )
        assert all(torch.allclose(a, b) for a, b in pairs)


@on_every_backend
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ffn_on_every_backend(backend: str, dtype: torch.dtype, gated: bool) -> None:
    """Dropped and masked tokens, idle experts: the network against the reference, calibrated in the same dtype."""
    up_shape = SMALL_SHAPES["padded_separable"]
    if "separable" not in require_strategies(backend, up_shape, dtype):
        up_shape = SMALL_SHAPES["padded"]  # the CUDA kernels compute rebuilt weights only
    routing = route(expert_choice("some_idle", 11, 4, 2), 4, capacity=5, token_mask=torch.arange(11) % 4 != 1)
    shapes = (up_shape, up_shape.mirrored(), *([up_shape] if gated else []))
    blocks = [random_blocks(shape, 4, dtype) for shape in shapes]
    x, weights = torch.randn(11, up_shape.in_features).to(dtype), torch.rand(11, 2).to(dtype)
    biases = [torch.randn(size).to(dtype) for size in (up_shape.out_features, up_shape.in_features)]

    def run(function: Callable[..., Tensor], run_dtype: torch.dtype) -> list[Tensor]:
        up, down, *gate = (cast(block, run_dtype) for block in blocks)
        inputs = [t.to(run_dtype).requires_grad_() for t in (x, weights, *biases)]
        options = {"gate_proj": gate[0] if gated else None, "up_bias": inputs[2], "down_bias": inputs[3]}
        y = function(inputs[0], routing, inputs[1], up, down, activation="silu", **options)
        of_blocks = [leaf for block in (up, down, *gate) for leaf in leaves(block)]
        return [y, *torch.autograd.grad(y.square().sum(), [*inputs, *of_blocks])]

    with use_backend(backend), poisoned_memory():
        actual = run(mpo_ffn, dtype)
    truth, same = run(mpo_ffn_reference, torch.float64), run(mpo_ffn_reference, dtype)
    names = ["y", "dx", "dweights", "dup_bias", "ddown_bias"] + [
        f"d{kind}.{k}" for kind in ("up", "down", "gate")[: len(blocks)] for k in range(3)
    ]
    for name, a, t, s in zip(names, actual, truth, same, strict=True):
        if dtype == torch.float64:  # the truth has the same rounding
            assert relative_error(a, t) < 1e-13, name
        else:
            assert_calibrated(a, t, s, name, factor=3)


def test_refusals_of_a_gate() -> None:
    shape = SMALL_SHAPES["separable"]
    up, down, gate = (random_blocks(each, 2, torch.float32) for each in (shape, shape.mirrored(), shape))
    given = torch.randn(3, 12), route(torch.zeros(3, 1).long(), 2), torch.ones(3, 1)
    other = MPOBlocks(gate.left, gate.central, gate.right, gate.in_features - 1, gate.out_features)
    with pytest.raises(ValueError, match=rf"x must be \[T, I\] with I = {gate.in_features - 1}"):
        mpo_ffn(*given, up, down, gate_proj=other)
    wider = MPOBlocks(gate.left, gate.central, gate.right, gate.in_features, gate.out_features - 1)
    with pytest.raises(ValueError, match="gate_proj must have 10 out_features like up; got 9"):
        mpo_ffn(*given, up, down, gate_proj=wider)
    with pytest.raises(ValueError, match="activation must be one of"):
        mpo_ffn(*given, up, down, gate_proj=gate, activation="tanh")
    with pytest.raises(TypeError, match=r"up and gate_proj must be MPOBlocks .*; got"):
        mpo_ffn(*given, up, down, gate_proj=gate.left)  # type: ignore[arg-type]
