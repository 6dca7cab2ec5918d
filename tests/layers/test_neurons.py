"""Experts of their own neurons: the formula, padding, dropout, dtypes; `MPOCores`, `MPOLinear`,
`MPOEmbedding`."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.layers import (
    ACTIVATIONS,
    MPOCores,
    MPOEmbedding,
    MPOLinear,
    NeuronExperts,
    NeuronFeedForward,
    routing_context,
)
from mpoe.layers.neurons import without_experts
from mpoe_kernels import MPOShape, neuron_experts
from tests.assertions import refuses
from tests.cases import either

from ..models.tiny_models import dense_model
from .test_native_calls import Dense, E, F, I, made

M = 3


class Ending(nn.Module):
    """The end of a network that adds its input, as BERT's."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(F, I), nn.LayerNorm(I), nn.Dropout(0.0)

    def forward(self, hidden, x):
        return self.norm(self.dropout(self.dense(hidden)) + x)


def layer(gated=False, latent=None, **router):
    """Around a dense network, with experts that contribute."""
    options = {"neurons": M, "latent": latent, "backend": "eager"}
    return made("neurons", gated, bias=True, options=options, **router)


def added(module, x):
    """What the experts add to each of ``x [T, I]``, by the definition."""
    own, decision = module.experts, module.router(x)
    act = ACTIVATIONS[own.activation]
    rows = []
    for t, token in enumerate(x):
        z = token if own.latent_in is None else token @ own.latent_in
        total = torch.zeros_like(z)
        for k, e in enumerate(decision.top_k_index[t].tolist()):
            u = own.up[e] @ z
            bias = 0 if own.bias is None else own.bias[e]
            h = act(u + bias) if own.gate_proj is None else act(own.gate_proj[e] @ z + bias) * u
            total = total + decision.top_k_weights[t, k] * (h @ own.down[e])
        rows.append(total if own.latent_out is None else total @ own.latent_out)
    return torch.stack(rows)


@either("gated")
@pytest.mark.parametrize("latent", [None, 4])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize(
    "gates",
    [
        {},
        {"routed_scaling_factor": 2.0},
        {"is_scale_prob": True},
        {"scoring_func": "sigmoid", "bias_update_rate": 0.1},
    ],
    ids=["sum to 1", "times a factor", "raw", "sigmoid with a correction bias"],
)
def test_the_definition(gated, latent, top_k, gates):
    module = layer(gated, latent, top_k=top_k, **gates)
    if module.router.e_score_correction_bias is not None:
        module.router.e_score_correction_bias[3] = 2.0  # the first choice of every token
        assert bool((module.router(torch.randn(4, I)).top_k_index == 3).any(1).all())
    x = torch.randn(2, 4, I, requires_grad=True)
    found, want = module(x), Dense.forward(module, x) + added(module, x.view(-1, I)).view(x.shape)
    assert_close(found, want, rtol=1e-4, atol=1e-5)
    inputs, weight = [x, *module.parameters()], torch.randn(2, 4, I)
    mine, theirs = (
        torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (found, want)
    )
    assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_padding_has_no_expert_and_is_not_counted():
    module = layer()
    x = torch.randn(2, 3, I)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    with routing_context({"main": mask}) as routing:
        found = module(x)
    with routing_context({"main": None}) as whole:
        other = module(x)
    assert torch.equal(found[~mask], Dense.forward(module, x)[~mask])
    assert torch.allclose(found[mask], other[mask])
    (record,) = routing.records
    assert int(record.expert_load.sum()) == 2 * int(mask.sum())
    assert int(whole.records[0].expert_load.sum()) == 2 * mask.numel()
    x[~mask] = float("nan")  # whatever padding holds stays there
    again = module(x, token_mask=mask)
    assert torch.equal(again[mask], found[mask])
    refuses(ValueError, r"token_mask must be \[2, 3\]", module, x, token_mask=mask[:1])


def test_a_network_that_ends_in_a_module_that_adds_its_input():
    torch.manual_seed(0)
    dense, up = Ending(), nn.Linear(I, F)
    config = MPOEConfig(
        shape="neurons", num_experts=E, neurons=M, router=RouterConfig(top_k=2), backend="eager"
    )
    module = NeuronFeedForward(I, F, config, names={"down": "dense"}, adds_input=True)
    module.around(dense, {"up": up, "down": dense.dense})
    nn.init.normal_(module.experts.down)
    x, hidden = torch.randn(4, I), torch.randn(4, F)
    own = Ending.forward(module, hidden, x + added(module, x))
    assert torch.allclose(module(hidden, x), own, atol=1e-5)
    assert module.projections() == {"down": module.dense, "up": up}


def test_what_the_layer_has_itself_is_not_taken_from_the_dense_network():
    dense = Ending()
    dense.in_features, dense.note = I, "of the dense network"
    dense.forward = dense._compiled_call_impl = lambda *_: None
    dense.register_buffer("positions", torch.zeros(2), persistent=False)
    module = ending_with_experts(dense)
    assert (module.in_features, module.note) == (I, "of the dense network")
    assert module(torch.ones(1, F), torch.ones(1, I)) is not None
    assert "positions" in dict(module.named_buffers())
    assert "positions" not in module.state_dict()


def ending_with_experts(dense):
    config = MPOEConfig(shape="neurons", num_experts=E, neurons=M)
    module = NeuronFeedForward(I, F, config, names={"down": "dense"}, adds_input=True)
    module.around(dense, {"up": nn.Linear(I, F), "down": dense.dense})
    return module


def test_hooks_of_the_dense_network_are_called_and_can_be_removed():
    dense = Ending()
    called = []
    handles = [
        dense.register_forward_hook(lambda *_: called.append("forward")),
        dense.register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    module = ending_with_experts(dense)
    module(torch.randn(1, F, requires_grad=True), torch.randn(1, I)).sum().backward()
    assert called == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    module(torch.randn(1, F, requires_grad=True), torch.randn(1, I)).sum().backward()
    assert len(called) == 2


def test_a_dense_network_with_a_method_of_the_layers_is_refused():
    class Casting(Ending):
        def cast(self, x):
            return x.double()

    words = "Casting cannot get neurons: its attribute 'cast' has the name of one that the"
    refuses(ValueError, words, ending_with_experts, Casting())


@pytest.mark.parametrize(
    "name, value",
    [
        ("stream", 3.0),
        ("columns", torch.ones(2)),
        ("experts", nn.Identity()),
        ("router", 4),
        ("output_dropout", nn.Dropout(0.1)),
        ("cast", True),
    ],
)
def test_a_dense_network_whose_names_are_taken_is_refused(name, value):
    dense = Ending()
    setattr(dense, name, value)
    config = MPOEConfig(shape="neurons", num_experts=E, neurons=M)
    module = NeuronFeedForward(I, F, config, names={"down": "dense"}, adds_input=True)
    words = f"Ending cannot get neurons: its attribute '{name}' has the name of one that the"
    refuses(ValueError, words, module.around, dense, {})


def test_without_experts_may_be_nested():
    module = layer()
    x = torch.randn(4, I)
    whole = module(x)
    with without_experts(module):
        alone = module(x)
        with without_experts(module):
            assert torch.equal(module(x), alone)
        assert torch.equal(module(x), alone)
    assert torch.equal(module(x), whole)
    assert not torch.equal(alone, whole)


def test_the_dense_networks_dropout_is_not_the_experts():
    module = layer()
    module.train().dropout.p = 0.5
    x = torch.randn(64, I)
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    assert torch.allclose(found - Dense.forward(module, x), added(module, x), atol=1e-5)
    asked = layer(expert_dropout=0.5)
    asked.train().dropout.p = 0.5
    torch.manual_seed(1)
    found = asked(x)
    torch.manual_seed(1)
    share = ((found - Dense.forward(asked, x)).abs() < 1e-6).float().mean()
    assert 0.4 < float(share) < 0.6
    asked.output_dropout = 0.5
    assert torch.allclose(asked.eval()(x) - Dense.forward(asked, x), added(asked, x), atol=1e-5)


def test_sums_in_half_precision_are_of_single_precision():
    """512 experts that add 1 / 512 each: in bfloat16 the sum would end at a half."""
    count = 512
    ones = torch.ones(count, 1, 4, dtype=torch.bfloat16)
    gates, index = torch.full((1, count), 1 / count), torch.arange(count)[None]
    found = neuron_experts(
        ones[0] / 4, gates, index, ones, ones, None, activation="relu", backend="eager"
    )
    assert torch.allclose(found.float(), torch.ones(1, 4), rtol=0.01)


def test_copies_of_one_neuron_differ():
    experts = convert_to_mpoe(
        dense_model("gpt2"), MPOEConfig(shape="neurons", num_experts=2, neurons=300)
    )
    up = next(
        module for module in experts.modules() if isinstance(module, NeuronExperts)
    ).up.flatten(0, 1)
    assert len(up.unique(dim=0)) == len(up)  # of 96 neurons


def test_dtypes():
    module = layer().double()
    x = torch.randn(3, I, dtype=torch.float64)
    want = module(x)
    assert want.dtype == torch.float64
    half = layer().bfloat16()
    assert torch.allclose(half(x.bfloat16()).double(), want, atol=0.3)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    half.experts.float()
    assert torch.allclose(half(x.bfloat16()).double(), want, atol=0.3)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    whole = layer()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = whole(x.float())
    assert lowered.dtype == torch.bfloat16
    assert torch.allclose(lowered.double(), want, atol=0.3)


@pytest.mark.parametrize("latent", [None, 4])
def test_merged(latent):
    module = layer(True, latent)
    assert module.own_parameters() == E * M * (3 * (latent or I) + 1)
    module.experts.up.requires_grad_(False)
    x = torch.randn(6, I)
    want = module(x)
    module.experts = module.experts.merged()
    assert module.experts.latent is None
    assert torch.allclose(module(x), want, atol=1e-5)
    assert not module.experts.up.requires_grad
    assert module.experts.down.requires_grad


@pytest.mark.parametrize("latent", [None, 16])
@pytest.mark.parametrize("std", [None, 0.3])
@torch.no_grad()
def test_random_neurons_have_the_scale_of_dense_ones(latent, std):
    own = NeuronExperts(64, 8, 32, latent, gated=True, bias=True, init_std=std)
    x = torch.randn(500, 64)
    z = x if latent is None else x @ own.latent_in
    wanted = (std or 64**-0.5) * 64**0.5  # of x times a dense neuron
    for rows in (own.up, own.gate_proj):
        assert float((z @ rows.flatten(0, 1).t()).std()) == pytest.approx(wanted, rel=0.1)
    assert not own.down.any()
    assert not own.bias.any()
    if latent is not None:
        assert float(own.latent_out.std()) == pytest.approx(0.25, rel=0.1)  # of 16 numbers


# ------------------------------------------------------------------ cores


SHAPES = [
    MPOShape.paper(24, 48),
    MPOShape.light(24, 48),
    MPOShape.separable(24, 48),
    MPOShape((2, 2, 2, 3), (2, 2, 3, 4), max_bond=4),
]


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


@pytest.mark.parametrize(
    "shape, gauge",
    [(shape, gauge) for shape in SHAPES[:3] for gauge in ("symmetric", "orthogonal")]
    + [(SHAPES[2], "identity")],
    ids=str,
)
def test_load_weight_copies_to_every_expert_and_measures(shape, gauge):
    cores, weight = MPOCores(shape, 3), torch.randn(24, 48)
    result = cores.load_weight_(weight, gauge)
    assert_close(cores.dense_weights(), weight.expand(3, 24, 48), rtol=1e-4, atol=1e-5)
    assert result.relative_error_bound < 1e-5
    assert len(result.local_errors) == shape.num_cores - 1
    for ratio, name in zip(cores.rate_ratios, cores.core_names(), strict=True):
        assert ratio == pytest.approx(rms(cores.get_parameter(name)) / rms(weight), rel=1e-4)
    assert cores.core_names()[shape.central] == "central"


def test_zero_weight_is_finite():
    cores = MPOCores(SHAPES[0], 2)
    cores.load_weight_(torch.zeros(24, 48))
    assert torch.equal(cores.dense_weights(), torch.zeros(2, 24, 48))
    assert set(cores.rate_ratios) == {1.0}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_weights_have_the_wanted_scale_and_expected_ratios(shape):
    cores = MPOCores(shape, 4, bias=True, init_std=0.05)
    assert rms(cores.dense_weights()) == pytest.approx(0.05, rel=0.25)
    for ratio, name in zip(cores.rate_ratios, cores.core_names(), strict=True):
        assert ratio == pytest.approx(rms(cores.get_parameter(name)) / 0.05, rel=0.2)
    assert torch.equal(cores.bias, torch.zeros(48))
    weights = cores.dense_weights()
    assert not torch.allclose(weights[0], weights[1])
    for k, core in enumerate(cores.cores()):
        if k != shape.central:  # an isometry
            columns = core[0].flatten(0, 2) if k < shape.central else core[0].flatten(1).T
            assert_close(columns.T @ columns, torch.eye(columns.shape[1]))
    parametrize.register_parametrization(
        cores.auxiliary, "1", nn.Identity()
    )  # no parameter of the list any more
    assert torch.equal(cores.dense_weights(), weights)


@pytest.mark.parametrize("shape", [None, *SHAPES[:3]], ids=str)
def test_mpo_linear_is_a_drop_in(shape):
    x = torch.randn(2, 5, 24)
    for linear in (nn.Linear(24, 48), nn.Linear(24, 48, bias=False), Conv1D(48, 24)):
        module = MPOLinear.from_linear(linear, shape)
        assert_close(module(x), linear(x), rtol=1e-4, atol=1e-5)
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
        assert_close(module.weight, weight, rtol=1e-4, atol=1e-5)
        assert (module.in_features, module.out_features) == (24, 48)
        assert (module.bias is None) == (linear.bias is None)


def test_mpo_embedding_is_a_drop_in_with_a_padded_vocabulary():
    embedding = nn.Embedding(101, 24)
    module = MPOEmbedding.from_embedding(embedding)
    assert (module.num_embeddings, module.embedding_dim) == (101, 24)
    ids = torch.randint(0, 101, (3, 7))
    assert_close(module(ids), embedding(ids), rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 24)
    assert_close(module.logits(x), x @ embedding.weight.T, rtol=1e-4, atol=1e-4)
    assert module.logits(x).shape == (3, 101)
    assert_close(module.weight, embedding.weight, rtol=1e-4, atol=1e-5)


def test_padding_row_gets_no_gradient():
    module = MPOEmbedding(MPOShape.automatic(30, 8, 3), padding_idx=-1)
    assert module.padding_idx == 29
    module(torch.tensor([29, 29])).sum().backward()
    assert module.cores.central.grad is None or not module.cores.central.grad.any()
    refuses(ValueError, "padding_idx", MPOEmbedding, MPOShape.automatic(30, 8, 3), padding_idx=30)


def test_a_chain_without_auxiliary_cores_still_has_all_experts():
    cores = MPOCores(MPOShape((6,), (5,)), 4)
    assert cores.blocks().num_experts == 4
    assert cores.dense_weights().shape == (4, 6, 5)


# ------------------------------------------------------------- MPOLinear as nn.Linear


@pytest.mark.parametrize(
    "values, named",
    [
        ((12, 6), {}),
        ((12, 6, False), {}),
        ((12,), {"out_features": 6}),
        ((), {"in_features": 12, "out_features": 6}),
    ],
)
def test_called_as_nn_linear(values, named):
    layer, like = MPOLinear(*values, **named), nn.Linear(*values, **named)
    x = torch.randn(2, 3, 12)
    assert (layer.in_features, layer.out_features) == (like.in_features, like.out_features)
    assert layer.weight.shape == like.weight.shape
    assert (layer.bias is None) == (like.bias is None)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_random_weights_are_as_large_as_those_of_nn_linear():
    layer, like = MPOLinear(64, 128), nn.Linear(64, 128)
    assert layer.weight.std().item() == pytest.approx(like.weight.std().item(), rel=0.1)
    assert MPOLinear(64, 128, init_std=0.01).weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert MPOEmbedding(MPOShape.paper(64, 128)).weight.std().item() == pytest.approx(1, rel=0.1)
    assert MPOLinear(8, 4, dtype=torch.float64).weight.dtype == torch.float64


def test_by_shape():
    shape = MPOShape.paper(12, 6)
    for layer in (MPOLinear(shape, bias=False), MPOLinear(shape=shape, bias=False)):
        assert layer.bias is None
        assert layer.cores.shape == shape
