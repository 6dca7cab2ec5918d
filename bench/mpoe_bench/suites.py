"""What every suite measures: comparisons that run one after another, and cases that the autotuner
is judged on."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe_bench.cases import JUDGED_WORKLOADS, Workload
from mpoe_bench.contender import Build, Comparison, Contender, Truth, dtype_name, size_facts
from mpoe_bench.layers import (
    LAYERS,
    TOKENS,
    Case,
    Place,
    case_layer,
    cases,
    layers_comparison,
    mixtures,
    named_case,
    original_layer,
    peer_layers,
    stock,
)
from mpoe_bench.peers import LOOP, PEERS, STOCK_LAYERS
from mpoe_kernels.backends import AUTO

SUITES = ("quick", "planner", "targets", "layers", "models")
# Quick to measure, with every shape and nearly every size; the planner suite takes all cases.
QUICK_JUDGED = (3, 12, 22, 30, 35, 42, 46)
HALVES = (torch.float32, torch.bfloat16)
# Of whole models; all are lossless, so that every model must compute what the dense one does.
SHAPES = ("neurons", "hidden", "separable", "light", "paper")
# For many tokens, and for few among many experts.
LARGE = ("separable", "light_64", "paper_64", "paper_full")
SMALL = ("separable", "paper_64", "paper_32", "paper_16")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: the real ones, or tiny ones for tests.

    Attributes:
        model: size of the model; the hidden size is four times as large.
        many_tokens, few_tokens: of a training batch and of a small batch.
        few_experts, many_experts: E.
        step_tokens: batch and sequence length of a train step.
        judged: whether targets count, and the choice is judged on its own cases, not on a few sizes
            made for a test.
    """

    model: int = 768
    many_tokens: int = 2048
    few_tokens: int = 64
    few_experts: int = 8
    many_experts: int = 64
    step_tokens: tuple[int, int] = (4, 128)
    judged: bool = True


SCALES = {"real": Scale(), "tiny": Scale(48, 32, 8, 4, 8, (2, 8), judged=False)}


def judged_of(
    suite: str, scale: Scale, device: str, backends: tuple[str, ...]
) -> list[tuple[str, Workload]]:
    """The cases that the choice is judged on, and whose choice: auto's if auto is measured, else
    each backend's own."""
    if device != "cpu" or suite not in ("quick", "planner"):
        return []
    whose = (AUTO,) if AUTO in backends else backends
    judged = JUDGED_WORKLOADS
    if not scale.judged:
        names = ("separable", "paper_4")
        judged = tuple(
            Workload(n, 48, 96, 4, 16, torch.float32, train)
            for n in names
            for train in (False, True)
        )
    elif suite == "quick":
        whose = whose[:1]
        judged = tuple(judged[k] for k in QUICK_JUDGED)
    return [(backend, case) for backend in whose for case in judged]


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Of an encoder and decoder, both on the same tokens, or of a decoder."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs).logits


def dense_model(name: str, model: int, layers: int, dtype: torch.dtype) -> Any:
    """``T5`` or ``Llama`` with random weights; layers of T5 are in the encoder and in the
    decoder."""
    import transformers

    torch.manual_seed(0)
    heads = 12 if model >= 96 else 2
    hidden = 4 * model
    if name == "T5":
        widths = {"d_model": model, "d_ff": hidden, "d_kv": max(8, model // 12), "num_heads": heads}
        config = transformers.T5Config(
            **widths, num_layers=layers, vocab_size=512, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    widths = {"hidden_size": model, "intermediate_size": hidden, "num_attention_heads": heads}
    config = transformers.LlamaConfig(
        **widths, num_hidden_layers=layers, vocab_size=512, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


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
        layers = []
        labels = [(f"mpoe {name}", name, False) for name in shapes]
        if train:
            labels += [(f"mpoe {name}, central masked", name, True) for name in masked]
        for label, name, is_masked in labels:
            case = named_case(name, at.model, experts, is_masked)
            layers += [case_layer(label, name, case, backend, at) for backend in self.backends]
        layers += peer_layers(peers, experts, at)
        layers += [original_layer(name, experts, at) for name in original]
        return layers_comparison(
            "ffn", f"FFN E={experts}", layers, at, train=train, experts=experts
        )

    def quick(self) -> Iterator[Comparison]:
        scale = self.scale
        few = (scale.few_experts, scale.many_tokens)
        many = (scale.many_experts, scale.few_tokens)
        yield self.ffn(LARGE, *few, peers=PEERS, masked=LARGE[:1], original=LARGE[2:])
        two = ("separable", "paper_64")
        yield self.ffn(two, *few, torch.bfloat16, peers=PEERS, original=two[1:])
        yield self.ffn(SMALL, *many, train=False, peers=PEERS, original=SMALL[-1:])
        for tokens in (1, 8):
            yield self.ffn(
                ("separable", "paper_16"), scale.few_experts, tokens, train=False, peers=(LOOP,)
            )
        yield self.model("train_step", SHAPES[:3], scale.step_tokens)
        yield self.beside(mixtures(scale.model), self.at(scale.many_tokens), others=STOCK_LAYERS)

    def targets(self) -> Iterator[Comparison]:
        """Only what the targets need: in both dtypes; on a GPU more tokens, in bfloat16."""
        if self.device == "cuda":
            yield from self.gpu_targets()
            return
        scale = self.scale
        masked = ("separable", "paper_64", "paper_full")
        for dtype in HALVES:
            few = scale.few_experts, scale.many_tokens, dtype
            yield self.ffn(LARGE, *few, peers=(LOOP,), original=masked[1:], masked=masked)
            yield self.ffn(("separable",), scale.many_experts, scale.many_tokens, dtype)
            yield self.ffn(
                SMALL, scale.many_experts, scale.few_tokens, dtype, train=False, peers=(LOOP,)
            )

    def gpu_targets(self) -> Iterator[Comparison]:
        scale = self.scale
        shapes = ("separable", "paper_full", "paper_64", "paper_32", "light_64")
        decoding = scale.many_experts, scale.few_tokens, torch.bfloat16
        yield self.ffn(shapes, *decoding, train=False, peers=PEERS)
        for experts in (scale.few_experts, scale.many_experts):
            for tokens in (TOKENS, 8 * TOKENS):
                yield self.ffn(shapes, experts, tokens, torch.bfloat16, peers=PEERS)

    def beside(
        self,
        named: Mapping[str, Case],
        at: Place,
        count: int = 1,
        others: Iterable[str] = (),
        train: bool = True,
    ) -> Comparison:
        """Layers by name, and some of `STOCK_LAYERS`."""
        backends = self.backends if count == 1 else self.backends[:1]
        contenders = []
        for name, case in named.items():
            contenders += [case_layer(name, name, case, backend, at) for backend in backends]
        contenders += [stock(name, at) for name in others]
        return layers_comparison("layers", "layers", contenders, at, train=train, count=count)

    def layers(self) -> Iterator[Comparison]:
        """A training batch, and few tokens through as many layers as a model has."""
        scale = self.scale
        depth = LAYERS if scale.judged else 2
        if self.device == "cuda":
            yield from self.gpu_layers((768, 2048, 4096), (1, 64, TOKENS))
            return
        if not scale.judged:
            yield from self.gpu_layers((32,), (1, 64))
        for dtype in HALVES:
            named = mixtures(scale.model)
            counts = {scale.many_tokens: 1, scale.few_tokens: depth, 1: depth}
            for tokens, count in counts.items():
                yield self.beside(named, self.at(tokens, dtype), count, STOCK_LAYERS)
            wide = self.at(scale.many_tokens, dtype, 2048 if scale.judged else 64)
            named = mixtures(wide.model)
            named = {name: case for name, case in named.items() if "neurons 64" in name}
            yield self.beside(named, wide)

    def gpu_layers(self, models: Sequence[int], counts: Sequence[int]) -> Iterator[Comparison]:
        """`cases` of every model's size, trained on the last of the numbers of tokens."""
        for model in models:
            named = {case.name: case for case in cases((model,))}
            for tokens in counts:
                at = self.at(tokens, torch.bfloat16, model)
                yield self.beside(named, at, train=tokens == counts[-1])

    def models(self) -> Iterator[Comparison]:
        """In bfloat16, with layers of T5-base's size: an AdamW step, and `generate` alone and in
        batches."""
        step = (8, 256)
        depth = LAYERS
        new = 24
        if not self.scale.judged:
            step = self.scale.step_tokens
            depth = 1
            new = 3
        for name in ("T5", "Llama"):
            yield self.model("train_step", SHAPES[:3], step, depth, torch.bfloat16, name)
            shapes = SHAPES[:3]
            batches = [8]
            if name == "T5":
                shapes = SHAPES
                batches = [1, 8]
            for batch in batches:
                yield self.model(
                    "generate", shapes, (batch, new), min(4, depth), torch.bfloat16, name
                )

    def model(
        self,
        key: str,
        shapes: Sequence[str],
        tokens: tuple[int, int],
        layers: int = 1,
        dtype: torch.dtype = torch.float32,
        name: str = "T5",
    ) -> Comparison:
        """A whole model's train steps, or the tokens that it generates: dense, as a Switch, with
        experts of ours.

        Args:
            key: ``"train_step"``: an AdamW step; ``"generate"``: a greedy call, the prompt's pass
                included, alone.
            shapes: of `SHAPES`.
            tokens: batch and sequence length; of `generate`, batch and new tokens.
            layers, name: see `dense_model`.
            dtype: of the weights.
        """
        generates = key == "generate"
        size = self.scale.model
        experts = self.scale.few_experts

        def context() -> tuple[Any, Tensor, Truth]:
            dense = dense_model(name, size, layers, dtype)
            ids = torch.randint(
                2, 512, (tokens[0], 16) if generates else tokens, device=self.device
            )

            @torch.no_grad()
            def results(dtype: torch.dtype) -> dict[str, Tensor]:
                return {"y": logits_of(copy.deepcopy(dense).to(self.device, dtype), ids)}

            return dense, ids, Truth.of(results, dtype)

        def build(
            shared: tuple[Any, Tensor, Truth], fields: dict[str, Any] | None
        ) -> tuple[Contender, Truth]:
            dense, ids, truth = shared
            model = copy.deepcopy(dense)
            if fields is not None:
                model = convert_to_mpoe(
                    model, MPOEConfig(num_experts=experts, **fields), inplace=True
                )
            model = model.to(self.device).eval()  # no dropout: all do the same work
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            length = {"min_new_tokens": tokens[1], "max_new_tokens": tokens[1]}

            def step() -> Tensor:
                optimizer.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                return loss.detach()

            contender = Contender(
                partial(logits_of, model, ids),
                dict(model.named_parameters()),
                facts=size_facts(model, dtype),
            )
            if generates:
                contender.timed = partial(model.generate, ids, do_sample=False, **length)
            else:
                contender.step = step
            return contender, truth

        switch = partial(build, fields={"expert_type": "dense"})
        builds: list[tuple[str, str, Build]] = [
            (f"dense {name}", "limit", partial(build, fields=None)),
            (f"{name} with dense experts (Switch)", "peer", switch),
        ]
        for shape in shapes:
            ours = partial(build, fields={"shape": shape})
            builds.append((f"mpoe {name} {shape}", "mpoe", ours))
        count = tokens[0] * tokens[1]
        facts = {
            "experts": experts,
            "tokens": count,
            "model": size,
            "hidden": 4 * size,
            "dtype": dtype_name(dtype),
        }
        what = f"train step: {count} tokens, AdamW"
        if generates:
            what = f"generate: {tokens[0]} x {tokens[1]} new tokens"
        title = f"{what}, {name} {layers} layers {size}x{4 * size} E={experts} {facts['dtype']}"
        phases = ("forward",) if generates else ("forward", "train")
        return Comparison(key, title, context, builds, count, facts, phases)
