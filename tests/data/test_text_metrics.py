"""Metrics of generated texts against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mpoe.data import text_metrics as m


def test_exact_match_and_shared_words() -> None:
    assert m.exact_match(["Get  payload.", "x"], ["get payload", "y"]) == 0.5
    # "get the payload" against "get payload": 2 shared of 3 and 2 -> 4/5; "" against "y" -> 0
    assert m.token_f1(["get the payload", ""], ["get payload", "y"]) == pytest.approx(0.4)
    assert m.token_f1(["a a"], ["a"]) == pytest.approx(2 / 3)
    assert m.token_f1(["..."], ["!"]) == 1.0  # nothing asked, nothing said


def test_rouge_by_hand() -> None:
    predicted, expected = ["the cat sat on the mat"], ["the cat lay on a mat"]
    # words: the, cat, on, mat shared (one "the" is surplus): 2*4 / 12
    assert m.rouge1(predicted, expected) == pytest.approx(2 * 4 / 12)
    # pairs: only "the cat" is shared, 5 and 5 pairs
    assert m.rouge2(predicted, expected) == pytest.approx(2 * 1 / 10)
    # longest common subsequence: the cat on mat
    assert m.rouge_l(predicted, expected) == pytest.approx(2 * 4 / 12)
    # order matters to ROUGE-L alone: "b a" and "a b" share two words and a subsequence of one
    assert m.rouge1(["b a"], ["a b"]) == 1.0
    assert m.rouge_l(["b a"], ["a b"]) == pytest.approx(2 * 1 / 4)
    assert m.rouge2(["one"], ["one"]) == 0.0  # no pair on either side
    assert m.rouge2(["one two"], ["one"]) == 0.0
    assert m.rouge_l(["a b c", "x"], ["a c", "y"]) == pytest.approx((2 * 2 / 5 + 0) / 2)


def test_bleu_by_hand() -> None:
    same = ["the cat sat on the mat"]
    assert m.bleu(same, same) == pytest.approx(1.0)
    # 1: the(1 of 2 kept) cat on mat -> 4/6; 2: "the cat" -> 1/5; 3 and 4 have none -> 1/2 of 4, 1/4 of 3
    expected = (4 / 6 * 1 / 5 * 0.5 / 4 * 0.25 / 3) ** 0.25
    assert m.bleu(same, ["the cat lay on a mat"]) == pytest.approx(expected)
    # too short by a half: exp(1 - 8/4)
    assert m.bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(math.exp(-1.0))
    # counts of the set, not a mean of sentences: 3 of 4 words, 1 of 2 pairs; no longer n-grams at all
    assert m.bleu(["a b", "c d"], ["a b", "c x"]) == pytest.approx(math.sqrt(3 / 4 * 1 / 2))
    assert m.bleu(["A b"], ["a b"]) < 1.0  # case counts
    assert m.bleu(["a, b"], ["a , b"]) == pytest.approx(1.0)  # marks are tokens of their own
    assert m.bleu(["x"], ["y"]) == 0.0
    assert m.bleu([""], ["y"]) == 0.0


@pytest.mark.parametrize("metric", [m.exact_match, m.token_f1, m.rouge1, m.rouge2, m.rouge_l, m.bleu])
def test_refusals(metric) -> None:
    with pytest.raises(TypeError, match="predictions must be texts; got int"):
        metric([1], ["a"])
    with pytest.raises(TypeError, match="references must be texts; got NoneType"):
        metric(["a"], [None])
