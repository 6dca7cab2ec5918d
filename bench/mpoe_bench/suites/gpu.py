"""What is measured on a GPU in a few minutes. Cases with a target come first, so that they fit the time.

bfloat16, T5-base's feed-forward layer, few and many experts; decoding as CUDA graphs, because on a GPU every forward
pass that can be captured is timed as one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mpoe_bench.contender import Comparison
from mpoe_bench.problem import FFNCase
from mpoe_bench.suites.ffn import ffn_comparison
from mpoe_bench.suites.ops import routing_comparison
from mpoe_bench.suites.scale import DENSE_PEERS, GPU_PEERS, Scale
from mpoe_bench.targets import GROUPED, LOOP


def _tokens(scale: Scale) -> tuple[int, int, int]:
    """Tokens of a small batch, a training batch and a large batch."""
    return (64, 4096, 32768) if scale.judged else (scale.few_tokens, scale.many_tokens, 2 * scale.many_tokens)


def gpu_comparisons(scale: Scale, device: str, backends: tuple[str, ...]) -> Iterator[Comparison]:
    """Most important first."""
    shapes = tuple(scale.shape(n) for n in ("separable", "paper_full", "paper_64", "paper_32", "paper_16", "light_64"))
    peers = (*DENSE_PEERS, *(GPU_PEERS if device == "cuda" else ()))
    small, middle, large = _tokens(scale)
    few, many = scale.few_experts, scale.many_experts
    base = FFNCase(scale.model, scale.hidden, dtype=torch.bfloat16, device=device)

    def ffn(experts: int, tokens: int, names: tuple[str, ...] = shapes, **options: Any) -> Comparison:
        case = replace(base, experts=experts, tokens=tokens, train=options.pop("train", True))
        case = replace(case, dtype=options.pop("dtype", case.dtype))
        return ffn_comparison(case, names, backends, **{"peers": peers, **options})

    paper = scale.shape("paper_64")
    yield ffn(many, small, train=False, original=(paper,))
    yield ffn(few, middle, original=(paper,), masked=(paper,))
    yield ffn(many, middle)
    yield ffn(few, large, ("separable", "paper_full", paper))
    yield ffn(many, large, ("separable", paper))
    decode = (GROUPED, *(("QuACK grouped GEMM", "SonicMoE") if device == "cuda" else ()))
    for tokens in (1, 8):
        yield ffn(many, tokens, train=False, peers=decode, key="decode")
    yield ffn(few, small, train=False)
    yield ffn(few, middle, ("separable", paper), dtype=torch.float32, peers=(LOOP,))
    for top_k in (1, 2):
        yield routing_comparison(scale.model, many, middle, top_k, device)
