"""What every suite measures, as a list of sections that run one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mpoe_bench.cases import JUDGED_WORKLOADS, WORKLOAD_LOADS, WORKLOAD_SHAPES, WORKLOAD_SIZES, Workload
from mpoe_bench.peers import OF_CORES
from mpoe_bench.problem import FFNCase
from mpoe_bench.section import Comparison, Later, Setup
from mpoe_bench.suites.ffn import ffn_comparison
from mpoe_bench.suites.gpu import gpu_sections
from mpoe_bench.suites.layers import LAYERS, layers_comparison
from mpoe_bench.suites.models import SHAPES, model_comparison
from mpoe_bench.suites.ops import embedding_comparison, linear_comparison, routing_comparison
from mpoe_bench.suites.planner import planner_section
from mpoe_bench.suites.scale import DENSE_PEERS, GPU_PEERS, Scale
from mpoe_bench.timing import Budget
from mpoe_kernels.backends import AUTO

LOOP, ORIGINAL = "dense experts, loop", "original: rebuild all"
SUITES = ("quick", "full", "planner", "targets", "layers", "models", "gpu")
Section = Callable[[], dict[str, Any]]
# Quick to measure, with every shape and nearly every size; the planner suite takes all cases.
QUICK_JUDGED = (3, 12, 22, 30, 35, 42, 46)


def _tiny_judged() -> tuple[Workload, ...]:
    return tuple(
        Workload(name, 48, 96, 4, 16, torch.float32, training)
        for name in ("separable", "paper_4")
        for training in (False, True)
    )


def sections_of(suite: str, scale: Scale, setup: Setup) -> Iterator[Section]:
    """The sections of a suite, in order.

    Raises:
        ValueError: an unknown suite, or one that cannot run on this device.
    """
    if suite not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {suite!r}")
    if suite == "planner":
        if setup.device != "cpu":
            raise ValueError(f"the planner suite holds CPU cases only; got device {setup.device!r}")
        return iter([_planner(scale, setup, name) for name in judged_backends(setup)])
    suites = {"quick": _quick, "full": _full, "targets": _targets, "layers": _layers, "models": _models}
    return (gpu_sections if suite == "gpu" else suites[suite])(scale, setup)


def judged_backends(setup: Setup) -> tuple[str, ...]:
    """Whose choices the planner suite judges: auto's if auto is measured, otherwise each named backend's own."""
    return (AUTO,) if AUTO in setup.backends else setup.backends


def _planner(scale: Scale, setup: Setup, backend: str, quick: bool = False) -> Section:
    cases = JUDGED_WORKLOADS if scale.judged else _tiny_judged()
    if quick and scale.judged:
        cases = tuple(cases[k] for k in QUICK_JUDGED)
    short = replace(setup, budget=replace(setup.budget, seconds_each=setup.budget.seconds_each / 3, max_rounds=9))
    return partial(planner_section, cases, short, backend)


def _cases(scale: Scale, setup: Setup) -> tuple[FFNCase, FFNCase]:
    """A training batch with few experts, and a small batch with many, forward only."""
    base = FFNCase(scale.model, scale.hidden, device=setup.device)
    return (
        replace(base, experts=scale.few_experts, tokens=scale.many_tokens),
        replace(base, experts=scale.many_experts, tokens=scale.few_tokens, train=False),
    )


def _peers(setup: Setup) -> tuple[str, ...]:
    return (*DENSE_PEERS, *(GPU_PEERS if setup.device == "cuda" else ()))


def _compare(setup: Setup, make: Callable[..., Comparison], *arguments: Any, **options: Any) -> Section:
    return Later(setup, partial(make, *arguments, **options))


def _ffn(setup: Setup, case: FFNCase, shapes: Sequence[str], **options: Any) -> Section:
    return _compare(setup, ffn_comparison, case, shapes, setup.backends, **options)


def _quick(scale: Scale, setup: Setup) -> Iterator[Section]:
    many, few = _cases(scale, setup)
    paper, bond_32, light = (scale.shape(name) for name in ("paper_64", "paper_32", "light_64"))
    original = {"core_peers": ((ORIGINAL, paper), (ORIGINAL, "paper_full"))}
    yield _ffn(
        setup, many, ("separable", light, paper, "paper_full"), peers=_peers(setup), masked=("separable",), **original
    )
    half = {"peers": (LOOP, "dense experts, grouped_mm"), "core_peers": ((ORIGINAL, paper),)}
    yield _ffn(setup, replace(many, dtype=torch.bfloat16), ("separable", paper), **half)
    small = {"peers": _peers(setup), "core_peers": ((ORIGINAL, "paper_16"),)}
    yield _ffn(setup, few, ("separable", paper, bond_32, "paper_16"), **small)
    tensors = replace(few, experts=scale.few_experts, tokens=4 * scale.few_tokens)
    of_cores = tuple((peer, "paper_16") for peer in OF_CORES)
    yield _ffn(setup, tensors, ("separable", "paper_16"), peers=(LOOP,), core_peers=of_cores)
    yield from _decode(scale, setup, ("separable", "paper_16"))
    yield from _ops(scale, setup, ("separable", paper))
    yield _train_step(scale, setup, ("neurons", "hidden", "separable"))
    where = (setup.backends, setup.device)
    yield _compare(setup, layers_comparison, (scale.model, scale.hidden), scale.many_tokens, 1, torch.float32, *where)
    if setup.device == "cpu":
        yield _planner(scale, setup, judged_backends(setup)[0], quick=True)


def _targets(scale: Scale, setup: Setup) -> Iterator[Section]:
    """Only what the targets need, in both dtypes."""
    many, few = _cases(scale, setup)
    paper, bond_32, light = (scale.shape(name) for name in ("paper_64", "paper_32", "light_64"))
    large = {
        "peers": (LOOP,),
        "core_peers": ((ORIGINAL, paper), (ORIGINAL, "paper_full")),
        "masked": ("separable", paper, "paper_full"),
    }
    for dtype in (torch.float32, torch.bfloat16):
        yield _ffn(setup, replace(many, dtype=dtype), ("separable", light, paper, "paper_full"), **large)
        yield _ffn(setup, replace(many, experts=scale.many_experts, dtype=dtype), ("separable",))
        yield _ffn(setup, replace(few, dtype=dtype), ("separable", paper, bond_32, "paper_16"), peers=(LOOP,))


def _decode(scale: Scale, setup: Setup, shapes: tuple[str, ...]) -> Iterator[Section]:
    for tokens in (1, 8):
        case = replace(_cases(scale, setup)[1], experts=scale.few_experts, tokens=tokens)
        yield _ffn(setup, case, shapes, peers=(LOOP,), key="decode")


def _ops(scale: Scale, setup: Setup, shapes: tuple[str, ...]) -> Iterator[Section]:
    sizes = (scale.model, scale.hidden)
    tokens = scale.many_tokens // 4
    for experts in (1, scale.few_experts):
        where = (setup.device, setup.backends)
        yield _compare(setup, linear_comparison, shapes, sizes, experts, tokens, torch.float32, *where)
    for top_k in (1, 2):
        few = (scale.model, scale.few_experts, scale.many_tokens, top_k)
        yield _compare(setup, routing_comparison, *few, setup.device)
    table = (scale.vocabulary, scale.model, (64, 16), tokens)
    yield _compare(setup, embedding_comparison, *table, setup.device, setup.backends)


def _layers(scale: Scale, setup: Setup) -> Iterator[Section]:
    """Mixtures around a dense network: a training batch, and few tokens through as many layers as a model has."""
    sizes, depth = (scale.model, scale.hidden), LAYERS if scale.judged else 2
    large = (2048, 8192) if scale.judged else (64, 128)
    where = (setup.backends, setup.device)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, layers in ((scale.many_tokens, 1), (scale.few_tokens, depth), (1, depth)):
            yield _compare(setup, layers_comparison, sizes, tokens, layers, dtype, *where)
        yield _compare(setup, layers_comparison, large, scale.many_tokens, 1, dtype, *where, chosen="neurons 64")


def _train_step(scale: Scale, setup: Setup, shapes: tuple[str, ...]) -> Section:
    sizes = (scale.model, scale.hidden)
    return _compare(
        setup, model_comparison, "train_step", shapes, sizes, scale.few_experts, scale.step_tokens, setup.device
    )


def _models(scale: Scale, setup: Setup) -> Iterator[Section]:
    """A T5 of base size in bfloat16: an AdamW step, and `generate` one token at a time and in batches."""
    where = ((scale.model, scale.hidden), scale.few_experts)
    depth = LAYERS if scale.judged else 1
    step = (8, 256) if scale.judged else scale.step_tokens
    few = ("neurons", "hidden", "separable")
    yield _compare(setup, model_comparison, "train_step", few, *where, step, setup.device, depth, torch.bfloat16)
    for batch in (1, 8):
        new = (batch, 24 if scale.judged else 3)
        shapes = tuple(SHAPES)
        yield _compare(setup, model_comparison, "generate", shapes, *where, new, setup.device, 4, torch.bfloat16)


def _full(scale: Scale, setup: Setup) -> Iterator[Section]:
    many, few = _cases(scale, setup)
    shapes = tuple(dict.fromkeys(scale.shape(shape) for shape in WORKLOAD_SHAPES))
    paper, light = scale.shape("paper_64"), scale.shape("light_64")
    peers: dict[str, Any] = {"peers": _peers(setup), "core_peers": ((ORIGINAL, paper), (ORIGINAL, "paper_full"))}
    for dtype in (torch.float32, torch.bfloat16):
        masked = ("separable", paper, "paper_full") if dtype == torch.float32 else ()
        yield _ffn(setup, replace(many, dtype=dtype), shapes, masked=masked, **peers)
        yield _ffn(setup, replace(few, dtype=dtype), shapes, **peers)
    tokens = sorted({1, 8, scale.few_tokens, scale.many_tokens // 4, scale.many_tokens})
    tokens += [4096, 32768] if setup.device == "cuda" else []
    curve = ("separable", light, "paper_full", paper, "paper_16")
    for experts in (scale.few_experts, 2 * scale.few_experts, scale.many_experts):
        for count in tokens:
            case = replace(many, experts=experts, tokens=count)
            yield _ffn(setup, case, curve, peers=(LOOP, "dense experts, grouped_mm"))
    for load in WORKLOAD_LOADS[1:]:
        yield _ffn(setup, replace(many, load=load), ("separable", paper), peers=_peers(setup))
    sizes = WORKLOAD_SIZES[1] if scale.judged else (64, 128)
    large = replace(many, model=sizes[0], hidden=sizes[1])
    yield _ffn(setup, large, ("separable", light, paper, "paper_full"), peers=(LOOP,))
    of_cores = tuple((peer, shape) for shape in (paper, "paper_16") for peer in OF_CORES)
    yield _ffn(setup, replace(many, tokens=4 * scale.few_tokens), (paper, "paper_16"), core_peers=of_cores)
    yield from _decode(scale, setup, curve)
    yield from _ops(scale, setup, ("separable", light, paper, "paper_full"))
    yield _train_step(scale, setup, tuple(SHAPES))
    yield from _layers(scale, setup)
    yield from _models(scale, setup)
    if setup.device == "cpu":
        for backend in judged_backends(setup):
            yield _planner(scale, setup, backend)


def budget_of(suite: str, scale: Scale) -> Budget:
    """A suite's seconds and rounds per function."""
    if not scale.judged:
        return Budget(seconds_each=0.01, sample_seconds=0.0005, min_rounds=3, max_rounds=3)
    return {
        "quick": Budget(seconds_each=1.2, max_rounds=15),
        "targets": Budget(seconds_each=2.0, min_rounds=5, max_rounds=15),
        "gpu": Budget(seconds_each=0.12, sample_seconds=0.002, min_rounds=7, max_rounds=15),
    }.get(suite, Budget(seconds_each=3.0))
