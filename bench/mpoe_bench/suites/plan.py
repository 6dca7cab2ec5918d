"""What every suite measures: comparisons that run one after another, and cases that the autotuner is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mpoe_bench.cases import JUDGED_WORKLOADS, Workload
from mpoe_bench.contender import Comparison
from mpoe_bench.gpu_cases import TOKENS, Case, cases
from mpoe_bench.peers import DENSE_PEERS, GPU_PEERS
from mpoe_bench.peers.stock_layers import STOCK_LAYERS
from mpoe_bench.suites.layers import (
    LAYERS,
    Layer,
    case_layer,
    layers_comparison,
    mixtures,
    named_case,
    original_layer,
    part_comparisons,
    peer_layers,
    stock,
)
from mpoe_bench.suites.models import SHAPES, model_comparison
from mpoe_bench.suites.scale import Scale
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
    judged = JUDGED_WORKLOADS
    if not scale.judged:
        names = ("separable", "paper_4")
        judged = tuple(Workload(n, 48, 96, 4, 16, torch.float32, train) for n in names for train in (False, True))
    elif suite == "quick":
        whose, judged = whose[:1], tuple(judged[k] for k in QUICK_JUDGED)
    return [(backend, case) for backend in whose for case in judged]


class _Plan(NamedTuple):
    """A method per suite."""

    scale: Scale
    device: str
    backends: tuple[str, ...]

    def ffn(
        self,
        shapes: Sequence[str],
        experts: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        *,
        train: bool = True,
        peers: Sequence[str] = (),
        original: Sequence[str] = (),
        masked: Sequence[str] = (),
        key: str = "ffn",
    ) -> Comparison:
        """MPO experts of several shapes, one per token, on every backend; ``masked`` again with the central gradient
        masked; peers with dense experts, and the original's algorithm on some shapes."""
        model, where = self.scale.model, (self.device, dtype)
        layers: list[Layer] = []
        for names, hidden in ((shapes, False), (masked if train else (), True)):
            for real in names:
                name = self.scale.shapes.get(real, real)
                label, case = f"mpoe {name}{', central masked' * hidden}", named_case(name, model, experts, hidden)
                layers += [case_layer(label, name, case, backend, tokens, *where) for backend in self.backends]
        layers += peer_layers(peers, model, experts, *where)
        layers += [original_layer(self.scale.shapes.get(n, n), model, experts, *where) for n in original]
        title = f"{'decode' if key == 'decode' else 'FFN'} E={experts}"
        return layers_comparison(key, title, layers, model, tokens, dtype, self.device, train=train, experts=experts)

    @property
    def peers(self) -> tuple[str, ...]:
        return (*DENSE_PEERS, *(GPU_PEERS if self.device == "cuda" else ()))

    def quick(self) -> Iterator[Comparison]:
        scale = self.scale
        shapes, small = (
            ("separable", "light_64", "paper_64", "paper_full"),
            ("separable", "paper_64", "paper_32", "paper_16"),
        )
        few, many = (scale.few_experts, scale.many_tokens), (scale.many_experts, scale.few_tokens)
        yield self.ffn(shapes, *few, peers=self.peers, masked=shapes[:1], original=shapes[2:])
        half: dict[str, Any] = {"dtype": torch.bfloat16, "peers": (LOOP, GROUPED), "original": ("paper_64",)}
        yield self.ffn(("separable", "paper_64"), *few, **half)
        yield self.ffn(small, *many, train=False, peers=self.peers, original=("paper_16",))
        for tokens in (1, 8):
            yield self.ffn(
                ("separable", "paper_16"), scale.few_experts, tokens, train=False, peers=(LOOP,), key="decode"
            )
        parts = [scale.shapes.get(name, name) for name in ("separable", "paper_64")]
        yield from part_comparisons(
            parts, scale.model, scale.vocabulary, scale.many_tokens // 4, self.device, self.backends
        )
        yield self.model("train_step", ("neurons", "hidden", "separable"), scale.step_tokens)
        yield self.mixtures(scale.model, scale.many_tokens, 1, torch.float32)

    def targets(self) -> Iterator[Comparison]:
        """Only what the targets need, in both dtypes."""
        scale, shapes = self.scale, ("separable", "light_64", "paper_64", "paper_full")
        masked, original = ("separable", "paper_64", "paper_full"), ("paper_64", "paper_full")
        small = ("separable", "paper_64", "paper_32", "paper_16")
        for dtype in HALVES:
            few = scale.few_experts, scale.many_tokens, dtype
            yield self.ffn(shapes, *few, peers=(LOOP,), original=original, masked=masked)
            yield self.ffn(("separable",), scale.many_experts, scale.many_tokens, dtype)
            yield self.ffn(small, scale.many_experts, scale.few_tokens, dtype, train=False, peers=(LOOP,))

    def mixtures(self, model: int, tokens: int, count: int, dtype: torch.dtype, chosen: str = "") -> Comparison:
        """Those around a dense network, and stock layers, whose names hold ``chosen``."""
        backends = self.backends if count == 1 else self.backends[:1]
        found = self._cases(mixtures(model), backends, tokens, dtype, chosen)
        found += [stock(name, model, tokens, self.device, dtype) for name in STOCK_LAYERS if chosen in name]
        return layers_comparison("layers", "layers", found, model, tokens, dtype, self.device, count=count)

    def gpu_layers(self, model: int, tokens: int) -> Comparison:
        """What has limits on a GPU."""
        dtype = torch.bfloat16
        found = self._cases({case.name: case for case in cases((model,))}, self.backends, tokens, dtype)
        return layers_comparison("layers", "layers", found, model, tokens, dtype, self.device)

    def _cases(
        self, named: dict[str, Case], backends: Sequence[str], tokens: int, dtype: torch.dtype, chosen: str = ""
    ) -> list[Layer]:
        return [
            case_layer(name, name, case, backend, tokens, self.device, dtype)
            for name, case in named.items()
            for backend in backends
            if chosen in name
        ]

    def layers(self) -> Iterator[Comparison]:
        """A training batch, and few tokens through as many layers as a model has."""
        if self.device == "cuda":
            yield from (self.gpu_layers(model, TOKENS) for model in (768, 4096))
            return
        scale, depth = self.scale, LAYERS if self.scale.judged else 2
        for dtype in HALVES:
            for tokens, count in ((scale.many_tokens, 1), (scale.few_tokens, depth), (1, depth)):
                yield self.mixtures(scale.model, tokens, count, dtype)
            yield self.mixtures(2048 if scale.judged else 64, scale.many_tokens, 1, dtype, chosen="neurons 64")
        if not scale.judged:
            yield self.gpu_layers(32, 64)

    def model(self, key: str, shapes: Sequence[str], tokens: tuple[int, int], *options: Any) -> Comparison:
        sizes = self.scale.model, 4 * self.scale.model
        return model_comparison(key, shapes, sizes, self.scale.few_experts, tokens, self.device, *options)

    def models(self) -> Iterator[Comparison]:
        """In bfloat16, with layers of T5-base's size: an AdamW step, and `generate` alone and in batches."""
        step, depth, new = ((8, 256), LAYERS, 24) if self.scale.judged else (self.scale.step_tokens, 1, 3)
        few = ("neurons", "hidden", "separable")
        for name in ("T5", "Llama"):
            yield self.model("train_step", few, step, depth, torch.bfloat16, name)
            for batch in (1, 8) if name == "T5" else (8,):
                shapes = tuple(SHAPES) if name == "T5" else few
                yield self.model("generate", shapes, (batch, new), min(4, depth), torch.bfloat16, name)

    def gpu(self) -> Iterator[Comparison]:
        """A few minutes on a GPU in bfloat16, cases with a target first; decoding is timed as CUDA graphs too."""
        scale, dtype, paper = self.scale, torch.bfloat16, "paper_64"
        every = ("separable", "paper_full", paper, "paper_32", "paper_16", "light_64")
        small, middle, large = scale.few_tokens, TOKENS, 32768
        if not scale.judged:
            middle, large = scale.many_tokens, 2 * scale.many_tokens
        few, many, peers = scale.few_experts, scale.many_experts, {"peers": self.peers}
        yield self.ffn(every, many, small, dtype, train=False, original=(paper,), **peers)
        yield self.ffn(every, few, middle, dtype, original=(paper,), masked=(paper,), **peers)
        yield self.ffn(every, many, middle, dtype, **peers)
        yield self.ffn(("separable", "paper_full", paper), few, large, dtype, **peers)
        yield self.ffn(("separable", paper), many, large, dtype, **peers)
        decode = (GROUPED, *(("QuACK grouped GEMM", "SonicMoE") if self.device == "cuda" else ()))
        for tokens in (1, 8):
            yield self.ffn(every, many, tokens, dtype, train=False, peers=decode, key="decode")
        yield self.ffn(every, few, small, dtype, train=False, **peers)
        yield self.ffn(("separable", paper), few, middle, peers=(LOOP,))
