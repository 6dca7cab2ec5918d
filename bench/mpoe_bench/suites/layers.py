"""Layers with their routers, as models hold them, their peers, and the dense network on the same tokens.

Every contender has weights of its own and is held to the results of a plain module with the same ones in float64. Few
tokens pass through one layer, whose weights stay in the processor's caches, or through twelve, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpoe.layers import MPOEmbedding, MPOLinear
from mpoe_bench.cases import workload_shape
from mpoe_bench.contender import Build, Comparison, Contender, Truth, dtype_name, gradients_of, size_facts
from mpoe_bench.gpu_cases import Case, Dense
from mpoe_bench.peers import PEERS
from mpoe_bench.peers.dense_experts import OriginalLayer
from mpoe_bench.peers.stock_layers import stock_layer
from mpoe_bench.targets import ORIGINAL
from mpoe_kernels import MPOShape, plan_contraction

LIMIT = "dense FFN"
LAYERS = 12  # of a model of T5-base's width


class Layer(NamedTuple):
    """A contender.

    Attributes:
        name, kind: see `Comparison`.
        make: the module; of True, one with parameters of the same names that computes the same in plain PyTorch.
        facts: for its row, from the module.
        trains: whether it has a backward pass.
    """

    name: str
    kind: str
    make: Callable[[bool], nn.Module]
    facts: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    trains: bool = True


def on(backend: str, make: Callable[[str], nn.Module]) -> Callable[[bool], nn.Module]:
    """`Layer.make` of what takes a backend."""
    return lambda plain: make("eager" if plain else backend)


def case_layer(label: str, shape: str, case: Case, backend: str, tokens: int, device: str, dtype: torch.dtype) -> Layer:
    """Experts of ours on a backend; ``shape`` is that of its row."""

    def facts(layer: Any) -> dict[str, Any]:
        """The floor: fewest FLOPs of any strategy, router in, relative to the dense network's, by phase."""
        router = case.experts / (8 * case.model)
        if hasattr(layer, "relative_flops"):
            floor = {"forward": layer.relative_flops(case.top_k) + router}
        else:
            floor = {}
            for phase, training in (("forward", False), ("train", True)):
                options: Any = {"training": training, "mask_central": case.masked, "top_k": case.top_k}
                shapes = layer.experts.up.shape, layer.experts.down.shape
                plans = [plan_contraction(shape, case.experts, tokens, dtype, **options) for shape in shapes]
                floor[phase] = sum(plan.flops for plan in plans) / sum(plan.dense_flops for plan in plans) + router
        return {"shape": shape, "backend": backend, "masked": case.masked, "floor": floor}

    return Layer(f"{label} [{backend}]", "mpoe", on(backend, partial(case.layer, device, dtype=dtype)), facts)


def mixtures(model: int) -> dict[str, Case]:
    """Around a dense network, by name, for a model's size: those that have a target, or that users run by default."""
    m = min(64, max(model // 12, 1))

    def neurons(experts: int, size: int, top_k: int, **latent: int) -> Case:
        return Case("neurons", model, experts, top_k, options={"neurons": size, **latent})

    def hidden(experts: int, per_group: bool) -> Case:
        return Case("hidden", model, experts, 2, options={"block_size": m, "block_per_group": per_group})

    return {
        "hidden 8, per group, 2": hidden(8, True),
        "hidden 64, shared, 2": hidden(64, False),
        f"neurons 8 x {m}, 2": neurons(8, m, 2),
        f"neurons 64 x {m}, 8": neurons(64, m, 8),
        f"neurons 128 x {2 * m}, 8": neurons(128, 2 * m, 8),
        f"latent {6 * m}, 128 x {4 * m}, 8": neurons(128, 4 * m, 8, latent=6 * m),
    }


def named_case(name: str, model: int, experts: int, masked: bool = False) -> Case:
    """``paper_full``, ``paper_B`` (bond B), ``light_P`` or ``separable``, one expert per token."""
    shape, _, size = name.partition("_")
    return Case(shape, model, experts, 1, options={"max_bond": int(size)} if size.isdigit() else {}, masked=masked)


def peer_layers(names: Sequence[str], model: int, experts: int, device: str, dtype: torch.dtype) -> Iterator[Layer]:
    """Those of `PEERS`."""
    sizes = model, 4 * model, experts
    for name in names:
        yield Layer(name, "peer", partial(PEERS[name].layer, sizes, device, dtype), trains=PEERS[name].trains)


def original_layer(shape: str, model: int, experts: int, device: str, dtype: torch.dtype) -> Layer:
    """The original's algorithm on a shape, which its name tells."""
    case = named_case(shape, model, experts)
    make = partial(case.layer, device, "eager", dtype=dtype)
    return Layer(f"{ORIGINAL} ({shape})", "peer", lambda plain: OriginalLayer(make(), plain))


def stock(name: str, model: int, tokens: int, device: str, dtype: torch.dtype) -> Layer:
    """One of `STOCK_LAYERS`."""
    return Layer(name, "peer", lambda _: stock_layer(name, model, 4 * model, tokens, dtype).to(device))


def _built(
    shared: tuple[Tensor, Tensor | None], layer: Layer, count: int, dtype: torch.dtype
) -> tuple[Contender, Truth]:
    x, grad_y = shared
    torch.manual_seed(1)
    modules = nn.Sequential(*(layer.make(False) for _ in range(count))).train(grad_y is not None)
    module, plain = modules[0], layer.make(True).train(grad_y is not None)
    plain.load_state_dict(module.state_dict())
    grad_y = grad_y if layer.trains else None

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        own = plain.double() if dtype == torch.float64 else plain  # routers stay in float32 beside 16 bits
        own.zero_grad()
        leaf = x.detach()
        if x.is_floating_point():
            leaf = leaf.to(dtype).requires_grad_(grad_y is not None)
        y = own(leaf)
        if grad_y is None:
            return {"y": y}
        y.backward(grad_y.to(dtype))
        return {"y": y, **gradients_of({"x": leaf, **dict(own.named_parameters())})}

    leaves = {"x": x, **dict(module.named_parameters())}
    facts = size_facts(sum(p.numel() for p in modules.parameters()), dtype) | dict(layer.facts(module))
    contender = Contender(lambda: module(x), grad_y, tuple(leaves.values()), partial(gradients_of, leaves), facts)
    if count > 1:
        contender.timed = lambda: modules(x)
    return contender, Truth.of(results, dtype)


def layers_comparison(
    key: str,
    title: str,
    layers: Sequence[Layer],
    model: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    train: bool = True,
    count: int = 1,
    **facts: Any,
) -> Comparison:
    """``layers`` beside the dense network, on ``tokens`` tokens ``[T, model]``.

    Args:
        key: of the section in the results.
        title: its beginning.
        layers: the contenders.
        model, tokens, dtype, device: of the tokens.
        train: whether forward and backward are timed too.
        count: layers in a row. Of several, which need much memory, the first one's result is checked and the forward
            passes of all are timed, in evaluation mode.
        facts: more of the case.
    """
    train = train and count == 1

    def context() -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        x, grad_y = (torch.randn(tokens, model).to(device, dtype) for _ in range(2))
        return x.requires_grad_(train), grad_y if train else None

    several = f", {count} of them" if count > 1 else ""
    known = {"model": model, "hidden": 4 * model, "tokens": tokens, "layers": count, "dtype": dtype_name(dtype)}
    return Comparison(
        key,
        f"{title} {model}x{4 * model} T={tokens} {dtype_name(dtype)}{several}",
        context,
        _builds(
            [Layer(LIMIT, "limit", lambda _: Dense(model, "relu", device=device, dtype=dtype)), *layers], count, dtype
        ),
        LIMIT,
        tokens,
        known | facts,
        ("forward", "train") if train else ("forward",),
    )


def _builds(layers: Sequence[Layer], count: int, dtype: torch.dtype) -> list[tuple[str, str, Build]]:
    return [(each.name, each.kind, partial(_built, layer=each, count=count, dtype=dtype)) for each in layers]


def part_comparisons(
    shapes: Sequence[str], model: int, vocabulary: int, tokens: int, device: str, backends: Sequence[str]
) -> Iterator[Comparison]:
    """`MPOLinear` against `nn.Linear`, and `MPOEmbedding` against `nn.Embedding`."""

    def linear_x() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return torch.randn(tokens, model, device=device).requires_grad_(), torch.randn(tokens, 4 * model, device=device)

    def ids() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return torch.randint(vocabulary, (tokens,), device=device), torch.randn(tokens, model, device=device)

    linear = {name: workload_shape(name, model, 4 * model) for name in shapes}
    tables = {f"bond {bond}": MPOShape.paper(vocabulary, model, max_bond=bond) for bond in (64, 16)}
    kinds: tuple[tuple[Any, Any, dict[str, MPOShape], tuple[int, int], Any], ...] = (
        (nn.Linear, MPOLinear, linear, (model, 4 * model), linear_x),
        (nn.Embedding, MPOEmbedding, tables, (vocabulary, model), ids),
    )
    for plain, ours, made, sizes, context in kinds:
        stock = partial(plain, *sizes, device=device)
        layers = [Layer(f"nn.{plain.__name__}", "limit", lambda _, stock=stock: stock())]
        for (name, shape), backend in product(made.items(), backends):
            make = on(backend, lambda each, ours=ours, shape=shape: ours(shape=shape, backend=each, device=device))
            layers.append(Layer(f"{ours.__name__} {name} [{backend}]", "mpoe", make))
        title = f"{ours.__name__} {sizes[0]}x{sizes[1]} T={tokens}"
        builds = _builds(layers, 1, torch.float32)
        yield Comparison("op", title, context, builds, layers[0].name, tokens, {"tokens": tokens})
