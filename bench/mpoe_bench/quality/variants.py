"""What arms change in a model: own biases, independent experts, even gates, frozen parts, LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.layers import DenseExperts, MPOEFeedForward
from mpoe.layers.activations import ACTIVATIONS
from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights
from mpoe.layers.experts import MPOExperts
from mpoe.layers.hidden import HiddenExperts, HiddenFeedForward
from mpoe.layers.router import RouterOutput, TopKRouter
from mpoe_bench.quality.arms import Arm
from mpoe_kernels import Routing, combine, dispatch, grouped_mpo_linear


class OwnBiases(nn.Module):
    """Experts ``down_e(act(up_e x))`` with their own biases ``[E, F]``.

    Args:
        experts: MPO experts, whose cores are kept; or dense experts, which then all share the first one's weights.
    """

    def __init__(self, experts: MPOExperts | DenseExperts) -> None:
        super().__init__()
        self.num_experts, self.activation = experts.num_experts, experts.activation
        self.dtype = experts.dtype
        self.linears = nn.ModuleDict()
        self.biases = nn.ParameterDict()
        for kind in ("up", "down"):
            projection = experts.projections()[kind]
            bias = projection.bias if projection.bias is not None else torch.zeros(projection.out_features)
            self.biases[f"{kind}_bias"] = nn.Parameter(bias.detach().expand(self.num_experts, -1).clone())
            projection.bias = None
            if isinstance(projection, ExpertWeights):
                projection.weight = nn.Parameter(projection.weight.detach()[:1].clone())
            self.linears[kind] = projection

    def projections(self) -> dict[str, nn.Module]:
        return dict(self.linears.items())

    def forward(self, x: Tensor, routing: Routing, top_k_weights: Tensor, dropout: float = 0.0) -> Tensor:
        """Same as `MPOExperts.forward`."""
        offsets = routing.expert_offsets
        expert = torch.repeat_interleave(torch.arange(self.num_experts), offsets.diff().long())
        rows = dispatch(x, routing)[: len(expert)]
        hidden = ACTIVATIONS[self.activation](self._linear("up", rows, offsets, expert))
        hidden = nn.functional.dropout(hidden, dropout, self.training)
        y = self._linear("down", hidden, offsets, expert)
        y = torch.cat([y, y.new_zeros(routing.token_of_slot.shape[0] - len(expert), y.shape[1])])
        return combine(y, routing, top_k_weights)

    def _linear(self, kind: str, rows: Tensor, offsets: Tensor, expert: Tensor) -> Tensor:
        projection = self.linears[kind]
        if isinstance(projection, MPOCores):
            y = grouped_mpo_linear(rows, projection.blocks(), offsets)
        else:
            y = rows @ projection.weight[0]
        return y + self.biases[f"{kind}_bias"][expert]


@torch.no_grad()
def apply_variant(model: nn.Module, arm: Arm) -> None:
    """Change a converted ``model`` in place as ``arm`` says."""
    for module in model.modules():
        if arm.independent and isinstance(module, MPOCores | ExpertWeights):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, MPOEFeedForward) and (arm.own_biases or arm.shared_weight):
            module.experts = OwnBiases(module.experts)
        if isinstance(module, TopKRouter) and arm.even_gate:
            module.register_forward_hook(_times_experts)
        if isinstance(module, HiddenFeedForward) and arm.all_gates:
            _use_all_gates(module)
        if isinstance(module, HiddenExperts):
            _change_blocks(module, arm)
    if arm.adapter:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, MPOCores):
                module.auxiliary.requires_grad_(True)
            elif isinstance(module, TopKRouter | HiddenExperts):
                module.requires_grad_(True)


def _times_experts(router: TopKRouter, _: Any, output: RouterOutput) -> RouterOutput:
    return dataclasses.replace(output, top_k_weights=output.top_k_weights * router.num_experts)


def _use_all_gates(network: HiddenFeedForward) -> None:
    """Experts that are not chosen get a gate of 0 with the gradient of their probability.

    The router's own decision, and with it the balancing loss, stays unchanged.
    """
    decisions: list[RouterOutput] = []

    def all_gates(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        u, gates, index, *rest = arguments
        p = torch.softmax(decisions.pop().logits, dim=-1)
        every = torch.arange(p.shape[-1], device=p.device).expand(p.shape)
        return u, (p - p.detach()).scatter(-1, index, gates), every, *rest

    network.router.register_forward_hook(lambda _, __, decision: decisions.append(decision))
    network.experts.register_forward_pre_hook(all_gates)


def _change_blocks(experts: HiddenExperts, arm: Arm) -> None:
    """Apply an arm's noise, restarted outputs and frozen blocks to hidden-side experts."""
    if arm.noise:
        experts.add_noise_(arm.noise)
    for name, core in experts.auxiliary.items():
        if arm.restart:
            fresh = torch.rand(*core.shape[:2], 1, core.shape[-1]) < arm.restart
            core.copy_(torch.where(fresh, torch.randn_like(core) / core.shape[-2] ** 0.5, core))
        core.requires_grad_(name not in arm.frozen)


def with_lora(model: nn.Module, rank: int, targets: Sequence[str]) -> nn.Module:
    """PEFT's LoRA on the linear layers called ``targets``, scaled by 2 (``lora_alpha = 2 r``)."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)))


def feed_forward_parameters(model: nn.Module) -> dict[str, int]:
    """Parameter counts of the experts' weights and own biases: ``shared``, and ``own`` for all experts together."""
    counts = {"shared": 0, "own": 0}
    for module in model.modules():
        if isinstance(module, MPOCores):
            counts["shared"] += module.central.numel()
            counts["own"] += sum(core.numel() for core in module.auxiliary)
        elif isinstance(module, ExpertWeights):
            counts["own" if module.weight.shape[0] > 1 else "shared"] += module.weight.numel()
        elif isinstance(module, HiddenFeedForward):
            counts["shared"] += sum(weight.numel() for weight in module.central_parameters().values())
            counts["own"] += sum(parameter.numel() for parameter in module.experts.parameters())
        elif isinstance(module, OwnBiases):
            counts["own"] += sum(bias.numel() for bias in module.biases.values())
    return counts
