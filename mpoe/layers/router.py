"""`TopKRouter`: which experts a token goes to, and with what weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe.config import RouterConfig


@dataclass(frozen=True)
class RouterOutput:
    """Decision of a router.

    Attributes:
        logits: raw, float32 ``[T, E]``.
        top_k_index: int64 ``[T, K]``, best expert first.
        top_k_weights: gates, float32 ``[T, K]``.
    """

    logits: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


class TopKRouter(nn.Module):
    """Softmax router in float32, whatever autocast or the parameters' dtype.

    Gate (ARCHITECTURE: a fresh conversion must change nothing): top-1 multiplies by ``p / stop_grad(p)``, whose value
    is exactly 1 and whose gradient is that of log p; top-k weights are renormalised to sum 1; ``is_scale_prob`` uses
    the raw probabilities, as Switch Transformers does.

    Args:
        in_features: size I of a token.
        num_experts: E.
        config: `RouterConfig`.

    Raises:
        ValueError: ``top_k`` larger than ``num_experts``.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = RouterConfig() if config is None else config
        if self.config.top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}; got {self.config.top_k}")
        self.in_features, self.num_experts, self.top_k = in_features, num_experts, self.config.top_k
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal of variance ``init_scale / in_features`` (Switch Transformers, section 2.4)."""
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh random values of every parameter, by name."""
        std = math.sqrt(self.config.init_scale / self.in_features)
        value = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        if std:
            nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std)
        else:
            value.zero_()
        return {"weight": value}

    def capacity(self, num_tokens: int) -> int | None:
        """Slots an expert may own, ``ceil(factor * T * K / E)``; ``None`` = no limit.

        T counts every token of the batch, padding included: the bound is known without looking at the mask.
        """
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is None:
            return None
        return max(1, math.ceil(factor * num_tokens * self.top_k / self.num_experts))

    def forward(self, x: Tensor) -> RouterOutput:
        """Route tokens ``x [T, I]``."""
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be [T, I] with I = {self.in_features}; got {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.config.jitter:
                x = x * torch.empty_like(x).uniform_(1.0 - self.config.jitter, 1.0 + self.config.jitter)
            logits = F.linear(x, self.weight.float())
            weights, index = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
            if not self.config.is_scale_prob:
                weights = weights / (weights.detach() if self.top_k == 1 else weights.sum(-1, keepdim=True))
        return RouterOutput(logits, index, weights)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}, top_k={self.top_k}"
