"""Fixtures of the model tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpoe import MPOEConfig, collect_statistics, convert_to_mpoe, save_expert

from .domain_experts import domain, language_model, loss, tokenizer, trained
from .tiny_models import dense_model


@pytest.fixture
def converted():
    """Factory: a converted model of a family, see `tiny_models.FAMILIES`."""

    def make(family, **config):
        return convert_to_mpoe(dense_model(family), MPOEConfig(**{"num_experts": 4, "shape": "separable", **config}))

    return make


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base, two experts trained on texts of disjoint vocabularies, their files, and losses with the right one."""
    folder, base = tmp_path_factory.mktemp("experts"), language_model()
    files, own = [], []
    for number in (0, 1):
        model = trained(base, number)
        files.append(folder / f"domain{number}.expert")
        statistics = collect_statistics(model, domain(number, seed=20))
        save_expert(model, files[-1], statistics=statistics, tokenizer=tokenizer(), training={"steps": 120})
        own.append(loss(model, number))
    return SimpleNamespace(base=base, files=files, own=own, background=domain(2))
