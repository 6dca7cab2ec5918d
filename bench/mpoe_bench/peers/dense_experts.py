"""Dense experts ``[E, hidden, model]``: loop, grouped product, one-hot einsum, and Transformers' own Switch layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import Contender, UnavailableError, size_facts
from mpoe_bench.problem import Problem, grad_of, probe

ONE_HOT_LIMIT = 2**31  # bytes of the one-hot tensor [T, E, C] beyond which the peer does not take part


def probe_experts(grad: Tensor) -> Tensor:
    """Weight gradients ``[E, out, in]`` -> ``[E, in, PROBE_COLUMNS]``, one expert at a time."""
    columns = probe(grad.shape[1]).to(grad.device)
    return torch.stack([g.T.double() @ columns for g in grad]).cpu()


def _contender(
    problem: Problem, function: Callable[[], Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]
) -> Contender:
    """With weights ``[experts, out, in]`` of some experts each."""

    def gradients() -> Mapping[str, Tensor]:
        found = {"dx": grad_of(problem.batch.x)}
        for name, weights in (("d_up_probe", ups), ("d_down_probe", downs)):
            found[name] = torch.cat([probe_experts(grad_of(w).view(-1, *w.shape[-2:])) for w in weights])
        return found

    facts = size_facts(sum(w.numel() for w in (*ups, *downs)), problem.case.dtype)
    return Contender(function, problem.grad_y, (problem.batch.x, *ups, *downs), gradients, facts)


def dense_contender(problem: Problem, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """A contender with full expert weights: ``function(x, up [E, hidden, model], down [E, model, hidden])``."""
    up, down = problem.dense_experts
    return _contender(problem, lambda: function(problem.batch.x, up, down), [up], [down])


def loop(problem: Problem) -> Contender:
    """As in Switch implementations: for each expert, gather its tokens, run its FFN, scatter the result.

    Every expert's weights are separate tensors, as in a module list, so that a backward pass touches only them.
    """
    index, gates = problem.batch.index[:, 0], problem.batch.gates
    ups, downs = ([w.requires_grad_(problem.case.train) for w in t.detach().unbind(0)] for t in problem.dense_experts)

    def function() -> Tensor:
        x = problem.batch.x
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y_e = F.linear(F.relu(F.linear(x[rows], up)), down)
                y = y.index_add(0, rows, (y_e * gates[rows]).to(x.dtype))
        return y

    return _contender(problem, function, ups, downs)


class _FixedRouter(nn.Module):
    """Gives the layer the routing that every contender gets, in the form that the layer's own router returns."""

    def __init__(self, index: Tensor, gates: Tensor, num_experts: int) -> None:
        super().__init__()
        self.index, self.gates, self.num_experts = index, gates, num_experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        expert_index = F.one_hot(self.index[:, 0], self.num_experts)[None]
        return expert_index, self.gates[None].to(hidden_states.dtype), None


def switch(problem: Problem) -> Contender:
    """Transformers' `SwitchTransformersSparseMLP`, unmodified, with our weights and our routing decision."""
    from transformers.models.switch_transformers import configuration_switch_transformers as configuration
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    case, batch = problem.case, problem.batch
    sizes = {"d_model": case.model, "d_ff": case.hidden, "num_experts": case.experts, "expert_capacity": case.tokens}
    with torch.device("meta"):
        layer: Any = modeling.SwitchTransformersSparseMLP(
            configuration.SwitchTransformersConfig(**sizes, dense_act_fn="relu", dropout_rate=0.0)
        )
    layer.router = _FixedRouter(batch.index, batch.gates, case.experts)
    weights: list[list[Tensor]] = []
    for name, full in zip(("wi", "wo"), problem.dense_experts, strict=True):
        own = [nn.Parameter(each, requires_grad=case.train) for each in full.detach()]
        for e, weight in enumerate(own):
            getattr(layer.experts[f"expert_{e}"], name).weight = weight
        weights.append(list(own))
    return _contender(problem, lambda: layer(batch.x[None])[0], *weights)


def sorted_tokens(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order, inverse, ends)``: a stable sort of tokens by expert and the experts' last slots, int32 ``[E]``."""
    order = torch.argsort(index, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.bincount(index, minlength=num_experts)
    return order, inverse, counts.cumsum(0).to(torch.int32)


def grouped_mm(problem: Problem) -> Contender:
    """Sort by expert, `torch.nn.functional.grouped_mm` twice, un-sort."""
    if not hasattr(F, "grouped_mm"):
        raise UnavailableError("this torch has no torch.nn.functional.grouped_mm")
    index, gates = problem.batch.index[:, 0], problem.batch.gates

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order, inverse, ends = sorted_tokens(index, up.shape[0])
        hidden = F.relu(F.grouped_mm(x[order], up.transpose(1, 2), offs=ends))
        y = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        return (y[inverse] * gates).to(x.dtype)

    return dense_contender(problem, function)


def one_hot(problem: Problem) -> Contender:
    """GShard's dispatch: einsum with a one-hot tensor ``[T, E, C]``; C is the largest load, so nothing is dropped."""
    case = problem.case
    index, gates = problem.batch.index[:, 0], problem.batch.gates
    capacity = int(torch.bincount(index, minlength=case.experts).max())
    size = case.tokens * case.experts * capacity * case.dtype.itemsize
    if size > ONE_HOT_LIMIT:
        raise UnavailableError(f"the one-hot tensor [T, E, C] = [{case.tokens}, {case.experts}, {capacity}] is too big")

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        expert = F.one_hot(index, case.experts)
        position = (expert.cumsum(0) - 1).gather(1, index[:, None])[:, 0]
        mask = expert.to(x.dtype)[:, :, None] * F.one_hot(position, capacity).to(x.dtype)[:, None, :]
        grouped = torch.einsum("tec,ti->eci", mask, x)
        hidden = F.relu(torch.einsum("eci,efi->ecf", grouped, up))
        y = torch.einsum("ecf,eif->eci", hidden, down)
        return torch.einsum("tec,eci->ti", mask * gates[:, :, None].to(x.dtype), y)

    return dense_contender(problem, function)
