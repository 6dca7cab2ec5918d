"""A call of the native linear op that fits."""

from dataclasses import replace

import torch
from mpoe_bench.cases import random_blocks

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.op import ForwardCall

SHAPE = MPOShape((4, 3, 1), (1, 5, 2), max_bond=3)


def forward_call(**changes):
    """Of two experts; the first one has one of the three slots."""
    blocks = random_blocks(SHAPE, 2, torch.float32)
    call = ForwardCall(
        x=torch.randn(3, SHAPE.in_features),
        left=blocks.left,
        central=blocks.central,
        right=blocks.right,
        expert_offsets=torch.tensor([0, 1, 3], dtype=torch.int32),
        bias=None,
        row_index=torch.arange(3),
        in_features=SHAPE.in_features,
        out_features=SHAPE.out_features,
        activation="none",
        strategy="separable",
        backend="native",
        save=True,
    )
    return replace(call, **changes)
