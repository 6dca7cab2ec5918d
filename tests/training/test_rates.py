"""The rates that a run starts from, and the search for one."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpoe import MPOEConfig
from mpoe.training.rates import TRIED, _search, find_rate, kind_of, rate_advice, recommended_for, recommended_rate
from mpoe.training.statistics import WINDOW, LoadWatch

from .tiny import Rows, arguments, dense_model, make_trainer, mpoe_model

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
    words = {"t5": "T5", "gpt2": "GPT-2", "bert": "BERT", "scratch": 'from scratch (`regime="scratch"`)'}
    page = (DOCS / "fine_tuning.md").read_text()
    for name, tried in TRIED.items():
        rates = [f"{tried.rate:g}", *(f"{rate:g} {kind}" for kind, rate in tried.other.items())]
        assert f"| {words[name]} | {', '.join(rates)} | {tried.width} | {tried.where} |\n" in page


def counts(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_experts_that_take_most_or_none_are_named_once() -> None:
    watch, even = LoadWatch(), [100] * 4
    odd = counts(even, [700, 100, 100, 100], [150, 150, 100, 0])
    assert watch.add(odd, WINDOW - 1) == []  # not for long
    first, second = watch.add(odd, WINDOW)
    assert first.startswith(f"mixture layer 1: expert 0 took 70% of the tokens in {WINDOW} steps")
    assert second.startswith(f"mixture layer 2: 1 of 4 experts took no token in {WINDOW} steps")
    assert watch.add(odd, 2 * WINDOW) == []  # said already
    (third,) = watch.add(counts([900, 0, 0, 100], even, even), 3 * WINDOW)[:1]
    assert third.startswith("mixture layer 0: expert 0 took 90%")


def test_what_is_no_reason_to_warn() -> None:
    watch = LoadWatch()
    assert watch.add(counts([700, 300], [100, 99]), WINDOW) == []  # of two experts 70% is not most
    assert watch.add(counts([100, 0, 0, 0], [0, 0, 0, 0]), 2 * WINDOW) == []  # too few tokens to tell
    assert watch.add(counts([10_000]), 3 * WINDOW) == []  # one expert takes all it is given
    watch.add(counts([1000, 0]), 3 * WINDOW + 50)
    assert watch.add(counts([0, 1000]), 4 * WINDOW) == []  # each had its time
    watch.start(1000)
    assert watch.add(counts([1000, 0]), 1000 + WINDOW - 1) == []  # counted from where the run resumed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": 1e-3}, []),
        ({"learning_rate": 1e-2}, []),
        ({"learning_rate": 1.5e-4}, []),
        ({"learning_rate": 5e-5}, ["learning_rate 5e-05 is 1/30 of the 0.0015 to start from (a pretrained t5"]),
        ({"learning_rate": 1e-3, "mpo_lr": 0.6}, ["mpo_lr 0.6 is 400 times the 0.0015"]),
        ({"learning_rate": 0.0}, []),
        ({"learning_rate": 5e-5, "regime": "scratch"}, []),
    ],
)
def test_rates_far_from_what_worked(tmp_path: Path, options: dict, said: list[str]) -> None:
    found = rate_advice(mpoe_model("t5"), arguments(tmp_path, **options))
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))
    assert len(rate_advice(dense_model("t5"), arguments(tmp_path, **options))) == len(said)
    assert rate_advice(torch.nn.Linear(2, 2), arguments(tmp_path, **options)) == []


def test_the_trainer_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpoe.training.statistics.WINDOW", 2)
    monkeypatch.setattr("mpoe.training.statistics._TOKENS", 1)
    model = mpoe_model("t5", num_experts=32)
    trainer = make_trainer(tmp_path, model=model, learning_rate=1e-6, max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(warning.message) for warning in caught]
    assert any(text.startswith("learning_rate 1e-06 is 1/1,500 of") for text in texts)
    assert any(text.startswith("encoder.0.1: ") and "of 32 experts took no token in 2 steps" in text for text in texts)


def test_finds_the_same_rate_twice_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model = mpoe_model("gpt2", dropout=0.1, jitter=0.1)
    items = [Rows("gpt2", rows=1)[0]] * 12
    trainer = make_trainer(tmp_path, "gpt2", model, per_device_train_batch_size=4, learning_rate=7e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers, mode = torch.get_rng_state(), model.training
    found = find_rate(trainer, items, 1e-5, steps=3)
    assert found == find_rate(trainer, items, 1e-5, steps=3)
    rate, losses = found
    assert rate == min(losses, key=lambda tried: losses[tried])
    assert rate > 1e-5  # which hardly learns in three steps, so the search went upwards
    assert len(losses) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(numbers, torch.get_rng_state())
    assert (model.training, trainer.args.learning_rate) == (mode, 7e-4)


def test_it_goes_on_while_the_best_is_at_an_end() -> None:
    assert list(_search(lambda rate: abs(rate - 1e-3), 1e-3)) == [3e-4, 1e-3, 3e-3]
    assert list(_search(lambda rate: -rate, 1e-3)) == [3e-4, 1e-3, 3e-3, 9e-3, 3e-2]
    assert list(_search(lambda rate: rate, 1e-3)) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize(("ranks", "items", "message"), [(2, 5, "one process; got 2"), (1, 1, "two training items")])
def test_refusals(ranks: int, items: int, message: str) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=ranks), model=None)
    with pytest.raises(ValueError, match=message):
        find_rate(trainer, [{}] * items, 1e-3)
