"""The scores of an answer that ignores the input, and whether a model's answers look like one.

A score alone says little: if nine of ten labels are equal, a constant answer reaches 90%.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from mpoe.data.task import Task

# A share of equal answers that counts as collapsed, unless the targets are nearly as uniform.
_MOST, _MORE = 0.95, 0.1
_FEW = 5  # ratio of distinct targets to distinct answers


def constant_answer(task: Task, targets: Sequence[str]) -> str:
    """The best constant answer for all items: the most frequent target (on ties the first); for numbers their mean.

    Args:
        targets: the expected texts ``[N]``, N >= 1.

    Raises:
        ValueError: there are no targets.
    """
    if not targets:
        raise ValueError(f"targets of task {task.name} must hold at least one text; got none")
    if task.kind == "regression":
        return repr(sum(float(target) for target in targets) / len(targets))
    return Counter(targets).most_common(1)[0][0]


def baseline_scores(task: Task, targets: Sequence[str]) -> dict[str, float]:
    """Every metric of a task with `constant_answer` for every item. Correlations of a constant are 0."""
    return task.score([constant_answer(task, targets)] * len(targets), targets)


def frequency_perplexity(tokens: Iterable[int]) -> float:
    """Perplexity per token of guessing every token by its frequency among ``tokens``: exp of their entropy."""
    counts = Counter(tokens)
    total = counts.total()
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values())) if total else math.nan


def collapse(answers: Sequence[str], targets: Sequence[str]) -> str | None:
    """A sentence if ``answers`` ``[N]`` have collapsed to few values while ``targets`` ``[N]`` have not, else None."""
    if len(answers) < 2 or len(set(targets)) < 2:
        return None
    counts = Counter(answers)
    answer, most = counts.most_common(1)[0]
    share, expected = most / len(answers), Counter(targets)[answer] / len(targets)
    shown = repr(answer if len(answer) <= 40 else answer[:37] + "...")
    if len(counts) == 1:
        return f"all {len(answers)} answers are {shown}, which {expected:.0%} of the expected ones are"
    if share >= _MOST and share - expected > _MORE:
        return f"{share:.0%} of the {len(answers)} answers are {shown}, which {expected:.0%} of the expected ones are"
    if len(counts) * _FEW <= len(set(targets)):
        return f"the {len(answers)} answers have {len(counts)} different values, the expected ones {len(set(targets))}"
    return None
