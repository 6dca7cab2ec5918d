"""Arguments that fit the raw ops ``torch.ops.mpoe.*``."""

from __future__ import annotations

from typing import Any

import torch
from mpoe_bench.cases import expert_choice, random_blocks

from mpoe_kernels import route
from tests.cases import SMALL_SHAPES

TOKENS, EXPERTS, TOP_K = 5, 3, 2


def calls(backend: str) -> dict[str, dict[str, Any]]:
    """Arguments that fit, of every op."""
    routing = route(expert_choice("zipf", TOKENS, EXPERTS, TOP_K), EXPERTS)
    slots = {name: getattr(routing, name) for name in ("expert_offsets", "token_of_slot", "slot_of_token")}
    shape, rows = SMALL_SHAPES["separable"], TOKENS * TOP_K
    blocks, one = random_blocks(shape, EXPERTS, torch.float32), random_blocks(shape, 1, torch.float32)
    linear = {
        "x": torch.randn(TOKENS, 12),
        "left": blocks.left,
        "central": blocks.central,
        "right": blocks.right,
        "expert_offsets": routing.expert_offsets,
        "bias": torch.randn(10),
        "row_index": routing.token_of_slot,
        "in_features": 12,
        "out_features": 10,
        "activation": "gelu",
        "strategy": "auto",
        "backend": backend,
    }
    side = torch.randn(EXPERTS, 1, 3, 3)
    hidden = {
        "u": torch.randn(TOKENS, 12),
        "gates": torch.rand(TOKENS, TOP_K),
        "top_k_index": torch.randint(0, EXPERTS, (TOKENS, TOP_K)),
        "right": side,
        "left": side.clone(),
        "bias": torch.randn(EXPERTS, 12),
        "u_gate": torch.randn(TOKENS, 12),
        "right_gate": side.clone(),
        "activation": "silu",
        "backend": backend,
    }
    own = {name: torch.randn(EXPERTS, 3, 12) for name in ("up", "down")}
    neurons = {
        "x": torch.randn(TOKENS, 12),
        "gates": hidden["gates"],
        "top_k_index": hidden["top_k_index"],
        **own,
        "bias": torch.randn(EXPERTS, 3),
        "gate_up": own["up"].clone(),
        "activation": "silu",
        "backend": backend,
    }
    table = {
        "ids": torch.tensor([0, 3, 7]),
        "left": one.left,
        "central": one.central,
        "right": one.right,
        "num_embeddings": 12,
        "embedding_dim": 10,
        "backend": "eager",
    }
    gates, y_sorted = torch.rand(TOKENS, TOP_K), torch.randn(rows, 4)
    pairs = {"token_of_slot": slots["token_of_slot"], "slot_of_token": slots["slot_of_token"], "top_k_weights": gates}
    return {
        "route": {
            "top_k_index": torch.randint(0, EXPERTS, (TOKENS, TOP_K)),
            "num_experts": EXPERTS,
            "capacity": 2,
            "token_mask": torch.ones(TOKENS, dtype=torch.bool),
            "backend": backend,
        },
        "dispatch": {"x": torch.randn(TOKENS, 4), **slots, "backend": backend},
        "dispatch_backward": {
            "grad": torch.randn(rows, 4),
            "slot_of_token": slots["slot_of_token"],
            "backend": backend,
        },
        "combine": {"y_sorted": y_sorted, **slots, "top_k_weights": gates, "backend": backend},
        "combine_backward": {
            "grad": torch.randn(TOKENS, 4),
            "y_sorted": y_sorted,
            **pairs,
            "need_y": True,
            "need_weights": True,
            "backend": backend,
        },
        "grouped_mpo_linear": {**linear, "save": False},
        "grouped_mpo_linear_backward": {
            **linear,
            "activation": "none",
            "grad": torch.randn(rows, 10),
            "h": torch.randn(rows * 2, 5),
            "saved": torch.empty(0),
            "need": [True] * 5,
        },
        "hidden_experts": hidden,
        "hidden_experts_backward": {**hidden, "grad": torch.randn(TOKENS, 12), "need": [True] * 7},
        "neuron_experts": neurons,
        "neuron_experts_backward": {**neurons, "grad": torch.randn(TOKENS, 12), "need": [True] * 6},
        "mpo_embedding": table,
        "mpo_embedding_backward": {**table, "grad": torch.randn(3, 10), "need": [True] * 3},
    }


def run(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.mpoe, op)(*arguments.values())
