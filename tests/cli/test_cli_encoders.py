"""`mpoe train` of an encoder: labels and numbers, scored, evaluated, continued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .cli_data import write_rows

WORDS = ["[PAD]", "[UNK]", "sentiment", "rating", "sentence:", "the", "film", "number", "is", "good", "bad"]
FLAGS = ["--per_device_train_batch_size", 8, "--num_experts", 2, "--learning_rate", 3e-3, "--use_cpu"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """The folder of a tiny random BERT with a tokenizer of whole words."""
    tokens = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("baseline", [[], ["--baseline", "dense"]])
def test_classification(cli, bert: Path, sentiment: Path, tmp_path: Path, baseline: list) -> None:
    data = ["--data_dir", sentiment]
    flags = ["train", "--model", bert, *data, *FLAGS, "--max_steps", 30, *baseline]
    cli(*flags, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["class"] == ("" if baseline else "MPOE") + "BertForSequenceClassification"
    assert results["validation"]["sentiment"]["accuracy"] == 1.0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label2id"] == {"0": 0, "1": 1}
    scores = tmp_path / "scores.json"
    cli("evaluate", tmp_path / "run", "--output_file", scores)
    assert json.loads(scores.read_text())["scores"]["sentiment"]["accuracy"] == 1.0
    # what was trained has its head: one step more changes little
    again = ["train", "--load_experiment", tmp_path / "run", *data, *FLAGS[:2], "--max_steps", 1]
    cli(*again, "--learning_rate", 1e-6, "--output_dir", tmp_path / "again")
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["validation"]["sentiment"]["accuracy"] == 1.0


def test_regression_learns_exact_numbers(cli, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "rating").mkdir()
    for split, size in (("train", 32), ("validation", 8), ("test", 8)):
        rows = [{"sentence": f"film is {('bad', 'good')[i % 2]}", "score": (0.13, 0.29)[i % 2]} for i in range(size)]
        write_rows(tmp_path / "rating" / f"{split}.jsonl", rows)
    flags = ["train", "--model", bert, "--data_dir", tmp_path / "rating", *FLAGS, "--max_steps", 40]
    cli(*flags, "--output_dir", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation"]["rating"]["pearson"] > 0.99  # T5 writes .2 for both


def test_a_converted_encoder_gets_a_head(cli, bert: Path, sentiment: Path, tmp_path: Path) -> None:
    cli("convert", bert, tmp_path / "mixture", "--num_experts", 2)
    flags = ["train", "--model", tmp_path / "mixture", "--data_dir", sentiment, *FLAGS[:2], "--max_steps", 1]
    cli(*flags, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["class"] == "MPOEBertForSequenceClassification"


def test_labels_that_the_head_does_not_know(refused, bert: Path, sentiment: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "validation"):
        write_rows(other / f"{split}.jsonl", [{"sentence": "film", "label": label} for label in ("x", "y")])
    tasks = ["--data_dir", tmp_path, "--tasks", "sentiment", "--eval_tasks", "other"]
    line = refused("train", "--model", bert, *tasks, "--output_dir", tmp_path / "run")
    assert "targets must be among 0, 1, which the model tells apart; got 'x'" in line
