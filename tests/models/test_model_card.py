"""The model card: what it says, that a user's own card is never replaced, and what reaches a hub (a stand-in)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from mpoe import MPOEConfig, MPOETrainer, MPOETrainingArguments, convert_to_mpoe, load_mpoe
from mpoe.models.card import CARD_FILE, model_card, write_card

from .small_models import dense_model


def mixture(base: str = "some-group/small-t5", **options: Any) -> Any:
    dense = dense_model("t5")
    dense.config._name_or_path = base
    return convert_to_mpoe(dense, MPOEConfig(**{"num_experts": 3, "shape": "paper", **options}))


def test_card_says_what_the_model_is(tmp_path: Path) -> None:
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


def test_base_survives_saving_and_folders_stay_private(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    loaded = load_mpoe(tmp_path)
    assert model_card(loaded) == (tmp_path / CARD_FILE).read_text() == model_card(mixture())
    local = model_card(mixture(base=str(tmp_path)))
    assert str(tmp_path) not in local
    assert "base_model" not in local


@pytest.mark.parametrize("edit", [lambda text: "# Mine\n", lambda text: text.replace("0.5", "0.9"), lambda text: ""])
def test_only_our_own_unedited_card_is_replaced(tmp_path: Path, edit: Any) -> None:
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


class Hub:
    """Stands in for the hub's API: keeps files instead of sending them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: str | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.card = card
        monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **kwargs: SimpleNamespace(repo_id=name))
        monkeypatch.setattr(HfApi, "create_commit", lambda api, operations, **kwargs: self.commit(operations))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, folder_path, **kwargs: self.upload(folder_path))
        local = ModelCard.load
        monkeypatch.setattr(
            ModelCard, "load", lambda name, **kwargs: local(name) if Path(name).exists() else self.load()
        )

    def commit(self, operations: list[Any]) -> None:
        self.files |= {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}

    def upload(self, folder: str) -> None:
        self.files |= {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

    def load(self) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.card)


def write_to(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("saving", [False, True], ids=["push_to_hub", "save_pretrained"])
def test_pushing_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: bool) -> None:
    hub, model = Hub(monkeypatch), mixture()
    if saving:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/mixture")
    else:
        model.push_to_hub("me/mixture")
    assert {"config.json", "model.safetensors", CARD_FILE} <= set(hub.files)
    assert hub.files[CARD_FILE].decode() == model_card(model)
    (tmp_path / "back").mkdir()
    write_to(tmp_path / "back", hub.files)
    loaded = load_mpoe(tmp_path / "back")
    assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_card_on_the_hub_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, "---\nlicense: mit\n---\n# Mine\n")
    mixture().push_to_hub("me/mixture", tags=["more"])
    assert "# Mine" in hub.files[CARD_FILE].decode()
    assert "- more" in hub.files[CARD_FILE].decode()


def test_pushing_from_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(monkeypatch), mixture()
    arguments = MPOETrainingArguments(str(tmp_path), use_cpu=True, hub_model_id="me/mixture", report_to="none")
    trainer = MPOETrainer(model=model, args=arguments)
    trainer.state.log_history = [{"eval_loss": 0.25, "eval_runtime": 3.0, "step": 7}, {"loss": 1.0}]
    trainer.push_to_hub()
    assert hub.files[CARD_FILE].decode() == model_card(model, {"eval_loss": 0.25, "step": 7})
    assert "model.safetensors" in hub.files
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    trainer.push_to_hub()
    assert hub.files[CARD_FILE] == b"# Mine\n"
