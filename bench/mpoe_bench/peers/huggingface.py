"""transformers' own Switch layer, unmodified, with our weights and our routing decision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import Contender, UnavailableError, grad_of
from mpoe_bench.peers.dense_experts import probe
from mpoe_bench.problem import Problem
from mpoe_bench.subjects import size_facts


class _FixedRouter(nn.Module):
    """Gives the layer the routing that every contender gets, in the form that the layer's own router returns."""

    def __init__(self, index: Tensor, gates: Tensor, num_experts: int) -> None:
        super().__init__()
        self.index, self.gates, self.num_experts = index, gates, num_experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        expert_index = F.one_hot(self.index[:, 0], self.num_experts)[None]
        return expert_index, self.gates[None].to(hidden_states.dtype), None


def switch_sparse_mlp(problem: Problem) -> Contender:
    """`SwitchTransformersSparseMLP`; its experts' weights are views of those that the other dense peers use."""
    try:
        from transformers.models.switch_transformers import configuration_switch_transformers as configuration
        from transformers.models.switch_transformers import modeling_switch_transformers as modeling
    except ImportError as error:
        raise UnavailableError(f"transformers has no Switch Transformers: {error}") from error
    case, batch = problem.case, problem.batch
    config = configuration.SwitchTransformersConfig(
        d_model=case.model,
        d_ff=case.hidden,
        num_experts=case.experts,
        dense_act_fn="relu",
        dropout_rate=0.0,
        expert_capacity=case.tokens,
    )
    with torch.device("meta"):
        layer: Any = modeling.SwitchTransformersSparseMLP(config)
    layer.router = _FixedRouter(batch.index, batch.gates, case.experts)
    up, down = problem.dense_experts
    experts = [layer.experts[f"expert_{e}"] for e in range(case.experts)]
    for e, expert in enumerate(experts):
        expert.wi.weight = nn.Parameter(up.detach()[e], requires_grad=case.train)
        expert.wo.weight = nn.Parameter(down.detach()[e], requires_grad=case.train)

    def gradients() -> Mapping[str, Tensor]:
        return {
            "dx": grad_of(batch.x),
            "d_up_probe": torch.stack([grad_of(e.wi.weight).T.cpu().double() @ probe(case.hidden) for e in experts]),
            "d_down_probe": torch.stack([grad_of(e.wo.weight).T.cpu().double() @ probe(case.model) for e in experts]),
        }

    return Contender(
        "transformers Switch",
        "peer",
        lambda: layer(batch.x[None])[0],
        problem.grad_y,
        (batch.x, *layer.parameters()),
        gradients,
        size_facts(up.numel() + down.numel(), case.dtype),
    )
