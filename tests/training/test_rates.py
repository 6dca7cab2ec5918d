"""The rates that a run starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpoe import MPOEConfig
from mpoe.training.rates import TRIED, kind_of, rate_table, recommended_for, recommended_rate

from .tiny import dense_model, mpoe_model

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("asked", "rate"),
    [
        (("t5", 128, "finetune", "separable"), 1.5e-3),
        (("mpoe_t5", 64, "finetune", "separable"), 1.5e-3),  # never above what was tried
        (("mt5", 768, "finetune", "separable"), 2.5e-4),
        (("t5", 128, "finetune", "paper"), 1e-3),
        (("gpt2", 128, "finetune", "dense"), 3e-4),
        (("bert", 384, "finetune", "switch"), 3e-4),
        (("gpt2", 96, "scratch", "paper"), 8e-3),
        (("llama", 96, "scratch", "switch"), 4e-3),
    ],
)
def test_family_regime_kind_and_width(asked: tuple, rate: float) -> None:
    assert recommended_rate(*asked).rate == pytest.approx(rate)


def test_an_unknown_family_gets_the_lower_rate_and_is_told() -> None:
    found = recommended_rate("qwen3", 1024, "finetune", "separable")
    assert found.rate == pytest.approx(3e-4 * 128 / 1024, rel=0.02)
    assert "none is known of qwen3" in found.why
    assert found.rate <= min(tried.rate for tried in TRIED.values())


def test_kinds() -> None:
    assert kind_of(None) == kind_of(MPOEConfig(target_modules=["attention"], moe_type="none")) == "dense"
    assert kind_of(MPOEConfig(expert_type="dense", shape="separable")) == "switch"
    assert kind_of(MPOEConfig(shape="paper")) == "paper"


def test_of_a_model_in_memory() -> None:
    found = recommended_for(mpoe_model("t5"), "finetune")
    assert found is not None
    assert "separable experts" in found.why
    dense = recommended_for(dense_model("t5"), "finetune")
    assert dense is not None
    assert dense.rate < found.rate
    assert recommended_for(object(), "finetune") is None


def test_the_documentation_shows_this_table() -> None:
    assert rate_table() in (DOCS / "fine_tuning.md").read_text()
