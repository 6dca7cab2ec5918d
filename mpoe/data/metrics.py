"""Metrics: each takes predictions and references of equal length and returns a fraction, not per cent.

scikit-learn and scipy count labels and numbers, the packages of the extra ``metrics`` BLEU and ROUGE. Undefined cases
return 0.0 (F1 of a class that is nowhere, correlations with a constant input), since a model that always answers the
same has learned nothing. All metrics of generated texts but BLEU compare lower-case words without punctuation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mpoe.data.mappings import lookup

Metric = Callable[[Sequence, Sequence], float]
METRICS: dict[str, Metric] = {}


def _metric(prepare: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Callable[[Any, Any], Any]], Metric]:
    """Add a function to `METRICS` by its name; ``prepare`` checks and converts what it is given."""

    def add(function: Callable[[Any, Any], Any]) -> Metric:
        @functools.wraps(function)
        def metric(predictions: Sequence, references: Sequence) -> float:
            if len(predictions) != len(references):
                raise ValueError(
                    f"predictions and references differ in length: {len(predictions)} and {len(references)}"
                )
            if not len(references):
                raise ValueError("predictions and references are empty; a metric needs at least one item")
            return float(function(*prepare(predictions, references)))

        METRICS[function.__name__] = metric
        return metric

    return add


def get_metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        ValueError: there is none; the message suggests similar names.
        RuntimeError: it needs a package of the extra ``metrics`` that is not installed.
    """
    metric = lookup(METRICS, name, "metric")
    if name in _LIBRARIES:
        library(_LIBRARIES[name])
    return metric


# what needs a package of the extra
_LIBRARIES = {"bleu": "sacrebleu", **dict.fromkeys(("rouge1", "rouge2", "rouge_l"), "rouge_score")}


def library(module: str) -> Any:
    """A package of the extra ``metrics``, imported.

    Raises:
        RuntimeError: it is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f'this metric needs the package {package}: pip install "mpoe[metrics]"')
    return importlib.import_module(module)


# ------------------------------------------------------------------- labels and numbers


def _arrays(predictions: Any, references: Any, kind: Any = None) -> tuple[np.ndarray, np.ndarray]:
    try:
        x, y = np.asarray(predictions, dtype=kind), np.asarray(references, dtype=kind)
    except (TypeError, ValueError) as error:
        raise TypeError(f"predictions and references must be numbers: {error}") from error
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"predictions and references must be [N]; got {x.shape} and {y.shape}")
    return x, y


def _labels(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, expected = _arrays(predictions, references)
    if (predicted.dtype.kind in "US") != (expected.dtype.kind in "US"):
        raise TypeError(
            f"predictions are {predicted.dtype} and references {expected.dtype}; both texts or both numbers"
        )
    return predicted, expected


def _numbers(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = _arrays(predictions, references, np.float64)
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("predictions and references must be finite; got NaN or infinity")
    return x, y


def _f1(predicted: np.ndarray, expected: np.ndarray, classes: Any) -> Any:
    """Mean over ``classes`` of 2 TP / (2 TP + FP + FN)."""
    from sklearn.metrics import f1_score

    return f1_score(expected, predicted, labels=classes, average="macro", zero_division=0.0)


@_metric(_labels)
def accuracy(predictions: np.ndarray, references: np.ndarray) -> Any:
    """Share of exactly equal labels. Inputs: [N] numbers or texts."""
    return np.mean(predictions == references)


@_metric(_labels)
def f1(predictions: np.ndarray, references: np.ndarray) -> Any:
    """F1 of the class 1."""
    return _f1(predictions, references, [1])


@_metric(_labels)
def macro_f1(predictions: np.ndarray, references: np.ndarray) -> Any:
    """Unweighted mean of the F1 of every class among the references."""
    return _f1(predictions, references, np.unique(references))


@_metric(_labels)
def matthews(predictions: np.ndarray, references: np.ndarray) -> Any:
    """Matthews correlation of any number of classes (Gorodkin 2004, eq. 8)."""
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions, references) else matthews_corrcoef(references, predictions)


@_metric(_numbers)
def pearson(predictions: np.ndarray, references: np.ndarray) -> Any:
    """Pearson correlation of two [N] number sequences."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions, references) else pearsonr(predictions, references).statistic


@_metric(_numbers)
def spearman(predictions: np.ndarray, references: np.ndarray) -> Any:
    """Spearman rank correlation (Pearson of the ranks, ties share their mean rank)."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, references) else spearmanr(predictions, references).statistic


def _constant(*sides: np.ndarray) -> bool:
    return any(len(np.unique(side)) == 1 for side in sides)


def perplexity(losses: Sequence, weights: Sequence | None = None) -> float:
    """exp of the mean of [N] losses in nats; ``weights`` are the token counts behind each loss (default: equal)."""
    loss = np.asarray(losses, dtype=np.float64)
    if loss.ndim != 1 or not len(loss):
        raise ValueError(f"losses must be a non-empty sequence of numbers; got shape {loss.shape}")
    weight = np.ones_like(loss) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != loss.shape or np.any(weight < 0) or weight.sum() <= 0:
        raise ValueError(f"weights must be {len(loss)} numbers >= 0 that are not all 0; got shape {weight.shape}")
    if not np.all(np.isfinite(loss)):
        raise ValueError("losses must be finite; got NaN or infinity")
    mean = float(np.average(loss, weights=weight))
    return math.exp(mean) if mean < 700 else math.inf


# ----------------------------------------------------------------------- generated texts


def _texts(predictions: Sequence[str], references: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    for kind, texts in (("predictions", predictions), ("references", references)):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{kind} must be texts; got {type(text).__name__}")
    return predictions, references


def _words(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    first, second = ([re.findall(r"\w+", x.lower()) for x in texts] for texts in _texts(predictions, references))
    return first, second


def _mean(values: Iterable[float]) -> Any:
    return np.mean([float(value) for value in values])


@_metric(_words)
def exact_match(predictions: list[list[str]], references: list[list[str]]) -> Any:
    """Share of texts that are equal after lower-casing and dropping punctuation and repeated blanks."""
    return _mean(p == e for p, e in zip(predictions, references, strict=True))


@_metric(_words)
def token_f1(predictions: list[list[str]], references: list[list[str]]) -> Any:
    """Mean over texts of the F1 of the shared words (bags of words, as SQuAD does); two empty texts agree."""
    pairs = zip(predictions, references, strict=True)
    return _mean(2 * (Counter(p) & Counter(e)).total() / (len(p) + len(e)) if p or e else 1.0 for p, e in pairs)


@_metric(_words)
def rouge1(predictions: list[list[str]], references: list[list[str]]) -> Any:
    """ROUGE-1: mean over texts of the F1 of shared words (Lin 2004, section 2, as F1; no stemming)."""
    return _rouge("rouge1", predictions, references)


@_metric(_words)
def rouge2(predictions: list[list[str]], references: list[list[str]]) -> Any:
    """ROUGE-2: the same of shared pairs of neighbouring words; 0 where neither text has a pair."""
    return _rouge("rouge2", predictions, references)


@_metric(_words)
def rouge_l(predictions: list[list[str]], references: list[list[str]]) -> Any:
    """ROUGE-L: mean over texts of the F1 of their longest common subsequence of words (Lin 2004, section 3.1)."""
    return _rouge("rougeL", predictions, references)


def _rouge(kind: str, predictions: list[list[str]], references: list[list[str]]) -> Any:
    """By rouge-score, with words as here: its own are of ASCII letters alone. Two empty texts agree but in pairs."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], tokenizer=_Split())
    return _mean(
        scorer.score(" ".join(e), " ".join(p))[kind].fmeasure if p or e else float(kind != "rouge2")
        for p, e in zip(predictions, references, strict=True)
    )


class _Split:
    """Words that were joined by blanks, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


@_metric(_texts)
def bleu(predictions: Sequence[str], references: Sequence[str]) -> Any:
    """BLEU-4 of the whole set with one reference each (Papineni et al. 2002), case-sensitive, by sacreBLEU.

    Tokens are words and single punctuation marks. An order without any match counts as 1/2, 1/4, ... matches (the
    first, second, ... such order; sacreBLEU's default smoothing); orders that no prediction is long enough for are left
    out. 0.0 if no word matches.
    """
    words = [[" ".join(re.findall(r"\w+|[^\w\s]", text)) for text in texts] for texts in (predictions, references)]
    metric = library("sacrebleu").BLEU(tokenize="none", effective_order=True, force=True)
    return metric.corpus_score(words[0], [words[1]]).score / 100
