"""Metrics: each takes predictions and references of equal length and returns a fraction, not per cent.

Metrics of the embedded tasks and of a user's own folder need no further package; the area under the curve, BLEU and
ROUGE need the extra ``metrics``. Undefined cases return 0.0 for correlations with a constant input, since a model that
always answers the same has learned nothing, and raise where no value would be meaningful (only one class for the area
under the curve). All metrics of generated texts but BLEU compare lower-case words without punctuation.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mpoe.data.mappings import lookup

# ------------------------------------------------------------------- labels and numbers


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
    p, e = ((side[:, None] == classes).astype(np.float64) for side in (predicted, expected))  # [N, C]
    n = len(predicted)
    covariance = n * float(np.sum(p * e)) - float(p.sum(0) @ e.sum(0))
    spread = math.prod(n * n - float(np.sum(side.sum(0) ** 2)) for side in (p, e))
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


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks 1..N of an [N] array; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def roc_auc(scores: Sequence, references: Sequence) -> float:
    """Area under the ROC curve of [N] scores for references 0/1, by scikit-learn.

    Raises:
        ValueError: references are not 0/1, or only one of them occurs.
    """
    score, expected = _numbers(scores, references)
    if set(expected) != {0.0, 1.0}:
        shown = ", ".join(f"{value:g}" for value in np.unique(expected)[:5])
        raise ValueError(f"references must hold both 0 and 1 and nothing else; got {shown}")
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


# ----------------------------------------------------------------------- generated texts


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are equal after lower-casing and dropping punctuation and repeated blanks."""
    return _mean(predicted == expected for predicted, expected in _word_pairs(predictions, references))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over texts of the F1 of the shared words (bags of words, as SQuAD does); two empty texts agree."""
    pairs = _word_pairs(predictions, references)
    shared = [2 * (Counter(p) & Counter(e)).total() for p, e in pairs]
    return _mean(n / (len(p) + len(e)) if p or e else 1.0 for n, (p, e) in zip(shared, pairs, strict=True))


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-1: mean over texts of the F1 of shared words (Lin 2004, section 2, as F1; no stemming)."""
    return _rouge("rouge1", predictions, references)


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-2: the same of shared pairs of neighbouring words; 0 where neither text has a pair."""
    return _rouge("rouge2", predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L: mean over texts of the F1 of their longest common subsequence of words (Lin 2004, section 3.1)."""
    return _rouge("rougeL", predictions, references)


def _rouge(kind: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """By rouge-score, with words as here: its own are of ASCII letters alone. Two empty texts agree but in pairs."""
    pairs = _word_pairs(predictions, references)
    scorer = library("rouge_score.rouge_scorer").RougeScorer([kind], tokenizer=_Split())
    return _mean(
        scorer.score(" ".join(e), " ".join(p))[kind].fmeasure if p or e else float(kind != "rouge2") for p, e in pairs
    )


class _Split:
    """Words that were joined by blanks, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole set with one reference each (Papineni et al. 2002), case-sensitive, by sacreBLEU.

    Tokens are words and single punctuation marks. An order without any match counts as 1/2, 1/4, ... matches (the
    first, second, ... such order; sacreBLEU's default smoothing); orders that no prediction is long enough for are left
    out. 0.0 if no word matches.
    """
    _check_texts(predictions, references)
    words = [[" ".join(re.findall(r"\w+|[^\w\s]", text)) for text in texts] for texts in (predictions, references)]
    metric = library("sacrebleu").BLEU(tokenize="none", effective_order=True, force=True)
    return metric.corpus_score(words[0], [words[1]]).score / 100


METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        *(accuracy, f1, macro_f1, matthews, pearson, spearman, roc_auc),
        *(exact_match, token_f1, bleu, rouge1, rouge2, rouge_l),
    )
}
_LIBRARIES = {"roc_auc": "sklearn", "bleu": "sacrebleu"}
_LIBRARIES |= dict.fromkeys(("rouge1", "rouge2", "rouge_l"), "rouge_score")


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


def library(module: str) -> Any:
    """A package of the extra ``metrics``, imported.

    Raises:
        RuntimeError: it is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f'this metric needs the package {package}: pip install "mpoe[metrics]"')
    return importlib.import_module(module)


# ------------------------------------------------------------------------------- checks


def _same_length(predictions: Sequence | np.ndarray, references: Sequence | np.ndarray) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"predictions and references differ in length: {len(predictions)} and {len(references)}")
    if not len(references):
        raise ValueError("predictions and references are empty; a metric needs at least one item")


def _arrays(predictions: Any, references: Any, kind: Any = None) -> tuple[np.ndarray, np.ndarray]:
    _same_length(predictions, references)
    try:
        x, y = np.asarray(predictions, dtype=kind), np.asarray(references, dtype=kind)
    except (TypeError, ValueError) as error:
        raise TypeError(f"predictions and references must be numbers: {error}") from error
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"predictions and references must be [N]; got {x.shape} and {y.shape}")
    return x, y


def _labels(predictions: Sequence, references: Sequence) -> tuple[np.ndarray, np.ndarray]:
    predicted, expected = _arrays(predictions, references)
    if (predicted.dtype.kind in "US") != (expected.dtype.kind in "US"):
        raise TypeError(
            f"predictions are {predicted.dtype} and references {expected.dtype}; both texts or both numbers"
        )
    return predicted, expected


def _numbers(predictions: Sequence | np.ndarray, references: Sequence | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = _arrays(predictions, references, np.float64)
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("predictions and references must be finite; got NaN or infinity")
    return x, y


def _check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    _same_length(predictions, references)
    for kind, texts in (("predictions", predictions), ("references", references)):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{kind} must be texts; got {type(text).__name__}")


def _word_pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    _check_texts(predictions, references)
    words = ([re.findall(r"\w+", text.lower()) for text in texts] for texts in (predictions, references))
    return list(zip(*words, strict=True))


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
