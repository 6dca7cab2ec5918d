"""The score of an answer that looks at nothing, and answers that look like one."""

from __future__ import annotations

import math

import pytest

from mpoe.data.predict import baseline_scores, collapse, constant_answer, frequency_perplexity
from mpoe.data.task import Task


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
