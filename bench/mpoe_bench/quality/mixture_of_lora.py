"""A control: a mixture of LoRA adapters around a frozen gated network, as in MixLoRA (Li et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import RouterConfig
from mpoe.layers import TopKRouter, load_balancing_loss

SCALE = 2.0  # of an adapter's product, as in `with_lora`: lora_alpha = 2 r
BALANCE = 1e-2


class MixtureOfLora(nn.Module):
    """``sum_e gate_e FFN_e(x)``, where the weights of ``FFN_e`` are the network's own plus ``SCALE A_e B_e``.

    Args:
        network: with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``; its weights are not copied.
        num_experts: E.
        rank: of every adapter.
        top_k: experts per token, whose gates sum to 1.

    Attributes:
        balance_loss: Switch's balancing loss of the last call, weighted.
    """

    def __init__(self, network: Any, num_experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.network, self.num_experts = network, num_experts
        self.router = TopKRouter(
            network.up_proj.in_features, num_experts, RouterConfig(top_k=top_k, is_scale_prob=False)
        )
        self.first, self.second = nn.ParameterDict(), nn.ParameterDict()
        for name in ("gate_proj", "up_proj", "down_proj"):
            inner, outer = getattr(network, name).in_features, getattr(network, name).out_features
            self.first[name] = nn.Parameter(torch.empty(num_experts, inner, rank).uniform_(-1, 1) / inner**0.5)
            self.second[name] = nn.Parameter(torch.zeros(num_experts, rank, outer))
        self.balance_loss = torch.zeros(())

    def _adapted(self, name: str, expert: int, rows: Tensor) -> Tensor:
        return SCALE * (rows @ self.first[name][expert] @ self.second[name][expert])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., I] -> [..., I]``."""
        x = hidden_states.flatten(0, -2)
        decision = self.router(x)
        self.balance_loss = BALANCE * load_balancing_loss(decision.logits, decision.top_k_index)
        gate, up = self.network.gate_proj(x), self.network.up_proj(x)
        inner, y = torch.zeros_like(up), torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, choice = (decision.top_k_index == expert).nonzero(as_tuple=True)
            rows, weight = x[token], decision.top_k_weights[token, choice, None]
            h = self.network.act_fn(gate[token] + self._adapted("gate_proj", expert, rows))
            h = weight * h * (up[token] + self._adapted("up_proj", expert, rows))
            inner = inner.index_add(0, token, h)
            y = y.index_add(0, token, self._adapted("down_proj", expert, h))
        return (self.network.down_proj(inner) + y).view_as(hidden_states)


def with_mixture_of_lora(model: nn.Module, num_experts: int, rank: int, top_k: int) -> nn.Module:
    """Replace every gated network of ``model`` by a mixture; nothing else trains."""
    model.requires_grad_(False)
    found = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if _is_gated(child)
    ]
    for parent, name in found:
        setattr(parent, name, MixtureOfLora(getattr(parent, name), num_experts, rank, top_k))
    return model


def _is_gated(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def balance_losses(model: nn.Module) -> Tensor | float:
    """The model's balancing losses summed over its layers, as in an MPOE model; 0 without mixtures."""
    losses = [module.balance_loss for module in model.modules() if isinstance(module, MixtureOfLora)]
    return torch.stack(losses).sum() if losses else 0.0
