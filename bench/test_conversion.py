"""Conversion: decomposing one pretrained matrix, up and down."""

from __future__ import annotations

import pytest
import torch
from conftest import scale_of
from mpoe_bench.cases import relative_error
from mpoe_bench.problem import ffn_shapes

from mpoe_kernels import decompose, reconstruct


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("name", ["separable", "light_64", "paper_full"])
def test_decompose(benchmark, pytestconfig, name: str, direction: str) -> None:
    scale = scale_of(pytestconfig)
    shape = ffn_shapes(scale.shape(name), scale.model, scale.hidden)[direction == "down"]
    weight = torch.randn(shape.in_features, shape.out_features)
    assert relative_error(reconstruct(decompose(weight, shape), shape), weight) < 1e-4
    benchmark.group = f"decompose {shape.in_features}x{shape.out_features}"
    benchmark(decompose, weight, shape)
