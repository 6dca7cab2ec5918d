"""`mpoe plan`: tables, JSON, refusals, and models far beyond this machine."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from mpoe import MPOEConfig

COSTS = {"parameters", "weight_bytes", "state_bytes", "temporary_bytes", "flops", "x_dense"}
DESIGNS = {"mpoe", "switch", "dense"}


def plan(cli, tmp_path: Path, *arguments: object) -> dict:
    """The JSON of a run."""
    file = tmp_path / "plan.json"
    answer = cli("plan", *arguments, "--json", file)
    assert answer.code == 0, answer.err
    return json.loads(file.read_text())


# Millions of parameters at full bonds: dense, dense experts, MPOE with the paper's shapes (Gao et al., COLING 2022,
# recomputed from the shapes with biases shared).
REFERENCE = [
    ("t5-base", 8, 222.9, 1015.8, 294.0),
    ("t5-base", 16, 222.9, 1921.9, 365.1),
    ("t5-large", 4, 737.7, 1945.8, 863.9),
    ("t5-large", 8, 737.7, 3556.6, 990.1),
    ("gpt2", 8, 124.4, 520.9, 160.0),
    ("gpt2", 16, 124.4, 973.9, 195.5),
]


@pytest.mark.parametrize(("model", "experts", "dense", "switch", "mpoe"), REFERENCE)
def test_parameters_of_the_reference_table(cli, tmp_path, model, experts, dense, switch, mpoe) -> None:
    values = plan(cli, tmp_path, model, "--experts", experts, "--shape", "paper")
    whole = values["totals"]["whole"]
    found = [round(whole[design]["parameters"] / 1e6, 1) for design in ("dense", "switch", "mpoe")]
    assert found == [dense, switch, mpoe]
    for design in DESIGNS:  # bfloat16 weights; float32 parameters, gradients and AdamW's two moments
        assert whole[design]["weight_bytes"] == 2 * whole[design]["parameters"]
        assert whole[design]["state_bytes"] == 16 * whole[design]["parameters"]


def test_json_has_every_number(cli, tmp_path) -> None:
    values = plan(cli, tmp_path, "t5-base", "--shape", "separable", "--decoder_tokens", 512)
    assert values["schema"] == 2
    assert values["kind"] == "plan"
    assert values["model"]["parameters"] == 222_903_552
    assert values["work"] == {
        "tokens": {"encoder": 2048, "decoder": 512},
        "dtype": "bfloat16",
        "training": True,
        "mask_central": False,
    }
    assert [(layer["count"], layer["tokens"]) for layer in values["layers"]] == [(12, 2048), (12, 512)]
    for layer in values["layers"]:
        assert len(layer["names"]) == layer["count"]
        assert [m["kind"] for m in layer["matrices"]] == ["up", "down"]
        assert {(m["strategy"], m["backward_strategy"]) for m in layer["matrices"]} == {("separable", "separable")}
        for part in (layer, *layer["matrices"]):
            for design in DESIGNS:
                assert set(part[design]) == COSTS
        for design in DESIGNS:
            for number in ("parameters", "flops"):
                router = layer["router"][number] if design != "dense" else 0
                assert layer[design][number] == sum(m[design][number] for m in layer["matrices"]) + router
        assert layer["router"]["parameters"] == 768 * 8
    totals = values["totals"]
    assert set(totals) == {"feed_forward", "rest", "whole"}
    for design in DESIGNS:
        assert totals["whole"][design]["flops"] == totals["feed_forward"][design]["flops"] + totals["rest"]["flops"]
    assert totals["whole"]["dense"]["x_dense"] == 1.0


def test_operations_of_the_designs_by_hand(cli, tmp_path) -> None:
    tokens, rows, columns = 4096, 768, 3072
    flags = ["gpt2", "--tokens", tokens, "--top_k", 2]
    values = plan(cli, tmp_path, *flags, "--separable_left", 256, "--separable_right", 64)
    up = values["layers"][0]["matrices"][0]
    assert up["dense"]["flops"] == 3 * 2 * tokens * rows * columns
    assert up["switch"]["flops"] == 3 * 2 * 2 * tokens * rows * columns
    # every slot: left 256 x 256 on its 3 parts, the dense centre, right 64 x 64 on its 48 parts
    each = rows * 256 + rows * columns + columns * 64
    assert up["strategy"] == "separable"
    again = rows * 256  # the backward recomputes what the left cores give
    assert up["mpoe"]["flops"] == 2 * 2 * tokens * (3 * each + again)
    assert up["mpoe"]["x_dense"] == pytest.approx(2 * (3 * each + again) / (3 * rows * columns))
    # the head 768 -> 50257 and four times as many attention weights as 768 x 768 in each of 12 layers
    assert values["totals"]["rest"]["flops"] == 3 * 2 * tokens * (12 * 4 * rows * rows + rows * 50257)


def test_the_table_fits_and_says_what_it_counts(cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # not that of a pipe
    answer = cli("plan", "t5-base", "--experts", 64, "--shape", "paper")
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 110
    assert "…" not in answer.out
    for word in ("MPOE", "Switch", "by rebuild", "encoder and decoder up 768x3072", "AdamW", "24 feed-forward layers"):
        assert word in answer.out


def test_truncated_shapes_say_so(cli) -> None:
    answer = cli("plan", "t5-base", "--bond", 64)
    assert "truncated" in answer.out
    assert "lose most of a pretrained matrix" in " ".join(answer.out.split())
    assert "truncated" not in cli("plan", "t5-base").out


@pytest.mark.parametrize(
    ("model", "shape", "share"), [("t5", "hidden", "63%"), ("t5", "separable", None), ("gpt2", "hidden", None)]
)
def test_experts_that_are_not_small_are_told(cli, model: str, shape: str, share: str | None) -> None:
    told = " ".join(cli("plan", model, "--shape", shape).out.split())
    assert ("At this width these experts are not small" in told) == (share is not None)
    assert share is None or f"MPOE's feed-forward layers hold {share} of Switch's parameters" in told


@pytest.mark.parametrize("flags", [[], ["--inference"]])
def test_no_tokens(cli, tmp_path, flags: list[str]) -> None:
    values = plan(cli, tmp_path, "t5-base", "--tokens", 0, *flags)
    whole = values["totals"]["whole"]
    for design in DESIGNS:
        assert whole[design]["flops"] == 0
        assert whole[design]["x_dense"] is None
        assert bool(whole[design]["state_bytes"]) == (not flags)
    assert whole["dense"]["parameters"] == 222_903_552


@pytest.mark.parametrize("name", ["t5", "bert-base", "google/flan-t5-small", "openai-community/gpt2"])
def test_known_models(cli, tmp_path, name: str) -> None:
    parameters = {"t5": 1_312_512, "bert-base": 109_482_240, "google/flan-t5-small": 76_961_152}
    values = plan(cli, tmp_path, name)
    assert values["model"]["parameters"] == parameters.get(name, 124_439_808)


def test_configuration_files_and_converted_models(cli, tmp_path) -> None:
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **sizes}))
    values = plan(cli, tmp_path, tmp_path / "c.json", "--layers_to_transform", 1)
    assert [m["kind"] for m in values["layers"][0]["matrices"]] == ["up", "gate_proj", "down"]
    assert values["model"]["feed_forward_layers"] == 2
    mpoe = {"num_experts": 5, "shape": "light", "light_p": 16, "router": {"top_k": 2}}
    converted = {"model_type": "mpoe_t5", "architectures": ["MPOET5ForConditionalGeneration"], "mpoe": mpoe, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(converted))
    own = plan(cli, tmp_path, tmp_path)["config"]
    assert (own["num_experts"], own["shape"], own["light_p"], own["router"]["top_k"]) == (5, "light", 16, 2)
    other = plan(cli, tmp_path, tmp_path, "--experts", 3, "--top_k", 1)["config"]
    assert (other["num_experts"], other["shape"], other["router"]["top_k"]) == (3, "light", 1)


def highest_memory() -> int:
    """Bytes that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_neurons_and_what_a_converted_model_keeps_of_them(cli, tmp_path: Path) -> None:
    answer = cli("plan", "t5-base", "--shape", "neurons", "--neurons", 88)
    assert answer.code == 0, answer.err
    assert "249.0 M" in answer.out
    sizes = {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    mixture = MPOEConfig(shape="neurons", neurons=8, latent=16, num_experts=4).to_dict()
    values = {**sizes, "model_type": "mpoe_t5", "vocab_size": 40, "mpoe": mixture}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for flags, shape in (([], "neurons"), (["--shape", "hidden"], "hidden"), (["--neurons", 4], "neurons")):
        answer = cli("plan", tmp_path, *flags, "--json", tmp_path / "plan.json")
        assert answer.code == 0, answer.err
        found = json.loads((tmp_path / "plan.json").read_text())["config"]
        assert found["shape"] == shape
        assert found["neurons"] == (None if shape == "hidden" else 4 if flags else 8)
        assert found["latent"] == (None if shape == "hidden" else 16)


def test_eleven_billion_parameters_and_a_thousand_experts(cli) -> None:
    before, start = highest_memory(), time.perf_counter()
    answer = cli("plan", "t5-11b", "--experts", "1024")
    assert answer.code == 0, answer.err
    assert "1,024 experts" in answer.out
    assert time.perf_counter() - start < 20
    assert highest_memory() - before < 300e6  # with imports; the model alone would be 45 GB


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["t5-bse"], "did you mean 't5-base'"),
        (["./absent"], "no such file or folder: ./absent"),
        (["t5-base", "--shape", "papr"], "shape must be one of"),
        (["t5-base", "--shape", '{"up": '], "shape: bad JSON"),
        (["t5-base", "--experts", 0], "experts must be at least 1; got 0"),
        (["t5-base", "--tokens", -1], "tokens must be at least 0; got -1"),
        (["t5-base", "--decoder_tokens", -1], "decoder_tokens must be at least 0; got -1"),
        (["gpt2", "--decoder_tokens", 1], "decoder_tokens needs a model with a decoder of its own"),
        (["t5-base", "--bond", 0], "bond must be at least 1; got 0"),
        (["t5-base", "--top_k", 9], "top_k must be at most num_experts = 8; got 9"),
        (["t5-base", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["t5-base", "--separable_left", 5], "left must divide"),
        (["t5-base", "--training", "--inference"], "exclude each other"),
        (["t5-base", "--inference", "--mask_central"], "mask_central concerns training"),
        (["t5-base", "--neurons", 8], "neurons needs shape 'neurons'; got 'hidden'"),
        (
            ["t5-base", "--expert_type", "dense"],
            "got no MPO experts",
        ),
        (["t5-base", "--layers_to_transform", 77], "layers_to_transform must hold layer indices 0..11; got 77"),
        (["t5-base", "--expert", 8], "unknown option '--expert'"),
        (["--experts", 8], "plan needs a model first"),
    ],
)
def test_refusals(refused, flags: list, message: str) -> None:
    assert message in refused("plan", *flags)


def test_refusals_of_files(refused, tmp_path: Path) -> None:
    line = refused("plan", "t5-base", "--json", tmp_path / "absent" / "plan.json")
    assert "json must be in an existing folder" in line
    assert "holds no config.json" in refused("plan", tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json, line 1, column 2: bad JSON"),
        ("[]", "expected a mapping of names to values; got list"),
        ('{"model_type": "mamba"}', "of the family 'mamba', which mpoe does not know; it knows t5, "),
        ('{"model_type": "t5", "d_model": "wide"}', "is not a valid t5 one"),
        ('{"model_type": "gpt2", "n_embd": 8, "n_head": 3}', "builds no GPT2LMHeadModel"),
        ("\xe9", "the configuration must be UTF-8 text; byte 0 of"),
    ):
        config.write_text(text, encoding="latin-1")
        assert message in refused("plan", tmp_path)


def test_without_a_shape_it_plans_what_conversion_makes(cli, tmp_path) -> None:
    values = plan(cli, tmp_path, "t5-base")
    assert (values["config"]["shape"], values["config"]["router"]["top_k"]) == ("hidden", 2)
    assert values["totals"]["whole"]["mpoe"]["parameters"] == 298_548_480
    capped = plan(cli, tmp_path, "t5-base", "--max_bond", 64)
    assert (capped["config"]["shape"], capped["config"]["router"]["top_k"]) == ("separable", 1)
