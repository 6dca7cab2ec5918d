"""Means, deviations, and differences paired by seed, with a verdict on their significance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for a single number) and count of some numbers."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        return cls(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95% confidence interval; infinite for a single number."""
        if self.deviation is None:
            return math.inf
        return T_95[min(self.count - 1, len(T_95)) - 1] * self.deviation / math.sqrt(self.count)

    def text(self, digits: int = 3, sign: bool = False) -> str:
        number = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return number if self.deviation is None else f"{number} ± {self.deviation:.{digits}f}"


def score_of(record: Mapping[str, Any]) -> float:
    """The score on the test split, or on the validation split if the run did not read the test split."""
    return record["test"] if "test" in record else record["validation"]


def gain(records: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], lower_is_better: bool) -> Spread:
    """How much better than ``base``, seed by seed (positive = better), over the seeds that both have.

    Raises:
        ValueError: they have no seed in common.
    """
    reference = {record["budget"]["seed"]: score_of(record) for record in base}
    sign = -1.0 if lower_is_better else 1.0
    common = [r for r in records if r["budget"]["seed"] in reference]
    if not common:
        raise ValueError("records must share a seed with those they are compared with; they share none")
    return Spread.of([sign * (score_of(r) - reference[r["budget"]["seed"]]) for r in common])


def verdict(difference: Spread) -> str:
    """Whether a paired difference is more than the variation between seeds explains, at 95%."""
    if difference.deviation is None:
        return "one seed"
    if abs(difference.mean) <= difference.half_width:
        return "not significant"
    return "better" if difference.mean > 0 else "worse"
