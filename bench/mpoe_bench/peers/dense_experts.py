"""Dense experts ``[E, hidden, model]``, dispatched in the three usual ways: loop, grouped product, one-hot einsum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.contender import Contender, UnavailableError, grad_of
from mpoe_bench.problem import Problem, probe
from mpoe_bench.subjects import size_facts

ONE_HOT_LIMIT = 2**31  # bytes of the one-hot tensor [T, E, C] beyond which the peer does not take part


def dense_contender(problem: Problem, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    """A contender with full expert weights: ``function(x, up [E, hidden, model], down [E, model, hidden])``."""
    case, batch = problem.case, problem.batch
    up, down = problem.dense_experts

    def gradients() -> Mapping[str, Tensor]:
        return {
            "dx": grad_of(batch.x),
            "d_up_probe": probe_experts(grad_of(up)),
            "d_down_probe": probe_experts(grad_of(down)),
        }

    return Contender(
        "dense experts",
        "peer",
        lambda: function(batch.x, up, down),
        problem.grad_y,
        (batch.x, up, down),
        gradients,
        size_facts(up.numel() + down.numel(), case.dtype),
    )


def probe_experts(grad: Tensor) -> Tensor:
    """Weight gradients ``[E, out, in]`` -> ``[E, in, PROBE_COLUMNS]``, one expert at a time."""
    columns = probe(grad.shape[1]).to(grad.device)
    return torch.stack([g.T.double() @ columns for g in grad]).cpu()


def loop(problem: Problem) -> Contender:
    """As in Switch implementations: for each expert, gather its tokens, run its FFN, scatter the result.

    Every expert's weights are separate tensors, as in a module list, so that a backward pass touches only them.
    """
    case, batch = problem.case, problem.batch
    index, gates = batch.index[:, 0], batch.gates
    ups, downs = ([w.requires_grad_(case.train) for w in t.detach().unbind(0)] for t in problem.dense_experts)

    def function() -> Tensor:
        x = batch.x
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y_e = F.linear(F.relu(F.linear(x[rows], up)), down)
                y = y.index_add(0, rows, (y_e * gates[rows]).to(x.dtype))
        return y

    def gradients() -> Mapping[str, Tensor]:
        return {
            "dx": grad_of(batch.x),
            "d_up_probe": torch.cat([probe_experts(grad_of(w)[None]) for w in ups]),
            "d_down_probe": torch.cat([probe_experts(grad_of(w)[None]) for w in downs]),
        }

    parameters = sum(w.numel() for w in (*ups, *downs))
    facts = size_facts(parameters, case.dtype)
    leaves = (batch.x, *ups, *downs)
    return Contender("dense experts, loop", "peer", function, problem.grad_y, leaves, gradients, facts)


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
