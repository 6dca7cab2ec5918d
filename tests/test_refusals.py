"""Refusals that no other test has a reason to meet: each names the argument, what was expected and
what came."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mpoe import (
    MPOEConfig,
    RouterConfig,
    convert_to_mpoe,
    import_original,
    merge_experts,
    save_mpoe_only,
)
from mpoe.layers import (
    DenseExperts,
    MPOEFeedForward,
    MPOEmbedding,
    MPOExperts,
    MPOLinear,
    TopKRouter,
    load_balancing_loss,
    router_z_loss,
)
from mpoe.layers.context import check_mask
from mpoe.layers.cores import MPOCores
from mpoe.models import load_layers
from mpoe.training.checkpoints import step_of
from mpoe.training.freezing import freeze_all_but_experts, freeze_cores
from mpoe.training.sharding import save_sharded, shard_model
from mpoe_kernels import MPOShape, fold
from tests.assertions import refuses
from tests.cases import every_refusal, resized
from tests.models.tiny_models import tiny_model

SHAPE, SMALL = MPOShape((2, 3), (3, 2)), MPOShape((2, 4), (3, 4))
t5 = partial(tiny_model, "t5", "T5ForConditionalGeneration")
gpt2 = partial(tiny_model, "gpt2", "GPT2LMHeadModel")


def merged():
    return merge_experts(convert_to_mpoe(gpt2()))


def sharded():
    model = convert_to_mpoe(gpt2())
    model.__class__ = type("Sharded", (FSDPModule, type(model)), {})
    return model


def layer(shape=None):
    return MPOEFeedForward(8, 16, MPOEConfig(num_experts=2, shape=shape))


LAYOUT = "mask must be a dense tensor; got one of the layout"
MASKS = {
    r"mask must be bool \(or integers\), .* not additive; got torch.float32": torch.zeros(2, 3),
    "not additive; got torch.complex64": torch.zeros(2, 3, dtype=torch.complex64),
    f"{LAYOUT} torch.sparse_coo": torch.ones(2, 3).bool().to_sparse(),
    f"{LAYOUT} torch._mkldnn": torch.ones(2, 3).to_mkldnn(),
    f"{LAYOUT} nested": torch.nested.nested_tensor([torch.ones(3)]),
    "mask must be a bool tensor .2, 3.; got list": [[True] * 3] * 2,
    r"mask must be \[2, 3\]; got \[3, 2\]": torch.ones(3, 2).bool(),
}
CASES = {
    TypeError: {
        "router must be a RouterConfig or its dict; got str": lambda: MPOEConfig(router="switch"),
        r"target_modules must be a name .*; got \[\]": lambda: MPOEConfig(target_modules=[]),
        "exclude_modules must be a list .*; got 'x'": lambda: MPOEConfig(exclude_modules="x"),
        r"exclude_modules must be a list .*\[3\]": lambda: MPOEConfig(exclude_modules=[3]),
        "layers_to_transform must be a list .*; got '0'": lambda: MPOEConfig(
            layers_to_transform="0"
        ),
        "is_scale_prob must be True or False; got int 1": lambda: RouterConfig(is_scale_prob=1),
        r"embedding must be an nn\.Embedding; got Linear": lambda: MPOEmbedding.from_embedding(
            nn.Linear(2, 2)
        ),
        r"expected an nn\.Linear or a Conv1D; got ReLU": lambda: MPOLinear.from_linear(nn.ReLU()),
        "model must be an MPOE model .*; got GPT2LMHeadModel": lambda: merge_experts(gpt2()),
        "model must be an MPOE model": [
            lambda: load_layers(gpt2(), ".", ["mlp"]),
            lambda: save_mpoe_only(gpt2(), "x", gpt2()),
        ],
        "backend must be a name or None; got int 3": lambda: MPOEConfig(backend=3),
        "shape_pattern must be a mapping .*; got int": lambda: MPOEConfig(shape_pattern=3),
        "jitter must be a number; got str 'x'": lambda: RouterConfig(jitter="x"),
        "RouterConfig must be a mapping; got int 3": lambda: RouterConfig.from_dict(3),
        "shape must be an MPOShape; got str": lambda: MPOCores("x", 1),
        "model must be a module; got NoneType": lambda: freeze_all_but_experts(None),
        "model must be sharded by shard_model; got a plain": lambda: save_sharded(gpt2(), "x"),
        "in_features must be an integer; got float 1.5": lambda: TopKRouter(1.5, 4),
        "config must be a RouterConfig; got dict": lambda: TopKRouter(8, 4, {"top_k": 1}),
        "takes in_features and out_features, .* got in_features 12, out_features None": lambda: (
            MPOLinear(12)
        ),
        "got in_features None, out_features None, shape None": lambda: MPOLinear(),
        r"or a shape alone \(then bias goes by name\)": lambda: MPOLinear(SMALL, False),
        "or a shape alone": lambda: MPOLinear(12, 6, shape=SMALL),
        "out_features must be an integer": lambda: MPOLinear(12, True),
        r"which goes by name: fold\(cores, shape=shape\)": lambda: fold(
            MPOLinear(SMALL).cores.cores(), SMALL
        ),
        "init_std must be a number; got str": lambda: MPOLinear(SMALL, init_std="x"),
        "shape must be an MPOShape; got NoneType": lambda: MPOEmbedding(None, 1),
        "padding_idx must be an integer; got float 1.5": lambda: MPOEmbedding(SMALL, 1.5),
        "config must be an MPOEConfig; got str 'x'": lambda: MPOEFeedForward(8, 16, "x"),
        "hidden_features must be an integer; got NoneType": lambda: MPOEFeedForward(8, None),
        r"x must be a tensor \[T, I\]; got list": lambda: TopKRouter(8, 4)([1.0]),
        r"hidden_states must be a tensor \[..., I\]; got list": lambda: MPOEFeedForward(8, 16)(
            [1.0]
        ),
        "must hold floating-point numbers; got": lambda: MPOEFeedForward(8, 16)(
            torch.ones(2, 8).long()
        ),
    },
    ValueError: {
        "x must hold its values, in 64 bytes; got": lambda: TopKRouter(8, 4)(
            resized(torch.ones(2, 8), 32)
        ),
        r"shape_pattern must hold regular .*'\('": lambda: MPOEConfig(shape_pattern={"(": 2}),
        "named checkpoint-<step>; got 'checkpoint-x'": lambda: step_of("checkpoint-x"),
        "num_experts must be at least 1; got 0": [
            lambda: MPOCores(SHAPE, 0),
            lambda: DenseExperts(4, 8, 0),
            lambda: TopKRouter(8, 0),
        ],
        "top_k must be at most .* 2; got 3": lambda: TopKRouter(4, 2, RouterConfig(top_k=3)),
        "cache_experts needs a model with MPO experts": lambda: merged().cache_experts(5),
        "weights_kept needs a model with MPO experts": lambda: (
            merged().eval().weights_kept().__enter__()
        ),
        "source must be a checkpoint of the original": lambda: import_original("absent", t5()),
        r"gate_proj shape must be for a weight \[6, 6\]; got one for \[2, 3\]": lambda: MPOExperts(
            {"up": SHAPE, "down": SHAPE, "gate_proj": MPOShape((2,), (3,))}, 2
        ),
        "model must not be sharded already; it is": lambda: shard_model(sharded()),
        "in_features must be at least 1; got 0": lambda: TopKRouter(0, 4),
        "device and dtype must be .* has; got 'moon', None": lambda: TopKRouter(
            8, 4, device="moon"
        ),
        "device and dtype must be .* has; got None, 'x'": lambda: TopKRouter(8, 4, dtype="x"),
        "hidden_states must be a dense tensor; got one of the": lambda: layer()(
            torch.eye(8).to_sparse()
        ),
        "the down shape must be": lambda: MPOExperts({"up": SMALL, "down": SMALL}, 2),
        "in_features must be at least 1": lambda: MPOLinear(0, 6),
        "dtype must be of floating-point numbers; got": lambda: MPOLinear(SMALL, dtype=torch.int64),
        r"x must be \[T, I\] with I = 8; got \[2, 7\]": lambda: TopKRouter(8, 4)(torch.ones(2, 7)),
        r"hidden_states must be \[..., 8\]; got \[\]": lambda: MPOEFeedForward(8, 16)(
            torch.ones(())
        ),
    },
}


@every_refusal(CASES)
def test_refused(kind, message, calls):
    for call in calls:
        refuses(kind, message, call)


@pytest.mark.parametrize("message", MASKS)
def test_masks(message):
    refuses((TypeError, ValueError), message, check_mask, "mask", MASKS[message], (2, 3))


def test_additive_masks():
    for call in (
        lambda mask: layer()(torch.ones(3, 8), mask),
        lambda mask: layer("separable")(torch.ones(3, 8), mask),
        lambda mask: router_z_loss(torch.randn(3, 2), mask),
        lambda mask: load_balancing_loss(torch.randn(3, 2), torch.zeros(3, 1).long(), mask),
    ):
        mask = torch.tensor([0.0, -torch.inf, 0.0])
        refuses(TypeError, "token_mask must be bool .* not additive", call, mask)


def test_nothing_left_to_train():
    model = convert_to_mpoe(gpt2(), MPOEConfig(num_experts=2, shape="separable"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rsplit(".", 1)[-1] == "central")
    refuses(
        ValueError,
        "together leave nothing to train",
        freeze_cores,
        model,
        tensor_learn=True,
        train_AT_index="0,1,2",
    )


def test_components_that_are_not_in_mpo_form(tmp_path):
    model = convert_to_mpoe(gpt2(), MPOEConfig(num_experts=2))
    model.save_pretrained(tmp_path)
    refuses(
        ValueError,
        "components must be in MPO form in the model; attention is not",
        load_layers,
        model,
        tmp_path,
        ["attention"],
    )


def test_components_of_another_model(tmp_path):
    convert_to_mpoe(gpt2(), MPOEConfig(num_experts=2)).save_pretrained(tmp_path)
    deep, wide = (
        convert_to_mpoe(gpt2(**sizes), MPOEConfig(num_experts=2))
        for sizes in ({"n_layer": 3}, {"n_inner": 12})
    )
    refuses(
        ValueError,
        r"must hold transformer\.h\.2\.mlp\..*; it has None",
        load_layers,
        deep,
        tmp_path,
        ["mlp"],
    )
    other = r"hold transformer\.h\.0\..* \(.*\), as the model.*; it has \("
    refuses(ValueError, other, load_layers, wide, tmp_path, ["mlp"])
