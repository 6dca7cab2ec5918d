"""Encoders, which get a head for the task: classes and numbers."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.assertions import read_json

from .cli_data import write_rows

WORDS = "[PAD] [UNK] sentiment rating sentence: the film number is good bad".split()
EIGHT = "--per_device_train_batch_size 8 --use_cpu"
FLAGS = f"{EIGHT} --num_experts 2 --learning_rate 3e-3"


@pytest.fixture
def bert(tmp_path):
    """The folder of a tiny random BERT with a tokenizer of whole words."""
    tokens = Tokenizer(
        WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    return tmp_path / "bert"


@pytest.mark.parametrize("baseline", ["", "--baseline dense"])
def test_classification(cli, bert, sentiment, tmp_path, baseline):
    data = f"--data_dir {sentiment}"
    flags = f"train --model {bert} {data} {FLAGS} --max_steps 30 {baseline}"
    cli(f"{flags} --output_dir {tmp_path}/run")
    results = read_json(tmp_path / "run/results.json")
    assert results["class"] == ("" if baseline else "MPOE") + "BertForSequenceClassification"
    assert results["validation"]["sentiment"]["accuracy"] == 1.0
    config = read_json(tmp_path / "run/config.json")
    assert config["label2id"] == {"0": 0, "1": 1}
    scores = tmp_path / "scores.json"
    cli(f"evaluate {tmp_path}/run --output_file {scores}")
    assert read_json(scores)["scores"]["sentiment"]["accuracy"] == 1.0
    # what was trained has its head: one step more changes little
    again = f"train --load_experiment {tmp_path}/run {data} {EIGHT} --max_steps 1"
    cli(f"{again} --learning_rate 1e-06 --output_dir {tmp_path}/again")
    results = read_json(tmp_path / "again/results.json")
    assert results["validation"]["sentiment"]["accuracy"] == 1.0


def test_regression_learns_numbers(cli, bert, tmp_path):
    """Rounded to whole ones, as classes are, they would have a correlation of 0.91."""
    scores = {"bad": -1.0, "number": -0.45, "film": 0.45, "good": 1.0}
    (tmp_path / "rating").mkdir()
    for split, copies in (("train", 8), ("validation", 2), ("test", 2)):
        rows = [{"sentence": word, "score": score} for word, score in scores.items()]
        write_rows(tmp_path / "rating" / f"{split}.jsonl", rows * copies)
    flags = f"train --model {bert} --data_dir {tmp_path}/rating {FLAGS}"
    cli(f"{flags} --max_steps 60 --output_dir {tmp_path}/run")
    results = read_json(tmp_path / "run/results.json")
    assert results["validation"]["rating"]["pearson"] > 0.95


def test_a_converted_encoder_gets_a_head(cli, bert, sentiment, tmp_path):
    cli(f"convert {bert} {tmp_path}/mixture --num_experts 2")
    flags = f"train --model {tmp_path}/mixture --data_dir {sentiment} {EIGHT} --max_steps 1"
    cli(f"{flags} --output_dir {tmp_path}/run")
    assert read_json(tmp_path / "run/results.json")["class"] == "MPOEBertForSequenceClassification"


def test_labels_that_the_head_does_not_know(refused, bert, sentiment, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "validation"):
        write_rows(
            other / f"{split}.jsonl", [{"sentence": "film", "label": label} for label in ("x", "y")]
        )
    tasks = f"--data_dir {tmp_path} --tasks sentiment --eval_tasks other"
    line = refused(f"train --model {bert} {tasks} --output_dir {tmp_path}/run")
    assert "targets must be among 0, 1, which the model tells apart; got 'x'" in line
