"""Decomposition: exactness, errors, gauges, unusual input, the original algorithm as a yardstick; a shared centre."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import random_cores, relative_error
from torch import Tensor

from mpoe_kernels import MPOShape, decompose, decompose_shared, decompose_with_errors, expert_weights, fold, reconstruct
from mpoe_kernels.reference import weight_reference
from tests.cases import SMALL_SHAPES

GAUGES = ("symmetric", "orthogonal")  # for every shape; "identity" needs particular bonds and has its own tests


def original_algorithm(weight: Tensor, shape: MPOShape) -> Tensor:
    """Yardstick: full SVD sweep from left to right, symmetric gauge, then all bonds truncated at once."""
    n = shape.num_cores
    full = MPOShape(shape.in_factors, shape.out_factors)
    order = [axis for k in range(n) for axis in (k, n + k)]
    rest = weight.double().reshape(*shape.in_factors, *shape.out_factors).permute(order).reshape(1, -1)
    cores, spectra = [], []
    for k in range(n - 1):
        i, j = shape.in_factors[k], shape.out_factors[k]
        u, s, v = torch.linalg.svd(rest.reshape(full.bond_dims[k] * i * j, -1), full_matrices=False)
        d = full.bond_dims[k + 1]
        cores.append(u[:, :d].reshape(full.bond_dims[k], i, j, d))
        spectra.append(s[:d])
        rest = s[:d, None] * v[:d]
    cores.append(rest.reshape(full.bond_dims[n - 1], shape.in_factors[-1], shape.out_factors[-1], 1))
    for k, s in enumerate(spectra):
        root = s.clamp_min(1e-300).sqrt()
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    cut = [core[: shape.bond_dims[k], :, :, : shape.bond_dims[k + 1]] for k, core in enumerate(cores)]
    return reconstruct(cut)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_full_bonds_are_exact_and_truncation_meets_its_bound(name: str, gauge: str) -> None:
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
        assert result.relative_error_bound == pytest.approx(result.error_bound / float(weight.norm()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.data())
def test_any_size_any_chain_any_centre(
    in_features: int, out_features: int, num_cores: int, data: st.DataObject
) -> None:
    central = data.draw(st.integers(0, num_cores - 1))
    gauge = data.draw(st.sampled_from(GAUGES))
    shape = MPOShape.automatic(in_features, out_features, num_cores, central=central)
    rank = data.draw(st.integers(0, 3))
    weight = torch.randn(in_features, max(rank, 1), dtype=torch.float64) @ torch.randn(
        max(rank, 1), out_features, dtype=torch.float64
    )
    weight = weight if rank else torch.zeros_like(weight)  # also rank-deficient and all-zero matrices
    cores = decompose(weight, shape, gauge)
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    assert float((reconstruct(cores, shape) - weight).abs().max()) < 1e-10


@pytest.mark.parametrize("bond", [1, 4, 16, 40])
@pytest.mark.parametrize("kind", ["gaussian", "decaying"])
def test_truncation_is_never_worse_than_the_original(bond: int, kind: str) -> None:
    shape = MPOShape((3, 4, 4, 2), (4, 4, 3, 4), max_bond=bond)
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    if kind == "decaying":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight = u * (s * 0.9 ** torch.arange(s.numel())) @ v
    ours = relative_error(reconstruct(decompose(weight, shape), shape), weight)
    theirs = relative_error(original_algorithm(weight, shape), weight)
    assert ours <= theirs * 1.01


def test_symmetric_gauge_balances_every_bond() -> None:
    shape = SMALL_SHAPES["light"]
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    left, central, right = decompose(weight, shape, "symmetric")
    spectrum = torch.linalg.svdvals(weight.reshape(2, 6, 2, 6).permute(0, 2, 1, 3).reshape(4, -1))
    assert torch.allclose(left.square().sum((0, 1, 2)), spectrum)
    spectrum = torch.linalg.svdvals(weight.reshape(6, 2, 6, 2).permute(0, 2, 1, 3).reshape(-1, 4))
    assert torch.allclose(right.square().sum((1, 2, 3)), spectrum)
    assert relative_error(reconstruct([left, central, right]), weight) < 1e-13


def test_orthogonal_gauge_leaves_all_scale_in_the_centre() -> None:
    shape = SMALL_SHAPES["paper"]
    weight = torch.randn(shape.in_features, shape.out_features, dtype=torch.float64)
    cores = decompose(weight, shape, "orthogonal")
    for k, core in enumerate(cores):
        if k != shape.central:
            d, i, j, e = core.shape
            matrix = core.reshape(d * i * j, e) if k < shape.central else core.reshape(d, i * j * e).T
            assert torch.allclose(matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64))
    assert float(cores[shape.central].norm()) == pytest.approx(float(weight.norm()))


@pytest.mark.parametrize("name", ["light", "paper", "padded", "separable"])
def test_identity_gauge_leaves_the_weight_in_the_centre(name: str) -> None:
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


@pytest.mark.parametrize("bond", [None, 3])
@pytest.mark.parametrize("kind", ["identity", "zero rows", "zero columns", "one entry", "zeros"])
def test_null_directions_of_a_bond_stay_finite(kind: str, bond: int | None) -> None:
    """Singular values of zero: neither side of the bond is divided by them."""
    weight = torch.randn(12, 12)
    if kind == "identity":
        weight = torch.eye(12)
    elif kind == "zero rows":
        weight[3:] = 0
    elif kind == "zero columns":
        weight[:, :11] = 0
    else:
        weight = torch.zeros(12, 12)
        weight[5, 7] = float(kind == "one entry")
    for factors in (((2, 3, 2), (2, 3, 2)), ((12, 1), (1, 12)), ((3, 4), (4, 3))):
        shape = MPOShape(*factors, max_bond=bond)
        for gauge in GAUGES:
            found = decompose_with_errors(weight, shape, gauge)
            assert all(bool(torch.isfinite(core).all()) for core in found.cores)
            error = float((reconstruct(found.cores, shape) - weight).norm())
            assert error <= found.error_bound + 1e-5 * found.norm + 1e-12


def test_identity_gauge_refuses_truncated_bonds() -> None:
    shape = MPOShape((3, 4, 4, 2), (4, 4, 3, 4), max_bond=8)
    with pytest.raises(ValueError, match=r"gauge 'identity' needs bonds equal .* core 0 of .* has 8, not 12"):
        decompose(torch.ones(shape.in_features, shape.out_features), shape, "identity")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_low_precision_comes_back_in_its_dtype(dtype: torch.dtype, tolerance: float) -> None:
    shape = SMALL_SHAPES["padded"]
    weight = torch.randn(shape.in_features, shape.out_features).to(dtype)
    cores = decompose(weight, shape)
    assert {core.dtype for core in cores} == {dtype}
    assert relative_error(reconstruct([c.double() for c in cores], shape), weight) < tolerance


def test_t5_base_matrix_is_exact() -> None:
    weight = torch.randn(768, 3072) * 0.05
    assert relative_error(reconstruct(decompose(weight, MPOShape.paper(768, 3072))), weight) <= 1e-5


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3, 3, 3), ValueError, r"weight must be \[I, F\]"),
        (torch.ones(12, 12, dtype=torch.int64), TypeError, "weight must have a floating dtype"),
        (torch.ones(5, 12), ValueError, r"\[in_features, out_features\] = \[12, 12\]; got \[5, 12\]"),
        (torch.full((12, 12), float("nan")), ValueError, "weight must be finite"),
        (torch.full((12, 12), float("inf")), ValueError, "weight must be finite"),
    ],
)
def test_refused_weights(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(weight, SMALL_SHAPES["light"])


def test_refused_gauge_and_shape() -> None:
    with pytest.raises(ValueError, match=r"gauge must be one of .*did you mean 'symmetric'"):
        decompose(torch.ones(12, 12), SMALL_SHAPES["light"], "symetric")
    with pytest.raises(TypeError, match="shape must be an MPOShape"):
        decompose(torch.ones(12, 12), (12, 12))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_fold_and_reconstruct_agree_with_the_definition(name: str) -> None:
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
        assert chain is not None
        direct = chain[..., 0][: shape.in_features, : shape.out_features]
        assert torch.allclose(weights[e], direct)
        assert torch.allclose(weight_reference(blocks, e), direct)


def test_fold_refusals() -> None:
    cores = random_cores(SMALL_SHAPES["light"], 2)
    with pytest.raises(ValueError, match=r"cores\[0\] and cores\[1\] must share a bond"):
        fold([cores[0], cores[1][1:], cores[2]])
    with pytest.raises(ValueError, match=r"central must index one of the 3 cores"):
        fold(cores, central=3)
    with pytest.raises(ValueError, match=r"cores\[0\] must be \[d, i, j, d'\] \(the central core is shared\)"):
        fold(cores, central=0)
    with pytest.raises(ValueError, match="auxiliary cores must agree in their number of experts"):
        fold([cores[0][:1], cores[1], cores[2]])
    with pytest.raises(ValueError, match="num_experts must equal the cores' expert axis, 2; got 3"):
        fold(cores, num_experts=3)


# ------------------------------------------------------------------ E matrices around one centre

EXPERTS = 3


def around_one_centre(shape, relative):
    """Matrices of experts whose auxiliary cores have diverged, in float64."""
    cores = decompose(torch.randn(shape.in_features, shape.out_features, dtype=torch.float64), shape)
    apart = [
        core if k == shape.central else core + relative * core.abs().mean() * torch.randn(EXPERTS, *core.shape)
        for k, core in enumerate(cores)
    ]
    return expert_weights(fold(apart, shape.central, shape, EXPERTS))


def errors(weights, result):
    found = expert_weights(fold(result.cores, result.shape.central, result.shape, len(weights)))
    return (found - weights).flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("shape", "bound"), [(MPOShape.separable(16, 24), 1e-6), (MPOShape.paper(16, 24), 1e-4)], ids=["separable", "paper"]
)
def test_a_centre_that_is_there_is_found(shape, bound):
    torch.manual_seed(0)
    weights = around_one_centre(shape, 0.1)
    result = decompose_shared(weights, shape)
    assert result.relative_error_bound <= bound
    assert float(errors(weights, result).norm()) <= bound * float(weights.norm())
    assert result.cores[shape.central].shape == shape.core_shapes[shape.central]
    assert all(c.shape == (EXPERTS, *shape.core_shapes[k]) for k, c in enumerate(result.cores) if k != shape.central)


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_the_error_is_told_and_never_grows(name):
    shape = SMALL_SHAPES[name]
    weights = torch.randn(EXPERTS, shape.in_features, shape.out_features, dtype=torch.float64)
    told = []
    for sweeps in (1, 2, 4):
        result = decompose_shared(weights, shape, sweeps)
        own = errors(weights, result)
        torch.testing.assert_close(torch.tensor(result.expert_errors).double(), own / weights.flatten(1).norm(dim=1))
        assert result.error_bound == pytest.approx(float(own.norm()), rel=1e-6, abs=1e-9)
        assert result.sweeps <= sweeps
        told.append(result.relative_error_bound)
    # A matrix's padding counts in the search, but not in the reported error.
    assert all(after <= before * (1 if shape.is_full else 1.001) for before, after in pairwise(told))


def test_equal_matrices_need_no_search_and_zeros_are_no_division():
    shape = MPOShape.separable(8, 12)
    weights = torch.randn(1, 8, 12).expand(EXPERTS, -1, -1)
    result = decompose_shared(weights, shape)
    assert result.relative_error_bound <= 1e-6
    assert result.cores[0].dtype == torch.float32
    none = decompose_shared(torch.zeros(EXPERTS, 8, 12), shape)
    assert (none.relative_error_bound, none.expert_errors, none.sweeps) == (0.0, (0.0,) * EXPERTS, 0)
    opposed = torch.stack([weights[0], -weights[0]])  # their mean vanishes
    assert decompose_shared(opposed, shape).relative_error_bound <= 1e-6


@pytest.mark.parametrize(
    ("weights", "shape", "sweeps", "kind", "words"),
    [
        (
            torch.zeros(2, 8, 13),
            MPOShape.separable(8, 12),
            1,
            ValueError,
            r"= \[E, 8, 12\] with E >= 1; got \[2, 8, 13",
        ),
        (torch.zeros(0, 8, 12), MPOShape.separable(8, 12), 1, ValueError, r"with E >= 1; got \[0, 8, 12\]"),
        (torch.zeros(8, 12), MPOShape.separable(8, 12), 1, ValueError, "weights must be"),
        (torch.zeros(2, 8, 12).int(), MPOShape.separable(8, 12), 1, TypeError, "weights must have a floating dtype"),
        (torch.zeros(2, 8, 12), (8, 12), 1, TypeError, "shape must be an MPOShape; got tuple"),
        (torch.zeros(2, 8, 12), MPOShape.separable(8, 12), 0, ValueError, "sweeps must be at least 1; got 0"),
        (torch.full((2, 8, 12), torch.nan), MPOShape.separable(8, 12), 1, ValueError, "finite; they hold NaN or Inf"),
        (torch.zeros(2, 8, 12, device="meta"), MPOShape.separable(8, 12), 1, ValueError, "must have values"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(weights, shape, sweeps, kind, words):
    with pytest.raises(kind, match=words):
        decompose_shared(weights, shape, sweeps)
