"""What models with hidden-side experts, or with neurons, do alone: merging, starts, blocks,
patterns, refusals."""

import pytest
import torch
from torch import nn

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, merge_experts, merge_latent
from mpoe.layers import HiddenFeedForward, MPOEFeedForward
from mpoe.models.walk import modules_of, neuron_modules
from mpoe.training.freezing import GradientMask
from mpoe_kernels import MPOShape, reconstruct
from tests.assertions import refuses

from .tiny_models import batch, config, first_layer, kept_model, logits, stirred, tiny_model
from .tiny_models import dense_model as dense


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shared_blocks_are_plain_mpos(family):
    """With the projections as centre, HiddenExperts' cores rebuild C1 (1 x R) and (1 x L) C2."""
    model = stirred(kept_model(family, "hidden", block_per_group=False))
    layer = first_layer(model)
    features, block = layer.hidden_features, 8
    for kind in layer.projections():
        up = kind != "down"
        factors = (
            ((24, 1), (features // block, block)) if up else ((features // block, block), (24, 1))
        )
        shape = MPOShape(*factors, central=0)
        core = layer.experts.auxiliary[
            {"up": "right", "gate_proj": "right_gate", "down": "left"}[kind]
        ][2, 0]
        weight = layer.projections()[kind].weight.detach()
        weight = weight if family == "gpt2" else weight.T
        centre = (
            weight.view(1, 24, -1, block)
            if up
            else weight.view(-1, block, 24).permute(0, 2, 1)[None]
        )
        cores = [centre, (core if up else core.T).reshape(shape.core_shapes[1])]
        assert tuple(centre.shape) == shape.core_shapes[0]
        found = layer.expert_weights(kind)
        assert torch.allclose(reconstruct(cores), found[2], atol=1e-6)
        assert not found.requires_grad


def test_the_mask_compiles_into_two_graphs():
    model = kept_model("llama", "hidden").train()
    layer, compiled = first_layer(model), []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(2, 5, 24, requires_grad=True)
    mask = GradientMask(model, 0.5, seed=0)
    for step in range(6):
        with mask.step(step):
            run(x).sum().backward()
    assert len(compiled) <= 2


def test_default_blocks_are_the_largest_divisor_up_to_64():
    settings = MPOEConfig(shape="hidden")
    assert [settings.hidden_block(f) for f in (3072, 192, 24, 2816, 11008, 67)] == [
        64,
        64,
        24,
        64,
        64,
        1,
    ]


def test_dropout_and_padding():
    layer = first_layer(kept_model("gpt2", "hidden"))
    assert isinstance(layer, HiddenFeedForward)
    x = torch.randn(2, 3, 24)
    x[0, 1] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    y = layer(x, mask)
    assert not y[0, 1].any()
    assert bool(torch.isfinite(y).all())
    layer.expert_dropout = 0.5
    assert torch.equal(layer(x, mask), y)
    assert not torch.equal(layer.train()(x, mask), y)


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_training_starts_where_the_dense_model_is(family):
    """The dense network's own dropout, at its own place, from the same stream of random numbers."""
    model = dense(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    converted = convert_to_mpoe(model, config("neurons"))
    results = []
    for each in (model.train(), converted.train()):
        torch.manual_seed(4)
        results.append(each(**batch(family)).logits)
    assert torch.equal(*results)


def test_a_model_from_its_configuration_alone():
    """Random weights; the experts contribute nothing yet."""
    router = {"scoring_func": "sigmoid", "bias_update_rate": 0.001}
    wanted = kept_model("llama", "neurons", router=router, latent=6, expert_bias=True)
    torch.manual_seed(0)
    model = type(wanted)(wanted.config).eval()
    layer = first_layer(model)
    assert not layer.experts.down.any()
    assert not layer.experts.bias.any()
    assert not layer.router.e_score_correction_bias.any()
    assert 0.1 < float(layer.experts.latent_in.detach().std()) < 0.5  # I^-1/2 = .25
    assert bool(torch.isfinite(logits(model, "llama")).all())


@pytest.mark.parametrize("latent", [None, 6])
def test_the_start_follows_torch_seed(latent):
    model, found = dense("llama"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        layer = first_layer(convert_to_mpoe(model, config("neurons", latent=latent)))
        found.append(
            torch.cat([parameter.detach().flatten() for parameter in layer.experts.parameters()])
        )
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_neurons_start_as_copies_of_dense_ones(family, monkeypatch):
    noisy = first_layer(kept_model(family, "neurons"))
    monkeypatch.setattr("mpoe.models.sites.START_NOISE", 1e-6)
    layer = first_layer(kept_model(family, "neurons"))
    known = layer.central_weight("up").t()
    for row, bias in zip(
        layer.experts.up[2], layer.experts.bias[2] if family == "gpt2" else range(8), strict=True
    ):
        place = int((known - row).abs().sum(1).argmin())
        assert torch.allclose(known[place], row, atol=1e-4)
        if family == "gpt2":
            assert bias == layer.c_fc.bias[place]
        else:
            gate = layer.central_weight("gate_proj").t()[place]
            assert (layer.experts.gate_proj[2] - gate).abs().sum(1).min() < 1e-3
    distance = torch.cdist(noisy.experts.up[0].detach(), known.detach()).min(1).values
    assert (
        0.1 < float(distance.mean() / 24**0.5 / known.detach().std()) < 0.7
    )  # noise of half the standard deviation


def test_shapes_by_pattern():
    """Some layers have neurons and others blocks: each shape gets its own options."""
    for base, pattern in (
        ("neurons", {"layers.1.mlp": "hidden"}),
        ("hidden", {"layers.0.mlp": "neurons"}),
    ):
        mixed = kept_model("llama", "neurons", shape=base, shape_pattern=pattern)
        assert list(neuron_modules(mixed)) == ["model.layers.0.mlp"]
        assert list(modules_of(mixed, HiddenFeedForward)) == ["model.layers.1.mlp"]
        (layer,) = modules_of(mixed, HiddenFeedForward).values()
        assert layer.router.config.routed_scaling_factor is None
        (layer,) = neuron_modules(mixed).values()
        assert layer.router.config.routed_scaling_factor == 2.0


def test_sites_of_a_network_that_ends_in_another_module():
    sites = {
        "holder": "encoder.layer.*",
        "up": "intermediate.dense",
        "down": "output.dense",
        "activation": "gelu",
    }
    sites |= {"place": "intermediate", "sums": "output"}
    model = tiny_model("electra", "ElectraForMaskedLM", num_hidden_layers=1, embedding_size=24)
    converted = convert_to_mpoe(model, config("neurons"), sites=sites)
    assert list(neuron_modules(converted)) == ["electra.encoder.layer.0.output"]
    assert torch.equal(logits(converted, "bert_mlm"), logits(model, "bert_mlm"))
    inside = "shape 'neurons' needs its down projection inside the module"
    for kind, message, sums in (
        (ValueError, inside, ""),
        (ValueError, inside, "attention"),
        (TypeError, r"sites\['sums'\] must be a name", 1),
    ):
        wrong = {**sites, "sums": sums}
        refuses(kind, message, convert_to_mpoe, model, config("neurons"), sites=wrong)


def test_what_needs_a_dense_network_is_refused():
    refuses(
        TypeError,
        r"must be an MPOE model with neurons \(latent=l\); got GPT2",
        merge_latent,
        dense("gpt2"),
    )
    refuses(
        ValueError,
        "shape 'neurons' needs a dense network that stays",
        MPOEFeedForward,
        16,
        24,
        config("neurons"),
    )
    switch = convert_to_mpoe(dense("llama"), MPOEConfig(num_experts=2, expert_type="dense"))
    refuses(
        ValueError, "model must have MPO experts; got expert_type='dense'", merge_experts, switch
    )
    refuses(
        ValueError,
        "those of shape 'neurons' are added to a dense one",
        merge_experts,
        kept_model("llama", "neurons"),
    )


def test_defaults():
    """64 neurons; one in eight experts per token, two to eight; gates that sum to their number."""
    found = [MPOEConfig(shape="neurons", num_experts=n) for n in (1, 2, 8, 32, 128)]
    assert {each.neurons for each in found} == {64}
    assert [each.top_k for each in found] == [1, 2, 2, 4, 8]
    assert [each.router.routed_scaling_factor for each in found] == [1.0, 2.0, 2.0, 4.0, 8.0]
    raw = MPOEConfig(shape="neurons", router=RouterConfig(is_scale_prob=True))
    assert raw.router.routed_scaling_factor == 1.0
    assert MPOEConfig.from_dict(config("neurons", latent=6).to_dict()) == config(
        "neurons", latent=6
    )
