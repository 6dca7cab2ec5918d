"""Peers that work on the cores: the original's algorithm, and one einsum of x with all cores per expert.

The original (Gao et al., COLING 2022) is reimplemented from its description: every expert's weight is rebuilt from its
cores in every forward pass. A chain of tensordots leaves the axes in the order (i1, j1, ..., in, jn), one permutation
of 2n axes brings them to (i1..in, j1..jn), and a Switch loop follows. Autograd keeps all of this for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.contender import Contender, UnavailableError, size_facts
from mpoe_bench.problem import Problem, grad_of
from mpoe_kernels import MPOShape

INTERMEDIATE_LIMIT = 2**31  # bytes of an einsum's largest intermediate; beyond that it does not take part
WORK_LIMIT = 400.0  # times the dense FLOPs; beyond that one call would take minutes
Chain = Sequence[Tensor]  # the cores [d, i, j, d'] of one expert


def chains(cores: Sequence[Tensor], shape: MPOShape, experts: int) -> list[Chain]:
    """Every expert's chain; the backward pass gathers the gradients of all experts once."""
    apart = [[core] * experts if k == shape.central else core.unbind(0) for k, core in enumerate(cores)]
    return list(zip(*apart, strict=True))


def core_contender(
    problem: Problem, prepare: Callable[[Chain, MPOShape], Callable[[Tensor], Tensor]], rebuilds: bool
) -> Contender:
    """A Switch loop over experts whose projections ``prepare`` makes of their chains.

    Args:
        problem: whose cores are copied as leaves.
        prepare: gives ``[n, in] -> [n, out]``.
        rebuilds: all experts are prepared before any is used, those without tokens too.
    """
    case, batch = problem.case, problem.batch
    leaves = {k: [c.detach().clone().requires_grad_(case.train) for c in getattr(problem, k)] for k in ("up", "down")}
    index, gates = batch.index[:, 0], batch.gates

    def function() -> Tensor:
        x = batch.x
        ups = chains(leaves["up"], problem.up_shape, case.experts)
        downs = chains(leaves["down"], problem.down_shape, case.experts)
        pairs = (
            (prepare(u, problem.up_shape), prepare(d, problem.down_shape)) for u, d in zip(ups, downs, strict=True)
        )
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(list(pairs) if rebuilds else pairs):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y = y.index_add(0, rows, (down(F.relu(up(x[rows]))) * gates[rows]).to(x.dtype))
        return y

    def gradients() -> Mapping[str, Tensor]:
        found = {f"d_{kind}.{k}": grad_of(core) for kind, cores in leaves.items() for k, core in enumerate(cores)}
        return {"dx": grad_of(batch.x), **found}

    facts = {"shape": problem.shape_name} | size_facts(problem.parameters(), case.dtype)
    return Contender(function, problem.grad_y, (batch.x, *leaves["up"], *leaves["down"]), gradients, facts)


def rebuild_all(problem: Problem) -> Contender:
    """Rebuild all experts' weights, then loop over experts."""

    def prepare(chain: Chain, shape: MPOShape) -> Callable[[Tensor], Tensor]:
        product = chain[0]
        for core in chain[1:]:
            product = torch.tensordot(product, core, dims=1)
        pairs = zip(shape.in_factors, shape.out_factors, strict=True)
        product = product.reshape([size for pair in pairs for size in pair])
        axes = list(range(product.dim()))
        weight = product.permute(axes[0::2] + axes[1::2]).reshape(shape.padded_in, shape.padded_out)
        weight = weight[: shape.in_features, : shape.out_features]
        return lambda x: x @ weight

    return core_contender(problem, prepare, rebuilds=True)


def einsum_expression(cores: int) -> str:
    """Of x ``[n, i1..ik]`` with a chain of k cores -> ``[n, j1..jk]``; ``nab,eacf,fbdg->ncd`` for two cores."""
    letters = iter("abcdefghijklmopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    rows, columns = [next(letters) for _ in range(cores)], [next(letters) for _ in range(cores)]
    bonds = [next(letters) for _ in range(cores + 1)]
    chain = [f"{bonds[k]}{rows[k]}{columns[k]}{bonds[k + 1]}" for k in range(cores)]
    return f"n{''.join(rows)},{','.join(chain)}->n{''.join(columns)}"


def einsum_of_cores(problem: Problem) -> Contender:
    """``torch.einsum`` over x and the cores, expert by expert, in the order that opt_einsum finds."""
    try:
        import opt_einsum
    except ImportError as error:
        raise UnavailableError(f"without opt_einsum torch.einsum contracts from left to right: {error}") from error
    rows = max(1, int(torch.bincount(problem.batch.index[:, 0], minlength=1).max()))
    for shape in (problem.up_shape, problem.down_shape):
        sizes = [(rows, *shape.in_factors), *shape.core_shapes]
        path = opt_einsum.contract_path(einsum_expression(shape.num_cores), *sizes, shapes=True, optimize="auto")[1]
        size = float(path.largest_intermediate) * problem.case.dtype.itemsize
        work = float(path.opt_cost) / (2 * rows * shape.in_features * shape.out_features)
        if size > INTERMEDIATE_LIMIT or work > WORK_LIMIT:
            raise UnavailableError(
                f"opt_einsum's order needs {work:.0f} x the dense FLOPs and an intermediate of {size / 2**20:.0f} MiB"
            )

    def prepare(chain: Chain, shape: MPOShape) -> Callable[[Tensor], Tensor]:
        def contract(x: Tensor) -> Tensor:
            padded = F.pad(x, (0, shape.padded_in - shape.in_features)).view(-1, *shape.in_factors)
            y = torch.einsum(einsum_expression(shape.num_cores), padded, *chain)
            return y.reshape(x.shape[0], -1)[:, : shape.out_features]

        return contract

    return core_contender(problem, prepare, rebuilds=False)
