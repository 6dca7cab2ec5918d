"""The evidence of a whole request: routers that join a token's logits with their mean over the
request so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Evidence:
    """Sums over the tokens of a batch of requests, of those before a model call and of its own.

    A token counts from its own logits on; padding does not count.

    Attributes:
        sums_before: float32 ``[B, L, E]``, of the logits of the L layers in order of execution;
            ``None`` = a call that begins its requests.
        count_before: tokens that they are of, float32 ``[B, 1]``, or ``None``.
        sums: float32 ``[B, S, E]`` of every layer so far, up to each of the call's S tokens.
        count: float32 ``[B, S]``, or ``None`` before the first layer.
    """

    sums_before: Tensor | None = None
    count_before: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    count: Tensor | None = None

    def mean(self, logits: Tensor, counted: Tensor | None) -> Tensor:
        """The mean of the next layer's logits ``[B, S, E]`` over each request up to each token,
        alike; ``counted``: bool ``[B, S]``, ``None`` = all tokens."""
        if counted is not None:
            logits = logits.masked_fill(~counted[..., None], 0.0)
        sums = logits.cumsum(1)
        if self.sums_before is not None:
            sums = sums + self.sums_before[:, len(self.sums), None]
        if self.count is None:
            self.count = self._count(logits, counted)
        self.sums.append(sums)
        return sums / self.count.clamp_min(1.0)[..., None]

    def _count(self, logits: Tensor, counted: Tensor | None) -> Tensor:
        ones = logits.new_ones(logits.shape[:2]) if counted is None else counted.to(logits)
        count = ones.cumsum(1)
        return count if self.count_before is None else count + self.count_before


def join_request(
    logits: Tensor, weight: float, evidence: Evidence, size: Sequence[int], counted: Tensor | None
) -> Tensor:
    """``(1 - weight) logits + weight mean``, the mean over the request so far; float32 ``[T, E]``.

    Args:
        logits: float32 ``[T, E]``, T = B S.
        weight: of the mean, from 0 to 1.
        evidence: of the call in progress.
        size: (B, S), or (S,) of one request.
        counted: bool ``[T]``, False = padding; None = all.
    """
    rows = logits.view(-1, size[-1], logits.shape[-1])
    mask = None if counted is None else counted.view(rows.shape[:2])
    return torch.lerp(rows, evidence.mean(rows, mask), weight).view(logits.shape)
