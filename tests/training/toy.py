"""A tiny module with MPOE layers, for tests that need no Hugging Face model."""

from __future__ import annotations

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers import MPOEFeedForward


class Toy(nn.Module):
    """Two MPOE layers of width 32 and a linear head."""

    def __init__(self, shape: str = "separable", expert_type: str = "mpo") -> None:
        super().__init__()
        config = MPOEConfig(num_experts=4, shape=shape, light_p=8, expert_type=expert_type)
        self.layers = nn.ModuleList(MPOEFeedForward(32, 64, config, bias=True) for _ in range(2))
        self.layer_norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.layer_norm(x)).square().mean()

    def centrals(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if n.endswith(".central")]

    def others(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if not n.endswith(".central")]
