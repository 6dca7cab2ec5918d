"""grouped_mpo_linear on every backend, strategy, dtype and layout of memory, against the float64
reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import random_blocks, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import MPOBlocks, MPOShape, backends, grouped_mpo_linear, mpo_linear
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.op import ACTIVATIONS
from mpoe_kernels.reference import grouped_mpo_linear_reference, weight_reference
from tests.assertions import torch_threads
from tests.cases import SMALL_SHAPES, pairwise
from tests.linear_problem import LAYOUTS, NAMES, Product

from .backend_cases import (
    candidate_backend,
    choices_of,
    eager_kernel,
    on_every_backend,
    require,
    require_strategies,
    strategies_of,
)

BOTH = (torch.float32, torch.bfloat16)
# Several panels, tiles and k steps, with remainders everywhere.
MEDIUM = {
    "medium": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=117, out_features=165),
    "medium_separable": MPOShape(
        (40, 9, 1), (1, 7, 36), max_bond=(24, 30), in_features=357, out_features=249
    ),
    "medium_mirrored": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(24, 30)).mirrored(),
}
# For native kernels: several blocks in k and in n, with a smaller last one; bonds that do not fill
# a granule; both orders of half_left; for separable several pieces of k and column strips, and odd
# bonds, which bfloat16 pads.
LARGER = {
    "many_blocks": MPOShape((8, 13, 16), (8, 11, 16), max_bond=40),
    "many_blocks_mirrored": MPOShape((8, 9, 24), (12, 11, 16), max_bond=40),
    "wide_left": MPOShape((24, 3, 4), (16, 5, 2), max_bond=33),
    "wide_right": MPOShape((4, 3, 24), (4, 5, 24), max_bond=33),
    "cropped": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=101, out_features=123),
    "cropped_right_first": MPOShape(
        (4, 5, 6), (7, 6, 4), max_bond=20, in_features=101, out_features=123
    ),
    "few_rows": MPOShape((4, 9, 3), (4, 37, 8), max_bond=(11, 13)),
    "few_rows_central_first": MPOShape((2, 60, 4), (4, 4, 8), max_bond=8),
    "even": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)),
    "mirrored": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)).mirrored(),
    "odd": MPOShape((17, 9, 1), (1, 5, 21), max_bond=(15, 19)),
    "long_sums": MPOShape((48, 31, 1), (1, 5, 24), max_bond=(40, 36)),
    "longest_sums": MPOShape((64, 256, 1), (1, 3, 8)),  # the central step sums 16,384 products
    "many_rows": MPOShape((5, 4, 1), (1, 3, 6), max_bond=(5, 6)),
}
# A chain packs central piece by piece for up to 64 rows, in a backward 128: 12 of each slot, or 8
# if it is first; after left, for 481 columns, it has to be fewer rows. Separable packs central as a
# whole above 128 slots (64 in a backward), and sums its gradient over 1,024 rows at a time.
NATIVE_SIZES = [
    *((name, 70) for name in LARGER),
    *(
        (name, tokens)
        for name in ("few_rows", "few_rows_central_first")
        for tokens in (1, 2, 3, 8, 11, 40, 41)
    ),
    *((name, tokens) for name in ("even", "odd") for tokens in (1, 2, 3, 8, 64, 65, 128, 129, 400)),
    *(("long_sums", slots) for slots in (8, 17, 24, 33, 48, 100)),
    *(("longest_sums", 3), ("longest_sums", 148), ("many_rows", 2061)),
]
# One shape for each order of contracting x with the three blocks: initials of left, central and
# right.
CHAIN_ORDERS = {
    "LCR": ((2, 2, 2), (2, 2, 3)),
    "RCL": ((2, 2, 2), (3, 2, 2)),
    "CLR": ((2, 12, 2), (2, 2, 2)),
    "CRL": ((2, 12, 2), (3, 2, 2)),
    "RLC": ((3, 2, 5), (2, 8, 2)),
    "LRC": ((3, 2, 3), (2, 8, 2)),
}


def cpu_dtypes(backend):
    """Dtypes in which a backend computes anything, among those whose rounding the tests know."""
    shapes = (SMALL_SHAPES["light"], SMALL_SHAPES["separable"])
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return [
        dtype for dtype in dtypes if any(strategies_of(backend, shape, dtype) for shape in shapes)
    ]


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
def test_random_problems(backend, shape, tokens, seed, data, **options: object):
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
        **options,
    )
    product.check(data.draw(st.sampled_from(choices)))


@on_every_backend
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", MEDIUM)
def test_sizes_beyond_one_tile(backend, name, dtype):
    """More rows than a tile, more columns than a panel, and remainders of both; an idle and a
    one-row expert."""
    strategies = require_strategies(backend, MEDIUM[name], dtype)
    for options in (
        {"tokens": 83, "kind": "some_idle", "activation": "silu"},
        {"tokens": 1, "activation": "relu"},
    ):
        product = Product(MEDIUM[name], dtype, experts=4, top_k=1, backend=backend, **options)
        for strategy in strategies:
            product.check(strategy)


@pytest.mark.parametrize("size, dtype", pairwise(NATIVE_SIZES, BOTH))
def test_blocks_and_pieces_of_native_kernels(size, dtype):
    name, tokens = size
    experts, kind, activation = (4, "some_idle", "silu") if tokens == 70 else (2, "zipf", "gelu")
    product = Product(
        LARGER[name], dtype, tokens, experts, 1, kind, activation=activation, backend="native"
    )
    # All of one sign, otherwise the bias gradient may be a small difference of large numbers.
    product.grad = product.grad.abs() + 0.5
    strategies = require_strategies("native", LARGER[name], dtype)
    # Rebuilt and half rebuilt weights do not depend on the number of tokens: of large ones they are
    # compared once, and not of those whose sums are long in a chain alone.
    is_rebuilt = name not in ("even", "long_sums", "longest_sums")
    is_rebuilt |= tokens == 70 and name != "longest_sums"
    for strategy in strategies if is_rebuilt else strategies[3:]:
        product.check(strategy)


@on_every_backend
@pytest.mark.parametrize("name", ["paper", "separable"])
def test_rows_that_no_slot_reads(backend, name):
    shape = SMALL_SHAPES[name]
    product = Product(shape, tokens=0, top_k=1, backend=backend)
    product.x = torch.randn(3, shape.in_features)
    for strategy in require_strategies(backend, shape, product.dtype):
        product.check(strategy)


@on_every_backend
@pytest.mark.parametrize("order, dtype", pairwise(list(CHAIN_ORDERS), BOTH))
def test_every_chain_order(backend, order, dtype):
    shape = MPOShape(*CHAIN_ORDERS[order], max_bond=5)
    if "chain" not in require_strategies(backend, shape, dtype):
        pytest.skip(f"backend {backend} has no chain")
    assert BlockDims.of_shape(shape).chain_order == tuple(order)
    Product(shape, dtype, 21, top_k=1, backend=backend).check("chain")


@on_every_backend
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["medium", "medium_separable"])
def test_odd_alignment_and_strides_change_no_bit(backend, name, dtype):
    product = Product(MEDIUM[name], dtype, 20, backend=backend)
    for strategy in require_strategies(backend, MEDIUM[name], dtype):
        product.layout = "dense"
        dense = product.run(strategy)
        for product.layout in ("unaligned", "strided"):
            for label, a, b in zip(NAMES, dense, product.run(strategy), strict=True):
                if backend == "native":
                    assert torch.equal(a, b), f"{label} ({strategy}, {product.layout})"
                else:  # torch's own products may round differently there
                    assert relative_error(a, b) < 8 * torch.finfo(dtype).eps, (
                        f"{label} ({strategy}, {product.layout})"
                    )


@pytest.mark.parametrize(
    "shape, tokens, experts, dtype",
    pairwise(
        [
            MEDIUM["medium_mirrored"],
            *(LARGER[name] for name in ("many_blocks", "cropped", "few_rows", "even")),
        ],
        (1, 50),
        (1, 5),  # with few experts, one expert's rows of dleft and dright are shared out
        BOTH,
    ),
)
def test_native_bits_do_not_depend_on_threads(shape, tokens, experts, dtype):
    product = Product(
        shape, dtype, tokens, experts=experts, activation="gelu_new", backend="native"
    )
    for strategy in require_strategies("native", shape, dtype):
        results = []
        for threads in (1, 3):
            with torch_threads(threads):
                results.append(product.run(strategy))
        for label, a, b in zip(NAMES, *results, strict=True):
            assert torch.equal(a, b), f"{label} ({strategy})"


@pytest.mark.parametrize("name", ["paper", "separable"])
def test_masked_central_core_is_never_computed(name, monkeypatch):
    """A detached central core reaches the backward kernel as "not needed", and its gradient stays
    None."""
    seen = []
    kernels = {op: eager_kernel(op) for op in backends.CONTRACTIONS}
    backward = kernels["grouped_mpo_linear_backward"]
    kernels["grouped_mpo_linear_backward"] = lambda call: (seen.append(call.need), backward(call))[
        1
    ]
    monkeypatch.setitem(backends.BACKENDS, "seen", candidate_backend("seen", kernels))
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("seen", "eager"))
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 2, requires_grad=True)
    masked = MPOBlocks(
        blocks.left, blocks.central.detach(), blocks.right, shape.in_features, shape.out_features
    )
    x = torch.randn(5, shape.in_features, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 5])
    strategy = (
        "separable" if shape.is_separable else "half_left"
    )  # unforced, masked ones may choose another
    grouped_mpo_linear(x, masked, offsets, strategy=strategy).sum().backward()
    assert seen == [[True, True, False, True, False]]
    assert blocks.central.grad is None


def test_nothing_is_kept_for_a_backward_that_cannot_follow():
    shape = SMALL_SHAPES["separable"]
    blocks, x, offsets = (
        random_blocks(shape, 1),
        torch.randn(4, shape.in_features).double(),
        torch.tensor([0, 4]),
    )
    saved = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.mpoe.grouped_mpo_linear.default:
                saved.append(arguments[-1])
            return function(*arguments, **(options or {}))

    with Seen():
        grouped_mpo_linear(x, blocks, offsets)
        grouped_mpo_linear(
            x, blocks, offsets, torch.ones(shape.out_features).double().requires_grad_()
        )
        with torch.no_grad():
            grouped_mpo_linear(x.clone().requires_grad_(), blocks, offsets)
    assert saved == [False, True, False]


def test_linear_keeps_leading_dimensions_and_transposed_blocks_are_the_tied_head():
    shape = SMALL_SHAPES["padded"]
    blocks = random_blocks(shape, 1)
    weight = weight_reference(blocks, 0)
    x = torch.randn(2, 3, shape.in_features, dtype=torch.float64)
    bias = torch.randn(shape.out_features, dtype=torch.float64)
    assert torch.allclose(mpo_linear(x, blocks, bias), x @ weight + bias)
    hidden = torch.randn(4, shape.out_features, dtype=torch.float64)
    assert torch.allclose(mpo_linear(hidden, blocks.transposed()), hidden @ weight.T)


@pytest.mark.parametrize(
    "left, right", [((1, 1, 2, 20), (1, 6, 2, 2)), ((1, 2, 2, 6), (1, 20, 1, 2))]
)
def test_what_a_weight_is_rebuilt_from_may_be_larger(left, right):
    sizes = left, (left[-1], 3, 1, right[1]), right
    blocks = MPOBlocks(*(torch.randn(size, dtype=torch.float64) for size in sizes), 6, 4)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = grouped_mpo_linear(x, blocks, torch.tensor([0, 5]), strategy="rebuild", backend="eager")
    assert torch.allclose(y, x @ weight_reference(blocks, 0))


def test_every_public_activation_has_a_reference():
    shape = SMALL_SHAPES["light"]
    blocks = random_blocks(shape, 1)
    x, offsets = torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 4])
    for name, formula in ACTIVATIONS.items():
        got = grouped_mpo_linear(x, blocks, offsets, activation=name)
        assert torch.allclose(
            got, grouped_mpo_linear_reference(x, blocks, offsets, activation=formula)
        )


def small_product():
    blocks = random_blocks(MPOShape((2, 2, 3), (2, 3, 2)), 2, torch.float32)
    return torch.randn(5, 12), blocks, torch.tensor([0, 3, 5], dtype=torch.int32)


def test_a_raw_forward_that_saved_nothing_has_no_backward():
    """The library would read beyond the empty tensor."""
    require("native")
    x, blocks, offsets = small_product()
    left = blocks.left.requires_grad_()
    arguments = x, left, blocks.central, blocks.right, offsets, None, None, 12, 12
    y = torch.ops.mpoe.grouped_mpo_linear(*arguments, "gelu", "chain", "native", False)[0]
    with pytest.raises(ValueError, match=r"saved must be float32 \[5, 12\]; got float32 \[0\]"):
        y.sum().backward()


def test_autocast_reaches_torch_func():
    x, blocks, offsets = small_product()

    def loss(x, left):
        product = MPOBlocks(left, blocks.central, blocks.right, 12, 12)
        return grouped_mpo_linear(x, product, offsets).float().sum()

    wanted = torch.func.grad(loss, (0, 1))(x, blocks.left)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = torch.func.grad(loss, (0, 1))(x, blocks.left)
    for value, truth in zip(lowered, wanted, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, truth, rtol=0.05, atol=0.05 * truth.abs().max().item())
