"""Tensor-network peers: one einsum of x with all cores per expert, and tensorly-torch's factorized layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.contender import Contender, UnavailableError, grad_of
from mpoe_bench.peers.original import core_gradients, core_leaves, one_chain
from mpoe_bench.problem import Problem
from mpoe_bench.subjects import size_facts
from mpoe_kernels import MPOShape

INTERMEDIATE_LIMIT = 2**31  # bytes of an einsum's largest intermediate; beyond that it does not take part
WORK_LIMIT = 400.0  # times the dense FLOPs; beyond that one call would take minutes


def _loop(problem: Problem, expert_ffn: Callable[[Tensor, int], Tensor]) -> Callable[[], Tensor]:
    """For every busy expert: gather, the expert's FFN, scatter."""
    index, gates, batch = problem.batch.index[:, 0], problem.batch.gates, problem.batch

    def function() -> Tensor:
        y = torch.zeros_like(batch.x)
        for e in range(problem.case.experts):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y = y.index_add(0, rows, (expert_ffn(batch.x[rows], e) * gates[rows]).to(batch.x.dtype))
        return y

    return function


def einsum_expression(cores: int) -> str:
    """Of x ``[n, i1..ik]`` with a chain of k cores -> ``[n, j1..jk]``; ``nab,eacf,fbdg->ncd`` for two cores."""
    letters = iter("abcdefghijklmopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    rows, columns = [next(letters) for _ in range(cores)], [next(letters) for _ in range(cores)]
    bonds = [next(letters) for _ in range(cores + 1)]
    chain = [f"{bonds[k]}{rows[k]}{columns[k]}{bonds[k + 1]}" for k in range(cores)]
    return f"n{''.join(rows)},{','.join(chain)}->n{''.join(columns)}"


def contract(x: Tensor, cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """``x [n, I]`` through one chain by `torch.einsum`; opt_einsum, if installed, chooses the contraction path."""
    padded = F.pad(x, (0, shape.padded_in - shape.in_features))
    y = torch.einsum(einsum_expression(shape.num_cores), padded.view(-1, *shape.in_factors), *cores)
    return y.reshape(x.shape[0], -1)[:, : shape.out_features]


def _check_size(problem: Problem) -> None:
    """Refuse contractions that would fill the memory or take minutes."""
    try:
        import opt_einsum
    except ImportError as error:
        raise UnavailableError(f"without opt_einsum torch.einsum contracts from left to right: {error}") from error
    case = problem.case
    rows = max(1, int(torch.bincount(problem.batch.index[:, 0], minlength=1).max()))
    for shape in (problem.up_shape, problem.down_shape):
        sizes = [(rows, *shape.in_factors), *shape.core_shapes]
        expression = einsum_expression(shape.num_cores)
        path = opt_einsum.contract_path(expression, *sizes, shapes=True, optimize="auto")[1]
        size = float(path.largest_intermediate) * case.dtype.itemsize
        work = float(path.opt_cost) / (2 * rows * shape.in_features * shape.out_features)
        if size > INTERMEDIATE_LIMIT or work > WORK_LIMIT:
            raise UnavailableError(
                f"opt_einsum's order needs {work:.0f} x the dense FLOPs and an intermediate of {size / 2**20:.0f} MiB"
            )


def einsum_of_cores(problem: Problem) -> Contender:
    """``torch.einsum`` over x and the cores, expert by expert."""
    _check_size(problem)
    leaves = core_leaves(problem)

    def ffn(x: Tensor, e: int) -> Tensor:
        up = one_chain(leaves["up"], problem.up_shape.central, e)
        down = one_chain(leaves["down"], problem.down_shape.central, e)
        return contract(F.relu(contract(x, up, problem.up_shape)), down, problem.down_shape)

    case, batch = problem.case, problem.batch
    return Contender(
        "einsum of the cores",
        "peer",
        _loop(problem, ffn),
        problem.grad_y,
        (batch.x, *leaves["up"], *leaves["down"]),
        lambda: core_gradients(problem, leaves),
        {"shape": problem.shape_name} | size_facts(problem.parameters(), case.dtype),
    )


def _tltorch_layers(problem: Problem, implementation: str) -> list[tuple[Any, Any]]:
    """A `FactorizedLinear` pair per expert holding our cores."""
    try:
        import tltorch
    except ImportError as error:
        raise UnavailableError(f"tensorly-torch does not import: {error}") from error
    case = problem.case
    layers = []
    for e in range(case.experts):
        pair = []
        for shape, cores in ((problem.up_shape, problem.up), (problem.down_shape, problem.down)):
            if (shape.padded_in, shape.padded_out) != (shape.in_features, shape.out_features):
                raise UnavailableError("FactorizedLinear has no padding")
            layer = tltorch.FactorizedLinear(
                shape.in_factors,
                shape.out_factors,
                bias=False,
                factorization="blocktt",
                rank=list(shape.bond_dims),
                implementation=implementation,
                device=case.device,
                dtype=case.dtype,
            )
            # Its factors are [d, j, i, d'] (weight [out, in]).
            for k, core in enumerate(one_chain(cores, shape.central, e)):
                layer.weight.factors[k].data = core.detach().transpose(1, 2).contiguous()
            pair.append(layer.requires_grad_(case.train))
        layers.append((pair[0], pair[1]))
    return layers


def _tltorch(problem: Problem, implementation: str) -> Contender:
    if implementation == "factorized":
        _check_size(problem)
    layers = _tltorch_layers(problem, implementation)
    case, batch = problem.case, problem.batch

    def gradients() -> Mapping[str, Tensor]:
        found = {"dx": grad_of(batch.x)}
        for kind, shape, which in (("up", problem.up_shape, 0), ("down", problem.down_shape, 1)):
            for k in range(shape.num_cores):
                grads = torch.stack([grad_of(pair[which].weight.factors[k]).transpose(1, 2) for pair in layers])
                # Each expert has its own copy of the central core here; the shared core's gradient is their sum.
                found[f"d_{kind}.{k}"] = grads.double().sum(0) if k == shape.central else grads
        return found

    parameters = [p for pair in layers for layer in pair for p in layer.parameters()]
    return Contender(
        f"tltorch {implementation}",
        "peer",
        _loop(problem, lambda x, e: layers[e][1](F.relu(layers[e][0](x)))),
        problem.grad_y,
        (batch.x, *parameters),
        gradients,
        {"shape": problem.shape_name} | size_facts(sum(math.prod(p.shape) for p in parameters), case.dtype),
    )


def tltorch_factorized(problem: Problem) -> Contender:
    """tensorly-torch, contracting x with the factors in one einsum."""
    return _tltorch(problem, "factorized")


def tltorch_reconstructed(problem: Problem) -> Contender:
    """tensorly-torch, rebuilding the weight, then a linear layer."""
    return _tltorch(problem, "reconstructed")
