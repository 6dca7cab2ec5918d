"""Instruction data for decoders: pairs and conversations, the loss on responses alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mpoe.data import load_stand_in, load_task_from_folder
from mpoe.data.encode import encode_responses
from mpoe.data.task import Example

from .cli_data import write_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FLAGS = ["--per_device_train_batch_size", 4, "--max_steps", 30, "--num_experts", 2, "--learning_rate", 3e-3]
FLAGS += ["--use_cpu"]


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
    cli("train", "--model", "gpt2", *flags, *FLAGS, "--output_dir", tmp_path / "run")
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
    cli("train", "--model", tmp_path / "model", "--data_dir", chats, *FLAGS, "--output_dir", tmp_path / "run")
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
