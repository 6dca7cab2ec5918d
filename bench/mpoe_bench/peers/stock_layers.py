"""Transformers' own mixture layers, routers included, with random weights: what a model's feed-forward layer could be
instead of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GraniteMoeSharedConfig, SwitchTransformersConfig
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMLP, GraniteMoeSharedMoE
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP


class _OfTokens(nn.Module):
    """Sums what layers that take ``[batch, tokens, I]`` make of tokens ``[T, I]``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (layer(x[None])[0] for layer in self.layers)
        return sum(others, first)


def switch_layer(model: int, hidden: int, tokens: int) -> nn.Module:
    """Switch with eight experts, one per token; none is dropped."""
    sizes: Any = {
        "d_model": model,
        "d_ff": hidden,
        "num_experts": 8,
        "expert_capacity": tokens,
        "router_jitter_noise": 0.0,
    }
    return _OfTokens(SwitchTransformersSparseMLP(SwitchTransformersConfig(**sizes, dropout_rate=0.0)))


def granite_layer(model: int, hidden: int, tokens: int) -> nn.Module:
    """A dense network and 64 experts beside it, eight per token: the form of neurons. All are gated, so that hidden
    sizes are two thirds of a plain network's of the same weights and FLOPs."""
    config: Any = GraniteMoeSharedConfig(
        hidden_size=model,
        shared_intermediate_size=2 * hidden // 3,
        intermediate_size=max(min(64, model // 12) * 2 // 3, 1),
        num_local_experts=64,
        num_experts_per_tok=8,
        num_attention_heads=1,
    )
    return _OfTokens(GraniteMoeSharedMLP(config), GraniteMoeSharedMoE(config))


STOCK_LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "transformers Switch 8, 1": switch_layer,
    "transformers GraniteMoeShared 64, 8": granite_layer,
}


def stock_layer(name: str, model: int, hidden: int, tokens: int, dtype: torch.dtype) -> nn.Module:
    """A layer of `STOCK_LAYERS` for a model and dense network of these sizes and at most ``tokens`` tokens."""
    return STOCK_LAYERS[name](model, hidden, tokens).to(dtype)
