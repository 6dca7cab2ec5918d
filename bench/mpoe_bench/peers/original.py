"""The original's algorithm (Gao et al., COLING 2022), reimplemented from its description.

Every expert's weight is rebuilt from its cores in every forward pass: a chain of tensordots leaves the axes in the
order (i1, j1, ..., in, jn), one permutation of 2n axes brings them to (i1..in, j1..jn), and a Switch loop follows.
Autograd keeps all of this for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.contender import Contender, grad_of
from mpoe_bench.problem import Problem
from mpoe_bench.subjects import size_facts
from mpoe_kernels import MPOShape


def core_leaves(problem: Problem) -> dict[str, list[Tensor]]:
    """Copies of the cores as leaves, for contenders that differentiate through them."""
    train = problem.case.train
    return {k: [c.detach().clone().requires_grad_(train) for c in getattr(problem, k)] for k in ("up", "down")}


def core_gradients(problem: Problem, leaves: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Gradients, named as in `mpoe_bench.problem.Truth`."""
    found = {"dx": grad_of(problem.batch.x)}
    for kind, cores in leaves.items():
        found |= {f"d_{kind}.{k}": grad_of(core) for k, core in enumerate(cores)}
    return found


def one_chain(cores: Sequence[Tensor], central: int, expert: int) -> list[Tensor]:
    """The cores ``[d, i, j, d']`` of one expert."""
    return [core if k == central else core[expert] for k, core in enumerate(cores)]


def chains(cores: Sequence[Tensor], central: int, experts: int) -> list[list[Tensor]]:
    """`one_chain` of every expert; the backward pass gathers the gradients of all experts once."""
    apart = [[core] * experts if k == central else core.unbind(0) for k, core in enumerate(cores)]
    return [list(chain) for chain in zip(*apart, strict=True)]


def rebuild(cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """The weight ``[I, F]`` of one chain."""
    product = cores[0]
    for core in cores[1:]:
        product = torch.tensordot(product, core, dims=1)
    product = product.reshape([size for pair in zip(shape.in_factors, shape.out_factors, strict=True) for size in pair])
    axes = list(range(product.dim()))
    weight = product.permute(axes[0::2] + axes[1::2]).reshape(shape.padded_in, shape.padded_out)
    return weight[: shape.in_features, : shape.out_features]


def rebuild_all(problem: Problem) -> Contender:
    """Rebuild all experts' weights, then loop over experts."""
    case, batch = problem.case, problem.batch
    leaves = core_leaves(problem)
    index, gates = batch.index[:, 0], batch.gates

    def function() -> Tensor:
        x = batch.x
        ups = chains(leaves["up"], problem.up_shape.central, case.experts)
        downs = chains(leaves["down"], problem.down_shape.central, case.experts)
        weights = [
            (rebuild(up, problem.up_shape), rebuild(down, problem.down_shape))
            for up, down in zip(ups, downs, strict=True)
        ]
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(weights):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y_e = F.relu(x[rows] @ up) @ down
                y = y.index_add(0, rows, (y_e * gates[rows]).to(x.dtype))
        return y

    return Contender(
        "original: rebuild all",
        "peer",
        function,
        problem.grad_y,
        (batch.x, *leaves["up"], *leaves["down"]),
        lambda: core_gradients(problem, leaves),
        {"shape": problem.shape_name} | size_facts(problem.parameters(), case.dtype),
    )
