"""GPU libraries, used where they are installed. Their interfaces move: the check against the truth guards them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import Contender, UnavailableError
from mpoe_bench.peers.dense_experts import dense_contender, sorted_tokens
from mpoe_bench.problem import Problem


def _library(name: str, problem: Problem) -> Any:
    """Import a CUDA library, or say why not."""
    if problem.case.device != "cuda":
        raise UnavailableError(f"{name.partition('.')[0]} runs on CUDA devices only")
    try:
        return importlib.import_module(name)
    except Exception as error:  # such packages compile at import and fail in any way
        raise UnavailableError(f"{name} does not import: {type(error).__name__}: {error}") from error


def scattermoe(problem: Problem) -> Contender:
    """ScatterMoE's MLP (Tan et al., arXiv 2403.08245)."""
    module = _library("scattermoe.mlp", problem)
    case, batch = problem.case, problem.batch
    mlp = module.MLP(case.model, case.hidden, num_experts=case.experts, top_k=1, activation=nn.ReLU())
    mlp = mlp.to(case.device, case.dtype)
    gates = batch.gates.to(case.dtype)

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights = {"experts.weight": up, "output_experts.weight": down}
        return torch.func.functional_call(mlp, weights, (x, gates, batch.index))

    return dense_contender(problem, function)


def megablocks(problem: Problem) -> Contender:
    """MegaBlocks' grouped GEMM (Gale et al., arXiv 2211.15841) on sorted tokens; bfloat16 only."""
    ops = _library("megablocks.grouped_gemm_util", problem).ops
    if ops is None:
        raise UnavailableError("megablocks finds no grouped_gemm")
    if problem.case.dtype != torch.bfloat16:
        raise UnavailableError("grouped_gemm takes bfloat16 only")
    index, gates, experts = problem.batch.index[:, 0], problem.batch.gates, problem.case.experts

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order, inverse, _ = sorted_tokens(index, experts)
        sizes = torch.bincount(index, minlength=experts).cpu()  # it wants them on the host
        hidden = F.relu(ops.gmm(x[order], up, sizes, trans_b=True))
        return (ops.gmm(hidden, down, sizes, trans_b=True)[inverse] * gates).to(x.dtype)

    return dense_contender(problem, function)


def triton_kernels(problem: Problem) -> Contender:
    """triton_kernels' ragged matmul on sorted tokens; it has no autograd, so forward only."""
    matmul = _library("triton_kernels.matmul", problem).matmul
    metadata = _library("triton_kernels.tensor", problem).make_ragged_tensor_metadata
    index, gates, experts = problem.batch.index[:, 0], problem.batch.gates, problem.case.experts

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order, inverse, _ = sorted_tokens(index, experts)
        ragged = metadata(torch.bincount(index, minlength=experts).to(torch.int32), x.shape[0])
        hidden = F.relu(matmul(x[order], up.transpose(1, 2), None, a_ragged_metadata=ragged))
        y = matmul(hidden, down.transpose(1, 2), None, a_ragged_metadata=ragged)
        return (y[inverse] * gates).to(x.dtype)

    contender = dense_contender(problem, function)
    contender.grad_y = None
    return contender
