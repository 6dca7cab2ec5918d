"""The peers: other mixtures of experts, and how each is made.

Dense experts in a loop and as grouped products, and the original's algorithm, with one expert per
token; a layer of Transformers' own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe_kernels import MPOShape

LOOP = "dense experts, loop"
GROUPED = "dense experts, grouped_mm"
ORIGINAL = "original: rebuild all"
GRANITE = "transformers GraniteMoeShared 64, 8"


class DenseExpertsLayer(nn.Module):
    """A router with one expert per token, and dense experts.

    Args:
        compute: what computes the experts: x ``[T, I]``, experts int64 ``[T]``, gates ``[T, 1]``,
            up ``[E, F, I]`` and down ``[E, I, F]``, as in nn.Linear -> ``[T, I]``.
        sizes: model size I, hidden size F, experts E.
        apart: every expert's weights are separate tensors, as in a module list: a backward pass
            touches only those.
        plain: in plain PyTorch, which gives the same.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        apart: bool,
        sizes: tuple[int, int, int],
        plain: bool,
        **placed: Any,
    ) -> None:
        super().__init__()
        model, hidden, experts = sizes
        self.compute = loop if plain else compute
        self.router = nn.Linear(model, experts, bias=False, **placed)

        def weights(rows: int, columns: int) -> Any:
            matrices = torch.randn(experts, rows, columns, **placed) / columns**0.5
            if apart:
                return nn.ParameterList(matrices.unbind(0))
            return nn.Parameter(matrices)

        self.up = weights(hidden, model)
        self.down = weights(model, hidden)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates, index = self.router(x).softmax(-1, dtype=dtype).max(-1)
        return self.compute(x, index, gates[:, None], self.up, self.down)


def loop(
    x: Tensor, index: Tensor, gates: Tensor, up: Sequence[Tensor], down: Sequence[Tensor]
) -> Tensor:
    """As in Switch implementations: for each expert, gather its tokens, run its FFN, scatter the
    result."""
    y = torch.zeros_like(x)
    for e, (up_e, down_e) in enumerate(zip(up, down, strict=True)):
        rows = (index == e).nonzero()[:, 0]
        if rows.numel():
            hidden = F.relu(F.linear(x[rows], up_e))
            y_e = F.linear(hidden, down_e) * gates[rows]
            y = y.index_add(0, rows, y_e.to(x.dtype))
    return y


def grouped_mm(x: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sort by expert, `torch.nn.functional.grouped_mm` twice, un-sort."""
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=len(up))
    ends = counts.cumsum(0).to(torch.int32)
    hidden = F.relu(F.grouped_mm(x[order], up.mT, offs=ends))
    y = F.grouped_mm(hidden, down.mT, offs=ends)
    y = torch.empty_like(y).index_copy(0, order, y)
    return (y * gates).to(x.dtype)


def rebuilt(cores: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """An expert's weight ``[I, F]`` from its cores ``[d, i, j, d']``.

    A chain of tensordots leaves the axes in the order (i1, j1, ..., in, jn), one permutation of 2n
    axes brings them to (i1..in, j1..jn).
    """
    product, *others = cores
    for core in others:
        product = torch.tensordot(product, core, dims=1)
    pairs = zip(shape.in_factors, shape.out_factors, strict=True)
    product = product.reshape([size for pair in pairs for size in pair])
    axes = range(product.dim())
    product = product.permute(*axes[0::2], *axes[1::2])
    weight = product.reshape(shape.padded_in, shape.padded_out)
    return weight[: shape.in_features, : shape.out_features]


class OriginalLayer(nn.Module):
    """The original's algorithm (Gao et al., COLING 2022), reimplemented from its description, on
    the cores of a layer.

    Every expert's weight is rebuilt in every forward pass, also of those without tokens; a Switch
    loop follows. Autograd keeps all of this for the backward pass. With ``plain`` the layer
    computes itself.
    """

    def __init__(self, layer: Any, plain: bool) -> None:
        super().__init__()
        self.layer = layer
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.layer(x)
        decision = self.layer.router(x)
        up = self.weights(self.layer.experts.up)
        down = self.weights(self.layer.experts.down)
        return loop(x, decision.top_k_index[:, 0], decision.top_k_weights, up, down)

    def weights(self, module: Any) -> list[Tensor]:
        """Of every expert, as in nn.Linear."""
        cores = []
        for core in module.cores():
            is_shared = core.dim() == 4
            cores.append([core] * self.layer.num_experts if is_shared else core.unbind(0))
        return [rebuilt(chain, module.shape).T for chain in zip(*cores, strict=True)]


class GraniteLayer(nn.Module):
    """Transformers' dense network and 64 experts beside it, eight per token, with random weights:
    the form of neurons.

    All are gated, so that hidden sizes are two thirds of a plain network's of the same weights and
    FLOPs.
    """

    def __init__(self, model: int) -> None:
        from transformers import GraniteMoeSharedConfig
        from transformers.models.granitemoeshared import modeling_granitemoeshared as granite

        super().__init__()
        config = GraniteMoeSharedConfig(
            hidden_size=model,
            shared_intermediate_size=8 * model // 3,
            intermediate_size=max(min(64, model // 12) * 2 // 3, 1),
            num_local_experts=64,
            num_experts_per_tok=8,
            num_attention_heads=1,
        )
        self.network = granite.GraniteMoeSharedMLP(config)
        self.experts = granite.GraniteMoeSharedMoE(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x[None]
        return (self.network(batch) + self.experts(batch))[0]


PEERS = {
    LOOP: partial(DenseExpertsLayer, loop, True),
    GROUPED: partial(DenseExpertsLayer, grouped_mm, False),
}
