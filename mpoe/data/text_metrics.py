"""Metrics of generated texts: each takes N predicted and N expected texts and returns a fraction, not per cent.

All but BLEU compare lower-case words without punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

BLEU_ORDER = 4


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are equal after lower-casing and dropping punctuation and repeated blanks."""
    return _mean(predicted == expected for predicted, expected in _word_pairs(predictions, references))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over texts of the F1 of the shared words (bags of words, as SQuAD does)."""
    return rouge1(predictions, references)


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-1: mean over texts of the F1 of shared words (Lin 2004, section 2, as F1; no stemming)."""
    return _mean(_f1((p & e).total(), p.total(), e.total()) for p, e in _ngram_pairs(predictions, references, 1))


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-2: the same of shared pairs of neighbouring words; 0 where neither text has a pair."""
    pairs = _ngram_pairs(predictions, references, 2)
    return _mean(_f1((p & e).total(), p.total(), e.total()) if p or e else 0.0 for p, e in pairs)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L: mean over texts of the F1 of their longest common subsequence of words (Lin 2004, section 3.1)."""
    return _mean(_f1(_common_length(p, e), len(p), len(e)) for p, e in _word_pairs(predictions, references))


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole set with one reference each (Papineni et al. 2002), case-sensitive.

    Tokens are words and single punctuation marks. An order without any match counts as 1/2, 1/4, ... matches (the
    first, second, ... such order; as sacreBLEU's default smoothing does); orders that no prediction is long enough for
    are left out. 0.0 if no word matches.
    """
    _check_texts(predictions, references)
    pairs = [(_tokens(p), _tokens(e)) for p, e in zip(predictions, references, strict=True)]
    logs: list[float] = []
    missed = 0
    for order in range(1, BLEU_ORDER + 1):
        grams = [(_ngrams(p, order), _ngrams(e, order)) for p, e in pairs]
        total = sum(predicted.total() for predicted, _ in grams)
        matches: float = sum((predicted & expected).total() for predicted, expected in grams)
        if not total:
            break
        if not matches:
            if order == 1:
                return 0.0
            missed += 1
            matches = 0.5**missed
        logs.append(math.log(matches / total))
    if not logs:
        return 0.0
    length, wanted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1.0 - wanted / length))


def text_words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return re.findall(r"\w+", text.lower())


def same_length(predictions: Sequence | Any, references: Sequence | Any) -> None:
    """Refuse inputs of unequal or no length."""
    if len(predictions) != len(references):
        raise ValueError(f"predictions and references differ in length: {len(predictions)} and {len(references)}")
    if not len(references):
        raise ValueError("predictions and references are empty; a metric needs at least one item")


def _check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    same_length(predictions, references)
    for kind, texts in (("predictions", predictions), ("references", references)):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"{kind} must be texts; got {type(text).__name__}")


def _word_pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    _check_texts(predictions, references)
    return [(text_words(p), text_words(e)) for p, e in zip(predictions, references, strict=True)]


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _ngram_pairs(
    predictions: Sequence[str], references: Sequence[str], order: int
) -> list[tuple[Counter[tuple[str, ...]], Counter[tuple[str, ...]]]]:
    return [(_ngrams(p, order), _ngrams(e, order)) for p, e in _word_pairs(predictions, references)]


def _f1(shared: int, predicted: int, expected: int) -> float:
    """Harmonic mean of precision and recall; two empty sides agree."""
    return 2.0 * shared / (predicted + expected) if predicted or expected else 1.0


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = row
        row = [0]
        for index, other in enumerate(second):
            row.append(previous[index] + 1 if word == other else max(previous[index + 1], row[index]))
    return row[-1]


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
