"""What every suite measures: comparisons that run one after another, and cases that the autotuner
is judged on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mpoe_bench.cases import JUDGED_WORKLOADS, Workload
from mpoe_bench.contender import Comparison
from mpoe_bench.layers import (
    LAYERS,
    TOKENS,
    Case,
    Layer,
    Place,
    case_layer,
    cases,
    granite,
    layers_comparison,
    mixtures,
    named_case,
    original_layer,
    peer_layers,
)
from mpoe_bench.peers import LOOP, PEERS
from mpoe_bench.whole_models import ModelCase
from mpoe_kernels.backends import AUTO

SUITES = ("quick", "planner", "targets", "layers", "models")
DTYPES = (torch.float32, torch.bfloat16)
# Of layers that train on many tokens, and that decode few with many experts.
TRAINING_SHAPES = ("separable", "light_64", "paper_64", "paper_full")
DECODING_SHAPES = ("separable", "paper_64", "paper_32", "paper_16")
# Of whole models; all but the first ones in `generate` of a T5 alone.
MODEL_SHAPES = ("neurons", "hidden", "separable")
GENERATING_SHAPES = (*MODEL_SHAPES, "light", "paper")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: the real ones, or tiny ones for tests.

    Attributes:
        model: size of the model; the hidden size is four times as large.
        training_tokens, decoding_tokens: T of a training batch, and of a batch that decodes.
        few_experts, many_experts: E.
        short_step, step: sequences of a train step, and the length of each: of a model of one
            layer, and of whole models.
        depth: layers of a model.
        new_tokens: that `generate` makes.
        wide: size of another model, whose layers have targets too.
        judged: whether targets count, and the choice is judged on its own cases, not on a few sizes
            made for a test.
    """

    model: int = 768
    training_tokens: int = 2048
    decoding_tokens: int = 64
    few_experts: int = 8
    many_experts: int = 64
    short_step: tuple[int, int] = (4, 128)
    step: tuple[int, int] = (8, 256)
    depth: int = LAYERS
    new_tokens: int = 24
    wide: int = 2048
    judged: bool = True


SCALES = {"real": Scale(), "tiny": Scale(48, 32, 8, 4, 8, (2, 8), (2, 8), 2, 3, 64, judged=False)}


def judged_of(scale: Scale, backends: tuple[str, ...]) -> list[tuple[str, Workload]]:
    """The cases of the suite ``planner``, and whose choice is judged: auto's if auto is measured,
    else each backend's own."""
    judged = JUDGED_WORKLOADS
    if not scale.judged:
        judged = tuple(
            Workload(name, 48, 96, 4, 16, torch.float32, training)
            for name in ("separable", "paper_4")
            for training in (False, True)
        )
    if AUTO in backends:
        backends = (AUTO,)
    return [(backend, case) for backend in backends for case in judged]


class Plan(NamedTuple):
    """The comparisons of the suites, a method each."""

    scale: Scale
    device: str
    backends: tuple[str, ...]

    def of(self, suite: str) -> Iterator[Comparison]:
        """Of a suite, in order; none of the suite ``planner``."""
        return iter(()) if suite == "planner" else getattr(self, suite)()

    def at(
        self, tokens: int, dtype: torch.dtype = torch.float32, model: int | None = None
    ) -> Place:
        return Place(model or self.scale.model, tokens, self.device, dtype)

    def ffn(
        self,
        shapes: Sequence[str],
        experts: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        *,
        train: bool = True,
        peers: Iterable[str] = (),
        original: Sequence[str] = (),
        masked: Sequence[str] = (),
    ) -> Comparison:
        """MPO experts of several shapes, one per token, on every backend; ``masked`` again with the
        central gradient masked; peers with dense experts, and the original's algorithm on some
        shapes."""
        at = self.at(tokens, dtype)
        labels = [(f"mpoe {name}", name, False) for name in shapes]
        labels += [(f"mpoe {name}, central masked", name, True) for name in masked]
        layers = []
        for label, name, is_masked in labels:
            case = named_case(name, at.model, experts, is_masked)
            layers += [case_layer(label, name, case, backend, at) for backend in self.backends]
        layers += peer_layers(peers, experts, at)
        layers += [original_layer(name, experts, at) for name in original]
        return layers_comparison(
            "ffn", f"FFN E={experts}", layers, at, train=train, experts=experts
        )

    def decoding(self, dtype: torch.dtype = torch.float32) -> Comparison:
        """Few tokens among many experts."""
        scale = self.scale
        return self.ffn(
            DECODING_SHAPES,
            scale.many_experts,
            scale.decoding_tokens,
            dtype,
            train=False,
            peers=(LOOP,),
        )

    def quick(self) -> Iterator[Comparison]:
        """Every peer once."""
        scale = self.scale
        training = (scale.few_experts, scale.training_tokens)
        yield self.ffn(
            TRAINING_SHAPES,
            *training,
            peers=PEERS,
            masked=("separable",),
            original=("paper_64", "paper_full"),
        )
        yield self.ffn(("separable", "paper_64"), *training, torch.bfloat16, peers=(LOOP,))
        yield self.decoding()
        for tokens in (1, 8):
            yield self.ffn(("separable", "paper_16"), scale.few_experts, tokens, train=False)
        yield self.train_step()
        at = self.at(scale.training_tokens)
        yield self.beside(mixtures(scale.model), at, peers=[granite(at)])

    def targets(self) -> Iterator[Comparison]:
        """Only what the targets need: in both dtypes; on a GPU more tokens, in bfloat16."""
        if self.device == "cuda":
            yield from self.gpu_targets()
            return
        scale = self.scale
        for dtype in DTYPES:
            yield self.ffn(
                TRAINING_SHAPES,
                scale.few_experts,
                scale.training_tokens,
                dtype,
                peers=(LOOP,),
                original=("paper_64", "paper_full"),
                masked=("separable", "paper_64", "paper_full"),
            )
            yield self.ffn(("separable",), scale.many_experts, scale.training_tokens, dtype)
            yield self.decoding(dtype)

    def gpu_targets(self) -> Iterator[Comparison]:
        scale = self.scale
        shapes = ("separable", "paper_full", "paper_64", "paper_32", "light_64")
        decoding = scale.many_experts, scale.decoding_tokens, torch.bfloat16
        yield self.ffn(shapes, *decoding, train=False, peers=PEERS)
        for experts in (scale.few_experts, scale.many_experts):
            for tokens in (TOKENS, 8 * TOKENS):
                yield self.ffn(shapes, experts, tokens, torch.bfloat16, peers=PEERS)

    def beside(
        self,
        named: Mapping[str, Case],
        at: Place,
        count: int = 1,
        peers: Iterable[Layer] = (),
        train: bool = True,
    ) -> Comparison:
        """Layers by name, and peers."""
        backends = self.backends if count == 1 else self.backends[:1]
        contenders = []
        for name, case in named.items():
            contenders += [case_layer(name, name, case, backend, at) for backend in backends]
        contenders += peers
        return layers_comparison("layers", "layers", contenders, at, train=train, count=count)

    def layers(self) -> Iterator[Comparison]:
        """A training batch, and few tokens through as many layers as a model has."""
        scale = self.scale
        if self.device == "cuda":
            yield from self.limited_layers((768, 2048, 4096), (1, 64, TOKENS))
            return
        if not scale.judged:
            yield from self.limited_layers((32,), (1, 64))
        depth = scale.depth
        for dtype in DTYPES:
            named = mixtures(scale.model)
            counts = {scale.training_tokens: 1, scale.decoding_tokens: depth, 1: depth}
            for tokens, count in counts.items():
                at = self.at(tokens, dtype)
                yield self.beside(named, at, count, [granite(at)])
            named = {
                name: case for name, case in mixtures(scale.wide).items() if "neurons 64" in name
            }
            yield self.beside(named, self.at(scale.training_tokens, dtype, scale.wide))

    def limited_layers(
        self, models: Sequence[int], token_counts: Sequence[int]
    ) -> Iterator[Comparison]:
        """`cases`, which have limits on a GPU, of every model's size; trained on the last of the
        numbers of tokens."""
        for model in models:
            named = {case.name: case for case in cases((model,))}
            for tokens in token_counts:
                at = self.at(tokens, torch.bfloat16, model)
                yield self.beside(named, at, train=tokens == token_counts[-1])

    def train_step(self) -> Comparison:
        """Of a T5 of one layer in float32."""
        scale = self.scale
        sizes = (scale.model, scale.few_experts, self.device)
        return ModelCase("train_step", MODEL_SHAPES, *scale.short_step, *sizes).comparison()

    def models(self) -> Iterator[Comparison]:
        """In bfloat16, with layers of T5-base's size: an AdamW step, and `generate` alone and in
        batches."""
        scale = self.scale
        sizes = (scale.model, scale.few_experts, self.device)
        generating = {"T5": (GENERATING_SHAPES, (1, 8)), "Llama": (MODEL_SHAPES, (8,))}
        for family, (shapes, batches) in generating.items():
            how = (family, scale.depth, torch.bfloat16)
            yield ModelCase("train_step", MODEL_SHAPES, *scale.step, *sizes, *how).comparison()
            how = (family, min(4, scale.depth), torch.bfloat16)
            for batch in batches:
                work = (batch, scale.new_tokens)
                yield ModelCase("generate", shapes, *work, *sizes, *how).comparison()
