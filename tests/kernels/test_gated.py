"""Two projections of the same rows, multiplied: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, route
from mpoe_kernels.backends import BackendError
from mpoe_kernels.linear.gated import gated_mpo_linear
from mpoe_kernels.reference import grouped_mpo_linear_reference
from tests.assertions import assert_calibrated, poisoned_memory
from tests.cases import SMALL_SHAPES

from .backend_cases import cast, leaves, on_every_backend, require_strategies


class Problem:
    """Rounded inputs of both projections; some experts are idle and some slots are empty."""

    def __init__(self, name: str, dtype: torch.dtype, tokens: int = 11, activation: str = "silu") -> None:
        self.shape, self.activation = SMALL_SHAPES[name], activation
        self.routing = route(expert_choice("some_idle", tokens, 4, 2), 4, capacity=5, backend="eager")
        self.blocks = [cast(random_blocks(self.shape, 4), dtype) for _ in range(2)]
        self.x = torch.randn(tokens, self.shape.in_features).to(dtype)
        self.bias = torch.randn(self.shape.out_features).to(dtype)

    @property
    def inputs(self) -> list[Tensor]:
        """x, bias, up blocks, gate blocks."""
        return [self.x, self.bias, *leaves(self.blocks[0]), *leaves(self.blocks[1])]

    def product(self, tensors: list[Tensor], backend: str) -> Tensor:
        x, bias, *blocks = tensors
        sizes = self.shape.in_features, self.shape.out_features
        up, gate = MPOBlocks(*blocks[:3], *sizes), MPOBlocks(*blocks[3:], *sizes)
        where = {"row_index": self.routing.token_of_slot, "slot_of_token": self.routing.slot_of_token}
        offsets, options = self.routing.expert_offsets, {"activation": self.activation, "backend": backend}
        return gated_mpo_linear(x, up, offsets, bias, gate_proj=gate, **where, **options)

    def results(self, dtype: torch.dtype, product: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        """y and every gradient."""
        tensors = [t.detach().to(dtype).requires_grad_() for t in self.inputs]
        y = product(tensors)
        grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
        return [y, *torch.autograd.grad(y, tensors, grad)]

    def reference(self, tensors: list[Tensor]) -> Tensor:
        x, bias, *blocks = tensors
        sizes = self.shape.in_features, self.shape.out_features
        where, index = self.routing.expert_offsets, self.routing.token_of_slot
        up, gate = MPOBlocks(*blocks[:3], *sizes), MPOBlocks(*blocks[3:], *sizes)
        factor = grouped_mpo_linear_reference(x, gate, where, row_index=index, activation=self.activation)
        return factor * grouped_mpo_linear_reference(x, up, where, bias, row_index=index)

    def check(self, backend: str, dtype: torch.dtype) -> None:
        with poisoned_memory():
            found = self.results(dtype, lambda tensors: self.product(tensors, backend))
        truth, same = self.results(torch.float64, self.reference), self.results(dtype, self.reference)
        for number, (f, t, s) in enumerate(zip(found, truth, same, strict=True)):
            assert_calibrated(f, t, s, f"result {number}")
        assert bool((found[0][int(self.routing.expert_offsets[-1]) :] == 0).all())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "activation"), [("light", "relu"), ("separable", "silu"), ("padded", "gelu_tanh")])
def test_against_reference(backend: str, name: str, activation: str, dtype: torch.dtype) -> None:
    require_strategies(backend, SMALL_SHAPES[name], dtype)
    Problem(name, dtype, activation=activation).check(backend, dtype)


def test_it_compiles_in_one_graph() -> None:
    problem = Problem("separable", torch.float32)

    def total(*tensors: Tensor) -> Tensor:
        return problem.product(list(tensors), "eager").square().sum()

    tensors = [t.detach().requires_grad_() for t in problem.inputs]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(total(*tensors), tensors), strict=True
    ):
        assert torch.allclose(found, wanted)


def test_refusals() -> None:
    problem = Problem("separable", torch.float32)
    (up, gate), offsets = problem.blocks, problem.routing.expert_offsets
    other = MPOBlocks(gate.left, gate.central, gate.right, gate.in_features - 1, gate.out_features)
    where = {"row_index": problem.routing.token_of_slot, "backend": "triton"}
    with pytest.raises(ValueError, match=rf"x must be \[T, I\] with I = {gate.in_features - 1}"):
        gated_mpo_linear(problem.x, up, offsets, gate_proj=other, **where)
    wider = MPOBlocks(gate.left, gate.central, gate.right, gate.in_features, gate.out_features - 1)
    with pytest.raises(ValueError, match="gate_proj must have 10 out_features like up; got 9"):
        gated_mpo_linear(problem.x, up, offsets, gate_proj=wider, **where)
    with pytest.raises(ValueError, match="activation must be one of"):
        gated_mpo_linear(problem.x, up, offsets, gate_proj=gate, activation="tanh", **where)
    with pytest.raises(TypeError, match=r"up and gate_proj must be MPOBlocks .*; got"):
        gated_mpo_linear(problem.x, up, offsets, gate_proj=gate.left, **where)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="backend 'triton' cannot run grouped_mpo_linear"):
        gated_mpo_linear(problem.x, up, offsets, gate_proj=gate, **where)
