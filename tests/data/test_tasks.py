"""Tasks: the registry refuses well; what a few lines of YAML or Python describe."""

import dataclasses
import json
from dataclasses import FrozenInstanceError

import pytest

from mpoe.data.metrics import average_score
from mpoe.data.spec import TaskSpec
from mpoe.data.task import SPLITS, Example, Task, with_subsets, with_validation_test_split
from mpoe.data.tasks import (
    get_task,
    load_task,
    read_task_file,
    register_task,
    standard_specs,
    task_names,
)
from tests.assertions import refuses, write_json


def tiny_task(name="tiny", **changes):
    rows = {
        "train": [("good", 1), ("bad", 0)],
        "validation": [(f"item {i}", i % 2) for i in range(10)],
        "test": [("fine", 1)],
    }
    fields = {
        "name": name,
        "rows": lambda split: rows[split],
        "to_text": lambda row: Example(f"judge: {row[0]}", ("no", "yes")[row[1]]),
        "labels": ("no", "yes"),
        **changes,
    }
    return Task(**fields)


def test_a_task_is_a_value():
    task = tiny_task()
    refuses(FrozenInstanceError, "cannot assign to field 'name'", setattr, task, "name", "other")
    assert {task: 1}[dataclasses.replace(task)] == 1


def test_registry():
    assert {"doc_module", "doc_lm"} <= set(task_names())
    refuses(
        ValueError,
        r"task must be one of .*; got 'doc_modul' \(did you mean 'doc_mod",
        get_task,
        "doc_modul",
    )
    task = register_task(tiny_task("registered_in_a_test"))
    assert get_task("registered_in_a_test") is task
    refuses(ValueError, "registered already", register_task, tiny_task("registered_in_a_test"))
    other = register_task(tiny_task("registered_in_a_test"), replace=True)
    assert get_task("registered_in_a_test") is other
    refuses(TypeError, "task must be a Task or a TaskSpec; got str", register_task, "doc_lm")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "two words"}, "name must be letters"),
        ({"labels": ("yes",)}, "at least two different"),
        ({"labels": ("yes", "yes")}, "at least two different"),
        ({"metrics": ()}, "at least one"),
    ],
)
def test_task_refuses(changes, message):
    refuses(ValueError, message, tiny_task, **changes)


def test_scores_from_texts():
    task = tiny_task(metrics=("accuracy", "f1"))
    assert task.train() == (Example("judge: good", "yes"), Example("judge: bad", "no"))
    scores = task.score([" Yes ", "no", "maybe", "no"], ["yes", "no", "yes", "yes"])
    assert scores == {"accuracy": 0.5, "f1": pytest.approx(0.5)}
    refuses(
        ValueError,
        r"references of task tiny must be labels .*'maybe'",
        task.score,
        ["yes"],
        ["maybe"],
    )
    refuses(ValueError, r"split must be one of 'train'.*'dev'", task.examples, "dev")
    regression = tiny_task(kind="regression", labels=(), metrics=("pearson",))
    assert regression.score(["1.0", "nonsense", "-1.0"], ["2.0", "0.0", "-2.0"])[
        "pearson"
    ] == pytest.approx(1.0)
    refuses(ValueError, "perplexity", get_task("doc_lm").score, ["a"], ["a"])
    refuses(TypeError, "rows must be Example", tiny_task(to_text=None).train)


def test_average_over_tasks_not_over_metrics():
    assert average_score({"a": {"accuracy": 1.0, "f1": 0.0}, "b": {"pearson": 0.5}}) == 0.75
    refuses(ValueError, "at least one task", average_score, {})


def test_subsets_grow_and_depend_on_the_seed_alone():
    task = Task(
        "t",
        lambda split: [Example(str(i)) for i in range(100)],
        kind="generation",
        metrics=("exact_match",),
    )
    assert with_subsets(task).train() == task.train()
    small, large, other = (
        with_subsets(task, n_train=n, data_seed=seed).train()
        for n, seed in ((20, 1), (50, 1), (20, 2))
    )
    assert small == large[:20] != other
    assert sorted(with_subsets(task, n_train=1000).train(), key=lambda e: int(e.source)) == list(
        task.train()
    )
    assert [len(with_subsets(tiny_task(), n_val=3).examples(split)) for split in SPLITS] == [
        2,
        3,
        1,
    ]
    refuses(ValueError, "n_train must be at least 1; got 0", with_subsets, tiny_task(), n_train=0)


def test_test_half_of_validation_leaks_nothing():
    texts = ["a", "A ", "b", "c", "d", "e", "f", "seen", "g", "h"]

    def task(validation, train="Seen"):
        items = {"train": [Example(train)], "validation": [Example(text) for text in validation]}
        return Task("t", lambda split: items[split], kind="generation", metrics=("exact_match",))

    splits = with_validation_test_split(task(texts), seed=3)
    validation, test = splits.validation(), splits.test()
    assert sorted(e.source for e in (*validation, *test)) == sorted(texts)
    assert {e.source.lower().strip() for e in validation}.isdisjoint(
        e.source.lower().strip() for e in test
    )
    assert "seen" not in {e.source for e in test}
    assert 3 <= len(test) <= 5
    assert with_validation_test_split(task(texts), seed=3).test() == test
    assert any(with_validation_test_split(task(texts), seed=s).test() != test for s in range(5))
    assert splits.train() == (Example("Seen"),)
    one = with_validation_test_split(task(["a", "b"], "b"))
    refuses(
        ValueError,
        "validation of task t, .* two different items that are not in train; got 1",
        one.test,
    )


YAML = """
review:
  template: "is this good? {sentence}"
  label_words: {0: bad, 1: good, n: bad, "?": null}
  metrics: [accuracy, f1]
  data_dir: my_folder
  max_target_length: 4
grade:
  template: "{title}: how good? {sentence}"
  label_column: stars
  kind: regression
headline:
  template: "shorten: {body}"
  label_column: title
  kind: generation
  metrics: [rouge_l, bleu]
prose: {template: "{text}", kind: language_modeling}
"""


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(size):
    return [{"sentence": f"sentence {i}", "label": i % 2} for i in range(size)]


def test_yaml_and_python_describe_the_same(tmp_path):
    (tmp_path / "tasks.yaml").write_text(YAML)
    specs = read_task_file(tmp_path / "tasks.yaml")
    assert list(specs) == ["review", "grade", "headline", "prose"]
    python = TaskSpec(
        name="review",
        template="is this good? {sentence}",
        label_words={0: "bad", True: "good", "n": "bad", "?": None},
        metrics=("accuracy", "f1"),
        data_dir=str(tmp_path / "my_folder"),  # relative to the file, there
        max_target_length=4,
    )
    assert specs["review"] == python
    assert (python.kind, python.labels, python.columns) == (
        "classification",
        ("bad", "good"),
        ("sentence",),
    )
    write_json(
        tmp_path / "tasks.json", {"prose": {"template": "{text}", "kind": "language_modeling"}}
    )
    assert read_task_file(tmp_path / "tasks.json")["prose"] == specs["prose"]
    for spec in (*specs.values(), *standard_specs().values()):
        kept = {**json.loads(json.dumps(spec.to_mapping())), "description": "of earlier versions"}
        again = TaskSpec.from_mapping(spec.name, kept)
        assert again == spec
        assert list(again.label_words.items()) == list(
            spec.label_words.items()
        )  # their order tells the positive one

    left_out = {"sentence": None, "label": "?"}  # whatever else it holds
    data = [*rows(4), left_out, {"sentence": "no", "label": "n"}]
    write(tmp_path / "my_folder", train=data, dev=rows(2), test=rows(2))
    task = load_task(python)
    assert [example.target for example in task.train()] == ["bad", "good", "bad", "good", "bad"]
    assert task.train()[0] == Example("is this good? sentence 0", "bad")
    assert task.score(["good", "bad"], ["good", "good"]) == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
    }


def test_every_kind_of_task(tmp_path):
    (tmp_path / "tasks.yaml").write_text(YAML)
    specs = read_task_file(tmp_path / "tasks.yaml")
    row = {"title": "A", "body": "b {c}", "sentence": "s", "stars": 3.51, "text": " t "}
    assert specs["grade"].example(row, "row 1") == Example("A: how good? s", "3.6")
    assert specs["headline"].example(row, "row 1") == Example(
        "shorten: b {c}", "A"
    )  # braces of the data stay
    assert specs["prose"].example(row, "row 1") == Example(" t ")
    assert specs["prose"].example({"text": " "}, "row 1") is None
    assert (specs["grade"].metrics, specs["headline"].metrics) == (
        ("pearson", "spearman"),
        ("rouge_l", "bleu"),
    )


def test_cells_may_hold_lists_and_mappings():
    spec = TaskSpec("t", "{q} {c.text.1} {a.b}", label_column="t.en", kind="generation")
    row = {"q": "which", "c": {"text": ["x", "y"]}, "a.b": "as it stands", "t": {"en": "yes"}}
    assert spec.example(row, "row 0") == Example("which y as it stands", "yes")
    for broken in (
        {**row, "c": {"text": ["x"]}},
        {**row, "c": {"words": []}},
        {**row, "c": "text"},
    ):
        refuses(
            ValueError,
            r"row 0: column 'c\.text\.1' is missing, which template of task t asks",
            spec.example,
            broken,
            "row 0",
        )
    refuses(
        ValueError,
        "column 't' must hold a text or a number; got",
        TaskSpec("t", "{t}", kind="language_modeling").example,
        row,
        "row 0",
    )


def test_registered_in_a_few_lines(tmp_path):
    write(tmp_path / "data", train=rows(40), test=rows(4))
    spec = TaskSpec(
        "few_lines",
        "good? {sentence}",
        label_words={0: "no", 1: "yes"},
        data_dir=str(tmp_path / "data"),
    )
    register_task(spec, replace=True)
    task = get_task("few_lines")
    validation = {
        example.source for example in task.validation()
    }  # no file of its own: out of the training items
    assert len(validation) == 4
    assert len(task.train()) == 36
    assert not validation & {example.source for example in task.train()}
    assert task.validation() == get_task("few_lines").validation()
    refuses(
        ValueError,
        "a task named 'rte' is registered already",
        register_task,
        TaskSpec("rte", "{a}", kind="language_modeling"),
    )


def test_headers_and_names_of_files_differ(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "train.tsv").write_text(
        'a\t1\tsay "hi\nb\t0\tsay\tho\tho\nc\t0\tsay ho\n'
    )  # no header
    (folder / "dev.tsv").write_text("id\tQuality\ttext\nd\t1\tyes\n")
    fields = {
        "template": "{text}?",
        "label_words": {0: "no", 1: "yes"},
        "renamed_columns": {"Quality": "label"},
    }
    spec = TaskSpec.from_mapping(
        "t", {**fields, "column_names": ["id", "label", "text"], "skip_malformed": True}
    )
    task = load_task(spec, folder)
    with pytest.warns(UserWarning, match=r"train\.tsv: left out 1 lines"):
        train = task.train()
    assert train == (Example('say "hi?', "yes"), Example("say ho?", "no"))
    assert task.validation() == (Example("yes?", "yes"),)
    strict = TaskSpec.from_mapping("t", {**fields, "column_names": ["id", "label", "text"]})
    strict_task = load_task(strict, folder)
    refuses(
        ValueError,
        r"train\.tsv, line 2: expected 3 columns \(id, label, text\); got 5",
        strict_task.train,
    )


def test_wikitext_folders(tmp_path):
    for split in ("train", "valid", "test"):
        text = (
            " \n = Title = \n \n The first paragraph . \n goes on \n \n = = Part = = \n \n "
            "Another . \n"
        )
        (tmp_path / f"wiki.{split}.raw").write_text(text)
    spec = TaskSpec("wiki", "{text}", kind="language_modeling")
    sources = [example.source for example in load_task(spec, tmp_path).validation()]
    assert "".join(sources) == text


GOOD = {"template": "{a}", "label_words": {0: "no", 1: "yes"}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"templat": "x"}, r"task t has no field 'templat' \(did you mean 'template'"),
        ({"name": "u"}, "name of task t must be what its description stands under; got 'u'"),
        (
            {"column_names": ["a", 3]},
            "every item of column_names of task t must be a text; got int 3",
        ),
        (
            {"template": "no column"},
            "template of task t must name columns in braces.*got 'no column'",
        ),
        ({"template": "{a} {b"}, "template of task t must name columns in braces"),
        ({"template": 3}, "template of task t must be a text; got int 3"),
        (
            {"metrics": ["acuracy"]},
            r"metrics of the classification task t must be one .*; got 'acuracy' \(did you mean",
        ),
        ({"metrics": ["bleu"]}, "metrics of the classification task t must be one of .*got 'bleu'"),
        ({"metrics": "f1"}, "metrics of task t must be a list of texts; got str 'f1'"),
        (
            {"label_words": {0: "no"}},
            "label_words of task t must give at least two different words",
        ),
        (
            {"label_words": {0: False, 1: "yes"}},
            "label 0 in label_words of task t must be a text .YAML reads .*got bool",
        ),
        ({"label_words": {}}, "kind of task t must be one of 'classification'.*got ''"),
        (
            {"label_words": {}, "kind": "classification"},
            "label_words of task t must give at least two .*got none",
        ),
        ({"label_words": ["no", "yes"]}, "label_words of task t must be a mapping"),
        ({"kind": "ranking"}, "kind of task t must be one of 'classification'.*got 'ranking'"),
        ({"max_target_length": 0}, "max_target_length of task t must be at least 1; got 0"),
        ({"max_target_length": "8"}, "max_target_length of task t must be an integer; got str '8'"),
        ({"hidden_test": 1}, "hidden_test of task t must be true or false; got int 1"),
        ({"hub": {"config": "x"}}, "path of hub of task t must be a data set's name; got NoneType"),
        ({"hub": ["x"]}, "hub of task t must be a mapping; got list"),
        (
            {"hub": {"path": "x", "confg": "y"}},
            r"hub of task t has no field 'confg' \(did you mean 'config'",
        ),
    ],
)
def test_refusals_name_field_and_file(tmp_path, changes, message):
    write_json(tmp_path / "tasks.json", {"t": {**GOOD, **changes}})
    refuses(ValueError, r"tasks\.json: .*" + message, read_task_file, tmp_path / "tasks.json")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.txt", "a: 1", r"the task file must be a \.json, \.yaml or \.yml file"),
        ("t.yaml", "", "expected at least one task; got none"),
        (
            "t.yaml",
            "two words: {template: '{a}', kind: generation}",
            "name must be letters, digits",
        ),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    refuses(ValueError, message, read_task_file, tmp_path / name)


def test_a_task_without_data():
    refuses(
        ValueError,
        "task movie_sentiment comes without data: give data_dir, a folder that holds",
        get_task,
        "movie_sentiment",
    )
