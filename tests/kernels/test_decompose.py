"""Shapes; decomposition: exactness, errors, gauges, unusual input, the original as a yardstick."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import random_cores, relative_error, workload_shape

from mpoe_kernels import (
    MPOShape,
    decompose,
    decompose_with_errors,
    expert_weights,
    fold,
    reconstruct,
)
from mpoe_kernels.mpo.factors import balanced_factors
from mpoe_kernels.reference import weight_reference
from tests.assertions import refuses
from tests.cases import SMALL_SHAPES, every_refusal, resized

# ------------------------------------------------------------------ shapes


def test_t5_base_bonds_and_counts():
    shape = MPOShape.paper(768, 3072)
    assert shape.in_factors == (3, 4, 4, 4, 4)
    assert shape.out_factors == (4, 4, 8, 6, 4)
    assert shape.bond_dims == (1, 12, 192, 384, 16, 1)
    assert shape.central_parameters == 2_359_296
    assert shape.auxiliary_parameters == 184_720
    assert shape.parameters(8) == 2_359_296 + 8 * 184_720
    assert shape.is_full


@pytest.mark.parametrize(
    "sizes, bond, central, auxiliary",
    [
        ((768, 3072), 128, 524_288, 74_128),
        ((768, 3072), 8, 2_048, 2_784),
        ((768, 768), None, None, 0.1255),
        ((32128, 768), None, None, 0.0652),
    ],
)
def test_counts_of_the_original_shapes(sizes, bond, central, auxiliary):
    """Of full bonds the share of the auxiliary cores, as the original says."""
    shape = MPOShape.paper(*sizes, max_bond=bond)
    assert shape.is_full == (bond is None)
    assert central is None or (shape.central_parameters, shape.auxiliary_parameters) == (
        central,
        auxiliary,
    )
    share = shape.auxiliary_parameters / (shape.padded_in * shape.padded_out)
    assert central is not None or share == pytest.approx(auxiliary, abs=6e-5)


def test_separable_is_detected_and_shapes_mirror():
    up = MPOShape.separable(768, 3072, left=256, right=64)
    assert (up.in_factors, up.out_factors) == ((256, 3, 1), (1, 48, 64))
    down = up.mirrored()
    assert (down.in_factors, down.out_factors) == ((64, 48, 1), (1, 3, 256))
    assert up.is_separable
    assert down.is_separable
    assert up.is_full
    assert not MPOShape.paper(768, 3072).is_separable
    assert MPOShape.separable(768, 3072) == up, "the defaults are the design's sizes for T5-base"
    assert MPOShape.separable(3072, 768) == down
    assert MPOShape.paper(768, 3072).mirrored() == MPOShape.paper(3072, 768)


def test_light_is_small_and_lossless():
    shape = MPOShape.light(768, 3072, p=64)
    dims = shape.block_dims
    assert dims["iL"] * dims["jL"] == dims["iR"] * dims["jR"] == 64
    assert shape.is_full
    assert shape.auxiliary_parameters == 2 * 64**2
    assert MPOShape.light(13, 1, p=8).block_dims["iL"] == 13


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 7))
def test_automatic_factors_cover_any_size(in_features, out_features, num_cores):
    shape = MPOShape.automatic(in_features, out_features, num_cores)
    assert shape.in_features == in_features
    assert in_features <= shape.padded_in <= math.ceil(in_features * 1.125)
    assert out_features <= shape.padded_out <= math.ceil(out_features * 1.125)
    assert shape.num_cores == num_cores
    assert MPOShape.from_dict(shape.to_dict()) == shape


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_every_constructor_takes_any_size(in_features, out_features):
    for make in (MPOShape.paper, MPOShape.light, MPOShape.separable):
        shape = make(in_features, out_features)
        assert (shape.in_features, shape.out_features) == (in_features, out_features)


def test_balanced_factors_put_the_largest_in_the_middle():
    factors = balanced_factors(1440, 5)
    assert math.prod(factors) == 1440
    assert max(factors) == factors[2]
    assert balanced_factors(72, 3) == (4, 6, 3)  # the large primes are given first


# ------------------------------------------------------------------ matrices

GAUGES = (
    "symmetric",
    "orthogonal",
)  # for every shape; "identity" needs particular bonds and has its own tests


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_full_bonds_are_exact_and_truncation_meets_its_bound(name, gauge):
    shape = SMALL_SHAPES[name]
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    result = decompose_with_errors(weight, shape, gauge)
    assert [tuple(core.shape) for core in result.cores] == list(shape.core_shapes)
    error = float((reconstruct(result.cores, shape) - weight).norm())
    if shape.is_full:
        assert error < 1e-12
        assert result.error_bound < 1e-12
    else:
        assert 0 < error <= result.error_bound * (1 + 1e-9)
        assert len(result.local_errors) == shape.num_cores - 1
        assert result.relative_error_bound == pytest.approx(
            result.error_bound / float(weight.norm())
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.data())
def test_any_size_any_chain_any_centre(in_features, out_features, num_cores, data):
    """Also matrices without full rank, with zero rows, and all zero: neither side of a bond is
    divided by zero."""
    central, bond = (
        data.draw(st.integers(0, num_cores - 1)),
        data.draw(st.none() | st.integers(1, 3)),
    )
    shape = MPOShape.automatic(in_features, out_features, num_cores, central=central, max_bond=bond)
    rank, zeros = data.draw(st.integers(0, 3)), data.draw(st.integers(0, in_features))
    left, right = torch.randn(in_features, rank).double(), torch.randn(rank, out_features).double()
    left[:zeros] = 0
    weight = left @ right
    found = decompose_with_errors(weight, shape, data.draw(st.sampled_from(GAUGES)))
    assert all(bool(torch.isfinite(core).all()) for core in found.cores)
    error = float((reconstruct(found.cores, shape) - weight).norm())
    assert error <= found.error_bound * (1 + 1e-9) + 1e-9
    assert bond or found.error_bound < 1e-9


def discarded(weight, shape):
    """What no chain of these bonds can hold: the squares of the singular values that each bond
    drops from the weight's matrix of the factors before it and after it."""
    rest = weight.reshape(*shape.in_factors, *shape.out_factors)
    order = [axis for k in range(shape.num_cores) for axis in (k, shape.num_cores + k)]
    rest = rest.permute(order)
    rows, squares = 1, []
    for k, bond in enumerate(shape.bond_dims[1:-1]):
        rows *= shape.in_factors[k] * shape.out_factors[k]
        squares.append(float(torch.linalg.svdvals(rest.reshape(rows, -1))[bond:].square().sum()))
    return squares


@pytest.mark.parametrize("bond", [1, 4, 16, 40])
@pytest.mark.parametrize("decay", [1.0, 0.9], ids=["gaussian", "decaying"])
def test_truncation_is_as_good_as_its_theorem_says(bond, decay):
    """Oseledets, Tensor-train decomposition, 2011, theorem 2.2: between the largest and the sum."""
    shape = MPOShape((3, 4, 4, 2), (4, 4, 3, 4), max_bond=bond)
    u, s, v = torch.linalg.svd(torch.randn(96, 192, dtype=torch.float64), full_matrices=False)
    weight = u * (s * decay ** torch.arange(s.numel())) @ v
    error = (reconstruct(decompose(weight, shape), shape) - weight).square().sum()
    squares = discarded(weight, shape)
    assert max(squares) * (1 - 1e-9) <= error <= sum(squares) * (1 + 1e-9)


def test_symmetric_gauge_balances_every_bond():
    shape = SMALL_SHAPES["light"]
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    left, central, right = decompose(weight, shape, "symmetric")
    spectrum = torch.linalg.svdvals(weight.reshape(2, 6, 2, 6).permute(0, 2, 1, 3).reshape(4, -1))
    assert torch.allclose(left.square().sum((0, 1, 2)), spectrum)
    spectrum = torch.linalg.svdvals(weight.reshape(6, 2, 6, 2).permute(0, 2, 1, 3).reshape(-1, 4))
    assert torch.allclose(right.square().sum((1, 2, 3)), spectrum)
    assert relative_error(reconstruct([left, central, right]), weight) < 1e-13


def test_orthogonal_gauge_leaves_all_scale_in_the_centre():
    shape = SMALL_SHAPES["paper"]
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    cores = decompose(weight, shape, "orthogonal")
    for k, core in enumerate(cores):
        if k != shape.central:
            d, i, j, e = core.shape
            matrix = (
                core.reshape(d * i * j, e) if k < shape.central else core.reshape(d, i * j * e).T
            )
            assert torch.allclose(
                matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
            )
    assert float(cores[shape.central].norm()) == pytest.approx(float(weight.norm()))


@pytest.mark.parametrize("name", ["light", "paper", "padded", "separable"])
def test_identity_gauge_leaves_the_weight_in_the_centre(name):
    shape = SMALL_SHAPES[name]
    weight = torch.randn(shape.in_features, shape.out_features)
    result = decompose_with_errors(weight, shape, "identity")
    assert [tuple(core.shape) for core in result.cores] == list(shape.core_shapes)
    assert torch.equal(reconstruct(result.cores, shape), weight)  # not even rounded
    assert result.error_bound == 0.0
    centre = result.cores[shape.central].flatten()
    assert torch.equal(centre[centre != 0].sort().values, weight.flatten().sort().values)
    for k, core in enumerate(result.cores):
        if k != shape.central:
            edge = math.isqrt(core.numel())
            assert torch.equal(core.reshape(edge, edge), torch.eye(edge))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_low_precision_comes_back_in_its_dtype(dtype, tolerance):
    shape = SMALL_SHAPES["padded"]
    weight = torch.randn(shape.in_features, shape.out_features).to(dtype)
    cores = decompose(weight, shape)
    assert {core.dtype for core in cores} == {dtype}
    assert relative_error(reconstruct([c.double() for c in cores], shape), weight) < tolerance


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_fold_and_reconstruct_agree_with_the_definition(name):
    shape = SMALL_SHAPES[name]
    cores = random_cores(shape, 3)
    blocks = fold(cores, shape=shape, num_experts=3)
    assert blocks.num_experts == 3
    weights = expert_weights(blocks)
    assert weights.shape == (3, shape.in_features, shape.out_features)
    for e in range(3):
        chain = None
        for k, core in enumerate(cores):  # contract the cores directly, without blocks
            core = core if k == shape.central else core[e]
            if chain is None:
                chain = core[0]
            else:
                chain = torch.einsum("xya,aijb->xiyjb", chain, core).flatten(0, 1).flatten(1, 2)
        direct = chain[..., 0][: shape.in_features, : shape.out_features]
        assert torch.allclose(weights[e], direct)
        assert torch.allclose(weight_reference(blocks, e), direct)


@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal", "identity"])
@pytest.mark.parametrize(
    "dtype, size", [(torch.float32, 1e37), (torch.float64, 1e300), (torch.bfloat16, 1e37)]
)
@pytest.mark.parametrize("factors", [((2, 3, 2), (3, 2, 2)), ((2, 6), (6, 2)), ((12,), (12,))])
def test_decompose_large_numbers(gauge, dtype, size, factors):
    weight = (torch.randn(12, 12, dtype=torch.float64) / 3).to(dtype)
    shape = MPOShape(*factors)
    same, found = (decompose_with_errors(w, shape, gauge) for w in (weight, weight * size))
    assert found.norm == pytest.approx(same.norm * size, rel=0.02)
    cores = [core.double() for core in found.cores]
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    cores[-1] = cores[-1] / size
    rounding = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        reconstruct(cores, shape), weight.double(), rtol=rounding, atol=rounding
    )


# ------------------------------------------------------------------ refusals

ONES, SHAPE, LIGHT = torch.ones, MPOShape((2, 3), (3, 2)), SMALL_SHAPES["light"]


def of(**changes):
    return MPOShape(**{"in_factors": (2, 2), "out_factors": (2, 2), **changes})


REFUSED = {
    ValueError: {
        # shapes
        "in_factors and out_factors must have the same length": lambda: of(out_factors=(2,)),
        "in_factors must hold at least one factor": lambda: of(in_factors=(), out_factors=()),
        r"in_factors\[1\] must be at least 1; got 0": lambda: of(in_factors=(2, 0)),
        "max_bond must be at least 1; got 0": lambda: of(max_bond=0),
        "one entry per inner bond": lambda: of(max_bond=(1, 2)),
        "central must lie between 0 and the last of 2 cores = 1; got 2": lambda: of(central=2),
        r"product of its factors \[2, 2\] = 4; got 5": lambda: of(in_features=5),
        "out_features must lie between 1": lambda: of(out_features=0),
        "left must divide in_features = 768; got 100": lambda: MPOShape.separable(
            768, 3072, left=100
        ),
        r"unknown: \['ranks'\]": lambda: MPOShape.from_dict({**of().to_dict(), "ranks": 3}),
        "num_experts must be at least 1": lambda: MPOShape.paper(8, 8).parameters(0),
        "must be at least 1; got 0": lambda: MPOShape.paper(0, 3),
        "out_features must lie between 1 and 1099511627776; got 922337203685477": lambda: (
            MPOShape.separable(16, 2**63)
        ),
        "out_features must lie between 1 and 1099511627776; got 9223372036854775808": lambda: (
            MPOShape.light(16, 2**63)
        ),
        "name must be 'separable', .*; got 'paper_x'": lambda: workload_shape("paper_x", 6, 6),
        # decompositions
        r"weight must be \[I, F\]": lambda: decompose(ONES(3, 3, 3), LIGHT),
        "weight must be finite": [
            lambda: decompose(torch.full((12, 12), torch.nan), LIGHT),
            lambda: decompose(torch.full((12, 12), torch.inf), LIGHT),
        ],
        "gauge must be one of .*did you mean 'symmetric'": lambda: decompose(
            ONES(12, 12), LIGHT, "symetric"
        ),
        r"weight must have values to decompose; .* on meta": lambda: decompose(
            ONES(6, 6, device="meta"), SHAPE
        ),
        "weight must be a dense tensor; .* torch.sparse_coo": lambda: decompose(
            torch.eye(6).to_sparse(), SHAPE
        ),
        "weight must hold its values": lambda: decompose(resized(ONES(6, 6), 72), SHAPE),
        r"gauge 'identity' needs bonds equal .* core 0 of .* has 8, not 12": lambda: decompose(
            ONES(96, 192), MPOShape((3, 4, 4, 2), (4, 4, 3, 4), max_bond=8), "identity"
        ),
        "too large: with the gauge 'orthogonal' its": lambda: decompose(
            ONES(6, 6) * 3e38, SHAPE, "orthogonal"
        ),
    },
    TypeError: {
        # shapes
        r"in_factors\[0\] must be an integer; got float 2.5": lambda: of(in_factors=(2.5, 2)),
        "in_factors must be a sequence of integers; got 3": lambda: of(in_factors=3),
        "max_bond must be None, an integer": lambda: of(max_bond="big"),
        r"max_bond\[0\] must be an integer; got float 1\.5": lambda: of(max_bond=[1.5]),
        "central must be an integer; got str 'x'": lambda: of(central="x"),
        "in_features must be an integer; got str 'x'": lambda: of(in_features="x"),
        "an MPOShape is described by a mapping; got str 'x'": lambda: MPOShape.from_dict("x"),
        "must be an integer; got str 'x'": lambda: MPOShape.paper("x", 3),
        # decompositions
        "weight must have a floating dtype": lambda: decompose(ONES(12, 12).long(), LIGHT),
        "shape must be an MPOShape": lambda: decompose(ONES(12, 12), (12, 12)),
    },
}


@every_refusal(REFUSED)
def test_refused(kind, message, calls):
    for call in calls:
        refuses(kind, message, call)
