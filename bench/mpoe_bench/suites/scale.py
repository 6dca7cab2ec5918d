"""Sizes of a run, and the peers that every feed-forward case may have."""

from __future__ import annotations

from dataclasses import dataclass

from mpoe_bench.targets import GROUPED, LOOP

DENSE_PEERS = (
    LOOP,
    GROUPED,
    "dense experts, one-hot einsum",
    "transformers Switch",
)
GPU_PEERS = ("ScatterMoE", "SonicMoE", "QuACK grouped GEMM", "Liger SwiGLU as ReLU, 1.5x FLOPs")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: the real ones, or tiny ones for tests.

    Attributes:
        model, hidden: sizes of the FFN.
        many_tokens, few_tokens: of a training batch and of a small batch.
        few_experts, many_experts: E.
        shapes: (real name, name used instead) pairs.
        step_tokens: batch and sequence length of a train step.
        vocabulary: of the embedding.
        judged: whether the choice is judged on its own cases, not on a few sizes made for a test.
    """

    model: int = 768
    hidden: int = 3072
    many_tokens: int = 2048
    few_tokens: int = 64
    few_experts: int = 8
    many_experts: int = 64
    shapes: tuple[tuple[str, str], ...] = ()
    step_tokens: tuple[int, int] = (4, 128)
    vocabulary: int = 32128
    judged: bool = True

    def shape(self, name: str) -> str:
        return dict(self.shapes).get(name, name)


SCALES = {
    "real": Scale(),
    "tiny": Scale(
        *(48, 96, 32, 8, 4, 8),
        shapes=(("light_64", "light_8"), ("paper_64", "paper_6"), ("paper_32", "paper_4")),
        step_tokens=(2, 8),
        vocabulary=64,
        judged=False,
    ),
}
