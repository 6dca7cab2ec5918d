"""Rates, decay and freezing of the optimizer's parameter groups; training models with neurons."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Trainer

from mpoe import MPOEConfig, RouterConfig
from mpoe.models import convert_to_mpoe
from mpoe.models.walk import mpo_modules, neuron_modules, routed_layers
from mpoe.training import (
    MPOETrainingArguments,
    build_param_groups,
    freeze_cores,
    update_correction_bias,
)
from tests.assertions import differing, refuses
from tests.cases import pairwise

from .tiny import Rows, Toy, dense_model, make_trainer, mpoe_model
from .tiny import arguments as run_arguments

arguments = partial(
    MPOETrainingArguments, output_dir="unused", learning_rate=1e-3, weight_decay=0.1
)


def rates(groups):
    found = {id(p): (g["lr"], g["weight_decay"], g["kind"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups), "a parameter is in two groups"
    return found


def pretrained_toy(gauge="symmetric"):
    """Cores decomposed from weights, so that their ratios differ from each other."""
    model = Toy()
    for _, cores in mpo_modules(model):
        cores.load_weight_(
            torch.randn(cores.shape.in_features, cores.shape.out_features) * 0.05, gauge
        )
    return model


@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal"])
@pytest.mark.parametrize(
    "options, base, central, auxiliary",
    [
        ({}, 1e-3, 0.35, 0.5),
        ({"regime": "scratch"}, 1e-3, 1.0, 0.1),
        ({"mpo_lr": 2e-4}, 2e-4, 0.35, 0.5),
        ({"mpo_lr": 2e-4, "central_lr_scale": 0.25, "auxiliary_lr_scale": 3}, 2e-4, 0.25, 3.0),
    ],
)
def test_core_rates(gauge, options, base, central, auxiliary):
    model = pretrained_toy(gauge)
    found = rates(build_param_groups(model, arguments(**options)))
    for _, cores in mpo_modules(model):
        weight_rms = cores.dense_weights()[0].square().mean().sqrt().item()
        for index, core in enumerate(cores.chain()):
            scale = central if index == cores.shape.central else auxiliary
            expected = base * core.square().mean().sqrt().item() / weight_rms * scale
            assert found[id(core)][0] == pytest.approx(expected, rel=1e-4)


def test_one_raw_rate_without_scaling():
    model = pretrained_toy()
    found = rates(build_param_groups(model, arguments(scale_core_lr=False, mpo_lr=5e-4)))
    cores = [core for _, module in mpo_modules(model) for core in module.chain()]
    assert {found[id(core)][0] for core in cores} == {5e-4}
    half = rates(build_param_groups(model, arguments(scale_core_lr=False, central_lr_scale=0.5)))
    assert {half[id(core)][0] for core in model.centrals()} == {5e-4}


def test_every_parameter_once_and_kinds():
    model = pretrained_toy()
    found = rates(build_param_groups(model, arguments(router_lr_scale=2.0)))
    assert found.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        rate, decay, kind = found[id(parameter)]
        if ".central" in name or ".auxiliary" in name:
            assert kind == name.split("experts.")[1].split(".")[1]
        elif "router" in name:
            assert (kind, rate) == ("router", 2e-3)
        else:
            assert (kind, rate) == ("rest", 1e-3)
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1), name


def test_dense_experts_have_their_own_rate():
    model = Toy(expert_type="dense")
    model.other = nn.Parameter(torch.ones(2, 2, 2))
    found = rates(build_param_groups(model, arguments(dense_expert_lr_scale=0.3)))
    assert found[id(model.other)] == (1e-3, 0.1, "rest")
    weights = [p for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    assert len(weights) == 4
    for parameter in weights:
        assert found[id(parameter)] == (pytest.approx(3e-4), 0.1, "dense_expert")


def test_zero_weight_trains_at_the_unscaled_rate_with_a_warning():
    model = Toy()
    model.layers[0].experts.up.rate_ratios = (0.5, 0.0, float("nan"))
    with pytest.warns(UserWarning, match=r"layers\.0\.experts\.up has unusable rate ratios"):
        found = rates(build_param_groups(model, arguments()))
    assert found[id(model.layers[0].experts.up.central)][0] == pytest.approx(0.35e-3)
    assert found[id(model.layers[0].experts.up.auxiliary[0])][0] == pytest.approx(0.25e-3)


# ------------------------------------------------------------------ freezing


def test_frozen_cores_are_in_no_group():
    model = Toy()
    freeze_cores(model, tensor_learn=True)
    groups = build_param_groups(model, arguments())
    assert {g["kind"] for g in groups} == {"rest", "router", "auxiliary"}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refuses(ValueError, "nothing to train", build_param_groups, model, arguments())


def test_freezing_refusals():
    mixed = mpoe_model("t5", target_modules=["ffn", "attention"])
    refuses(
        ValueError,
        r"names word_embed, but this model's MPO cores are in: attention, mlp",
        freeze_cores,
        mixed,
        update_mpo_layer="word_embed",
    )
    refuses(
        ValueError,
        r"must be below the number of cores \(here at most 5\); got '5'",
        freeze_cores,
        mixed,
        train_AT_index="5",
    )
    refuses(ValueError, "Linear has none", freeze_cores, nn.Linear(2, 2), tensor_learn=True)
    assert freeze_cores(nn.Linear(2, 2)) == {"frozen": 0, "trained": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_cores(mixed)


def test_attention_biases_of_t5_are_not_decayed():
    """They are tables [buckets, heads], so that their number of axes does not tell."""
    model = mpoe_model("t5")
    found = rates(build_param_groups(model, arguments()))
    tables = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
    assert len(tables) == 2
    assert [found[id(table)][1:] for table in tables] == [(0.0, "rest")] * 2
    assert found[id(model.get_input_embeddings().weight)][1] == 0.1


# ------------------------------------------------------------------ neurons


NEURONS = {"shape": "neurons", "neurons": 8, "num_experts": 4, "router": RouterConfig(top_k=2)}
BALANCED = RouterConfig(
    top_k=2, scoring_func="sigmoid", bias_update_rate=0.01, balance_loss_weight=0.0
)


@pytest.mark.parametrize("family, latent", pairwise(["t5", "gpt2", "bert"], [None, 8]))
def test_the_loss_falls(family, latent, tmp_path):
    """With the dense network and P, Q frozen in every step, so that only the experts and the router
    learn in it."""
    model = mpoe_model(family, **NEURONS, latent=latent)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        tmp_path,
        family,
        model,
        max_steps=12,
        learning_rate=0.02,
        gradient_mask_prob=1.0,
        logging_steps=1,
    )
    trainer.train()
    losses = [record["task_loss"] for record in trainer.state.log_history if "task_loss" in record]
    assert sum(losses[-3:]) < sum(losses[:3])
    shared = {
        id(w)
        for layer in neuron_modules(model).values()
        for w in layer.central_parameters().values()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in shared:
            assert torch.equal(parameter, before[name]), name
    for layer in neuron_modules(model).values():
        assert layer.experts.down.any()


def test_the_trainer_moves_the_correction_bias_against_the_load(tmp_path):
    model = mpoe_model("gpt2", **{**NEURONS, "router": BALANCED})
    trainer = make_trainer(tmp_path, "gpt2", model, max_steps=3, gradient_accumulation_steps=2)
    loads = []
    compute = trainer.compute_loss

    def watched(*arguments, **options):
        loss, outputs = compute(*arguments, **{**options, "return_outputs": True})
        loads.append(outputs.expert_load)
        return loss

    trainer.compute_loss = watched
    trainer.train()
    assert len(loads) == 6
    want = torch.zeros(2, 4)
    for first, second in zip(loads[::2], loads[1::2], strict=True):
        load = (first + second).float()
        want += 0.01 * torch.sign(load.mean(1, keepdim=True) - load)
    found = torch.stack([layer.router.e_score_correction_bias for _, layer in routed_layers(model)])
    assert torch.allclose(found, want)
    assert bool(found.any())


def test_loads_that_do_not_fit_are_refused(tmp_path):
    model = mpoe_model("gpt2", **{**NEURONS, "router": BALANCED})
    for size in ((3, 4), (2, 1)):
        refuses(
            ValueError,
            r"expert_load must be \[2, E\], a row per layer; got \[",
            update_correction_bias,
            model,
            torch.zeros(size),
        )
    model.config.output_router_logits = False
    refuses(
        ValueError,
        "bias_update_rate needs the model's expert_load",
        make_trainer(tmp_path, "gpt2", model, max_steps=1).train,
    )


@pytest.mark.parametrize("latent", [None, 8])
def test_the_dense_networks_moments_survive_conversion(latent, tmp_path):
    """A run of the dense model, converted, goes on with AdamW's moments and steps; only what is new
    starts anew."""
    dense = dense_model("gpt2")
    first = Trainer(
        dense, run_arguments(tmp_path / "dense", max_steps=3), train_dataset=Rows("gpt2")
    )
    first.train()
    before = {
        id(p): {n: v.clone() for n, v in state.items()}
        for p, state in first.optimizer.state.items()
    }
    converted = convert_to_mpoe(dense, MPOEConfig(**NEURONS, latent=latent), inplace=True)
    options = {"max_steps": 2, "previous_optimizer": first.optimizer}
    trainer = make_trainer(tmp_path / "mixture", "gpt2", converted, **options)
    state = trainer.create_optimizer().state
    new = [name for name, p in converted.named_parameters() if id(p) not in before]
    assert new
    assert all("experts" in name or "router" in name for name in new)
    assert len(state) == len(before)
    for parameter, values in state.items():
        assert not differing(values, before[id(parameter)])
    trainer.train()
    steps = {
        name: int(trainer.optimizer.state[p]["step"]) for name, p in converted.named_parameters()
    }
    assert all(count == (2 if name in new else 5) for name, count in steps.items())


def test_a_previous_optimizer_that_does_not_fit_is_refused(tmp_path):
    model = mpoe_model("gpt2", **NEURONS)
    refuses(
        TypeError,
        "previous_optimizer must be an optimizer; got str",
        make_trainer,
        tmp_path,
        "gpt2",
        model,
        previous_optimizer="adamw",
    )
    for other, words in (
        (
            torch.optim.SGD(model.parameters()),
            "must be of the kind that trains now, AdamW; got SGD",
        ),
        (
            torch.optim.AdamW(dense_model("gpt2").parameters()),
            "converted with inplace=True; got one that has none",
        ),
    ):
        refuses(
            ValueError, words, make_trainer(tmp_path, "gpt2", model, previous_optimizer=other).train
        )
