"""Which data a task's name stands for, and what the options then mean."""

import shutil
import sys
from types import ModuleType

import pytest

from mpoe.cli.tasks import DataOptions, resolve
from mpoe.data.task import Example
from tests.assertions import refuses

from .cli_data import described


def tasks(names, **options):
    return resolve(names, DataOptions(**options), "seq2seq")


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
