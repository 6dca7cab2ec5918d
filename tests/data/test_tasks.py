"""Tasks: the embedded ones carry no leak, the registry refuses well, scores follow from texts."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from mpoe.data.doc_tasks import FAMILIES, MASK, TELLING, family_of, kind_items, mask_names, module_items, name_items
from mpoe.data.documentation import DocRecord
from mpoe.data.splits import split_validation_test, with_subsets, with_validation_test_split
from mpoe.data.task import Example, Task, subset
from mpoe.data.tasks import average_score, get_task, register_task, task_names

TEXT_TASKS = ("doc_kind", "doc_module", "doc_name")


def tiny_task(name: str = "tiny", **changes) -> Task:
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


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_embedded_splits_share_no_source_text(documentation, name):
    task = get_task(name)
    train, validation, test = task.train(), task.validation(), task.test()
    sources = [{e.source.lower() for e in items} for items in (train, validation, test)]
    assert [len(s) for s in sources] == [len(train), len(validation), len(test)]
    assert not sources[0] & sources[1]
    assert not sources[0] & sources[2]
    assert not sources[1] & sources[2]
    assert len(train) > 2000
    assert task.train() == train


def test_embedded_tasks_hold_out_over_two_thousand_items(documentation):
    assert sum(len(get_task(name).test()) for name in TEXT_TASKS) >= 2000


@pytest.mark.parametrize("name", ["doc_kind", "doc_module"])
def test_no_label_dominates_the_held_out_items(documentation, name):
    counts = Counter(e.target for e in get_task(name).test())
    assert set(counts) <= set(get_task(name).labels)
    assert max(counts.values()) / sum(counts.values()) < 0.45
    assert len(counts) >= 4


def test_doc_module_shows_no_name_of_its_module(documentation):
    hidden = {word.lower() for word in TELLING}
    for example in get_task("doc_module").test():
        words = set(example.source.removeprefix("subject of: ").lower().replace(".", " ").split())
        assert not words & hidden
        assert example.target not in words


def test_doc_lm_never_shows_a_held_out_object(documentation):
    held_out = {r.name for r in documentation.split("test")}
    assert not any(e.source.split("\n", 1)[0] in held_out for e in get_task("doc_lm").train())


def test_items_of_one_record():
    text = (
        "Return the payload of the message. It is an email.message.Message or a str. Third words come here. And fourth."
    )
    record = DocRecord("email.message.Message.get_payload", "email.message", "method", text, "train")
    first, second, third = module_items(record)
    assert first == Example(f"subject of: Return the payload of the {MASK}.", "mail")
    assert second.source == f"subject of: It is an {MASK} or a str."
    assert third.target == "mail"
    assert list(kind_items(record)) == [Example(f"kind of: Return the payload of the {MASK}.", "method")]
    [item] = name_items(record)
    assert item.target == "get payload"
    assert item.source.startswith("name of: Return the payload of the message.")
    init = dataclasses.replace(record, name="email.message.Message.__init__")
    assert not list(name_items(init))
    exception = DocRecord("abc.FooError", "abc", "exception", "Exception raised when FooError is asked for.", "train")
    assert list(kind_items(exception)) == [Example(f"kind of: {MASK} raised when {MASK} is asked for.", "exception")]


def test_families_and_masking():
    assert family_of("numpy.polynomial.hermite") == "number"
    assert family_of("numpy.core.fromnumeric") == "array"
    assert family_of("numpy.f2py") is None
    assert family_of("osx") is None
    assert len(FAMILIES) == 12
    assert mask_names("Use np.Array, not arrays.", {"array", "np"}) == f"Use {MASK}, not arrays."
    assert mask_names("x = 1", {"x"}) == "x = 1"  # one-letter names say nothing


def test_registry():
    assert {*TEXT_TASKS, "doc_lm"} <= set(task_names())
    with pytest.raises(ValueError, match=r"unknown task 'doc_modul': did you mean doc_module.*known: .*doc_lm"):
        get_task("doc_modul")
    task = register_task(tiny_task("registered_in_a_test"))
    assert get_task("registered_in_a_test") is task
    with pytest.raises(ValueError, match="registered already"):
        register_task(tiny_task("registered_in_a_test"))
    other = register_task(tiny_task("registered_in_a_test"), replace=True)
    assert get_task("registered_in_a_test") is other
    with pytest.raises(TypeError, match="task must be a Task or a TaskSpec; got str"):
        register_task("doc_lm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two words"}, "name must be letters"),
        ({"labels": ("yes",)}, "at least two different"),
        ({"labels": ("yes", "yes")}, "at least two different"),
        ({"metrics": ()}, "at least one"),
    ],
)
def test_task_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(**changes)


def test_scores_from_texts():
    task = tiny_task(metrics=("accuracy", "f1"))
    assert task.train() == (Example("judge: good", "yes"), Example("judge: bad", "no"))
    scores = task.score([" Yes ", "no", "maybe", "no"], ["yes", "no", "yes", "yes"])
    assert scores == {"accuracy": 0.5, "f1": pytest.approx(0.5)}
    with pytest.raises(ValueError, match=r"references of task tiny must be labels .*'maybe'"):
        task.score(["yes"], ["maybe"])
    with pytest.raises(ValueError, match=r"split must be one of train.*'dev'"):
        task.examples("dev")
    regression = tiny_task(kind="regression", labels=(), metrics=("pearson",))
    assert regression.score(["1.0", "nonsense", "-1.0"], ["2.0", "0.0", "-2.0"])["pearson"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="perplexity"):
        get_task("doc_lm").score(["a"], ["a"])
    with pytest.raises(TypeError, match="rows must be Example"):
        tiny_task(to_text=None).train()


def test_average_over_tasks_not_over_metrics():
    assert average_score({"a": {"accuracy": 1.0, "f1": 0.0}, "b": {"pearson": 0.5}}) == 0.75
    with pytest.raises(ValueError, match="at least one task"):
        average_score({})


def test_subsets_grow_and_depend_on_the_seed_alone():
    items = list(range(100))
    assert subset(items, None) == tuple(items)
    assert subset(items, 20, seed=1) == subset(items, 50, seed=1)[:20]
    assert subset(items, 20, seed=1) != subset(items, 20, seed=2)
    assert sorted(subset(items, 1000)) == items
    with pytest.raises(ValueError, match="n must be >= 0"):
        subset(items, -1)
    task = with_subsets(tiny_task(), n_val=3, data_seed=5)
    assert [len(task.examples(s)) for s in ("train", "validation", "test")] == [2, 3, 1]
    with pytest.raises(ValueError, match="n_train must be >= 1 or unset; got 0"):
        with_subsets(tiny_task(), n_train=0)


def test_test_half_of_validation_leaks_nothing():
    texts = ["a", "A ", "b", "c", "d", "e", "f", "seen", "g", "h"]
    items = [Example(text) for text in texts]
    validation, test = split_validation_test(items, seed=3, train=[Example("Seen")])
    assert sorted(e.source for e in (*validation, *test)) == sorted(texts)
    assert {e.source.lower().strip() for e in validation}.isdisjoint(e.source.lower().strip() for e in test)
    assert "seen" not in {e.source for e in test}
    assert 3 <= len(test) <= 5
    assert split_validation_test(items, seed=3, train=[Example("Seen")]) == (validation, test)
    assert any(split_validation_test(items, seed=s)[1] != test for s in range(5))
    with pytest.raises(ValueError, match="at least two different items that are not in train; got 1"):
        split_validation_test([Example("a"), Example("b")], train=[Example("b")])
    task = with_validation_test_split(tiny_task(), seed=1)
    assert len(task.validation()) == len(task.test()) == 5
    assert not set(task.validation()) & set(task.test())
    assert len(task.train()) == 2
