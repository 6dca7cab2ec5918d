"""The peers: other ways to compute a mixture of experts, reimplemented or called through their own packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from mpoe_bench.peers import dense_experts, gpu
from mpoe_bench.peers.dense_experts import Compute, DenseExpertsLayer, loop, relu, swiglu
from mpoe_bench.targets import GROUPED, LOOP


class Peer(NamedTuple):
    """What computes dense experts.

    Attributes:
        compute: of the sizes (model, hidden, experts), the device and the dtype; raises `UnavailableError`.
        options: of `DenseExpertsLayer`.
        trains: whether it has a backward pass.
    """

    compute: Callable[[tuple[int, int, int], str, torch.dtype], Compute]
    options: dict[str, bool] = {}  # noqa: RUF012
    trains: bool = True

    def layer(self, sizes: tuple[int, int, int], device: str, dtype: torch.dtype, plain: bool) -> nn.Module:
        """The layer, or one that computes the same in a plain loop."""
        gated = self.options.get("gated", False)
        compute = loop(swiglu if gated else relu) if plain else self.compute(sizes, device, dtype)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        return DenseExpertsLayer(sizes, compute, **self.options, **placed)


DENSE_PEERS = {
    LOOP: Peer(lambda *_: loop(), {"apart": True}),
    GROUPED: Peer(lambda *_: dense_experts.grouped_mm),
    "dense experts, one-hot einsum": Peer(lambda *_: dense_experts.one_hot),
}
GPU_PEERS = {
    "ScatterMoE": Peer(gpu.scattermoe),
    "SonicMoE": Peer(gpu.sonicmoe),
    "QuACK grouped GEMM": Peer(gpu.quack, trains=False),
    "Liger SwiGLU": Peer(gpu.liger, {"gated": True}),
}
PEERS = DENSE_PEERS | GPU_PEERS
