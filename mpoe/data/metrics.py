"""Metrics in numpy: each takes predictions and references of equal length and returns a fraction, not per cent.

Those of generated texts are in :mod:`mpoe.data.text_metrics`. Metrics of the embedded tasks and of a user's own folder
need no further package; the area under the curve, BLEU and ROUGE need the extra ``metrics``. Undefined cases return 0.0
for correlations with a constant input, since a model that always answers the same has learned nothing, and raise where
no value would be meaningful (only one class for the area under the curve).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mpoe.data.names import lookup
from mpoe.data.text_metrics import bleu, exact_match, library, rouge1, rouge2, rouge_l, same_length, token_f1


def accuracy(predictions: Sequence, references: Sequence) -> float:
    """Share of exactly equal labels. Inputs: [N] numbers or texts."""
    predicted, expected = _labels(predictions, references)
    return float(np.mean(predicted == expected))


def f1(predictions: Sequence, references: Sequence, positive: object = 1) -> float:
    """F1 of the class ``positive``: 2 TP / (2 TP + FP + FN); 0.0 if the class is neither predicted nor present."""
    predicted, expected = _labels(predictions, references)
    true_positive = int(np.sum((predicted == positive) & (expected == positive)))
    total = int(np.sum(predicted == positive)) + int(np.sum(expected == positive))
    return 2.0 * true_positive / total if total else 0.0


def macro_f1(predictions: Sequence, references: Sequence) -> float:
    """Unweighted mean of the F1 of every class among the references."""
    _, expected = _labels(predictions, references)
    return float(np.mean([f1(predictions, references, positive) for positive in np.unique(expected)]))


def matthews(predictions: Sequence, references: Sequence) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004, eq. 8); 0.0 if either side is constant."""
    predicted, expected = _labels(predictions, references)
    classes = np.unique(np.concatenate([predicted, expected]))
    p = (predicted[:, None] == classes).astype(np.float64)  # [N, C]
    e = (expected[:, None] == classes).astype(np.float64)
    n = len(predicted)
    covariance = n * float(np.sum(p * e)) - float(p.sum(0) @ e.sum(0))
    spread = (n * n - float(np.sum(p.sum(0) ** 2))) * (n * n - float(np.sum(e.sum(0) ** 2)))
    return covariance / math.sqrt(spread) if spread > 0 else 0.0


def pearson(predictions: Sequence | np.ndarray, references: Sequence | np.ndarray) -> float:
    """Pearson correlation of two [N] number sequences; 0.0 if either is constant."""
    x, y = _numbers(predictions, references)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def spearman(predictions: Sequence, references: Sequence) -> float:
    """Spearman rank correlation (Pearson of the ranks, ties share their mean rank); 0.0 if either is constant."""
    x, y = _numbers(predictions, references)
    return pearson(ranks(x), ranks(y))


def roc_auc(scores: Sequence, references: Sequence) -> float:
    """Area under the ROC curve of [N] scores for references 0/1, by scikit-learn.

    Raises:
        ValueError: references are not 0/1, or only one of them occurs.
    """
    score, expected = _numbers(scores, references)
    if set(expected) != {0.0, 1.0}:
        raise ValueError(f"references must hold both 0 and 1 and nothing else; got {_few(np.unique(expected))}")
    return float(library("sklearn.metrics").roc_auc_score(expected, score))


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
    mean = float(loss @ weight / weight.sum())
    return math.exp(mean) if mean < 700 else math.inf


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1..N of an [N] array; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        *(accuracy, f1, macro_f1, matthews, pearson, spearman, roc_auc),
        *(exact_match, token_f1, bleu, rouge1, rouge2, rouge_l),
    )
}


_LIBRARIES = {"roc_auc": "sklearn", "bleu": "sacrebleu", "rouge1": "rouge_score"}
_LIBRARIES |= dict.fromkeys(("rouge2", "rouge_l"), "rouge_score")


def get_metric(name: str) -> Callable[..., float]:
    """The metric called ``name``.

    Raises:
        ValueError: there is none; the message suggests similar names.
        RuntimeError: it needs a package of the extra ``metrics`` that is not installed.
    """
    metric = lookup(METRICS, name, "metric")
    if name in _LIBRARIES:
        library(_LIBRARIES[name])
    return metric


def _labels(predictions: Sequence, references: Sequence) -> tuple[np.ndarray, np.ndarray]:
    same_length(predictions, references)
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.ndim != 1 or expected.ndim != 1:
        raise ValueError(f"predictions and references must be [N]; got {predicted.shape} and {expected.shape}")
    if (predicted.dtype.kind in "US") != (expected.dtype.kind in "US"):
        raise TypeError(
            f"predictions are {predicted.dtype} and references {expected.dtype}; both texts or both numbers"
        )
    return predicted, expected


def _numbers(predictions: Sequence | np.ndarray, references: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    same_length(predictions, references)
    try:
        x, y = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"predictions and references must be numbers: {error}") from error
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"predictions and references must be [N]; got {x.shape} and {y.shape}")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("predictions and references must be finite; got NaN or infinity")
    return x, y


def _few(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return shown + (", ..." if len(values) > 5 else "")
