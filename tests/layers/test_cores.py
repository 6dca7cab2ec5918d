"""`MPOCores`, `MPOLinear`, `MPOEmbedding`."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpoe.layers import MPOCores, MPOEmbedding, MPOLinear
from mpoe_kernels import MPOShape, fold

SHAPES = [
    MPOShape.paper(24, 48),
    MPOShape.light(24, 48),
    MPOShape.separable(24, 48),
    MPOShape.paper(24, 48, max_bond=4),
]


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("shape", "gauge"),
    [(shape, gauge) for shape in SHAPES[:3] for gauge in ("symmetric", "orthogonal")] + [(SHAPES[2], "identity")],
    ids=str,
)
def test_load_weight_copies_to_every_expert_and_measures(shape, gauge):
    cores, weight = MPOCores(shape, 3), torch.randn(24, 48)
    result = cores.load_weight_(weight, gauge)
    torch.testing.assert_close(cores.dense_weights(), weight.expand(3, 24, 48), rtol=1e-4, atol=1e-5)
    assert result.relative_error_bound < 1e-5
    assert len(result.local_errors) == shape.num_cores - 1
    for ratio, name in zip(cores.rate_ratios, cores.core_names(), strict=True):
        assert ratio == pytest.approx(rms(cores.get_parameter(name)) / rms(weight), rel=1e-4)
    assert cores.core_names()[shape.central] == "central"
    before = [core.detach().clone() for core in cores.auxiliary]
    cores.add_noise_(0.1)
    assert not torch.allclose(*cores.dense_weights()[:2])
    for old, new in zip(before, cores.auxiliary, strict=True):
        assert rms(new - old) == pytest.approx(0.1 * rms(old), rel=0.5)


def test_zero_weight_is_finite():
    cores = MPOCores(SHAPES[0], 2)
    cores.load_weight_(torch.zeros(24, 48))
    assert torch.equal(cores.dense_weights(), torch.zeros(2, 24, 48))
    assert all(ratio == 1.0 for ratio in cores.rate_ratios)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_weights_have_the_wanted_scale_and_expected_ratios(shape):
    cores = MPOCores(shape, 4, bias=True, init_std=0.05)
    assert rms(cores.dense_weights()) == pytest.approx(0.05, rel=0.25)
    for ratio, name in zip(cores.rate_ratios, cores.core_names(), strict=True):
        assert ratio == pytest.approx(rms(cores.get_parameter(name)) / 0.05, rel=0.2)
    assert torch.equal(cores.bias, torch.zeros(48))
    weights = cores.dense_weights()
    assert not torch.allclose(weights[0], weights[1])


def test_half_precision_weights_are_decomposed_in_float32():
    cores, weight = MPOCores(SHAPES[2], 2, dtype=torch.bfloat16), torch.randn(24, 48).bfloat16()
    cores.load_weight_(weight)
    assert cores.central.dtype == torch.bfloat16
    torch.testing.assert_close(cores.dense_weights()[0], weight, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [None, *SHAPES[:3]], ids=str)
def test_mpo_linear_is_a_drop_in(shape):
    x = torch.randn(2, 5, 24)
    for linear in (nn.Linear(24, 48), nn.Linear(24, 48, bias=False), Conv1D(48, 24)):
        module = MPOLinear.from_linear(linear, shape)
        torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-5)
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
        torch.testing.assert_close(module.weight, weight, rtol=1e-4, atol=1e-5)
        assert (module.in_features, module.out_features) == (24, 48)
        assert (module.bias is None) == (linear.bias is None)


def test_mpo_embedding_is_a_drop_in_with_a_padded_vocabulary():
    embedding = nn.Embedding(101, 24)
    module = MPOEmbedding.from_embedding(embedding)
    assert (module.num_embeddings, module.embedding_dim) == (101, 24)
    ids = torch.randint(0, 101, (3, 7))
    torch.testing.assert_close(module(ids), embedding(ids), rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 24)
    torch.testing.assert_close(module.logits(x), x @ embedding.weight.T, rtol=1e-4, atol=1e-4)
    assert module.logits(x).shape == (3, 101)
    torch.testing.assert_close(module.weight, embedding.weight, rtol=1e-4, atol=1e-5)


def test_padding_row_gets_no_gradient():
    module = MPOEmbedding(MPOShape.automatic(30, 8, 3), padding_idx=-1)
    assert module.padding_idx == 29
    module(torch.tensor([29, 29])).sum().backward()
    assert module.cores.central.grad is None or not module.cores.central.grad.any()
    with pytest.raises(ValueError, match="padding_idx"):
        MPOEmbedding(MPOShape.automatic(30, 8, 3), padding_idx=30)


def test_a_chain_without_auxiliary_cores_still_has_all_experts() -> None:
    cores = MPOCores(MPOShape((6,), (5,)), 4)
    assert cores.blocks().num_experts == 4
    assert cores.dense_weights().shape == (4, 6, 5)


# ------------------------------------------------------------- MPOLinear as nn.Linear


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
