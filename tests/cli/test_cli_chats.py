"""Instruction data: pairs of a prompt and a response, and conversations."""

import pytest

from mpoe.data import load_stand_in, load_task_from_folder
from mpoe.data.encode import encode_responses
from mpoe.data.task import Example
from tests.assertions import read_json, refuses

from .cli_data import write_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FLAGS = (
    "--per_device_train_batch_size 4 --use_cpu --num_experts 2 --learning_rate 3e-3 --max_steps 30"
)


def instructions(folder, rows):
    folder.mkdir()
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [rows(word) for word in ("list", "return", "value")])
    return folder


def chat(word):
    turns = [("user", f"say {word}"), ("assistant", word), ("user", "again"), ("assistant", word)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def texts(item, tokenizer):
    """All of an item, and what its loss counts."""
    counted = [label for label in item["labels"] if label != -100]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(counted)


@pytest.fixture
def pairs(tmp_path):
    return instructions(
        tmp_path / "pairs", lambda word: {"prompt": f"say {word}", "response": word}
    )


def test_pairs_are_encoded(pairs):
    task = load_task_from_folder(pairs)
    assert (task.kind, task.max_source_length, task.max_target_length) == ("generation", 512, 256)
    assert task.train()[0] == Example("say list", "list")
    _, tokenizer = load_stand_in("gpt2")
    whole, counted = texts(encode_responses(task.train(), tokenizer)[0], tokenizer)
    end = tokenizer.eos_token
    assert whole == f"say list\nlist{end}"
    assert counted == f"list{end}"
    cut = encode_responses([Example("say " * 50, "list " * 50)], tokenizer, 8, 4)[0]
    assert [label == -100 for label in cut["labels"]] == [True] * 8 + [False] * 4
    assert len(cut["input_ids"]) == 12


def test_pairs_are_learned(cli, pairs, tmp_path):
    cli(f"train --model gpt2 --data_dir {pairs} {FLAGS} --output_dir {tmp_path}/run")
    scores = read_json(tmp_path / "run/results.json")["validation"]["pairs"]
    assert scores["exact_match"] == 1.0
    assert scores["loss"] < 0.5


def test_an_encoder_and_decoder_trains_on_pairs(cli, pairs, tmp_path):
    flags = f"--data_dir {pairs} --max_steps 1 --max_target_length 4"
    cli(f"train --model t5 {flags} --output_dir {tmp_path}/run")


def test_conversations(cli, tmp_path):
    chats = instructions(tmp_path / "chats", chat)
    model, tokenizer = load_stand_in("gpt2")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    example = load_task_from_folder(chats).train()[0]
    assert example.source == "user: say list\nassistant: list\nuser: again"
    assert example.target == "list"
    whole, counted = texts(encode_responses([example], tokenizer)[0], tokenizer)
    end = tokenizer.eos_token
    assert whole == f"<user>say list{end}<assistant>list{end}<user>again{end}<assistant>list{end}"
    assert counted == f"list{end}list{end}"
    cli(f"train --model {tmp_path}/model --data_dir {chats} {FLAGS} --output_dir {tmp_path}/run")
    assert read_json(tmp_path / "run/results.json")["validation"]["chats"]["exact_match"] == 1.0


def test_messages_need_a_chat_template(refused, tmp_path):
    chats = instructions(tmp_path / "chats", chat)
    line = refused(f"train --model gpt2 --data_dir {chats} --output_dir {tmp_path}/run")
    assert "messages need a tokenizer with a chat template" in line


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    example = load_task_from_folder(instructions(tmp_path / "chats", chat)).train()[0]
    _, tokenizer = load_stand_in("gpt2")
    tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    words = "must continue a prompt with the response; it rewrites it"
    refuses(ValueError, words, encode_responses, [example], tokenizer)


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "a"}] * 2, ["a", "b"], "ab"])
def test_what_is_no_conversation(refused, tmp_path, messages):
    write_rows(tmp_path / "train.jsonl", [{"messages": messages}])
    write_rows(tmp_path / "validation.jsonl", [{"messages": messages}])
    line = refused(f"train --model gpt2 --data_dir {tmp_path} --output_dir {tmp_path}/run")
    assert "train.jsonl, line 1: messages must be two or more of" in line
