"""grouped_mpo_linear on every backend, strategy, dtype and layout of memory, against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice, random_blocks, relative_error
from torch.library import opcheck

from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear, route
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.reference import grouped_mpo_linear_reference, weight_reference
from tests.assertions import poisoned_memory, torch_threads
from tests.cases import SMALL_SHAPES, pairwise
from tests.linear_problem import LAYOUTS, NAMES, Product, leaves, strided

from .backend_cases import (
    BACKENDS,
    choices_of,
    on_every_backend,
    require,
    require_strategies,
    strategies_of,
)

ALL_UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FEW_UTILS = ("test_schema", "test_faketensor")
BOTH = (torch.float32, torch.bfloat16)
# Several panels, tiles and k steps, with remainders everywhere.
MEDIUM = {
    "medium": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=117, out_features=165),
    "medium_separable": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(24, 30), in_features=357, out_features=249),
    "medium_mirrored": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(24, 30)).mirrored(),
}
# For native kernels: several blocks in k and in n, with a smaller last one; bonds that do not fill a granule; both
# orders of half_left; for separable several pieces of k and column strips, and odd bonds, which bfloat16 pads.
LARGER = {
    "many_blocks": MPOShape((16, 9, 16), (16, 7, 16), max_bond=40),
    "many_blocks_mirrored": MPOShape((16, 7, 24), (16, 9, 16), max_bond=40),
    "wide_left": MPOShape((24, 3, 4), (16, 5, 2), max_bond=33),
    "wide_right": MPOShape((4, 3, 24), (4, 5, 24), max_bond=33),
    "cropped": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=101, out_features=123),
    "cropped_right_first": MPOShape((4, 5, 6), (7, 6, 4), max_bond=20, in_features=101, out_features=123),
    "few_rows": MPOShape((4, 9, 3), (4, 37, 8), max_bond=(11, 13)),
    "few_rows_central_first": MPOShape((2, 60, 4), (4, 4, 8), max_bond=8),
    "even": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)),
    "mirrored": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)).mirrored(),
    "odd": MPOShape((17, 9, 1), (1, 5, 21), max_bond=(15, 19)),
    "long_sums": MPOShape((48, 31, 1), (1, 5, 24), max_bond=(40, 36)),
    "longest_sums": MPOShape((64, 256, 1), (1, 3, 8)),  # the central step sums 16,384 products
    "many_rows": MPOShape((5, 4, 1), (1, 3, 6), max_bond=(5, 6)),
}
# A chain packs central piece by piece for up to 64 rows, in a backward 128: 12 of each slot, or 8 if it is first; after
# left, for 481 columns, it has to be fewer rows. Separable packs central as a whole above 128 slots (64 in a backward),
# and sums its gradient over 1,024 rows at a time.
NATIVE_SIZES = [
    *((name, 70) for name in LARGER),
    *((name, tokens) for name in ("few_rows", "few_rows_central_first") for tokens in (1, 2, 3, 8, 11, 40, 41)),
    *((name, tokens) for name in ("even", "odd") for tokens in (1, 2, 3, 8, 64, 65, 128, 129, 400)),
    *(("long_sums", slots) for slots in (8, 17, 24, 33, 48, 100)),
    *(("longest_sums", 3), ("longest_sums", 148), ("many_rows", 2061)),
]
# One shape for each order of contracting x with the three blocks: initials of left, central and right.
CHAIN_ORDERS = {
    "LCR": ((2, 2, 2), (2, 2, 3)),
    "RCL": ((2, 2, 2), (3, 2, 2)),
    "CLR": ((2, 12, 2), (2, 2, 2)),
    "CRL": ((2, 12, 2), (3, 2, 2)),
    "RLC": ((3, 2, 5), (2, 8, 2)),
    "LRC": ((3, 2, 3), (2, 8, 2)),
}


def cpu_dtypes(backend: str) -> list[torch.dtype]:
    """Dtypes in which a backend computes anything, among those whose rounding the tests know."""
    shapes = (SMALL_SHAPES["light"], SMALL_SHAPES["separable"])
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return [dtype for dtype in dtypes if any(strategies_of(backend, shape, dtype) for shape in shapes)]


@on_every_backend
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(list(SMALL_SHAPES.values()))
    | st.builds(
        lambda factors, bond: MPOShape(*zip(*factors, strict=True), max_bond=bond),
        st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
        st.none() | st.integers(1, 24),
    ),
    tokens=st.integers(0, 20),
    kind=st.sampled_from(["uniform", "zipf", "all_to_one", "some_idle"]),
    activation=st.sampled_from(["none", "relu", "gelu", "gelu_new", "silu"]),
    capacity=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_random_problems(
    backend: str, shape: MPOShape, tokens: int, seed: int, data: st.DataObject, **options: object
) -> None:
    require(backend)
    torch.manual_seed(seed)
    dtypes = cpu_dtypes(backend)
    if not dtypes:
        pytest.skip(f"backend {backend} has no kernel for grouped_mpo_linear")
    dtype = data.draw(st.sampled_from(dtypes))
    choices = choices_of(backend, shape, dtype)
    assume(choices)
    product = Product(
        shape,
        dtype,
        tokens,
        experts=data.draw(st.integers(1, 5)),
        top_k=data.draw(st.integers(1, 2)),
        with_bias=data.draw(st.booleans()),
        gathered=data.draw(st.booleans()),
        mask=torch.rand(tokens) > 0.2 if data.draw(st.booleans()) else None,
        backend=backend,
        layout=data.draw(st.sampled_from(list(LAYOUTS))),
        **options,  # type: ignore[arg-type]
    )
    product.check(data.draw(st.sampled_from(choices)))


@on_every_backend
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", MEDIUM)
def test_sizes_beyond_one_tile(backend: str, name: str, dtype: torch.dtype) -> None:
    """More rows than a tile, more columns than a panel, and remainders of both; an idle and a one-row expert."""
    strategies = require_strategies(backend, MEDIUM[name], dtype)
    for options in ({"tokens": 83, "kind": "some_idle", "activation": "silu"}, {"tokens": 1, "activation": "relu"}):
        product = Product(MEDIUM[name], dtype, experts=4, top_k=1, backend=backend, **options)  # type: ignore[arg-type]
        for strategy in strategies:
            product.check(strategy)


@pytest.mark.parametrize(("size", "dtype"), pairwise(NATIVE_SIZES, BOTH))
def test_blocks_and_pieces_of_native_kernels(size: tuple[str, int], dtype: torch.dtype) -> None:
    name, tokens = size
    kind, activation = ("some_idle", "silu") if tokens == 70 else ("zipf", "gelu")
    product = Product(LARGER[name], dtype, tokens, 4, 1, kind, activation=activation, backend="native")
    # All of one sign, otherwise the bias gradient may be a small difference of large numbers.
    product.grad = product.grad.abs() + 0.5
    for strategy in require_strategies("native", LARGER[name], dtype):
        product.check(strategy)


@on_every_backend
@pytest.mark.parametrize(("order", "dtype"), pairwise(list(CHAIN_ORDERS), BOTH))
def test_every_chain_order(backend: str, order: str, dtype: torch.dtype) -> None:
    shape = MPOShape(*CHAIN_ORDERS[order], max_bond=5)
    if "chain" not in require_strategies(backend, shape, dtype):
        pytest.skip(f"backend {backend} has no chain")
    assert BlockDims.of_shape(shape).chain_order == tuple(order)
    Product(shape, dtype, 21, top_k=1, backend=backend).check("chain")


@on_every_backend
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["medium", "medium_separable"])
def test_odd_alignment_and_strides_change_no_bit(backend: str, name: str, dtype: torch.dtype) -> None:
    product = Product(MEDIUM[name], dtype, 20, backend=backend)
    for strategy in require_strategies(backend, MEDIUM[name], dtype):
        product.layout = "dense"
        dense = product.run(strategy)
        for product.layout in ("unaligned", "strided"):
            for label, a, b in zip(NAMES, dense, product.run(strategy), strict=True):
                if backend == "native":
                    assert torch.equal(a, b), f"{label} ({strategy}, {product.layout})"
                else:  # torch's own products may round differently there
                    assert relative_error(a, b) < 8 * torch.finfo(dtype).eps, f"{label} ({strategy}, {product.layout})"


@pytest.mark.parametrize(
    ("shape", "tokens", "experts", "dtype"),
    pairwise(
        [MEDIUM["medium_mirrored"], *(LARGER[name] for name in ("many_blocks", "cropped", "few_rows", "even"))],
        (1, 50),
        (1, 5),  # with few experts, one expert's rows of dleft and dright are shared out
        BOTH,
    ),
)
def test_native_bits_do_not_depend_on_threads(shape: MPOShape, tokens: int, experts: int, dtype: torch.dtype) -> None:
    product = Product(shape, dtype, tokens, experts=experts, activation="gelu_new", backend="native")
    for strategy in require_strategies("native", shape, dtype):
        results = []
        for threads in (1, 2, 3):
            with torch_threads(threads):
                results.append(product.run(strategy))
        for other in results[1:]:
            for label, a, b in zip(NAMES, results[0], other, strict=True):
                assert torch.equal(a, b), f"{label} ({strategy})"


SOME = [set(each) for count in (1, 2, 4) for each in combinations(range(5), count)]
ALONE = [(backend, name, needed) for backend in BACKENDS for name in ("light", "separable") for needed in SOME]
ALONE += [("native", name, needed) for name in ("many_blocks", "even") for needed in SOME if len(needed) != 2]


@pytest.mark.parametrize(("backend", "name", "needed"), ALONE, ids=str)
def test_some_gradients_alone(backend: str, name: str, needed: set[int]) -> None:
    """They have the bits that they have if all are wanted; without any, y has the same bits."""
    shape = (SMALL_SHAPES | LARGER)[name]
    product = Product(shape, tokens=5, experts=2, top_k=1, gathered=False, backend=backend)
    for strategy in require_strategies(backend, product.shape, torch.float32):
        y, *every = product.run(strategy)
        given = [t.detach().requires_grad_(place in needed) for place, t in enumerate(product.inputs)]
        wanted = [t for t in given if t.requires_grad]
        with poisoned_memory():
            found = torch.autograd.grad(product.call(given, strategy), wanted, product.grad)
        for place, gradient in zip(sorted(needed), found, strict=True):
            # Of a bias alone plain PyTorch sums all rows at once, not expert by expert.
            same = torch.allclose if backend == "eager" and needed == {4} else torch.equal
            assert same(gradient, every[place]), f"{NAMES[place + 1]} ({strategy})"
        with torch.no_grad():
            assert torch.equal(product.call(given, strategy), y)


def of_all(backend: str, *names: str) -> str:
    """The one of these shapes for which all is checked: another for every backend."""
    return names[BACKENDS.index(backend) % len(names)]


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
        # Autograd and AOT dispatch take most of the time and depend on neither sizes nor strategies.
        utils = ALL_UTILS if (name, strategy) == (of_all(backend, "paper", "separable"), "auto") else FEW_UTILS
        opcheck(op, (*arguments, "gelu", strategy, backend, True), test_utils=utils)
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
    strategies = require_strategies(backend, shape, torch.float32)
    whole = of_all(backend, "light", "separable"), strategies[-1]
    for strategy in strategies:
        everything = [True] * 5
        for need in (everything, [True, False, False, False, False], [False, True, False, True, True]):
            opcheck(
                torch.ops.mpoe.grouped_mpo_linear_backward.default,
                (x, left, central, right, routing.expert_offsets, bias, routing.token_of_slot)
                + (shape.in_features, shape.out_features, "none", strategy, backend)
                + (grad, h if strategy == "separable" else empty, empty, need),
                test_utils=ALL_UTILS if need is everything and (name, strategy) == whole else FEW_UTILS,
            )


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


ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


# tools/native_sanitizers.sh also runs these kernels with every instruction set under sanitizers.
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.slow if isa == "avx2" else pytest.mark.exhaustive) for isa in ISAS]
)
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    require("native")
    best = NATIVE_LIBRARY.info["isa_detected"]  # what the tests use anyway
    if ISAS.index(isa) >= ISAS.index(best):
        pytest.skip(f"this machine's best is {best}")
    environment = os.environ | {"MPOE_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "native"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
