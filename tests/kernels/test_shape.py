"""MPOShape: sizes, constructors, refusals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpoe_kernels import MPOShape
from mpoe_kernels.mpo.factors import balanced_factors


def test_t5_base_bonds_and_counts() -> None:
    shape = MPOShape.paper(768, 3072)
    assert shape.in_factors == (3, 4, 4, 4, 4)
    assert shape.out_factors == (4, 4, 8, 6, 4)
    assert shape.bond_dims == (1, 12, 192, 384, 16, 1)
    assert shape.central_parameters == 2_359_296
    assert shape.auxiliary_parameters == 184_720
    assert shape.parameters(8) == 2_359_296 + 8 * 184_720
    assert shape.is_full


@pytest.mark.parametrize(
    ("sizes", "ratio"),
    [
        ((768, 3072), 0.0783),
        ((3072, 768), 0.0783),
        ((1024, 4096), 0.0782),
        ((768, 768), 0.1255),
        ((1024, 1024), 0.1255),
        ((32128, 768), 0.0652),
        ((32128, 1024), 0.0626),
    ],
)
def test_auxiliary_share_of_the_original_shapes(sizes: tuple[int, int], ratio: float) -> None:
    shape = MPOShape.paper(*sizes)
    assert shape.auxiliary_parameters / (shape.padded_in * shape.padded_out) == pytest.approx(ratio, abs=6e-5)


@pytest.mark.parametrize(
    ("bond", "central", "auxiliary"), [(128, 524_288, 74_128), (64, 131_072, 37_264), (8, 2_048, 2_784)]
)
def test_truncated_counts(bond: int, central: int, auxiliary: int) -> None:
    shape = MPOShape.paper(768, 3072, max_bond=bond)
    assert (shape.central_parameters, shape.auxiliary_parameters) == (central, auxiliary)
    assert not shape.is_full


def test_separable_is_detected_and_mirrors() -> None:
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


def test_mirrored_other_shapes_swap_factors() -> None:
    assert MPOShape.paper(768, 3072).mirrored() == MPOShape.paper(3072, 768)


def test_light_is_small_and_lossless() -> None:
    shape = MPOShape.light(768, 3072, p=64)
    dims = shape.block_dims
    assert dims["iL"] * dims["jL"] == dims["iR"] * dims["jR"] == 64
    assert shape.is_full
    assert shape.auxiliary_parameters == 2 * 64**2


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 7))
def test_automatic_factors_cover_any_size(in_features: int, out_features: int, num_cores: int) -> None:
    shape = MPOShape.automatic(in_features, out_features, num_cores)
    assert shape.in_features == in_features
    assert in_features <= shape.padded_in <= math.ceil(in_features * 1.125)
    assert out_features <= shape.padded_out <= math.ceil(out_features * 1.125)
    assert shape.num_cores == num_cores
    assert MPOShape.from_dict(shape.to_dict()) == shape


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_every_constructor_takes_any_size(in_features: int, out_features: int) -> None:
    for make in (MPOShape.paper, MPOShape.light, MPOShape.separable):
        shape = make(in_features, out_features)
        assert (shape.in_features, shape.out_features) == (in_features, out_features)


def test_balanced_factors_put_the_largest_in_the_middle() -> None:
    factors = balanced_factors(1440, 5)
    assert math.prod(factors) == 1440
    assert max(factors) == factors[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_factors": (2, 3), "out_factors": (2,)}, "in_factors and out_factors must have the same length"),
        ({"in_factors": (), "out_factors": ()}, "in_factors must hold at least one factor"),
        ({"in_factors": (2, 0), "out_factors": (1, 1)}, "in_factors must hold positive integers; got 0"),
        ({"in_factors": (2, 2), "out_factors": (2, 2), "max_bond": 0}, "max_bond must be at least 1; got 0"),
        ({"in_factors": (2, 2), "out_factors": (2, 2), "max_bond": (1, 2)}, "one entry per inner bond"),
        (
            {"in_factors": (2, 2), "out_factors": (2, 2), "central": 2},
            r"central must index one of the 2 cores \(0..1\); got 2",
        ),
        (
            {"in_factors": (2, 2), "out_factors": (2, 2), "in_features": 5},
            r"product of its factors \[2, 2\] = 4; got 5",
        ),
        ({"in_factors": (2, 2), "out_factors": (2, 2), "out_features": 0}, "out_features must lie between 1"),
    ],
)
def test_refusals_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPOShape(**arguments)


def test_type_refusals() -> None:
    with pytest.raises(TypeError, match=r"in_factors must hold integers; got 2.5"):
        MPOShape((2.5, 2), (2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_bond must be None, an integer"):
        MPOShape((2, 2), (2, 2), max_bond="big")
    with pytest.raises(ValueError, match="left must divide in_features = 768; got 100"):
        MPOShape.separable(768, 3072, left=100)
    with pytest.raises(ValueError, match=r"unknown: \['ranks'\]"):
        MPOShape.from_dict({"in_factors": [2], "out_factors": [2], "ranks": 3})
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        MPOShape.paper(8, 8).parameters(0)


@pytest.mark.parametrize("make", [MPOShape.separable, MPOShape.light])
def test_absurd_sizes_are_refused_at_once(make) -> None:
    with pytest.raises(ValueError, match=r"out_features must be at most 1099511627776; got 9223372036854775808"):
        make(16, 2**63)
