"""Dense experts behind a router, one per token: loop, grouped product, one-hot einsum, the original's algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_bench.contender import UnavailableError
from mpoe_kernels import MPOShape

ONE_HOT_LIMIT = 2**31  # bytes of the one-hot tensor [T, E, C] beyond which the peer does not take part
# x [T, I], experts int64 [T], gates [T, 1], up [E, F, I] and down [E, I, F] (as in nn.Linear) -> [T, I]
Compute = Callable[[Tensor, Tensor, Tensor, Any, Any], Tensor]


def relu(z: Tensor) -> Tensor:
    return F.relu(z)


def swiglu(z: Tensor) -> Tensor:
    """``silu(gate) * up`` of both in one."""
    gate, up = z.chunk(2, -1)
    return F.silu(gate) * up


class DenseExpertsLayer(nn.Module):
    """A router with one expert per token, and dense experts.

    Args:
        sizes: model size I, hidden size F, experts E.
        compute: what computes the experts.
        gated: SwiGLU experts, of two thirds of the hidden size: the same weights and FLOPs.
        apart: every expert's weights are separate tensors, as in a module list: a backward pass touches only those.
    """

    def __init__(
        self, sizes: tuple[int, int, int], compute: Compute, gated: bool = False, apart: bool = False, **placed: Any
    ) -> None:
        super().__init__()
        model, hidden, experts = sizes
        hidden = 2 * hidden // 3 if gated else hidden
        self.compute, self.router = compute, nn.Linear(model, experts, bias=False, **placed)

        def weights(rows: int, columns: int) -> Any:
            made = torch.randn(experts, rows, columns, **placed) / columns**0.5
            return nn.ParameterList(made.unbind(0)) if apart else nn.Parameter(made)

        self.up, self.down = weights(2 * hidden if gated else hidden, model), weights(model, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gates, index = self.router(x).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).max(-1)
        return self.compute(x, index, gates[:, None], self.up, self.down)


def loop(activation: Callable[[Tensor], Tensor] = relu) -> Compute:
    """As in Switch implementations: for each expert, gather its tokens, run its FFN, scatter the result."""

    def compute(x: Tensor, index: Tensor, gates: Tensor, up: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
        y = torch.zeros_like(x)
        for e, weights in enumerate(zip(up, down, strict=True)):
            rows = (index == e).nonzero()[:, 0]
            if rows.numel():
                y_e = F.linear(activation(F.linear(x[rows], weights[0])), weights[1])
                y = y.index_add(0, rows, (y_e * gates[rows]).to(x.dtype))
        return y

    return compute


def sorted_tokens(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order, inverse, ends)``: a stable sort of tokens by expert and the experts' last slots, int32 ``[E]``."""
    order = torch.argsort(index, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.bincount(index, minlength=num_experts)
    return order, inverse, counts.cumsum(0).to(torch.int32)


def grouped_mm(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sort by expert, `torch.nn.functional.grouped_mm` twice, un-sort."""
    order, inverse, ends = sorted_tokens(index, up.shape[0])
    hidden = F.relu(F.grouped_mm(x[order], up.mT, offs=ends))
    y = F.grouped_mm(hidden, down.mT, offs=ends)
    return (y[inverse] * gates).to(x.dtype)


def one_hot(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GShard's dispatch: einsum with a one-hot tensor ``[T, E, C]``; C is the largest load, so nothing is dropped."""
    experts = up.shape[0]
    capacity = int(torch.bincount(index, minlength=experts).max())
    if x.shape[0] * experts * capacity * x.itemsize > ONE_HOT_LIMIT:
        raise UnavailableError(f"the one-hot tensor [T, E, C] = [{x.shape[0]}, {experts}, {capacity}] is too big")
    expert = F.one_hot(index, experts)
    position = (expert.cumsum(0) - 1).gather(1, index[:, None])[:, 0]
    mask = expert.to(x.dtype)[:, :, None] * F.one_hot(position, capacity).to(x.dtype)[:, None, :]
    grouped = torch.einsum("tec,ti->eci", mask, x)
    hidden = F.relu(torch.einsum("eci,efi->ecf", grouped, up))
    y = torch.einsum("ecf,eif->eci", hidden, down)
    return torch.einsum("tec,eci->ti", mask * gates[:, :, None].to(x.dtype), y)


def rebuilt(cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """An expert's weight ``[I, F]`` from its cores ``[d, i, j, d']``.

    A chain of tensordots leaves the axes in the order (i1, j1, ..., in, jn), one permutation of 2n axes brings them to
    (i1..in, j1..jn).
    """
    product, *others = cores
    for core in others:
        product = torch.tensordot(product, core, dims=1)
    product = product.reshape([size for pair in zip(shape.in_factors, shape.out_factors, strict=True) for size in pair])
    axes = list(range(product.dim()))
    weight = product.permute(axes[0::2] + axes[1::2]).reshape(shape.padded_in, shape.padded_out)
    return weight[: shape.in_features, : shape.out_features]


class OriginalLayer(nn.Module):
    """The original's algorithm (Gao et al., COLING 2022), reimplemented from its description, on the cores of a layer.

    Every expert's weight is rebuilt in every forward pass, also of those without tokens; a Switch loop follows.
    Autograd keeps all of this for the backward pass. With ``plain`` the layer computes itself.
    """

    def __init__(self, layer: Any, plain: bool) -> None:
        super().__init__()
        self.layer, self.plain = layer, plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.layer(x)
        decision, experts, weights = self.layer.router(x), self.layer.num_experts, []
        for module in (self.layer.experts.up, self.layer.experts.down):
            cores = [module.get_parameter(name) for name in module.core_names()]
            apart = [[c] * experts if k == module.shape.central else c.unbind(0) for k, c in enumerate(cores)]
            weights.append([rebuilt(own, module.shape).T for own in zip(*apart, strict=True)])
        return loop()(x, decision.top_k_index[:, 0], decision.top_k_weights, *weights)
