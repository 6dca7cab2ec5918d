"""`MPOLinear` constructed like `nn.Linear`, and from a shape."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from mpoe import MPOLinear
from mpoe_kernels import MPOShape, fold


@pytest.mark.parametrize(
    ("values", "named"),
    [((12, 6), {}), ((12, 6, False), {}), ((12,), {"out_features": 6}), ((), {"in_features": 12, "out_features": 6})],
)
def test_called_as_nn_linear(values: tuple, named: dict) -> None:
    layer, like = MPOLinear(*values, **named), nn.Linear(*values, **named)
    x = torch.randn(2, 3, 12)
    assert (layer.in_features, layer.out_features) == (like.in_features, like.out_features)
    assert layer.weight.shape == like.weight.shape
    assert (layer.bias is None) == (like.bias is None)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_random_weights_are_as_large_as_those_of_nn_linear() -> None:
    layer, like = MPOLinear(64, 128), nn.Linear(64, 128)
    assert layer.weight.std().item() == pytest.approx(like.weight.std().item(), rel=0.1)
    assert MPOLinear(64, 128, init_std=0.01).weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert MPOLinear(8, 4, dtype=torch.float64).weight.dtype == torch.float64


def test_by_shape() -> None:
    shape = MPOShape.paper(12, 6)
    for layer in (MPOLinear(shape, bias=False), MPOLinear(shape=shape, bias=False)):
        assert layer.bias is None
        assert layer.cores.shape == shape


def test_tools_show_every_argument() -> None:
    names = ["in_features", "out_features", "bias", "backend", "init_std", "shape", "device", "dtype"]
    assert list(inspect.signature(MPOLinear).parameters) == names
    assert list(inspect.signature(MPOLinear.__init__).parameters)[1:] == names


@pytest.mark.parametrize(
    ("values", "named", "error", "message"),
    [
        ((12,), {}, TypeError, r"takes in_features and out_features, .* got in_features 12, out_features None"),
        ((12, 6), {"biass": True}, TypeError, "unexpected keyword argument 'biass'"),
        ((), {}, TypeError, "got in_features None, out_features None, shape None"),
        ((MPOShape.paper(12, 6), False), {}, TypeError, r"or a shape alone \(then bias goes by name\)"),
        ((12, 6), {"shape": MPOShape.paper(12, 6)}, TypeError, "or a shape alone"),
        ((0, 6), {}, ValueError, "in_features must be at least 1"),
        ((12, True), {}, TypeError, "out_features must be an integer"),
        (("12",), {}, TypeError, "shape must be an MPOShape"),
    ],
)
def test_what_is_neither(values: tuple, named: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MPOLinear(*values, **named)


def test_fold_says_where_a_shape_goes() -> None:
    layer = MPOLinear(12, 6)
    with pytest.raises(TypeError, match=r"which goes by name: fold\(cores, shape=shape\)"):
        fold(layer.cores.cores(), layer.cores.shape)  # type: ignore[arg-type]
