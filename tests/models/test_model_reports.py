"""The table of a model's MPO weights, freezing the parts that the experts share, and the model
card."""

import math

import pytest
import torch
from huggingface_hub import ModelCard

from mpoe import (
    MPOEConfig,
    MPOETrainer,
    MPOETrainingArguments,
    convert_to_mpoe,
    load_mpoe,
    save_mpoe_only,
)
from mpoe.models import MPOEGPT2Model, mpo_modules, parameter_kind
from mpoe.models.card import CARD_FILE, model_card, write_card
from mpoe.models.report import HEADER, summarize
from mpoe.models.walk import short_name
from mpoe.training import freeze_all_but_experts
from mpoe_kernels import plan_contraction
from tests.assertions import differing, read_json, refuses, write_json

from .tiny_models import KEPT, batch, dense_model


def test_a_row_for_every_weight(converted):
    model = converted("t5_gated", shape="paper", max_bond=3, target_modules=["ffn", "attention"])
    rows = summarize(model, 100)
    assert list(rows) == [name for name, _ in mpo_modules(model)]
    for name, cores in mpo_modules(model):
        plan = plan_contraction(cores.shape, cores.num_experts, 100, torch.float32, top_k=1)
        error = model.conversion_report[name]["relative_error_bound"]
        told = f"{error:.1e}" if error else "0", plan.strategy, f"{plan.x_dense:.2f}"
        assert rows[name][6:] == told
    report = model.parameter_report()
    central, own = (
        [cells[column].replace(",", "") for cells in rows.values()] for column in (4, 5)
    )
    assert sum(map(int, central)) == report["central"]
    assert sum(math.prod(map(int, each.split(" x "))) for each in own) == report["auxiliary"]


def test_the_table_is_printed_whole(converted, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    model = converted("gpt2")
    model.mpoe_summary(num_tokens=64)
    lines = capsys.readouterr().out.splitlines()
    assert "plans for 64 tokens" in lines[0]
    assert all(name in lines[2] for name in HEADER)
    for name, cells in summarize(model, 64).items():
        (line,) = [line for line in lines if line.split()[:1] == [short_name(name)]]
        assert all(cell in line for cell in cells)
    assert any("trainable params" in line for line in lines)


def test_errors_of_the_conversion_are_kept(tmp_path):
    dense = dense_model("gpt2")
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=2, max_bond=3, shape="paper"))
    errors = [cells[6] for cells in summarize(model, 8).values()]
    assert min(map(float, errors)) > 0.01
    model.save_pretrained(tmp_path / "whole")
    save_mpoe_only(model, tmp_path / "parts", dense)
    loaded = {
        "whole": load_mpoe(tmp_path / "whole"),
        "parts": load_mpoe(tmp_path / "parts", base=dense),
        "base": MPOEGPT2Model.from_pretrained(tmp_path / "whole"),  # its weights have shorter names
    }
    for name, each in loaded.items():
        assert [cells[6] for cells in summarize(each, 8).values()] == errors, name


@pytest.mark.parametrize("kept", [None, "x", {}, {"transformer.h.0.mlp.experts.up": "x"}])
def test_errors_that_a_checkpoint_does_not_hold(converted, tmp_path, kept):
    """Older checkpoints have none."""
    converted("gpt2", max_bond=3, shape="paper").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = read_json(file) | {"conversion_errors": kept}
    write_json(file, {name: value for name, value in values.items() if value is not None})
    assert {cells[6] for cells in summarize(load_mpoe(tmp_path), 8).values()} == {"-"}


def test_no_weights_no_summary(converted):
    model = converted("gpt2", expert_type="dense")
    refuses(ValueError, "mpoe_summary needs a model with MPO weights", model.mpoe_summary)
    refuses(
        ValueError,
        "num_tokens must be at least 0; got -1",
        converted("gpt2", shape="hidden").mpoe_summary,
        -1,
    )


def test_as_many_dense_experts_have_the_same_routers(converted):
    report = converted("gpt2", num_experts=3, shape="separable").parameter_report()
    dense, config = dense_model("gpt2"), dense_model("gpt2").config
    matrices = config.n_layer * 2 * config.n_embd * (config.n_inner or 4 * config.n_embd)
    assert report["router"] == config.n_layer * 3 * config.n_embd
    assert report["dense_total"] == dense.num_parameters()
    assert report["switch_total"] == dense.num_parameters() + 2 * matrices + report["router"]


def mixture(base="some-group/small-t5", **options):
    dense = dense_model("t5")
    dense.config._name_or_path = base
    return convert_to_mpoe(dense, MPOEConfig(**{"num_experts": 3, "shape": "paper", **options}))


def test_card_says_what_the_model_is(tmp_path):
    model = mixture()
    card = ModelCard(model_card(model, {"rte": {"accuracy": 0.71234, "note": "text"}, "loss": 0.5}))
    assert card.data.base_model == "some-group/small-t5"
    assert set(card.data.tags) == {"mpoe", "mixture-of-experts"}
    report = model.parameter_report()
    for words in (
        "# MPOET5ForConditionalGeneration",
        "| experts | 3, top-1; matrix product operators |",
        f"| parameters | {report['total']:,} |",
        f"central {report['central']:,}, auxiliary {report['auxiliary']:,}",
        str(model.encoder.block[0].layer[1].DenseReluDense.experts.up.shape),
        "| rte.accuracy | 0.7123 |",
        "| loss | 0.5 |",
    ):
        assert words in card.content, words
    assert "note" not in card.content
    card = model_card(mixture(shape="neurons", neurons=4))
    assert "| experts | 3, top-2; hidden neurons beside the dense network |" in card
    assert "product operator" not in card


def test_base_survives_saving_and_folders_stay_private(tmp_path):
    mixture().save_pretrained(tmp_path)
    loaded = load_mpoe(tmp_path)
    assert model_card(loaded) == (tmp_path / CARD_FILE).read_text() == model_card(mixture())
    local = model_card(mixture(base=str(tmp_path)))
    assert str(tmp_path) not in local
    assert "base_model" not in local


@pytest.mark.parametrize(
    "edit", [lambda text: "# Mine\n", lambda text: text.replace("0.5", "0.9"), lambda text: ""]
)
def test_only_our_own_unedited_card_is_replaced(tmp_path, edit):
    model, file = mixture(), tmp_path / CARD_FILE
    assert write_card(model, tmp_path, {"loss": 0.5})
    assert write_card(model, tmp_path, {"loss": 0.5})
    model.save_pretrained(tmp_path)
    assert "0.5" not in file.read_text()
    write_card(model, tmp_path, {"loss": 0.5})
    theirs = edit(file.read_text())
    file.write_text(theirs)
    assert not write_card(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert file.read_text() == theirs


@pytest.mark.parametrize("saving", [False, True], ids=["push_to_hub", "save_pretrained"])
def test_pushing_a_model(hub, tmp_path, saving):
    model = mixture()
    if saving:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/mixture")
    else:
        model.push_to_hub("me/mixture")
    assert {"config.json", "model.safetensors", CARD_FILE} <= set(hub.files)
    assert hub.files[CARD_FILE].decode() == model_card(model)
    (tmp_path / "back").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "back" / name).write_bytes(content)
    loaded = load_mpoe(tmp_path / "back")
    assert not differing(model, loaded)


def test_a_card_on_the_hub_stays(hub):
    hub.card = "---\nlicense: mit\n---\n# Mine\n"
    mixture().push_to_hub("me/mixture", tags=["more"])
    assert "# Mine" in hub.files[CARD_FILE].decode()
    assert "- more" in hub.files[CARD_FILE].decode()


def test_pushing_from_the_trainer(hub, tmp_path):
    model = mixture()
    arguments = MPOETrainingArguments(
        str(tmp_path), use_cpu=True, hub_model_id="me/mixture", report_to="none"
    )
    trainer = MPOETrainer(model=model, args=arguments)
    trainer.state.log_history = [{"eval_loss": 0.25, "eval_runtime": 3.0, "step": 7}, {"loss": 1.0}]
    trainer.push_to_hub()
    assert hub.files[CARD_FILE].decode() == model_card(model, {"eval_loss": 0.25, "step": 7})
    assert "model.safetensors" in hub.files
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    trainer.push_to_hub()
    assert hub.files[CARD_FILE] == b"# Mine\n"


FREEZABLE = {
    "separable": ("t5", {"shape": "separable"}),
    "paper": ("gpt2", {"shape": "paper", "target_modules": ["ffn"]}),
    "dense": ("gpt2", {"expert_type": "dense"}),
    **{kind: ("llama", {**fields, "router": {"top_k": 2}}) for kind, fields in KEPT.items()},
}


@pytest.mark.parametrize("kind", FREEZABLE)
def test_what_freezes_has_no_gradient(kind):
    family, fields = FREEZABLE[kind]
    model = convert_to_mpoe(dense_model(family), MPOEConfig(**{"num_experts": 4, **fields})).train()
    kinds, inputs = parameter_kind(model), batch(family)
    experts = {name for name in kinds if ".experts." in name}
    routers = {name for name in kinds if ".router." in name}
    central = {name for name, each in kinds.items() if each == "central"}
    if central:
        model.freeze_central()
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == central
        model(**inputs).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == central
        model.zero_grad()
        model.unfreeze_central()
        assert all(parameter.requires_grad for parameter in model.parameters())
    else:
        refuses(ValueError, "no central cores to freeze", model.freeze_central)
    assert freeze_all_but_experts(model) == model.parameter_report()["trainable"] > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == experts | routers
    refuses(
        ValueError,
        r"model must have experts .*; GPT2LMHeadModel has none",
        freeze_all_but_experts,
        dense_model("gpt2"),
    )
