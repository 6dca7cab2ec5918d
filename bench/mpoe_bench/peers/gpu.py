"""GPU libraries, used if they are installed. Their interfaces change; the check against the truth detects it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import Contender, UnavailableError, size_facts
from mpoe_bench.peers.dense_experts import dense_contender, probe_experts, sorted_tokens
from mpoe_bench.problem import Problem, grad_of

DEVICES = ("cuda",)  # where the libraries run


def _library(name: str, problem: Problem) -> Any:
    """Import a CUDA library, or say why not."""
    package = name.partition(".")[0]
    if problem.case.device not in DEVICES:
        raise UnavailableError(f"{package} runs on CUDA devices only")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise UnavailableError(f"{package} is not installed") from None
        raise UnavailableError(f"{name} does not import: {error}") from error
    except Exception as error:  # such packages compile at import and can fail in any way
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


def sonicmoe(problem: Problem) -> Contender:
    """SonicMoE (Guo et al., arXiv 2512.14080), on Hopper and Blackwell; 16-bit types only."""
    compute = _library("sonicmoe.functional", problem).moe_general_routing_inputs
    activation = _library("sonicmoe.enums", problem).ActivationType.RELU
    case, batch = problem.case, problem.batch
    if case.dtype.itemsize != 2:
        raise UnavailableError("sonicmoe takes bfloat16 and float16 only")
    tokens = torch.arange(case.tokens, dtype=torch.int32, device=case.device)
    index, gates = batch.index[:, 0].to(torch.int32), batch.gates[:, 0]

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        weights = (up.permute(1, 2, 0), None, down.permute(1, 2, 0), None)  # in SonicMoE's layout; no bias
        y, _ = compute(x, gates, tokens, index, *weights, case.experts, stream, activation, not torch.is_grad_enabled())
        return y.to(x.dtype)

    return dense_contender(problem, function)


def quack(problem: Problem) -> Contender:
    """QuACK's grouped GEMM, which SonicMoE is built on, on sorted tokens; it has no autograd, so forward only."""
    gemm = _library("quack.gemm_interface", problem).gemm
    if problem.case.dtype.itemsize != 2:
        raise UnavailableError("quack takes bfloat16 and float16 here")
    index, gates = problem.batch.index[:, 0], problem.batch.gates

    def function(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order, inverse, ends = sorted_tokens(index, up.shape[0])
        starts = F.pad(ends, (1, 0))
        hidden = F.relu(gemm(x[order], up.transpose(1, 2), cu_seqlens_m=starts))
        y = gemm(hidden, down.transpose(1, 2), cu_seqlens_m=starts)
        return (y[inverse] * gates).to(x.dtype)

    contender = dense_contender(problem, function)
    contender.grad_y = None
    return contender


# Liger's network is ``down(silu(gate x) * up x)``. With gate = STEEP W and up x = 1 / STEEP that is ReLU within
# rounding: silu(s z) / s is max(z, 0), unless |z| is only a few times 1 / s.
STEEP = 2.0**16
LIGER_COLUMNS = 64  # a whole tile of extra features, one of which is 1, so that ``up x`` can be a constant


def liger(problem: Problem) -> Contender:
    """Liger's fused mixture of experts, which supports only SwiGLU: a gate and a constant turn it into ReLU.

    Its up projection is therefore twice as wide as the others', hence 1.5x FLOPs in its name in the tables.
    """
    fused = _library("liger_kernel.ops.fused_moe", problem).LigerFusedMoEFunction
    case, batch = problem.case, problem.batch
    train = case.train
    up, down = (weight.detach() for weight in problem.dense_experts)
    x = F.pad(batch.x.detach(), (0, LIGER_COLUMNS))
    x[:, case.model] = 1.0
    both = up.new_zeros(case.experts, 2 * case.hidden, case.model + LIGER_COLUMNS)
    both[:, : case.hidden, : case.model] = up * STEEP
    both[:, case.hidden :, case.model] = 1.0 / STEEP
    # Liger's output rows are as wide as those of x.
    down = F.pad(down, (0, 0, 0, LIGER_COLUMNS))
    leaves = tuple(leaf.requires_grad_(train) for leaf in (x, both, down))
    index, gates = batch.index.to(torch.int32), batch.gates

    def gradients() -> Mapping[str, Tensor]:
        return {
            "dx": grad_of(x)[:, : case.model],
            "d_up_probe": probe_experts(grad_of(both)[:, : case.hidden, : case.model] * STEEP),
            "d_down_probe": probe_experts(grad_of(down)[:, : case.model]),
        }

    def function() -> Tensor:
        return fused.apply(x, both, down, index, gates)[:, : case.model].to(case.dtype)

    facts = size_facts(up.numel() + problem.dense_experts[1].numel(), case.dtype)
    return Contender(function, problem.grad_y, leaves, gradients, facts)
