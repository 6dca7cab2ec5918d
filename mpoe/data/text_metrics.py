"""Metrics of generated texts: each takes N predicted and N expected texts and returns a fraction, not per cent.

All but BLEU compare lower-case words without punctuation. BLEU and ROUGE need the extra ``metrics``.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


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
        return text.split(" ") if text else []


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of the whole set with one reference each (Papineni et al. 2002), case-sensitive, by sacreBLEU.

    Tokens are words and single punctuation marks. An order without any match counts as 1/2, 1/4, ... matches (the
    first, second, ... such order; sacreBLEU's default smoothing); orders that no prediction is long enough for are left
    out. 0.0 if no word matches.
    """
    _check_texts(predictions, references)
    predicted, expected = ([" ".join(_tokens(text)) for text in texts] for texts in (predictions, references))
    metric = library("sacrebleu").BLEU(tokenize="none", effective_order=True, force=True)
    return metric.corpus_score(predicted, [expected]).score / 100


def library(module: str) -> Any:
    """A package of the extra ``metrics``, imported.

    Raises:
        RuntimeError: it is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f'this metric needs the package {package}: pip install "mpoe[metrics]"')
    return importlib.import_module(module)


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


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)
