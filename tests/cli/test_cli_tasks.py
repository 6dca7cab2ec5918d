"""Which data a task's name stands for, and what the options then mean; runs of encoders and on
instruction data."""

import json
import shutil
import sys
from types import ModuleType

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mpoe.cli.command import CommandError
from mpoe.cli.evaluate import score_table
from mpoe.cli.tasks import DataOptions, data_of_run, model_of_experiment, resolve
from mpoe.data import load_stand_in, load_task_from_folder
from mpoe.data.encode import encode_responses
from mpoe.data.task import Example
from mpoe.training import prepare_output_dir
from mpoe.training.checkpoints import publish, staging_root
from tests.assertions import read_json, refuses

from .cli_data import described, write_rows


def tasks(names, style="seq2seq", **options):
    return resolve(names, DataOptions(**options), style)


def test_folders_of_known_tasks_are_read_as_described(tmp_path):
    data = described(tmp_path, "rte", "imdb")
    (data / "rte").rename(data / "RTE")  # as in the official download
    rte, imdb, embedded = tasks(
        ["rte", "imdb", "doc_module"], data_dir=str(data), metrics=["accuracy"]
    )
    assert rte.train()[0].source.startswith("Given: sentence1 0 of train Does it follow that")
    assert (rte.labels, rte.metrics, imdb.labels) == (("yes", "no"), ("accuracy",), ("no", "yes"))
    assert embedded.name == "doc_module"
    # options that say how columns are read win over the description
    (rte,) = tasks(["RTE"], data_dir=str(data), text_columns=["sentence1"])
    assert rte.train()[0].source == "RTE sentence1: sentence1 0 of train"


def test_folders_of_one_last_name_are_two_tasks(sentiment, tmp_path):
    for language in ("en", "fr"):
        shutil.copytree(sentiment, tmp_path / language / "s")
    one, two = tasks(["en/s", "fr/s/"], data_dir=str(tmp_path))
    assert (one.name, two.name) == ("en_s", "fr_s")
    assert two.train()[0].source.startswith("fr_s sentence: ")


def test_lengths_splits_and_sizes_apply_to_described_tasks(tmp_path):
    data = described(tmp_path, "rte")
    (rte,) = tasks(
        ["rte"], data_dir=str(data), split_validation_test=True, n_train=3, max_target_length=2
    )
    assert [len(rte.examples(split)) for split in ("train", "validation", "test")] == [3, 4, 4]
    assert not {e.source for e in rte.validation()} & {e.source for e in rte.test()}
    assert rte.max_target_length == 2
    with pytest.raises(
        ValueError, match="test labels of task rte are not public; use split_validation_test"
    ):
        tasks(["rte"], data_dir=str(data))[0].test()


def test_task_files(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(
        "imdb: {template: 'mine: {text}', label_words: {0: bad, 1: good}, data_dir: elsewhere}\n"
    )
    described(tmp_path, "imdb")
    (tmp_path / "imdb").rename(tmp_path / "elsewhere")
    (imdb,) = tasks([], task_file=[str(file)])
    assert imdb.train()[1].source == "mine: text 1 of train"  # a file's task wins over a known one
    refuses(
        ValueError,
        r"task_file: .*t\.yaml describes imdb again",
        tasks,
        [],
        task_file=[str(file)] * 2,
    )


@pytest.mark.parametrize(
    "names, options, message",
    [
        (
            ["rtf"],
            {"data_dir": "."},
            r"data_dir \. has no folder 'rtf', nor is there a task of that name; did .*rte",
        ),
        (
            ["doc_module"],
            {"text_columns": ["a"]},
            "text_columns says how a folder is read; task doc_module has none",
        ),
        (
            ["doc_module"],
            {"metrics": ["pearson"]},
            "metrics of the classification task .* must be one of .*'pearson'",
        ),
        (["doc_lm"], {}, r"doc_lm is language_modeling; a T5 .* does .*use a GPT-2 \(--model gpt2"),
        *(
            (
                [],
                {"data_dir": absent},
                f"data_dir must be an existing folder, or owner/name on the hub; got '{absent}'",
            )
            for absent in ("nowhere", "here/absent", "./absent")
        ),
    ],
)
def test_refusals(monkeypatch, tmp_path, names, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    refuses(ValueError, message, tasks, names, **options)


def offline(*_, **__):
    raise ConnectionError("Couldn't reach it")


def test_a_data_set_of_the_hub_in_the_place_of_a_folder(monkeypatch):
    rows = [{"sentence": f"sentence {i}", "label": i % 2} for i in range(20)]
    datasets = ModuleType("datasets")
    datasets.load_dataset = lambda path, *_, **__: {"train": rows, "test": rows[:2]}
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    (task,) = tasks(
        [], data_dir="someone/some.reviews", label_words='{"0": "bad", "1": "good"}', n_train=3
    )
    assert (task.name, task.labels) == ("some_reviews", ("bad", "good"))
    assert [len(task.examples(split)) for split in ("train", "validation")] == [3, 2]
    assert task.test()[1] == Example("some_reviews sentence: sentence 1", "good")
    datasets.load_dataset = offline
    refuses(
        ValueError,
        "there is no folder someone/other, and the hub did not",
        tasks,
        [],
        data_dir="someone/other",
    )


def test_average_is_over_tasks_in_the_table():
    one, constant = (
        {"a": {"accuracy": 1.0, "f1": 0.0, "items": 3}},
        {"a": {"accuracy": 0.5, "f1": 0.25}},
    )
    rows = [["a: accuracy", "1.0000", "0.5000"], ["a: f1", "0.0000", "0.2500"]]
    assert score_table({"value": one}, constant, "").rows == rows
    two, both = {**one, "b": {"pearson": 0.5, "items": 4}}, {**constant, "b": {"pearson": 0.0}}
    assert score_table({"value": two}, both, "").rows[-1][1:] == ["0.7500", "0.2500"]
    running = {"c": {"perplexity": 8.0, "loss": 2.0, "items": 1}}
    other = {"c": {"perplexity": 7.0, "loss": 2.0, "items": 1}}
    table = score_table(
        {"one": running, "other": other, "unfinished": {}}, {"c": {"perplexity": 9.0}}, ""
    )
    assert table.rows == [
        ["c: perplexity", "8.0000", "7.0000", "-", "9.0000"],
        ["c: loss", "2.0000", "2.0000", "-", "-"],
    ]
    assert table.best == {(0, 2)}  # lower is better; a tie has no best


def as_trained(folder, run, data=None, *flags):
    """`data_of_run` for a folder whose ``run.json`` holds ``run``."""
    (folder / "run.json").write_text(json.dumps({"config": run}))
    return data_of_run(str(folder), data or DataOptions(), set(flags))


def test_evaluation_divides_the_data_as_the_run_did(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert data_of_run(str(checkpoint), DataOptions(), set())[1:] == (0, None)
    for training, seed in (({"seed": 7, "data_seed": None}, 7), ({"seed": 7, "data_seed": 0}, 0)):
        assert as_trained(tmp_path, {"training": training})[1] == seed
        assert data_of_run(str(checkpoint), DataOptions(), set())[1] == seed
    (tmp_path / "run.json").write_text("{")
    refuses(
        ValueError,
        r"run\.json does not describe a run",
        data_of_run,
        str(checkpoint),
        DataOptions(),
        set(),
    )


def test_a_model_of_an_earlier_run_is_not_taken_for_the_runs(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    prepare_output_dir(tmp_path, True, run_config={"drawn_by": 5}, keep_model=True)
    assert data_of_run(str(tmp_path), DataOptions(), set())[1] == 0
    assert "holds the model of a run before the one in run.json" in capsys.readouterr().out
    refuses(CommandError, "holds neither its run's model", model_of_experiment, str(tmp_path))
    staged = staging_root(tmp_path) / "checkpoint-3"
    staged.mkdir(parents=True)
    publish(staged, tmp_path)
    assert model_of_experiment(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    assert data_of_run(str(tmp_path / "checkpoint-3"), DataOptions(), set())[1] == 5


def test_evaluation_reads_the_data_as_the_run_did(capsys, tmp_path):
    run = {
        "data": {
            **vars(DataOptions()),
            "tasks": ["a", "b"],
            "data_dir": "there",
            "max_source_length": 300,
        }
    }
    same = as_trained(tmp_path, run)[0]
    assert (same.tasks, same.data_dir, same.max_source_length) == (["a", "b"], "there", 300)
    assert (
        "as in training: data_dir there, max_source_length 300, tasks ['a', 'b']"
        in capsys.readouterr().out
    )
    other = as_trained(tmp_path, run, DataOptions(data_dir="here"), "data_dir")[0]
    assert (other.tasks, other.data_dir, other.max_source_length) == ([], "here", 300)
    given = DataOptions(max_source_length=128)
    assert as_trained(tmp_path, run, given, "max_source_length")[0].max_source_length == 128
    assert as_trained(tmp_path, {}, given)[0] is given


# ------------------------------------------------------------------ heads


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


def test_regression_learns_exact_numbers(cli, bert, tmp_path):
    (tmp_path / "rating").mkdir()
    for split, size in (("train", 32), ("validation", 8), ("test", 8)):
        rows = [
            {"sentence": f"film is {('bad', 'good')[i % 2]}", "score": (0.13, 0.29)[i % 2]}
            for i in range(size)
        ]
        write_rows(tmp_path / "rating" / f"{split}.jsonl", rows)
    flags = f"train --model {bert} --data_dir {tmp_path}/rating {FLAGS} --max_steps 40"
    cli(f"{flags} --output_dir {tmp_path}/run")
    results = read_json(tmp_path / "run/results.json")
    assert results["validation"]["rating"]["pearson"] > 0.99  # T5 writes .2 for both


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


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = f"{FLAGS} --per_device_train_batch_size 4 --max_steps 30"


def data(folder, rows):
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


def test_pairs(cli, tmp_path):
    task = load_task_from_folder(
        data(tmp_path / "pairs", lambda word: {"prompt": f"say {word}", "response": word})
    )
    assert (task.kind, task.max_source_length, task.max_target_length) == ("generation", 512, 256)
    assert task.train()[0] == Example("say list", "list")
    _, tokenizer = load_stand_in("gpt2")
    end = tokenizer.eos_token
    assert texts(encode_responses(task.train(), tokenizer)[0], tokenizer) == (
        f"say list\nlist{end}",
        f"list{end}",
    )
    cut = encode_responses([Example("say " * 50, "list " * 50)], tokenizer, 8, 4)[0]
    assert len(cut["input_ids"]) == 12
    assert [label == -100 for label in cut["labels"]] == [True] * 8 + [False] * 4
    flags = f"--data_dir {tmp_path}/pairs"
    cli(f"train --model gpt2 {flags} {CHAT} --output_dir {tmp_path}/run")
    scores = read_json(tmp_path / "run/results.json")["validation"]["pairs"]
    assert scores["exact_match"] == 1.0
    assert scores["loss"] < 0.5
    cli(f"train --model t5 {flags} --max_steps 1 --max_target_length 4 --output_dir {tmp_path}/t5")


def test_conversations(cli, refused, tmp_path):
    chats = data(tmp_path / "chats", chat)
    model, tokenizer = load_stand_in("gpt2")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    example = load_task_from_folder(chats).train()[0]
    assert (example.source, example.target) == (
        "user: say list\nassistant: list\nuser: again",
        "list",
    )
    whole, counted = texts(encode_responses([example], tokenizer)[0], tokenizer)
    end = tokenizer.eos_token
    assert whole == f"<user>say list{end}<assistant>list{end}<user>again{end}<assistant>list{end}"
    assert counted == f"list{end}list{end}"
    cli(f"train --model {tmp_path}/model --data_dir {chats} {CHAT} --output_dir {tmp_path}/run")
    assert read_json(tmp_path / "run/results.json")["validation"]["chats"]["exact_match"] == 1.0
    flags = f"--data_dir {chats} --output_dir {tmp_path}/none"
    assert "messages need a tokenizer with a chat template" in refused(
        f"train --model gpt2 {flags}"
    )
    tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    refuses(
        ValueError,
        "must continue a prompt with the response; it rewrites it",
        encode_responses,
        [example],
        tokenizer,
    )


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "a"}] * 2, ["a", "b"], "ab"])
def test_what_is_no_conversation(refused, tmp_path, messages):
    write_rows(tmp_path / "train.jsonl", [{"messages": messages}])
    write_rows(tmp_path / "validation.jsonl", [{"messages": messages}])
    line = refused(f"train --model gpt2 --data_dir {tmp_path} --output_dir {tmp_path}/run")
    assert "train.jsonl, line 1: messages must be two or more of" in line
