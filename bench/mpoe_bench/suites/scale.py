"""Sizes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: the real ones, or tiny ones for tests.

    Attributes:
        model: size of the model; the hidden size is four times as large.
        many_tokens, few_tokens: of a training batch and of a small batch.
        few_experts, many_experts: E.
        shapes: real name -> name used instead.
        step_tokens: batch and sequence length of a train step.
        vocabulary: of the embedding.
        judged: whether targets count, and the choice is judged on its own cases, not on a few sizes made for a test.
    """

    model: int = 768
    many_tokens: int = 2048
    few_tokens: int = 64
    few_experts: int = 8
    many_experts: int = 64
    shapes: Mapping[str, str] = field(default_factory=dict)
    step_tokens: tuple[int, int] = (4, 128)
    vocabulary: int = 32128
    judged: bool = True


TINY_SHAPES = {"light_64": "light_8", "paper_64": "paper_6", "paper_32": "paper_4"}
SCALES = {"real": Scale(), "tiny": Scale(48, 32, 8, 4, 8, TINY_SHAPES, (2, 8), 64, judged=False)}
