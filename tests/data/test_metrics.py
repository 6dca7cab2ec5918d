"""Metrics against values worked out by hand, and their refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from mpoe.data import metrics as m
from mpoe.data import tasks, text_metrics
from mpoe.data.doc_tasks import EMBEDDED_TASKS
from mpoe.data.task import Task


def test_accuracy():
    assert m.accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 0.5
    assert m.accuracy(["a", "b"], ["a", "c"]) == 0.5


def test_f1_by_hand():
    # TP 2, FP 1, FN 1 -> 2*2 / (4 + 2)
    assert m.f1([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(2 / 3)
    assert m.f1([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], positive=0) == pytest.approx(0.5)
    assert m.f1([0, 0], [0, 0]) == 0.0
    assert m.f1([-1, 1], [1, 1]) == pytest.approx(2 / 3)  # an answer that is no label is a miss


def test_macro_f1_counts_every_reference_class_alike():
    # class 0: TP 2 FP 1 FN 0 -> 0.8; class 1: TP 0 -> 0; class 2: TP 1, FP 0, FN 0 -> 1
    assert m.macro_f1([0, 0, 0, 2], [0, 0, 1, 2]) == pytest.approx((0.8 + 0 + 1) / 3)


def test_matthews_binary_formula():
    predicted, expected = [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0]
    tp, fp, fn, tn = 2, 1, 1, 3
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert m.matthews(predicted, expected) == pytest.approx(by_hand)
    assert m.matthews([0, 1, 2], [0, 1, 2]) == pytest.approx(1.0)
    assert m.matthews([1, 0], [0, 1]) == pytest.approx(-1.0)
    assert m.matthews([1, 1, 1], [0, 1, 0]) == 0.0


def test_matthews_three_classes_by_hand():
    # confusion (rows = truth): [[1, 1, 0], [0, 1, 0], [0, 0, 1]]; c = 3, s = 4, t = (2,1,1), p = (1,2,1)
    by_hand = (3 * 4 - (2 * 1 + 1 * 2 + 1 * 1)) / math.sqrt((16 - 6) * (16 - 6))
    assert m.matthews([0, 1, 1, 2], [0, 0, 1, 2]) == pytest.approx(by_hand)


def test_correlations_by_hand():
    # deviations (-1.5,-.5,.5,1.5) and (-1.5,.5,-.5,1.5): 2.25 - .25 - .25 + 2.25 = 4 over 5
    assert m.pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert m.spearman([1, 2, 3, 4], [10, 300, 20, 4000]) == pytest.approx(0.8)
    assert m.pearson([1, 2, 3], [-2, -4, -6]) == pytest.approx(-1.0)
    assert m.pearson([1, 1, 1], [1, 2, 3]) == 0.0
    assert m.spearman([5, 1, 2], [0, 0, 0]) == 0.0


def test_ranks_share_ties():
    np.testing.assert_array_equal(m.ranks(np.array([10, 20, 20, 5])), [2.0, 3.5, 3.5, 1.0])


def test_roc_auc_by_hand():
    # pairs (positive, negative): (.8,.4) won, (.8,.5) won, (.4,.4) half, (.4,.5) lost
    assert m.roc_auc([0.8, 0.4, 0.4, 0.5], [1, 1, 0, 0]) == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="both 0 and 1"):
        m.roc_auc([0.1, 0.2], [1, 1])
    with pytest.raises(ValueError, match="both 0 and 1"):
        m.roc_auc([0.1, 0.2, 0.3], [0, 1, 2])


def test_perplexity():
    assert m.perplexity([math.log(4), math.log(16)]) == pytest.approx(8.0)
    assert m.perplexity([math.log(4), math.log(16)], weights=[3, 1]) == pytest.approx(4 * math.sqrt(2))
    assert m.perplexity([1e6]) == math.inf
    for losses, weights in (([], None), ([math.nan], None), ([1.0], [0]), ([1.0, 2.0], [1])):
        with pytest.raises(ValueError, match=r"losses|weights"):
            m.perplexity(losses, weights)


@pytest.mark.parametrize("name", sorted(m.METRICS))
def test_every_metric_refuses_unequal_and_empty_input(name):
    metric = m.get_metric(name)
    with pytest.raises(ValueError, match="differ in length: 2 and 1"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="empty"):
        metric([], [])


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="both texts or both numbers"):
        m.accuracy(["1"], [1])
    with pytest.raises(TypeError, match="must be numbers"):
        m.pearson(["x"], [1])
    with pytest.raises(ValueError, match="finite"):
        m.spearman([math.nan, 1], [1, 2])
    with pytest.raises(ValueError, match=r"\[N\]; got \(1, 2\)"):
        m.accuracy([[1, 2]], [[1, 2]])
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy': did you mean accuracy"):
        m.get_metric("acuracy")


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30)


@given(PAIRS)
def test_what_needs_no_package_agrees_with_scikit_learn_and_scipy(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = map(list, zip(*pairs, strict=True))
    classes = sorted(set(expected))
    theirs = {
        "accuracy": sklearn.metrics.accuracy_score(expected, predicted),
        "f1": sklearn.metrics.f1_score(np.equal(expected, 1), np.equal(predicted, 1), zero_division=0.0),
        "macro_f1": sklearn.metrics.f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0),
        "matthews": sklearn.metrics.matthews_corrcoef(expected, predicted),
    }
    if len(set(predicted)) > 1 and len(classes) > 1:  # scipy has no value for a constant
        theirs["pearson"] = scipy.stats.pearsonr(predicted, expected).statistic
        theirs["spearman"] = scipy.stats.spearmanr(predicted, expected).statistic
    for name, value in theirs.items():
        assert m.get_metric(name)(predicted, expected) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("name", "package"), [("bleu", "sacrebleu"), ("rouge_l", "rouge_score"), ("roc_auc", "sklearn")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name: str, package: str) -> None:
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(RuntimeError, match=rf'needs the package {package}: pip install "mpoe\[metrics\]"'):
        m.get_metric(name)
    assert m.get_metric("matthews")([0, 1], [0, 1]) == 1.0


def test_without_the_extra_only_tasks_that_need_it_are_refused(monkeypatch) -> None:
    """Before anything is trained; the embedded tasks and the names of all others need none of its packages."""
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda asked: None)
    for task in EMBEDDED_TASKS:
        assert tasks.get_task(task.name) is task
    assert {task.name for task in EMBEDDED_TASKS} < set(tasks.task_names())
    needy = Task("needy", kind="generation", rows=lambda split: (), metrics=("bleu",))
    monkeypatch.setitem(tasks._REGISTERED, "needy", needy)
    with pytest.raises(RuntimeError, match="needs the package sacrebleu"):
        tasks.get_task("needy")
