"""Metrics against values worked out by hand, answers that look at nothing, and refusals."""

from __future__ import annotations

import math

import pytest

from mpoe.data import metrics as m
from mpoe.data import tasks
from mpoe.data.documentation import EMBEDDED_TASKS
from mpoe.data.metrics import METRICS
from mpoe.data.predict import baseline_scores, collapse, constant_answer, frequency_perplexity
from mpoe.data.task import Task


def test_f1_by_hand():
    # TP 2, FP 1, FN 1 -> 2*2 / (4 + 2)
    assert METRICS["f1"]([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(2 / 3)
    assert METRICS["macro_f1"]([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx((2 / 3 + 0.5) / 2)
    assert METRICS["f1"]([0, 0], [0, 0]) == 0.0
    assert METRICS["f1"]([-1, 1], [1, 1]) == pytest.approx(2 / 3)  # an answer that is no label is a miss


def test_correlations_by_hand():
    # deviations (-1.5,-.5,.5,1.5) and (-1.5,.5,-.5,1.5): 2.25 - .25 - .25 + 2.25 = 4 over 5
    assert METRICS["pearson"]([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert METRICS["spearman"]([1, 2, 3, 4], [10, 300, 20, 4000]) == pytest.approx(0.8)
    assert METRICS["pearson"]([1, 2, 3], [-2, -4, -6]) == pytest.approx(-1.0)
    assert METRICS["pearson"]([1, 1, 1], [1, 2, 3]) == 0.0
    assert METRICS["spearman"]([5, 1, 2], [0, 0, 0]) == 0.0


def test_perplexity():
    assert m.perplexity([math.log(4), math.log(16)]) == pytest.approx(8.0)
    assert m.perplexity([math.log(4), math.log(16)], weights=[3, 1]) == pytest.approx(4 * math.sqrt(2))
    assert m.perplexity([1e6]) == math.inf
    for losses, weights in (([], None), ([math.nan], None), ([1.0], [0]), ([1.0, 2.0], [1])):
        with pytest.raises(ValueError, match=r"losses|weights"):
            m.perplexity(losses, weights)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_refuses_unequal_and_empty_input(name):
    metric = m.get_metric(name)
    with pytest.raises(ValueError, match="differ in length: 2 and 1"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="empty"):
        metric([], [])


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="both texts or both numbers"):
        METRICS["accuracy"](["1"], [1])
    with pytest.raises(TypeError, match="must be numbers"):
        METRICS["pearson"](["x"], [1])
    with pytest.raises(ValueError, match="finite"):
        METRICS["spearman"]([math.nan, 1], [1, 2])
    with pytest.raises(ValueError, match=r"\[N\]; got \(1, 2\)"):
        METRICS["accuracy"]([[1, 2]], [[1, 2]])
    with pytest.raises(ValueError, match=r"metric must be one of .*; got 'acuracy' \(did you mean 'accuracy'"):
        m.get_metric("acuracy")


def test_matthews_by_hand() -> None:
    # TP 2, TN 1, FP 1, FN 1 -> (2 - 1) / sqrt(3 * 3 * 2 * 2)
    assert METRICS["matthews"]([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(1 / 6)
    assert METRICS["matthews"]([1, 1], [0, 1]) == METRICS["matthews"]([0, 1], [1, 1]) == 0.0


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rouge_l", "rouge_score")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name: str, package: str) -> None:
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(RuntimeError, match=rf'needs the package {package}: pip install "mpoe\[metrics\]"'):
        m.get_metric(name)
    assert m.get_metric("matthews")([0, 1], [0, 1]) == 1.0


def test_without_the_extra_only_tasks_that_need_it_are_refused(monkeypatch) -> None:
    """Before anything is trained; the embedded tasks and the names of all others need none of its packages."""
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda asked: None)
    for task in EMBEDDED_TASKS:
        assert tasks.get_task(task.name) is task
    assert {task.name for task in EMBEDDED_TASKS} < set(tasks.task_names())
    needy = Task("needy", kind="generation", rows=lambda split: (), metrics=("bleu",))
    monkeypatch.setitem(tasks._REGISTERED, "needy", needy)
    with pytest.raises(RuntimeError, match="needs the package sacrebleu"):
        tasks.get_task("needy")


def test_exact_match_and_shared_words() -> None:
    assert METRICS["exact_match"](["Get  payload.", "x"], ["get payload", "y"]) == 0.5
    # "get the payload" against "get payload": 2 shared of 3 and 2 -> 4/5; "" against "y" -> 0
    assert METRICS["token_f1"](["get the payload", ""], ["get payload", "y"]) == pytest.approx(0.4)
    assert METRICS["token_f1"](["a a"], ["a"]) == pytest.approx(2 / 3)
    assert METRICS["token_f1"](["..."], ["!"]) == 1.0  # nothing asked, nothing said


def test_rouge_by_hand() -> None:
    predicted, expected = ["the cat sat on the mat"], ["the cat lay on a mat"]
    # words: the, cat, on, mat shared (one "the" is surplus): 2*4 / 12
    assert METRICS["rouge1"](predicted, expected) == pytest.approx(2 * 4 / 12)
    # pairs: only "the cat" is shared, 5 and 5 pairs
    assert METRICS["rouge2"](predicted, expected) == pytest.approx(2 * 1 / 10)
    # longest common subsequence: the cat on mat
    assert METRICS["rouge_l"](predicted, expected) == pytest.approx(2 * 4 / 12)
    # order matters to ROUGE-L alone: "b a" and "a b" share two words and a subsequence of one
    assert METRICS["rouge1"](["b a"], ["a b"]) == 1.0
    assert METRICS["rouge_l"](["b a"], ["a b"]) == pytest.approx(2 * 1 / 4)
    assert METRICS["rouge2"](["one"], ["one"]) == 0.0  # no pair on either side
    assert METRICS["rouge2"](["one two"], ["one"]) == 0.0
    assert METRICS["rouge_l"](["a b c", "x"], ["a c", "y"]) == pytest.approx((2 * 2 / 5 + 0) / 2)


def test_bleu_by_hand() -> None:
    same = ["the cat sat on the mat"]
    assert METRICS["bleu"](same, same) == pytest.approx(1.0)
    # 1: the(1 of 2 kept) cat on mat -> 4/6; 2: "the cat" -> 1/5; 3 and 4 have none -> 1/2 of 4, 1/4 of 3
    expected = (4 / 6 * 1 / 5 * 0.5 / 4 * 0.25 / 3) ** 0.25
    assert METRICS["bleu"](same, ["the cat lay on a mat"]) == pytest.approx(expected)
    # too short by a half: exp(1 - 8/4)
    assert METRICS["bleu"](["a b c d"], ["a b c d e f g h"]) == pytest.approx(math.exp(-1.0))
    # counts of the set, not a mean of sentences: 3 of 4 words, 1 of 2 pairs; no longer n-grams at all
    assert METRICS["bleu"](["a b", "c d"], ["a b", "c x"]) == pytest.approx(math.sqrt(3 / 4 * 1 / 2))
    assert METRICS["bleu"](["A b"], ["a b"]) < 1.0  # case counts
    assert METRICS["bleu"](["a, b"], ["a , b"]) == pytest.approx(1.0)  # marks are tokens of their own
    assert METRICS["bleu"](["x"], ["y"]) == 0.0
    assert METRICS["bleu"]([""], ["y"]) == 0.0


@pytest.mark.parametrize(
    "metric",
    [
        METRICS["exact_match"],
        METRICS["token_f1"],
        METRICS["rouge1"],
        METRICS["rouge2"],
        METRICS["rouge_l"],
        METRICS["bleu"],
    ],
)
def test_what_is_no_text_is_refused(metric) -> None:
    with pytest.raises(TypeError, match="predictions must be texts; got int"):
        metric([1], ["a"])
    with pytest.raises(TypeError, match="references must be texts; got NoneType"):
        metric(["a"], [None])


def task(**options: object) -> Task:
    return Task(name="x", rows=lambda split: [], **options)  # type: ignore[arg-type]


def test_the_most_frequent_label() -> None:
    labels = task(labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))
    targets = ["yes"] * 9 + ["no"]
    assert constant_answer(labels, targets) == "yes"
    assert baseline_scores(labels, targets) == pytest.approx({"accuracy": 0.9, "f1": 18 / 19, "matthews": 0.0})
    with pytest.raises(ValueError, match="targets of task x must hold at least one text"):
        baseline_scores(labels, [])


def test_the_mean_and_the_most_frequent_text() -> None:
    numbers = task(kind="regression", metrics=("pearson", "spearman"))
    assert constant_answer(numbers, ["1.0", "2.0", "6"]) == "3.0"
    assert baseline_scores(numbers, ["1.0", "2.0", "6"]) == {"pearson": 0.0, "spearman": 0.0}
    texts = task(kind="generation", metrics=("exact_match", "token_f1"))
    assert baseline_scores(texts, ["a b", "a b", "c"]) == pytest.approx({"exact_match": 2 / 3, "token_f1": 2 / 3})


def test_tokens_by_their_frequency() -> None:
    assert frequency_perplexity([1, 2, 3, 4] * 5) == pytest.approx(4.0)
    assert frequency_perplexity([7, 7, 7]) == 1.0
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert frequency_perplexity(iter([1, 1, 1, 2])) == pytest.approx(expected)
    assert math.isnan(frequency_perplexity([]))


@pytest.mark.parametrize(
    ("answers", "targets", "words"),
    [
        (["a"] * 8, ["a", "b"] * 4, "all 8 answers are 'a', which 50% of the expected ones are"),
        (["a"] * 99 + ["b"], ["a", "b"] * 50, "99% of the 100 answers are 'a', which 50%"),
        (["a"] * 97 + ["b"] * 3, ["a"] * 92 + ["b"] * 8, None),  # nearly as the expected ones
        (
            ["1.0", "2.0"] * 10,
            [str(i) for i in range(20)],
            "the 20 answers have 2 different values, the expected ones 20",
        ),
        (["x" * 60] * 3, ["a", "b", "c"], "xxx..."),
        (["a", "b"] * 4, ["b", "a"] * 4, None),  # wrong, but not collapsed
        (["a"] * 4, ["a"] * 4, None),
        (["a"], ["b"], None),
    ],
)
def test_collapse(answers: list[str], targets: list[str], words: str | None) -> None:
    found = collapse(answers, targets)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)
