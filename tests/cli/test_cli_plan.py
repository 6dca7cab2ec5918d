"""`mpoe plan`: its numbers against converted models and by hand, its table, refusals, and huge
models."""

import json
import resource
import time

import pytest
from transformers import AutoConfig, GPT2LMHeadModel, T5ForConditionalGeneration

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.cli.plan import PlanOptions, build, costs, read_values
from tests.assertions import write_json
from tests.cases import either, pairwise

DESIGNS = ("mpoe", "switch", "dense")
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 2,
    "d_kv": 32,
    "vocab_size": 100,
}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 100,
    "n_positions": 16,
}


def plan(cli, tmp_path, *lines):
    """The JSON of a run."""
    file = tmp_path / "plan.json"
    cli("plan", *lines, "--json", file)
    return json.loads(file.read_text())


def costs_of(model, training=True, **config):
    return costs(
        build(model, read_values(model), MPOEConfig(**config)), PlanOptions(inference=not training)
    )


# Millions of parameters at full bonds: dense, dense experts, MPOE with the paper's shapes (Gao et
# al., COLING 2022, recomputed from the shapes with biases shared).
REFERENCE = [
    ("t5-base", 8, 222.9, 1015.8, 294.0),
    ("t5-base", 16, 222.9, 1921.9, 365.1),
    ("t5-large", 4, 737.7, 1945.8, 863.9),
    ("t5-large", 8, 737.7, 3556.6, 990.1),
    ("gpt2", 8, 124.4, 520.9, 160.0),
    ("gpt2", 16, 124.4, 973.9, 195.5),
]


@pytest.mark.parametrize("model, experts, dense, switch, mpoe", REFERENCE)
def test_parameters_of_the_reference_table(cli, tmp_path, model, experts, dense, switch, mpoe):
    values = plan(cli, tmp_path, f"{model} --experts {experts} --shape paper")
    whole = values["totals"]["whole"]
    assert [round(whole[d]["parameters"] / 1e6, 1) for d in ("dense", "switch", "mpoe")] == [
        dense,
        switch,
        mpoe,
    ]
    for (
        design
    ) in DESIGNS:  # bfloat16 weights; float32 parameters, gradients and AdamW's two moments
        assert whole[design]["weight_bytes"] == 2 * whole[design]["parameters"]
        assert whole[design]["state_bytes"] == 16 * whole[design]["parameters"]


SHAPES = [
    {"shape": "separable"},
    {"shape": "paper", "max_bond": 8},
    {"shape": "light", "light_p": 16},
    {"shape": "hidden"},
    {"shape": "hidden", "block_size": 16, "block_per_group": False},
    {"shape": "neurons", "neurons": 8},
    {"shape": "neurons", "neurons": 8, "latent": 16},
    {"shape": "neurons", "neurons": 8, "expert_bias": True},
]


@pytest.mark.parametrize("shape, values", pairwise(SHAPES, [T5, GATED, GPT2]))
def test_parameters_are_those_of_the_converted_model(tmp_path, values, shape):
    write_json(tmp_path / "config.json", values)
    costs = costs_of(str(tmp_path), num_experts=3, **shape)["totals"]["whole"]
    cls = GPT2LMHeadModel if values is GPT2 else T5ForConditionalGeneration
    own = {k: v for k, v in values.items() if k != "model_type"}
    model = cls(AutoConfig.for_model(values["model_type"], **own))
    report = convert_to_mpoe(model, MPOEConfig(num_experts=3, **shape)).parameter_report()
    assert [costs[d]["parameters"] for d in DESIGNS] == [
        report[k] for k in ("total", "switch_total", "dense_total")
    ]


def test_json_has_every_number(cli, tmp_path):
    values = plan(cli, tmp_path, "t5-base --shape separable")
    assert (values["schema"], values["name"], values["class"]) == (
        3,
        "t5-base",
        "T5ForConditionalGeneration",
    )
    work = {
        "tokens": 2048,
        "dtype": "bf16",
        "inference": False,
        "json": str(tmp_path / "plan.json"),
    }
    assert (values["work"], values["layers"]) == (work, 24)
    assert [(part["kind"], part["count"]) for part in values["parts"]] == [("up", 24), ("down", 24)]
    assert {(p["strategy"], p["backward_strategy"]) for p in values["parts"]} == {
        ("separable", "separable")
    }
    totals = values["totals"]
    for design in DESIGNS:
        for number, router in (("parameters", 24 * 768 * 8), ("flops", 24 * 2048 * 6 * 768 * 8)):
            of_parts = sum(part["count"] * part[design][number] for part in values["parts"])
            assert totals["converted"][design][number] == of_parts + (
                router if design != "dense" else 0
            )
            assert (
                totals["whole"][design][number]
                == totals["converted"][design][number] + totals["rest"][number]
            )
    assert totals["whole"]["dense"]["parameters"] == 222_903_552
    assert totals["whole"]["dense"]["x_dense"] == 1.0


def test_operations_of_the_designs_by_hand(cli, tmp_path):
    tokens, rows, columns = 4096, 768, 3072
    flags = f"gpt2 --tokens {tokens} --top_k 2"
    values = plan(cli, tmp_path, f"{flags} --separable_left 256 --separable_right 64")
    up = values["parts"][0]
    assert up["dense"]["flops"] == 3 * 2 * tokens * rows * columns
    assert up["switch"]["flops"] == 3 * 2 * 2 * tokens * rows * columns
    # every slot: left 256 x 256 on its 3 parts, the dense centre, right 64 x 64 on its 48 parts
    each = rows * 256 + rows * columns + columns * 64
    again = rows * 256  # the backward recomputes what the left cores give
    assert up["mpoe"]["flops"] == 2 * 2 * tokens * (3 * each + again)
    assert up["mpoe"]["x_dense"] == pytest.approx(2 * (3 * each + again) / (3 * rows * columns))
    # the head 768 -> 50257 and four times as many attention weights as 768 x 768 in each of 12
    # layers
    assert values["totals"]["rest"]["flops"] == 3 * 2 * tokens * (
        12 * 4 * rows * rows + rows * 50257
    )


@either("training")
def test_hidden_side_blocks_add_their_products(tmp_path, training):
    """FLOPs 1 + k b / I forward, 1 + 7/6 k b / I with the backward pass, which recomputes; no rows
    are copied."""
    write_json(tmp_path / "config.json", T5)
    shape = {"shape": "hidden", "num_experts": 8, "block_size": 16, "router": RouterConfig(top_k=2)}
    (network,) = costs_of(str(tmp_path), training, **shape)["parts"]
    added = network["mpoe"]["flops"] - network["dense"]["flops"]
    assert added == 2 * 2048 * 2 * 128 * 16 * (4 + 3 if training else 2)
    assert network["mpoe"]["x_dense"] == pytest.approx(1 + (7 / 6 if training else 1) * 2 * 16 / 64)
    assert (network["strategy"], network["count"]) == ("hidden", 4)


@pytest.mark.parametrize("latent", [None, 16])
@either("training")
def test_neurons_add_their_products(tmp_path, training, latent):
    """As `NeuronFeedForward.relative_flops`; with the backward pass, which recomputes, 4, 4 and 3
    products."""
    write_json(tmp_path / "config.json", GATED)
    shape = {
        "shape": "neurons",
        "num_experts": 8,
        "neurons": 8,
        "latent": latent,
        "router": RouterConfig(top_k=2),
    }
    (network,) = costs_of(str(tmp_path), training, **shape)["parts"]
    own = 2 * 8 * (64 if latent is None else latent) * (4 + 4 + 3 if training else 3)
    shared = 0 if latent is None else 2 * 64 * latent * (3 if training else 1)
    assert network["mpoe"]["flops"] - network["dense"]["flops"] == 2 * 2048 * (own + shared)
    assert (network["strategy"], network["lossless"]) == ("neurons", True)


def test_one_expert_and_temporary_weights(tmp_path):
    for part in costs_of("gpt2", num_experts=1, shape="separable")["parts"]:
        assert part["switch"] == part["dense"]
    write_json(tmp_path / "config.json", {**T5, "d_model": 1024, "d_ff": 4096})
    for shape in ("paper", "light", "separable"):  # below two experts
        found = costs_of(str(tmp_path), num_experts=1024, shape=shape)
        assert found["totals"]["whole"]["mpoe"]["temporary_bytes"] <= 2 * 1024 * 4096 * 2


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("t5-small", 60_506_624),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("gpt2-xl", 1_557_611_200),
        ("bert-base-uncased", 109_482_240),
        ("bert-large-uncased", 335_141_888),
    ],
)
def test_published_sizes(name, parameters):
    found = costs_of(name, num_experts=2)["totals"]["whole"]
    assert found["dense"]["parameters"] == parameters


def test_a_head_of_its_own_is_counted(tmp_path):
    """Of T5 v1.1, although Transformers 5 builds every T5 with a tied one."""
    write_json(tmp_path / "config.json", GATED)
    write_json(tmp_path / "untied.json", {**GATED, "tie_word_embeddings": False})
    files = (str(tmp_path), str(tmp_path / "untied.json"))
    tied, untied = (costs_of(file)["totals"]["whole"]["dense"]["parameters"] for file in files)
    assert untied - tied == 64 * 100


def test_the_table_fits_and_says_what_it_counts(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # not that of a pipe
    answer = cli("plan t5-base --experts 64 --shape paper")
    assert max(map(len, answer.out.splitlines())) <= 110
    assert "…" not in answer.out
    for word in (
        "MPOE",
        "Switch",
        "768x3072 by rebuild",
        "AdamW",
        "151.0 M",
        "24 feed-forward layers",
    ):
        assert word in answer.out
    assert "truncated" not in answer.out
    assert "lose most of a pretrained matrix" in " ".join(cli("plan t5-base --bond 64").out.split())


@pytest.mark.parametrize(
    "model, shape, share",
    [("t5", "hidden", "63%"), ("t5", "separable", None), ("gpt2", "hidden", None)],
)
def test_experts_that_are_not_small_are_told(cli, model, shape, share):
    told = " ".join(cli(f"plan {model} --shape {shape}").out.split())
    assert ("At this width these experts are not small" in told) == (share is not None)
    assert (
        share is None or f"MPOE's feed-forward layers hold {share} of Switch's parameters" in told
    )


@pytest.mark.parametrize("flags", ["", "--inference"])
def test_no_tokens(cli, tmp_path, flags):
    whole = plan(cli, tmp_path, f"t5 --tokens 0 {flags}")["totals"]["whole"]
    for design in DESIGNS:
        assert (whole[design]["flops"], whole[design]["x_dense"]) == (0, None)
        assert bool(whole[design]["state_bytes"]) == (not flags)
    assert whole["dense"]["parameters"] == 1_312_512


def test_configuration_files_and_converted_models(cli, refused, tmp_path):
    write_json(tmp_path / "c.json", GATED)
    values = plan(cli, tmp_path, f"{tmp_path}/c.json --layers_to_transform 1 --shape separable")
    assert [(part["kind"], part["count"]) for part in values["parts"]] == [
        ("up", 2),
        ("down", 2),
        ("gate_proj", 2),
    ]
    mpoe = {"num_experts": 5, "shape": "light", "light_p": 16, "router": {"top_k": 2}}
    converted = {
        **T5,
        "model_type": "mpoe_t5",
        "architectures": ["MPOET5ForConditionalGeneration"],
        "mpoe": mpoe,
    }
    write_json(tmp_path / "config.json", converted)
    own = plan(cli, tmp_path, tmp_path)["config"]
    assert (own["num_experts"], own["shape"], own["light_p"], own["router"]["top_k"]) == (
        5,
        "light",
        16,
        2,
    )
    assert "is converted already: num_experts cannot be changed any more" in refused(
        f"plan {tmp_path} --experts 3"
    )


def test_other_modules_in_mpo_form(cli, tmp_path):
    values = plan(cli, tmp_path, "gpt2 --shape separable --target_modules ffn attention embedding")
    kinds = {part["kind"]: part for part in values["parts"]}
    assert list(kinds) == ["c_attn", "c_proj", "up", "down"]
    assert kinds["c_attn"]["switch"] == kinds["c_attn"]["dense"]  # one expert
    whole, plain = (
        values["totals"]["whole"],
        plan(cli, tmp_path, "gpt2 --shape separable")["totals"]["whole"],
    )
    assert whole["dense"] == plain["dense"]
    assert whole["mpoe"]["parameters"] > plain["mpoe"]["parameters"]  # at full bonds


def test_without_a_shape_it_plans_what_conversion_makes(cli, tmp_path):
    values = plan(cli, tmp_path, "t5-base")
    assert (values["config"]["shape"], values["config"]["router"]["top_k"]) == ("hidden", 2)
    assert values["totals"]["whole"]["mpoe"]["parameters"] == 298_548_480
    capped = plan(cli, tmp_path, "t5-base --max_bond 64")
    assert (capped["config"]["shape"], capped["config"]["router"]["top_k"]) == ("separable", 1)


def highest_memory():
    """Bytes that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_eleven_billion_parameters_and_a_thousand_experts(cli):
    before, start = highest_memory(), time.perf_counter()
    answer = cli("plan t5-11b --experts 1024")
    assert "1,024 experts" in answer.out
    assert time.perf_counter() - start < 20
    assert highest_memory() - before < 300e6  # with imports; the model alone would be 45 GB


def test_refusals_of_files(refused, tmp_path):
    config = tmp_path / "config.json"
    for text, message in (
        (
            '{"model_type": "mamba"}',
            "of the family 'mamba', which mpoe does not know; it knows t5, ",
        ),
        ('{"model_type": "t5", "d_model": "wide"}', "'d_model'"),
        ('{"model_type": "gpt2", "n_embd": 8, "n_head": 3}', "builds no MPOEGPT2LMHeadModel"),
    ):
        config.write_text(text, encoding="latin-1")
        assert message in refused(f"plan {tmp_path}")
