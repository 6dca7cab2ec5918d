"""Metrics: each takes predictions and references of equal length and returns a fraction, not per
cent.

scikit-learn and scipy count labels and numbers, the packages of the extra ``metrics`` BLEU and
ROUGE. Undefined cases return 0.0 (F1 of a class that is nowhere, correlations with a constant
input), since a model that always answers the same has learned nothing. All metrics of generated
texts but BLEU compare lower-case words without punctuation.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpoe.config.checks import check_choice


@dataclass(frozen=True)
class Metric:
    """A function of predictions and references, both [N].

    ``kind``: the kind of task it is for (classification: labels, regression: numbers, generation:
    texts); ``count``: what it computes; ``package``: one of the extra ``metrics`` that it needs.
    """

    kind: str
    count: Callable[[Any, Any], Any]
    package: str = ""

    def __call__(self, predictions: Sequence, references: Sequence) -> float:
        """Raises ValueError for inputs of different lengths, without an item, or with a number that
        is not finite."""
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references differ in length: {len(predictions)} and "
                f"{len(references)}"
            )
        if not len(references):
            raise ValueError(
                "predictions and references are empty; a metric needs at least one item"
            )
        for name, values in (("predictions", predictions), ("references", references)):
            for value in values:
                if isinstance(value, float | np.floating) and not np.isfinite(value):
                    raise ValueError(f"{name} must be finite numbers; got {value}")
        return float(self.count(predictions, references))


def get_metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        ValueError: there is none; the message suggests similar names.
        RuntimeError: it needs a package of the extra ``metrics`` that is not installed.
    """
    check_choice("metric", name, list(METRICS))
    metric = METRICS[name]
    if metric.package and importlib.util.find_spec(metric.package) is None:
        raise RuntimeError(
            f'this metric needs the package {metric.package}: pip install "mpoe[metrics]"'
        )
    return metric


def average_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks (not over metrics) of the first metric in each task's scores."""
    if not scores:
        raise ValueError("scores must hold at least one task; got none")
    return sum(next(iter(metrics.values())) for metrics in scores.values()) / len(scores)


# ------------------------------------------------------------------- labels and numbers


def _accuracy(predicted: Any, expected: Any) -> Any:
    from sklearn.metrics import accuracy_score

    return accuracy_score(expected, predicted)


def _f1(predicted: Any, expected: Any, classes: Any) -> Any:
    """Mean over ``classes`` of 2 TP / (2 TP + FP + FN)."""
    from sklearn.metrics import f1_score

    return f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0)


def _correlation(name: str, x: Any, y: Any) -> Any:
    """Matthews' of any number of classes (Gorodkin 2004, eq. 8), Pearson's, or Spearman's (ties
    share their rank)."""
    from scipy import stats
    from sklearn.metrics import matthews_corrcoef

    if min(len(set(x)), len(set(y))) == 1:
        return 0.0
    return matthews_corrcoef(y, x) if name == "matthews" else getattr(stats, name)(x, y).statistic


# ----------------------------------------------------------------------- generated texts


def _mean(
    pair: Callable[[list[str], list[str]], float],
    predictions: Sequence[str],
    references: Sequence[str],
) -> Any:
    """Mean over texts of ``pair`` of their lower-case words."""
    words = (
        [re.findall(r"\w+", text.lower()) for text in texts] for texts in (predictions, references)
    )
    return np.mean([pair(p, e) for p, e in zip(*words, strict=True)])


def _shared(p: list[str], e: list[str]) -> float:
    """F1 of the shared words (bags of words, as SQuAD does); two empty texts agree."""
    return 2 * (Counter(p) & Counter(e)).total() / (len(p) + len(e)) if p or e else 1.0


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[str]) -> Any:
    """ROUGE (Lin 2004, as F1, no stemming) by rouge-score, with words as here: its own are of ASCII
    letters alone. Two empty texts agree but in pairs."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=str.split))

    def score(p: list[str], e: list[str]) -> float:
        if not p and not e:
            return float(kind != "rouge2")
        return scorer.score(" ".join(e), " ".join(p))[kind].fmeasure

    return _mean(score, predictions, references)


def _bleu(predictions: Sequence[str], references: Sequence[str]) -> Any:
    """BLEU-4 of the whole set with one reference each (Papineni et al. 2002), case-sensitive, by
    sacreBLEU.

    Tokens are words and single punctuation marks. An order without any match counts as 1/2, 1/4,
    ... matches (the first, second, ... such order; sacreBLEU's default smoothing); orders that no
    prediction is long enough for are left out. 0.0 if no word matches.
    """
    from sacrebleu import BLEU

    words = [
        [" ".join(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
        for texts in (predictions, references)
    ]
    metric = BLEU(tokenize="none", effective_order=True, force=True)
    return metric.corpus_score(words[0], [words[1]]).score / 100


METRICS = {
    "accuracy": Metric("classification", _accuracy),
    "f1": Metric("classification", partial(_f1, classes=[1])),  # of the second class
    # of the references' classes
    "macro_f1": Metric("classification", lambda p, e: _f1(p, e, np.unique(e))),
    "matthews": Metric("classification", partial(_correlation, "matthews")),
    "pearson": Metric("regression", partial(_correlation, "pearsonr")),
    "spearman": Metric("regression", partial(_correlation, "spearmanr")),
    "token_f1": Metric("generation", partial(_mean, _shared)),
    "exact_match": Metric("generation", partial(_mean, lambda p, e: float(p == e))),
    "bleu": Metric("generation", _bleu, "sacrebleu"),
    "rouge1": Metric("generation", partial(_rouge, "rouge1"), "rouge_score"),
    "rouge2": Metric("generation", partial(_rouge, "rouge2"), "rouge_score"),
    "rouge_l": Metric("generation", partial(_rouge, "rougeL"), "rouge_score"),
}
