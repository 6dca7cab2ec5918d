"""Early warnings for the user: experts that take most tokens or none, learning rates far from those that worked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.training.arguments import MPOETrainingArguments
from mpoe.training.rates import recommended_for

FAR = 10.0  # factor above or below

WINDOW = 100  # optimizer steps over which an expert's tokens are counted
_TOKENS = 50  # per expert of a layer: with fewer tokens in a window, zero may be chance


def rate_advice(model: Any, args: MPOETrainingArguments) -> list[str]:
    """A sentence for every base rate that differs by more than a factor of `FAR` from what worked
    (`mpoe.training.rates`).

    Empty when training from scratch, where good rates vary more, and for families without a known rate.
    """
    found = recommended_for(model, args.regime)
    if found is None or args.regime != "finetune":
        return []
    usual = found.rate
    rates = {"learning_rate": args.learning_rate}
    if args.mpo_lr is not None:
        rates["mpo_lr"] = args.mpo_lr
    return [
        f"{name} {rate:g} is {_times(rate / usual)} the {usual:g} to start from ({found.why})"
        "; see docs/fine_tuning.md, Rates"
        for name, rate in rates.items()
        if rate > 0 and not 1 / FAR <= rate / usual * (1 + 1e-9) <= FAR * (1 + 2e-9)
    ]


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio > 1 else f"1/{1 / ratio:,.0f} of"


class LoadWatch:
    """Counts the tokens of every expert over at least `WINDOW` steps, and warns once per layer about unusual loads.

    Args:
        names: names of the layers; without them layers are numbered.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = names
        self._counts: Tensor | None = None
        self._start = 0
        self._said: set[tuple[int, str]] = set()

    def start(self, step: int) -> None:
        """Start at optimizer step ``step`` (the checkpoint's, in a resumed run)."""
        self._counts, self._start = None, step

    def add(self, counts: Tensor, step: int) -> list[str]:
        """Add the tokens per expert ``[layers, E]`` since the last call, up to optimizer step ``step``.

        Returns:
            Sentences, at the end of a window, about an expert that took most of its layer's tokens (more than half plus
            half of the even share: 75% of 2 experts, 56% of 8), and about experts that took none.
        """
        counts = counts.detach().cpu()
        self._counts = counts if self._counts is None else self._counts + counts
        steps = step - self._start
        if steps < WINDOW:
            return []
        total, self._counts, self._start = self._counts, None, step
        return [text for layer, row in enumerate(total) for text in self._remarks(layer, row, steps)]

    def _remarks(self, layer: int, row: Tensor, steps: int) -> list[str]:
        experts, tokens = len(row), int(row.sum())
        if experts < 2 or tokens < _TOKENS * experts:
            return []
        found = []
        most = int(row.argmax())
        share, idle = int(row[most]) / tokens, int(torch.count_nonzero(row == 0))
        if share > 0.5 + 0.5 / experts:
            found.append(("most", f"expert {most} took {share:.0%} of the tokens"))
        if idle:
            found.append(("none", f"{idle} of {experts} experts took no token"))
        new = [(kind, text) for kind, text in found if (layer, kind) not in self._said]
        self._said |= {(layer, kind) for kind, _ in new}
        name = self._names[layer] if layer < len(self._names) else f"mixture layer {layer}"
        return [
            f"{name}: {text} in {steps} steps; balance_loss_weight, jitter or a lower router_lr_scale spread them"
            for _, text in new
        ]
