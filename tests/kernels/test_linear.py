"""grouped_mpo_linear on every backend and strategy, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice, random_blocks, relative_error
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear, route
from mpoe_kernels.reference import grouped_mpo_linear_reference, weight_reference
from tests.assertions import assert_calibrated, poisoned_memory, torch_threads
from tests.cases import SMALL_SHAPES

from .backend_cases import (
    LAYOUTS,
    cast,
    choices_of,
    leaves,
    on_every_backend,
    require,
    require_strategies,
    strategies_of,
    strided,
)

ALL_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FEW_UTILS = ("test_schema", "test_faketensor")
NAMES = ("y", "dx", "dleft", "dcentral", "dright", "dbias")
# Several panels, tiles and k steps, with remainders everywhere.
MEDIUM_SHAPES = {
    "medium": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=117, out_features=165),
    "medium_separable": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(24, 30), in_features=357, out_features=249),
    "medium_mirrored": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(24, 30)).mirrored(),
}


def cpu_dtypes(backend: str) -> list[torch.dtype]:
    """Dtypes in which a backend computes anything, among those whose rounding the tests know."""
    shapes = (SMALL_SHAPES["light"], SMALL_SHAPES["separable"])
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return [dtype for dtype in dtypes if any(strategies_of(backend, shape, dtype) for shape in shapes)]


class Run:
    """One product and its gradients, from rounded inputs, by a kernel or by the reference."""

    def __init__(
        self,
        shape: MPOShape,
        dtype: torch.dtype,
        *,
        tokens: int = 9,
        experts: int = 3,
        top_k: int = 2,
        kind: str = "zipf",
        capacity: int | None = None,
        activation: str | None = "gelu",
        with_bias: bool = True,
        gathered: bool = True,
        mask: Tensor | None = None,
    ) -> None:
        index = expert_choice(kind, tokens, experts, min(top_k, experts))
        self.routing = route(index, experts, capacity, mask)
        self.dtype, self.activation = dtype, activation
        slots = self.routing.token_of_slot.shape[0]
        self.row_index = self.routing.token_of_slot if gathered else None
        self.x = torch.randn(tokens if gathered else slots, shape.in_features).to(dtype)
        self.bias = torch.randn(shape.out_features).to(dtype) if with_bias else None
        self.blocks = random_blocks(shape, experts, dtype)
        self.grad = torch.randn(slots, shape.out_features).to(dtype)
        if activation == "relu":  # its gradient jumps at zero: rounding must not decide which side a value is on
            blocks, bias = cast(self.blocks, torch.float64), None if self.bias is None else self.bias.double()
            z = grouped_mpo_linear_reference(
                self.x.double(), blocks, self.routing.expert_offsets, bias, row_index=self.row_index
            )
            self.grad = self.grad * (z.detach().abs() > 0.1)

    def __call__(
        self,
        function: Callable[..., Tensor],
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = LAYOUTS["dense"],
        **options: object,
    ) -> list[Tensor]:
        x = layout(self.x.to(dtype)).detach().requires_grad_()
        bias = None if self.bias is None else layout(self.bias.to(dtype)).detach().requires_grad_()
        blocks = cast(self.blocks, dtype, layout)
        offsets, activation = self.routing.expert_offsets, self.activation
        y = function(x, blocks, offsets, bias, row_index=self.row_index, activation=activation, **options)
        inputs = [x, *leaves(blocks)] + ([] if bias is None else [bias])
        if y.requires_grad:  # without rows, the reference depends on no input
            grads = torch.autograd.grad(y, inputs, layout(self.grad.to(dtype)).detach(), allow_unused=True)
        else:
            grads = (None,) * len(inputs)
        return [y, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True))]

    def check(self, backend: str, strategy: str, layout: str = "dense") -> None:
        with poisoned_memory():
            actual = self(grouped_mpo_linear, self.dtype, LAYOUTS[layout], backend=backend, strategy=strategy)
        truth = self(grouped_mpo_linear_reference, torch.float64)
        same = self(grouped_mpo_linear_reference, self.dtype)
        for label, a, t, s in zip(NAMES, actual, truth, same, strict=False):
            if self.dtype == torch.float64:  # the truth has the same rounding
                assert relative_error(a, t) < 1e-13, f"{label} ({strategy})"
            else:
                assert_calibrated(a, t, s, f"{label} ({strategy})")
        assert bool((actual[0][int(self.routing.expert_offsets[-1]) :] == 0).all())


@on_every_backend
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(SMALL_SHAPES)),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from(["uniform", "zipf", "all_to_one", "some_idle"]),
    st.sampled_from([None, "relu", "gelu", "gelu_new", "silu"]),
    st.integers(0, 2**31),
    st.data(),
)
def test_forward_and_backward_against_reference(
    backend: str,
    name: str,
    tokens: int,
    experts: int,
    top_k: int,
    kind: str,
    activation: str | None,
    seed: int,
    data: st.DataObject,
) -> None:
    require(backend)
    torch.manual_seed(seed)
    dtypes = cpu_dtypes(backend)
    if not dtypes:
        pytest.skip(f"backend {backend} has no kernel for grouped_mpo_linear")
    dtype = data.draw(st.sampled_from(dtypes))
    choices = choices_of(backend, SMALL_SHAPES[name], dtype)
    assume(choices)
    run = Run(
        SMALL_SHAPES[name],
        dtype,
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        kind=kind,
        activation=activation,
        capacity=data.draw(st.none() | st.integers(1, 5)),
        with_bias=data.draw(st.booleans()),
        gathered=data.draw(st.booleans()),
        mask=torch.rand(tokens) > 0.2 if data.draw(st.booleans()) else None,
    )
    run.check(backend, data.draw(st.sampled_from(choices)), data.draw(st.sampled_from(list(LAYOUTS))))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEDIUM_SHAPES)
def test_sizes_beyond_one_tile(backend: str, name: str, dtype: torch.dtype) -> None:
    """More rows than a tile, more columns than a panel, and remainders of both; an idle and a one-row expert."""
    for strategy in require_strategies(backend, MEDIUM_SHAPES[name], dtype):
        run = Run(MEDIUM_SHAPES[name], dtype, tokens=83, experts=4, top_k=1, kind="some_idle", activation="silu")
        run.check(backend, strategy)
        Run(MEDIUM_SHAPES[name], dtype, tokens=1, experts=4, top_k=1, activation="relu").check(backend, strategy)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["medium", "medium_separable"])
def test_odd_alignment_and_strides_change_no_bit(backend: str, name: str, dtype: torch.dtype) -> None:
    for strategy in require_strategies(backend, MEDIUM_SHAPES[name], dtype):
        run = Run(MEDIUM_SHAPES[name], dtype, tokens=20)
        options = {"backend": backend, "strategy": strategy}
        with poisoned_memory():
            dense = run(grouped_mpo_linear, dtype, **options)
            for layout in ("unaligned", "strided"):
                moved = run(grouped_mpo_linear, dtype, LAYOUTS[layout], **options)
                for label, a, b in zip(NAMES, dense, moved, strict=True):
                    if backend == "native":
                        assert torch.equal(a, b), f"{label} ({strategy}, {layout})"
                    else:  # torch's own products may round differently there
                        assert relative_error(a, b) < 8 * torch.finfo(dtype).eps, f"{label} ({strategy}, {layout})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEDIUM_SHAPES)
def test_native_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    for strategy in require_strategies("native", MEDIUM_SHAPES[name], dtype):
        run = Run(MEDIUM_SHAPES[name], dtype, tokens=250, experts=5, kind="zipf", activation="gelu_new")
        results = []
        for threads in (1, 2, 4):
            with torch_threads(threads):
                results.append(run(grouped_mpo_linear, dtype, backend="native", strategy=strategy))
        for other in results[1:]:
            for label, a, b in zip(NAMES, results[0], other, strict=True):
                assert torch.equal(a, b), f"{label} ({strategy})"


@pytest.mark.parametrize("name", ["paper_bond_4", "separable", "padded", "one_core"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradcheck(name: str, activation: str | None) -> None:
    """By finite differences, if the backend has float64; the other dtypes are compared with float64 above."""
    shape = SMALL_SHAPES[name]
    routing = route(torch.tensor([[0, 1], [1, 2], [1, 0]]), 3, capacity=2)
    bias = torch.randn(shape.out_features, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, shape.in_features, dtype=torch.float64, requires_grad=True)
    blocks = random_blocks(shape, 3, requires_grad=True)
    for strategy in require_strategies("eager", shape, torch.float64):

        def function(x, left, central, right, bias, strategy=strategy):
            return grouped_mpo_linear(
                x,
                MPOBlocks(left, central, right, shape.in_features, shape.out_features),
                routing.expert_offsets,
                bias,
                row_index=routing.token_of_slot,
                activation=activation,
                strategy=strategy,
                backend="eager",
            )

        assert gradcheck(function, (x, *leaves(blocks), bias), fast_mode=True)


@on_every_backend
@pytest.mark.parametrize("name", ["paper", "separable", "padded_separable", "centre_last"])
def test_opcheck(backend: str, name: str) -> None:
    shape = SMALL_SHAPES[name]
    require_strategies(backend, shape, torch.float32)
    routing = route(expert_choice("uniform", 6, 3), 3, capacity=2)
    blocks = random_blocks(shape, 3, torch.float32, requires_grad=True)
    x = torch.randn(6, shape.in_features, requires_grad=True)
    sizes = (shape.in_features, shape.out_features)
    op = torch.ops.mpoe.grouped_mpo_linear.default
    for strategy in choices_of(backend, shape, torch.float32):
        arguments = (x, *leaves(blocks), routing.expert_offsets, torch.randn(sizes[1]), routing.token_of_slot, *sizes)
        # Autograd and AOT dispatch take most of the time and do not depend on sizes: only two shapes test them.
        utils = ALL_UTILS if name in ("paper", "separable") else FEW_UTILS
        for activation in ("none", "relu", "gelu") if strategy == "auto" else ("gelu",):
            opcheck(op, (*arguments, activation, strategy, backend, True), test_utils=utils)
        without = (x, *leaves(blocks), routing.expert_offsets, None, None, *sizes, "silu", strategy, backend, False)
        opcheck(op, without, test_utils=FEW_UTILS)


@on_every_backend
@pytest.mark.parametrize("name", ["light", "separable"])
def test_opcheck_backward(backend: str, name: str) -> None:
    shape = SMALL_SHAPES[name]
    routing = route(expert_choice("uniform", 6, 3), 3)
    left, central, right = (t.detach() for t in leaves(random_blocks(shape, 3, torch.float32)))
    x, grad = torch.randn(6, shape.in_features), torch.randn(6, shape.out_features)
    bias, empty = torch.zeros(shape.out_features), torch.empty(0)
    h = torch.randn(6 * central.shape[2], central.shape[3])
    for strategy in require_strategies(backend, shape, torch.float32):
        everything = [True] * 5
        for need in (everything, [True, False, False, False, False], [False, True, False, True, True]):
            opcheck(
                torch.ops.mpoe.grouped_mpo_linear_backward.default,
                (x, left, central, right, routing.expert_offsets, bias, routing.token_of_slot)
                + (shape.in_features, shape.out_features, "none", strategy, backend)
                + (grad, h if strategy == "separable" else empty, empty, need),
                test_utils=ALL_UTILS if need is everything else FEW_UTILS,
            )


@on_every_backend
@pytest.mark.parametrize("name", ["light", "separable"])
@pytest.mark.parametrize("needed", range(5))
def test_each_gradient_alone(backend: str, needed: int, name: str) -> None:
    """One gradient requested alone equals the same gradient when all are requested, for every strategy."""
    shape, dtype = SMALL_SHAPES[name], torch.float32
    blocks = random_blocks(shape, 2, dtype)
    inputs = [torch.randn(5, shape.in_features), *leaves(blocks), torch.randn(shape.out_features)]
    for strategy in require_strategies(backend, shape, dtype):

        def gradient(which: set[int], strategy=strategy) -> list[Tensor]:
            tensors = [t.detach().clone().requires_grad_(k in which) for k, t in enumerate(inputs)]
            x, left, central, right, bias = tensors
            own = MPOBlocks(left, central, right, shape.in_features, shape.out_features)
            y = grouped_mpo_linear(x, own, torch.tensor([0, 3, 4]), bias, strategy=strategy, backend=backend)
            return list(torch.autograd.grad(y.square().sum(), [tensors[k] for k in sorted(which)]))

        assert torch.equal(gradient({needed})[0], gradient(set(range(5)))[needed])


@on_every_backend
@pytest.mark.parametrize("name", ["paper", "separable"])
def test_expanded_gradient_and_transposed_input(backend: str, name: str) -> None:
    """The gradient of a sum has stride 0; x and left are transposed in memory."""
    shape, dtype = SMALL_SHAPES[name], torch.float32
    blocks, offsets = random_blocks(shape, 2, dtype), torch.tensor([0, 2, 5], dtype=torch.int32)
    x = torch.randn(shape.in_features, 5).T
    left = blocks.left.transpose(1, 2).contiguous().transpose(1, 2)
    moved = MPOBlocks(left, blocks.central, strided(blocks.right), shape.in_features, shape.out_features)
    for strategy in require_strategies(backend, shape, dtype):
        leaf = x.clone().requires_grad_()
        y = grouped_mpo_linear(leaf.T.contiguous().T, moved, offsets, strategy=strategy, backend=backend)
        assert torch.allclose(y, grouped_mpo_linear_reference(x, blocks, offsets), atol=1e-5)
        y.sum().backward()
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad[0], weight_reference(blocks, 0).sum(1), atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("name", ["light", "separable"])
def test_compiles_into_one_graph(backend: str, name: str) -> None:
    shape = SMALL_SHAPES[name]
    strategies = require_strategies(backend, shape, torch.float32)
    blocks = random_blocks(shape, 3, torch.float32, requires_grad=True)

    def product(x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_mpo_linear(x, blocks, offsets, activation="gelu", strategy=strategies[-1], backend=backend)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        x, offsets = torch.randn(tokens, shape.in_features, requires_grad=True), torch.tensor([0, 2, 2, tokens])
        expected, got = product(x, offsets), compiled(x, offsets)
        assert torch.equal(got, expected)
        inputs = [x, *leaves(blocks)]
        pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, expected)), strict=True)
        assert all(torch.allclose(a, b) for a, b in pairs)
