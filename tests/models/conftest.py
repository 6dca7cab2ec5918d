"""Fixtures of the model tests."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from mpoe import MPOEConfig, collect_statistics, convert_to_mpoe, save_expert, start_expert

from .tiny_models import (
    M,
    copied,
    dense_model,
    domain,
    fit,
    language_model,
    lessons,
    loss,
    tokenizer,
)


@copied
def converted_model(family, **config):
    return convert_to_mpoe(
        dense_model(family), MPOEConfig(**{"num_experts": 4, "shape": "separable", **config})
    )


@pytest.fixture
def converted():
    """Factory: a converted model of a family, see `tiny_models.FAMILIES`."""
    return converted_model


@pytest.fixture(scope="session")
def domains(tmp_path_factory):
    """A base, two experts trained on texts of disjoint vocabularies, their files, and losses with
    the right one."""
    folder, base = tmp_path_factory.mktemp("experts"), language_model()
    files, own = [], []
    for number in (0, 1):
        torch.manual_seed(number)
        model = start_expert(base, M)
        fit(model, lessons(number, 20))
        files.append(folder / f"domain{number}.expert")
        statistics = collect_statistics(model, domain(number, seed=20))
        save_expert(
            model, files[-1], statistics=statistics, tokenizer=tokenizer(), training={"steps": 40}
        )
        own.append(loss(model, number))
    return SimpleNamespace(base=base, files=files, own=own, background=domain(2))


class Hub:
    """Stands in for the hub's API: keeps files, and what it was asked, instead of sending them."""

    def __init__(self, monkeypatch):
        self.files = {}
        self.asked = []
        self.card = None
        monkeypatch.setattr(
            HfApi, "create_repo", lambda api, name, **options: self.create(api.token, name, options)
        )
        monkeypatch.setattr(HfApi, "create_commit", self.commit)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        own = ModelCard.load
        monkeypatch.setattr(
            ModelCard, "load", lambda name, **_: own(name) if Path(name).exists() else self.load()
        )

    def create(self, token, name, options):
        self.asked.append((token, name, options))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def commit(self, repo_id, operations, commit_message, **_):
        self.asked.append((repo_id, commit_message))
        for each in operations:
            content = each.path_or_fileobj
            self.files[each.path_in_repo] = (
                content if isinstance(content, bytes) else Path(content).read_bytes()
            )
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def upload(self, folder_path, **_):
        self.files |= {
            path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()
        }

    def load(self):
        if self.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.card)


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)
