"""Layers with their routers, as models hold them, their peers, and the dense network on the same
tokens.

`cases` lists what a GPU must compute fast, with limits: tools/gpu_floors.py bounds them,
`bench/gpu.sh` measures them, and ``python -m mpoe_bench.layers`` runs them once, forward and
backward, for a profiler.

Every contender has weights of its own and is held to the results of a plain module with the same
ones in float64. Few tokens pass through one layer, whose weights stay in the processor's caches, or
through twelve, as in a model.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import profile

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward
from mpoe.layers.neurons import NeuronFeedForward
from mpoe_bench.cases import dtype_name
from mpoe_bench.contender import Comparison, Contender, Truth, gradients_of, size_facts
from mpoe_bench.peers import GRANITE, ORIGINAL, PEERS, GraniteLayer, OriginalLayer
from mpoe_kernels import plan_contraction

LIMIT = "dense FFN"
LAYERS = 12  # of a model of T5-base's width
TOKENS = 4096
PHASES = ("forward", "training")


class Dense(nn.Module):
    """``down(relu(up x))``, four times as wide inside."""

    def __init__(self, model: int, **placed: Any) -> None:
        super().__init__()
        self.up = nn.Linear(model, 4 * model, False, **placed)
        self.down = nn.Linear(4 * model, model, False, **placed)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


@dataclass(frozen=True)
class Case:
    """One layer with its router.

    Attributes:
        shape: of its experts, with ``options`` of `MPOEConfig`.
        model: model size d; the hidden size is 4 d.
        experts, top_k: E and the experts of a token.
        limits: the largest times allowed, x dense: forward, and with the backward; None: reported.
        masked: the central cores get no gradient.
        tokens: for which the limits are.
    """

    shape: str
    model: int
    experts: int
    top_k: int
    limits: tuple[float | None, float | None] = (None, None)
    options: dict = field(default_factory=dict)
    masked: bool = False
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        """``paper max_bond 64 masked d=768 E=8 k=1``; of other than `TOKENS` tokens, ``T=64``
        too."""
        words = [self.shape, *(f"{key} {value}" for key, value in self.options.items())]
        words += ["masked"] * self.masked
        words += [f"d={self.model} E={self.experts} k={self.top_k}"]
        words += [f"T={self.tokens}"] * (self.tokens != TOKENS)
        return " ".join(words)

    def layer(
        self,
        device: str,
        backend: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> nn.Module:
        """With random weights, also of experts that start adding nothing, so that every gradient is
        one of numbers."""
        placed = {"device": device, "dtype": dtype}
        config = MPOEConfig(
            num_experts=self.experts,
            shape=self.shape,
            router=RouterConfig(top_k=self.top_k),
            backend=backend,
            **self.options,
        )
        sizes = self.model, 4 * self.model
        if self.shape == "neurons":
            dense = Dense(self.model, **placed)
            names = {"up": "up", "down": "down"}
            layer = NeuronFeedForward(*sizes, config, names=names, **placed)
            layer.around(dense, {"up": dense.up, "down": dense.down})
        else:
            layer = MPOEFeedForward(*sizes, config, **placed)
        if self.shape in ("neurons", "hidden"):
            with torch.no_grad():
                for core in layer.experts.own_cores:
                    core.add_(0.02 * torch.randn_like(core))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not (self.masked and "central" in name))
        return layer


def cases(models: tuple[int, ...] = (768, 4096), few: bool = False) -> Iterator[Case]:
    """Neurons, hidden-side experts, separable ones and the fused chain, masked and not.

    Args:
        models: d.
        few: also neurons for 64 tokens, as cases of their own.
    """
    for model in models:
        small = min(64, model // 4)
        bond = {"max_bond": small}
        neurons = {"neurons": small}
        yield Case("neurons", model, 8, 2, (1.3, 1.4), neurons)
        limits = (1.2, 1.2) if model >= 4096 else (1.6, 1.8)
        yield Case("neurons", model, 64, 8, limits, neurons)
        if few and model < 4096:
            yield Case("neurons", model, 64, 8, (2.5, None), neurons, tokens=64)
        for experts in (8, 64):
            yield Case("hidden", model, experts, 2, (1.5, 1.7))
        yield Case("separable", model, 8, 1, (1.5, 1.7))
        for masked in (False, True):
            yield Case("paper", model, 8, 1, options=bond, masked=masked)
        yield Case("light", model, 8, 1, options=bond)


def mixtures(model: int) -> dict[str, Case]:
    """Around a dense network, by name, for a model's size: those that have a target, or that users
    run by default."""
    m = min(64, max(model // 12, 1))

    def neurons(experts: int, size: int, top_k: int, **latent: int) -> Case:
        return Case("neurons", model, experts, top_k, options={"neurons": size, **latent})

    def hidden(experts: int, per_group: bool) -> Case:
        return Case(
            "hidden", model, experts, 2, options={"block_size": m, "block_per_group": per_group}
        )

    return {
        "hidden 8, per group, 2": hidden(8, True),
        "hidden 64, shared, 2": hidden(64, False),
        f"neurons 8 x {m}, 2": neurons(8, m, 2),
        f"neurons 64 x {m}, 8": neurons(64, m, 8),
        f"neurons 128 x {2 * m}, 8": neurons(128, 2 * m, 8),
        f"latent {6 * m}, 128 x {4 * m}, 8": neurons(128, 4 * m, 8, latent=6 * m),
    }


def named_case(name: str, model: int, experts: int, masked: bool = False) -> Case:
    """``paper_full``, ``paper_B`` (bond B), ``light_P`` or ``separable``, one expert per token; of
    a model made for a test, bonds are smaller."""
    shape, _, size = name.partition("_")
    options = {}
    if size.isdigit():
        options["max_bond"] = min(int(size), max(model // 6, 1))
    return Case(shape, model, experts, 1, options=options, masked=masked)


class Place(NamedTuple):
    """Where and on what layers are measured: ``tokens`` rows of size ``model``."""

    model: int
    tokens: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


class Layer(NamedTuple):
    """A contender.

    Attributes:
        name, kind: see `Comparison`.
        make: the module; of True, one with parameters of the same names that computes the same in
            plain PyTorch.
        facts: for its row, from the module.
    """

    name: str
    kind: str
    make: Callable[[bool], nn.Module]
    facts: Callable[[Any], Mapping[str, Any]] = lambda _: {}


def case_layer(label: str, shape: str, case: Case, backend: str, at: Place) -> Layer:
    """Experts of ours on a backend; ``shape`` is that of its row."""

    def facts(layer: Any) -> dict:
        """The floor: fewest FLOPs of any strategy, router in, relative to the dense network's, by
        phase."""
        router = case.experts / (8 * case.model)
        floor = {}
        if hasattr(layer, "relative_flops"):
            floor["forward"] = layer.relative_flops(case.top_k) + router
        else:
            for phase in ("forward", "train"):
                plans = [
                    plan_contraction(
                        projection.shape,
                        case.experts,
                        at.tokens,
                        at.dtype,
                        training=phase == "train",
                        mask_central=case.masked,
                        top_k=case.top_k,
                    )
                    for projection in layer.experts.projections().values()
                ]
                floor[phase] = fmean(plan.x_dense for plan in plans) + router
        return {"shape": shape, "backend": backend, "masked": case.masked, "floor": floor}

    make = partial(case.layer, at.device, dtype=at.dtype)
    return Layer(
        f"{label} [{backend}]", "mpoe", lambda plain: make("eager" if plain else backend), facts
    )


def peer_layers(names: Iterable[str], experts: int, at: Place) -> Iterator[Layer]:
    """Those of `PEERS`."""
    sizes = at.model, 4 * at.model, experts
    for name in names:
        make = partial(PEERS[name], sizes, device=at.device, dtype=at.dtype)
        yield Layer(name, "peer", make)


def original_layer(shape: str, experts: int, at: Place) -> Layer:
    """The original's algorithm on a shape, which its name tells."""
    make = partial(named_case(shape, at.model, experts).layer, at.device, "eager", dtype=at.dtype)
    return Layer(f"{ORIGINAL} ({shape})", "peer", lambda plain: OriginalLayer(make(), plain))


def granite(at: Place) -> Layer:
    """Transformers' own layer."""
    return Layer(GRANITE, "peer", lambda _: GraniteLayer(at.model).to(at.device, at.dtype))


def _built(
    shared: tuple[Tensor, Tensor | None], layer: Layer, count: int, dtype: torch.dtype
) -> tuple[Contender, Truth]:
    x, grad_y = shared
    torch.manual_seed(1)
    trains = grad_y is not None
    modules = nn.Sequential(*(layer.make(False) for _ in range(count)))
    module = modules.train(trains)[0]
    plain = layer.make(True).train(trains)
    plain.load_state_dict(module.state_dict())

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype == torch.float64:
            plain.double()  # routers stay in float32 beside 16 bits
        plain.zero_grad()
        leaf = x.detach().to(dtype).requires_grad_(trains)
        y = plain(leaf)
        if grad_y is None:
            return {"y": y}
        y.backward(grad_y.to(dtype))
        return {"y": y, **gradients_of({"x": leaf, **dict(plain.named_parameters())})}

    facts = size_facts(modules, dtype) | dict(layer.facts(module))
    leaves = {"x": x, **dict(module.named_parameters())}
    contender = Contender(lambda: module(x), leaves, grad_y, facts)
    if count > 1:
        contender.timed = lambda: modules(x)
    return contender, Truth.of(results, dtype)


def layers_comparison(
    key: str,
    title: str,
    layers: Sequence[Layer],
    at: Place,
    train: bool = True,
    count: int = 1,
    **facts: Any,
) -> Comparison:
    """``layers`` beside the dense network, on the same tokens.

    Args:
        key: of the section in the results.
        title: its beginning.
        layers: the contenders.
        at: where.
        train: whether forward and backward are timed too.
        count: layers in a row. Of several, which need much memory, the first one's result is
            checked and the forward passes of all are timed, in evaluation mode.
        facts: more of the case.
    """
    model = at.model
    hidden = 4 * model
    train = train and count == 1

    def context() -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        x = torch.randn(at.tokens, model).to(at.device, at.dtype)
        grad_y = torch.randn(at.tokens, model).to(at.device, at.dtype)
        return x.requires_grad_(train), grad_y if train else None

    limit = Layer(LIMIT, "limit", lambda _: Dense(model, device=at.device, dtype=at.dtype))
    built = partial(_built, count=count, dtype=at.dtype)
    builds = [
        (contender.name, contender.kind, partial(built, layer=contender))
        for contender in (limit, *layers)
    ]
    known = {
        "model": model,
        "hidden": hidden,
        "tokens": at.tokens,
        "layers": count,
        "dtype": dtype_name(at.dtype),
    }
    title = f"{title} {model}x{hidden} T={at.tokens} {dtype_name(at.dtype)}"
    if count > 1:
        title += f", {count} of them"
    phases = ("forward", "train") if train else ("forward",)
    return Comparison(key, title, context, builds, known | facts, phases)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Run layers once, forward and backward, for a profiler."
    )
    parser.add_argument(
        "--trace",
        type=Path,
        help="a folder for torch.profiler's traces, of a second call each: Chrome opens them",
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    chosen = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (TOKENS, 768) if device == "cuda" else (64, 32)
    for case in cases(sizes[1:]):
        if case.masked or chosen.only not in case.name:
            continue
        layer = case.layer(device)
        x = torch.randn(sizes, device=device, dtype=torch.bfloat16)
        layer(x).sum().backward()
        print(case.name, flush=True)
        if chosen.trace is None:
            continue
        with profile() as record:
            layer(x).sum().backward()
        order = f"self_{device}_time_total"
        print(record.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=48))
        chosen.trace.mkdir(parents=True, exist_ok=True)
        record.export_chrome_trace(str(chosen.trace / f"{case.name.replace(' ', '-')}.json"))


if __name__ == "__main__":
    main()
