"""GPU libraries, used if they are installed. Their interfaces change; the check against the truth detects it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import UnavailableError
from mpoe_bench.peers.dense_experts import Compute, sorted_tokens

DEVICES = ("cuda",)  # where the libraries run
Sizes = tuple[int, int, int]  # model, hidden, experts


def _library(name: str, device: str, dtype: torch.dtype | None = None) -> Any:
    """Import a CUDA library, or say why not; ``dtype`` if it takes those of 16 bits alone."""
    package = name.partition(".")[0]
    if device not in DEVICES:
        raise UnavailableError(f"{package} runs on CUDA devices only")
    if dtype is not None and dtype.itemsize != 2:
        raise UnavailableError(f"{package} takes bfloat16 and float16 here")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise UnavailableError(f"{package} is not installed") from None
        raise UnavailableError(f"{name} does not import: {error}") from error
    except Exception as error:  # such packages compile at import and can fail in any way
        raise UnavailableError(f"{name} does not import: {type(error).__name__}: {error}") from error


def scattermoe(sizes: Sizes, device: str, dtype: torch.dtype) -> Compute:
    """ScatterMoE's MLP (Tan et al., arXiv 2403.08245)."""
    module, (model, hidden, experts) = _library("scattermoe.mlp", device), sizes
    mlp = module.MLP(model, hidden, num_experts=experts, top_k=1, activation=nn.ReLU()).to(device, dtype)

    def compute(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weights = {"experts.weight": up, "output_experts.weight": down}
        return torch.func.functional_call(mlp, weights, (x, gates.to(dtype), index[:, None]))

    return compute


def sonicmoe(sizes: Sizes, device: str, dtype: torch.dtype) -> Compute:
    """SonicMoE (Guo et al., arXiv 2512.14080), on Hopper and Blackwell."""
    general = _library("sonicmoe.functional", device, dtype).moe_general_routing_inputs
    activation = _library("sonicmoe.enums", device).ActivationType.RELU

    def compute(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
        tokens = torch.arange(len(x), dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        weights = (up.permute(1, 2, 0), None, down.permute(1, 2, 0), None)  # in SonicMoE's layout; no bias
        chosen, inference = (gates[:, 0], tokens, index.to(torch.int32)), not torch.is_grad_enabled()
        y, _ = general(x, *chosen, *weights, sizes[2], stream, activation, inference)
        return y.to(x.dtype)

    return compute


def quack(_: Sizes, device: str, dtype: torch.dtype) -> Compute:
    """QuACK's grouped GEMM, which SonicMoE is built on, on sorted tokens; it has no autograd."""
    gemm = _library("quack.gemm_interface", device, dtype).gemm

    def compute(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order, inverse, ends = sorted_tokens(index, up.shape[0])
        starts = F.pad(ends, (1, 0))
        hidden = F.relu(gemm(x[order], up.mT, cu_seqlens_m=starts))
        y = gemm(hidden, down.mT, cu_seqlens_m=starts)
        return (y[inverse] * gates).to(x.dtype)

    return compute


def liger(_: Sizes, device: str, dtype: torch.dtype) -> Compute:
    """Liger's fused mixture of experts, which supports only SwiGLU."""
    fused = _library("liger_kernel.ops.fused_moe", device).LigerFusedMoEFunction

    def compute(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return fused.apply(x, up, down, index[:, None].to(torch.int32), gates).to(x.dtype)

    return compute
