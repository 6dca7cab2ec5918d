"""What every suite measures: comparisons that run one after another, and cases that the autotuner is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mpoe_bench.cases import JUDGED_WORKLOADS, Workload
from mpoe_bench.contender import Comparison
from mpoe_bench.problem import FFNCase
from mpoe_bench.suites.ffn import ffn_comparison
from mpoe_bench.suites.layers import LAYERS, layers_comparison
from mpoe_bench.suites.models import SHAPES, model_comparison
from mpoe_bench.suites.ops import embedding_comparison, linear_comparison, routing_comparison
from mpoe_bench.suites.scale import DENSE_PEERS, GPU_PEERS, Scale
from mpoe_bench.targets import GROUPED, LOOP
from mpoe_kernels.backends import AUTO

SUITES = ("quick", "planner", "targets", "layers", "models", "gpu")
# Quick to measure, with every shape and nearly every size; the planner suite takes all cases.
QUICK_JUDGED = (3, 12, 22, 30, 35, 42, 46)
HALVES = (torch.float32, torch.bfloat16)


def comparisons_of(suite: str, scale: Scale, device: str, backends: tuple[str, ...]) -> Iterator[Comparison]:
    """The comparisons of a suite, in order; none of the suite ``planner``."""
    plan = _Plan(scale, device, backends)
    return iter(()) if suite == "planner" else getattr(plan, suite)()


def judged_of(suite: str, scale: Scale, device: str, backends: tuple[str, ...]) -> list[tuple[str, Workload]]:
    """The cases that the choice is judged on, and whose choice: auto's if auto is measured, else each backend's own."""
    if device != "cpu" or suite not in ("quick", "planner"):
        return []
    whose = (AUTO,) if AUTO in backends else backends
    cases = JUDGED_WORKLOADS
    if not scale.judged:
        names = ("separable", "paper_4")
        cases = tuple(Workload(n, 48, 96, 4, 16, torch.float32, train) for n in names for train in (False, True))
    elif suite == "quick":
        whose, cases = whose[:1], tuple(cases[k] for k in QUICK_JUDGED)
    return [(backend, case) for backend in whose for case in cases]


class _Plan(NamedTuple):
    """A method per suite."""

    scale: Scale
    device: str
    backends: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.scale.model, self.scale.hidden

    @property
    def many(self) -> FFNCase:
        """A training batch with few experts."""
        return FFNCase(*self.sizes, self.scale.few_experts, self.scale.many_tokens, device=self.device)

    @property
    def few(self) -> FFNCase:
        """A small batch with many experts, forward only."""
        scale = self.scale
        return FFNCase(*self.sizes, scale.many_experts, scale.few_tokens, train=False, device=self.device)

    @property
    def peers(self) -> tuple[str, ...]:
        return (*DENSE_PEERS, *(GPU_PEERS if self.device == "cuda" else ()))

    def ffn(self, case: FFNCase, shapes: Sequence[str], **options: Any) -> Comparison:
        return ffn_comparison(case, shapes, self.backends, **options)

    def quick(self) -> Iterator[Comparison]:
        paper, bond_32, light = (self.scale.shape(name) for name in ("paper_64", "paper_32", "light_64"))
        shapes = ("separable", light, paper, "paper_full")
        yield self.ffn(self.many, shapes, peers=self.peers, masked=("separable",), original=(paper, "paper_full"))
        half, peers = replace(self.many, dtype=torch.bfloat16), (LOOP, GROUPED)
        yield self.ffn(half, ("separable", paper), peers=peers, original=(paper,))
        small = ("separable", paper, bond_32, "paper_16")
        yield self.ffn(self.few, small, peers=self.peers, original=("paper_16",))
        yield from self.decode(("separable", "paper_16"))
        yield from self.ops(("separable", paper))
        yield self.train_step(("neurons", "hidden", "separable"))
        yield self.layer(self.sizes, self.scale.many_tokens, 1, torch.float32)

    def targets(self) -> Iterator[Comparison]:
        """Only what the targets need, in both dtypes."""
        scale = self.scale
        paper, bond_32, light = (scale.shape(name) for name in ("paper_64", "paper_32", "light_64"))
        masked = ("separable", paper, "paper_full")
        shapes = ("separable", light, paper, "paper_full")
        for dtype in HALVES:
            many, few = replace(self.many, dtype=dtype), replace(self.few, dtype=dtype)
            yield self.ffn(many, shapes, peers=(LOOP,), original=(paper, "paper_full"), masked=masked)
            yield self.ffn(replace(many, experts=scale.many_experts), ("separable",))
            yield self.ffn(few, ("separable", paper, bond_32, "paper_16"), peers=(LOOP,))

    def decode(self, shapes: tuple[str, ...]) -> Iterator[Comparison]:
        for tokens in (1, 8):
            case = replace(self.few, experts=self.scale.few_experts, tokens=tokens)
            yield self.ffn(case, shapes, peers=(LOOP,), key="decode")

    def ops(self, shapes: tuple[str, ...]) -> Iterator[Comparison]:
        scale, device, tokens = self.scale, self.device, self.scale.many_tokens // 4
        for experts in (1, scale.few_experts):
            yield linear_comparison(shapes, self.sizes, experts, tokens, torch.float32, device, self.backends)
        for top_k in (1, 2):
            yield routing_comparison(scale.model, scale.few_experts, scale.many_tokens, top_k, device)
        yield embedding_comparison(scale.vocabulary, scale.model, (64, 16), tokens, device, self.backends)

    def layer(
        self, sizes: tuple[int, int], tokens: int, layers: int, dtype: torch.dtype, chosen: str = ""
    ) -> Comparison:
        return layers_comparison(sizes, tokens, layers, dtype, self.backends, self.device, chosen)

    def layers(self) -> Iterator[Comparison]:
        """Mixtures around a dense network: a training batch, and few tokens through as many layers as a model has."""
        scale, depth = self.scale, LAYERS if self.scale.judged else 2
        for dtype in HALVES:
            for tokens, layers in ((scale.many_tokens, 1), (scale.few_tokens, depth), (1, depth)):
                yield self.layer(self.sizes, tokens, layers, dtype)
            large = (2048, 8192) if scale.judged else (64, 128)
            yield self.layer(large, scale.many_tokens, 1, dtype, chosen="neurons 64")

    def train_step(self, shapes: tuple[str, ...]) -> Comparison:
        scale = self.scale
        return model_comparison("train_step", shapes, self.sizes, scale.few_experts, scale.step_tokens, self.device)

    def models(self) -> Iterator[Comparison]:
        """In bfloat16, with layers of T5-base's size: an AdamW step, and `generate` alone and in batches."""
        scale, where = self.scale, (self.sizes, self.scale.few_experts)
        step, depth = ((8, 256), LAYERS) if scale.judged else (scale.step_tokens, 1)
        few, few_layers = ("neurons", "hidden", "separable"), min(4, depth)
        for name in ("T5", "Llama"):
            yield model_comparison("train_step", few, *where, step, self.device, depth, torch.bfloat16, name)
            for batch in (1, 8) if name == "T5" else (8,):
                new, shapes = (batch, 24 if scale.judged else 3), tuple(SHAPES) if name == "T5" else few
                yield model_comparison("generate", shapes, *where, new, self.device, few_layers, torch.bfloat16, name)

    def gpu(self) -> Iterator[Comparison]:
        """A few minutes on a GPU in bfloat16, cases with a target first; decoding is timed as CUDA graphs too."""
        scale, paper = self.scale, self.scale.shape("paper_64")
        names = ("separable", "paper_full", "paper_64", "paper_32", "paper_16", "light_64")
        every = tuple(scale.shape(name) for name in names)
        small, middle, large = scale.few_tokens, 4096, 32768
        if not scale.judged:
            middle, large = scale.many_tokens, 2 * scale.many_tokens
        few, many = scale.few_experts, scale.many_experts

        def ffn(
            experts: int, tokens: int, shapes: Sequence[str] = every, train: bool = True, **more: Any
        ) -> Comparison:
            case = replace(self.many, experts=experts, tokens=tokens, train=train, dtype=torch.bfloat16)
            return self.ffn(case, shapes, **{"peers": self.peers, **more})

        yield ffn(many, small, train=False, original=(paper,))
        yield ffn(few, middle, original=(paper,), masked=(paper,))
        yield ffn(many, middle)
        yield ffn(few, large, ("separable", "paper_full", paper))
        yield ffn(many, large, ("separable", paper))
        decode = (GROUPED, *(("QuACK grouped GEMM", "SonicMoE") if self.device == "cuda" else ()))
        for tokens in (1, 8):
            yield ffn(many, tokens, train=False, peers=decode, key="decode")
        yield ffn(few, small, train=False)
        yield self.ffn(replace(self.many, tokens=middle), ("separable", paper), peers=(LOOP,))
        for top_k in (1, 2):
            yield routing_comparison(scale.model, many, middle, top_k, self.device)
