"""`mpoe train` of an encoder (labels and numbers) and of a decoder on instruction data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mpoe.data import load_stand_in, load_task_from_folder
from mpoe.data.encode import encode_responses
from mpoe.data.task import Example

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


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = ["--per_device_train_batch_size", 4, "--max_steps", 30, "--num_experts", 2, "--learning_rate", 3e-3]
CHAT += ["--use_cpu"]


def data(folder: Path, rows: Callable[[str], dict]) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [rows(word) for word in ("list", "return", "value")])
    return folder


def chat(word: str) -> dict:
    turns = [("user", f"say {word}"), ("assistant", word), ("user", "again"), ("assistant", word)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def texts(item: dict, tokenizer) -> tuple[str, str]:
    """All of an item, and what its loss counts."""
    counted = [label for label in item["labels"] if label != -100]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(counted)


def test_pairs(cli, tmp_path: Path) -> None:
    task = load_task_from_folder(data(tmp_path / "pairs", lambda word: {"prompt": f"say {word}", "response": word}))
    assert (task.kind, task.max_source_length, task.max_target_length) == ("generation", 512, 256)
    assert task.train()[0] == Example("say list", "list")
    _, tokenizer = load_stand_in("gpt2")
    end = tokenizer.eos_token
    assert texts(encode_responses(task.train(), tokenizer)[0], tokenizer) == (f"say list\nlist{end}", f"list{end}")
    cut = encode_responses([Example("say " * 50, "list " * 50)], tokenizer, 8, 4)[0]
    assert len(cut["input_ids"]) == 12
    assert [label == -100 for label in cut["labels"]] == [True] * 8 + [False] * 4
    flags = ["--data_dir", tmp_path / "pairs"]
    cli("train", "--model", "gpt2", *flags, *CHAT, "--output_dir", tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["validation"]["pairs"]
    assert scores["exact_match"] == 1.0
    assert scores["loss"] < 0.5
    cli("train", "--model", "t5", *flags, "--max_steps", 1, "--output_dir", tmp_path / "t5")


def test_conversations(cli, refused, tmp_path: Path) -> None:
    chats = data(tmp_path / "chats", chat)
    model, tokenizer = load_stand_in("gpt2")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    example = load_task_from_folder(chats).train()[0]
    assert (example.source, example.target) == ("user: say list\nassistant: list\nuser: again", "list")
    whole, counted = texts(encode_responses([example], tokenizer)[0], tokenizer)
    end = tokenizer.eos_token
    assert whole == f"<user>say list{end}<assistant>list{end}<user>again{end}<assistant>list{end}"
    assert counted == f"list{end}list{end}"
    cli("train", "--model", tmp_path / "model", "--data_dir", chats, *CHAT, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["validation"]["chats"]["exact_match"] == 1.0
    flags = ["--data_dir", chats, "--output_dir", tmp_path / "none"]
    assert "messages need a tokenizer with a chat template" in refused("train", "--model", "gpt2", *flags)
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="must continue a prompt with the response; it rewrites it"):
        encode_responses([example], tokenizer)


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "a"}] * 2, ["a", "b"], "ab"])
def test_what_is_no_conversation(refused, tmp_path: Path, messages: object) -> None:
    write_rows(tmp_path / "train.jsonl", [{"messages": messages}])
    write_rows(tmp_path / "validation.jsonl", [{"messages": messages}])
    line = refused("train", "--model", "gpt2", "--data_dir", tmp_path, "--output_dir", tmp_path / "run")
    assert "train.jsonl, line 1: messages must be two or more of" in line
