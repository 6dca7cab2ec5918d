"""`find_rate`: the best of a few rates, from the same weights and random numbers, which it leaves as they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.data import PaddingCollator, encode_language_modeling, get_task, load_stand_in
from mpoe.training import MPOETrainer, MPOETrainingArguments
from mpoe.training.rates import _search, find_rate


def test_finds_the_same_rate_twice_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    dense, tokenizer = load_stand_in("gpt2")
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=2))
    items = encode_language_modeling(get_task("doc_lm").validation()[:12], tokenizer, 16)
    args = MPOETrainingArguments(str(tmp_path), per_device_train_batch_size=4, learning_rate=7e-4, use_cpu=True)
    trainer = MPOETrainer(model, args, train_dataset=items, data_collator=PaddingCollator(tokenizer.pad_token_id))
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
    assert (model.training, args.learning_rate) == (mode, 7e-4)


def test_it_goes_on_while_the_best_is_at_an_end() -> None:
    assert list(_search(lambda rate: abs(rate - 1e-3), 1e-3)) == [3e-4, 1e-3, 3e-3]
    assert list(_search(lambda rate: -rate, 1e-3)) == [3e-4, 1e-3, 3e-3, 9e-3, 3e-2]
    assert list(_search(lambda rate: rate, 1e-3)) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize(("ranks", "items", "message"), [(2, 5, "one process; got 2"), (1, 1, "two training items")])
def test_refusals(ranks: int, items: int, message: str) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=ranks), model=None)
    with pytest.raises(ValueError, match=message):
        find_rate(trainer, [{}] * items, 1e-3)
