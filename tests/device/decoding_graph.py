"""A decoding step captured in a CUDA graph, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpoe_bench.cases import random_blocks
from mpoe_bench.graphs import graphed
from torch import Tensor

from mpoe_kernels import MPOBlocks, mpo_ffn, route
from tests.cases import SMALL_SHAPES


def run_apart(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a new process, so that what it leaves behind is gone; raises what it raised."""
    torch.multiprocessing.spawn(_without_rank, (function, *arguments))


def _without_rank(_: int, function: Callable[..., None], *arguments: object) -> None:
    function(*arguments)


def replay_a_decoding_step(backend: str, name: str, device: str) -> None:
    """Routing and both products, captured with one routing and replayed with another."""
    torch.manual_seed(0)
    shape = SMALL_SHAPES[name]
    down_shape = shape.mirrored() if shape.is_separable else shape
    parts = []
    for each in (shape, down_shape):
        made = random_blocks(each, 3)
        moved = (t.to(device, torch.float32) for t in (made.left, made.central, made.right))
        parts.append(MPOBlocks(*moved, each.in_features, each.out_features))
    x, index = torch.randn(4, shape.in_features, device=device), torch.tensor([[0], [1], [1], [2]], device=device)
    gates = torch.ones(4, 1, device=device)
    found = torch.empty(4, down_shape.out_features, device=device)

    def step() -> Tensor:
        with torch.no_grad():
            return mpo_ffn(x, route(index, 3, backend=backend), gates, *parts, backend=backend)

    replay = graphed(lambda: found.copy_(step()))
    x.copy_(torch.randn_like(x))
    index.copy_(torch.tensor([[2], [2], [0], [2]], device=device))
    replay()
    torch.testing.assert_close(found, step())
