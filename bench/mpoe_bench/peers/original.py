"""The original's algorithm (Gao et al., COLING 2022), reimplemented from its description.

Every expert's weight is rebuilt from its cores in every forward pass. A chain of tensordots leaves the axes in the
order (i1, j1, ..., in, jn), one permutation of 2n axes brings them to (i1..in, j1..jn), and a Switch loop follows.
Autograd keeps all of this for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.contender import Contender, size_facts
from mpoe_bench.problem import Problem, grad_of
from mpoe_kernels import MPOShape


def weights_of(cores: Sequence[Tensor], shape: MPOShape, experts: int) -> list[Tensor]:
    """Every expert's weight ``[I, F]``; the backward pass gathers the gradients of all experts once."""
    apart = [[core] * experts if k == shape.central else core.unbind(0) for k, core in enumerate(cores)]
    found = []
    for first, *others in zip(*apart, strict=True):
        product = first
        for core in others:
            product = torch.tensordot(product, core, dims=1)
        pairs = zip(shape.in_factors, shape.out_factors, strict=True)
        product = product.reshape([size for pair in pairs for size in pair])
        axes = list(range(product.dim()))
        weight = product.permute(axes[0::2] + axes[1::2]).reshape(shape.padded_in, shape.padded_out)
        found.append(weight[: shape.in_features, : shape.out_features])
    return found


def rebuild_all(problem: Problem) -> Contender:
    """Rebuild all experts' weights, also of those without tokens, then loop over experts."""
    case, batch = problem.case, problem.batch
    leaves = {k: [c.detach().clone().requires_grad_(case.train) for c in getattr(problem, k)] for k in ("up", "down")}
    index, gates = batch.index[:, 0], batch.gates

    def function() -> Tensor:
        x = batch.x
        ups = weights_of(leaves["up"], problem.up_shape, case.experts)
        downs = weights_of(leaves["down"], problem.down_shape, case.experts)
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y = y.index_add(0, rows, (F.relu(x[rows] @ up) @ down * gates[rows]).to(x.dtype))
        return y

    def gradients() -> Mapping[str, Tensor]:
        found = {f"d_{kind}.{k}": grad_of(core) for kind, cores in leaves.items() for k, core in enumerate(cores)}
        return {"dx": grad_of(batch.x), **found}

    facts = {"shape": problem.shape_name} | size_facts(problem.parameters(), case.dtype)
    return Contender(function, problem.grad_y, (batch.x, *leaves["up"], *leaves["down"]), gradients, facts)
