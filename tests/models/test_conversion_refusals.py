"""What conversion refuses: each error comes before any work, and names what was given."""

import pytest
import torch
import transformers
from transformers import GPT2LMHeadModel
from transformers.models.distilbert import DistilBertConfig, DistilBertModel

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_latent
from mpoe.models.find import hidden_size_as_mixture
from mpoe_kernels import MPOShape
from tests.assertions import refuses

from .tiny_models import dense_model, tiny_config, tiny_model


def with_nan():
    model = dense_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        model.transformer.h[0].ln_1.bias[0] = float("inf")
    return model


def of_another_family():
    sizes = {"dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1, "vocab_size": 9}
    return DistilBertModel(DistilBertConfig(**sizes))


def without_weights():
    return dense_model("gpt2").to("meta")


# What is wrong with a model: the model, and the message.
MODELS = {
    "not finite": (
        with_nan,
        r"transformer\.h\.0\.ln_1\.bias, transformer\.h\.1\.mlp\.c_fc\.weight",
    ),
    "unknown family": (of_another_family, r"a model of t5, .* vit; got DistilBertModel .*sites="),
    "converted": (lambda: convert_to_mpoe(dense_model("gpt2")), "an MPOE model already"),
    "unknown activation": (
        lambda: tiny_model("gpt2", "GPT2LMHeadModel", activation_function="quick_gelu"),
        "did you mean 'gelu",
    ),
    "no weights": (without_weights, r"model must hold weights; .* is on the device meta"),
}
GPT2_SHAPES = {"up": MPOShape.paper(24, 40), "down": MPOShape.paper(40, 24)}
NEARLY = "encoder.block.0.layer.1.DenseReluDens"
# What is wrong with a configuration: the model's family, the fields, and the message.
FIELDS = {
    "backend": ("t5", {"backend": "egaer"}, "got 'egaer'"),
    "no layers": ("t5", {"layers_to_transform": []}, "nothing is left to"),
    "absent layer": ("t5", {"layers_to_transform": [7]}, r"layer indices 0\.\.1; got 7"),
    "absent module": ("t5", {"exclude_modules": [NEARLY]}, r"did you mean .*DenseReluDense"),
    "shape": ("gpt2", {"shape": GPT2_SHAPES}, r"transformer\.h\.0\.mlp\.c_fc.*\[24, 96\]"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_models(fault):
    make, message = MODELS[fault]
    refuses(ValueError, message, convert_to_mpoe, make())


@pytest.mark.parametrize("fault", FIELDS)
def test_configurations(fault):
    family, fields, message = FIELDS[fault]
    config = MPOEConfig(**{"shape": "separable", **fields})
    refuses(ValueError, message, convert_to_mpoe, dense_model(family), config)


def test_a_configuration_is_no_dictionary():
    words = "config must be an MPOEConfig; got dict"
    refuses(TypeError, words, convert_to_mpoe, dense_model("gpt2"), {"num_experts": 2})


def test_a_refused_model_is_as_it_was():
    model = with_nan()
    refuses(ValueError, "finite", convert_to_mpoe, model, inplace=True)
    assert type(model) is GPT2LMHeadModel


@pytest.mark.parametrize("path", [None, 3])
def test_a_path_is_the_name_of_a_folder(path):
    refuses(TypeError, "path must be the folder of a saved model; got", load_mpoe, path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_a_mixture(family):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    words = f"model must be dense; got a {family}, which is a mixture of experts already"
    sites = {"holder": "layers.*.mlp", "up": "up", "down": "down", "activation": "silu"}
    refuses(ValueError, words, convert_to_mpoe, model)
    refuses(ValueError, words, convert_to_mpoe, model, sites=sites)
    words = f"a wider model must be of t5, .*; got {family}"
    refuses(ValueError, words, hidden_size_as_mixture, model, MPOEConfig())


def test_experts_without_a_latent_space_are_not_merged_out_of_it():
    config = MPOEConfig(num_experts=2, shape="neurons", neurons=8)
    model = convert_to_mpoe(dense_model("t5"), config)
    refuses(ValueError, "model must have neurons in a latent space", merge_latent, model)
