"""Real pretrained weights: a converted MiniLM equals the dense one, and learns movie sentiment in 150 CPU-seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe

from .minilm import classifier, collator, sentiment, sentiment_trainer

CPU_SECONDS = 150


@pytest.mark.slow
@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal"])
@pytest.mark.parametrize("shape", ["separable", "paper", "light"])
def test_conversion_is_lossless(shared_data: Path, shape: str, gauge: str) -> None:
    dense = classifier().eval()
    converted = convert_to_mpoe(dense, MPOEConfig(num_experts=8, shape=shape, gauge=gauge)).eval()
    batch = collator()(sentiment(shared_data, "validation", 8))
    with torch.no_grad():
        expected = dense(**batch, output_hidden_states=True)
        result = converted(**batch, output_hidden_states=True)
    valid = batch["attention_mask"].bool()
    assert_close(result.logits, expected.logits)
    for one, other in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert_close(one[valid], other[valid])


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


class CpuBudget(TrainerCallback):
    """Stops training when the process has used its CPU time."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.process_time(), seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = time.process_time() - self.start > self.seconds


@pytest.mark.exhaustive  # test_collapse.py has a shorter run of the same model among its slow tests
def test_learns_movie_sentiment(shared_data: Path, tmp_path: Path) -> None:
    steps, batch = 60, 32
    model = convert_to_mpoe(classifier(), MPOEConfig(shape="separable"))
    train, test = sentiment(shared_data, "train", steps * batch), sentiment(shared_data, "test")
    trainer = sentiment_trainer(model, tmp_path, train, test, steps, batch, callbacks=[CpuBudget(CPU_SECONDS)])
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] >= 0.78
