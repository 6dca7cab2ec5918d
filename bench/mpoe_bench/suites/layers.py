"""Mixtures around a dense network (hidden-side experts, neurons), router included, and stock layers, against it.

Few tokens pass through one layer, whose weights stay in the processor's caches, or through twelve, as in a model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers import HiddenFeedForward, NeuronFeedForward
from mpoe_bench.contender import Build, Comparison, Contender, size_facts
from mpoe_bench.gpu_cases import Dense
from mpoe_bench.peers.stock_layers import STOCK_LAYERS, stock_layer
from mpoe_bench.problem import Truth, grad_of
from mpoe_bench.suites.ffn import LIMIT

LAYERS = 12  # of a model of T5-base's width
START = 0.02  # of experts that would add nothing
Shared = tuple[Sequence[Dense], Tensor, Tensor]  # the dense networks, x, the gradient that enters the backward pass


def mixture(dense: Dense, config: MPOEConfig, activation: str) -> nn.Module:
    """The same network with experts between its projections or beside it, which are not at their initial values."""
    features, model = dense.up.weight.shape
    names, projections = {"up": "up", "down": "down"}, {"up": dense.up, "down": dense.down}
    options: Any = {"names": names, "activation": activation, "dtype": dense.up.weight.dtype}
    if config.is_neurons:
        layer: Any = NeuronFeedForward(model, features, config, **options)
        layer.around(dense, projections)
    else:
        layer = HiddenFeedForward(model, features, config, **options)
        layer.adopt(projections)
    with torch.no_grad():
        for core in layer.experts.own_cores:
            core.add_(START * torch.randn_like(core))
    return layer


def mixtures(scale_model: int) -> dict[str, dict[str, Any]]:
    """Name -> fields of its `MPOEConfig`, for a model's size: one that has a target, or that users run by default."""
    m = min(64, max(scale_model // 12, 1))

    def neurons(experts: int, size: int, top_k: int, latent: int | None = None) -> dict[str, Any]:
        router = {"top_k": top_k, "init_scale": 1.0}
        return {"shape": "neurons", "num_experts": experts, "neurons": size, "latent": latent, "router": router}

    def hidden(experts: int, per_group: bool) -> dict[str, Any]:
        router = {"top_k": 2, "init_scale": 1.0}
        own = {"block_size": m, "block_per_group": per_group}
        return {"shape": "hidden", "num_experts": experts, **own, "router": router}

    return {
        "hidden 8, per group, 2": hidden(8, True),
        "hidden 64, shared, 2": hidden(64, False),
        f"neurons 8 x {m}, 2": neurons(8, m, 2),
        f"neurons 64 x {m}, 8": neurons(64, m, 8),
        f"neurons 128 x {2 * m}, 8": neurons(128, 2 * m, 8),
        f"latent {6 * m}, 128 x {4 * m}, 8": neurons(128, 4 * m, 8, 6 * m),
    }


@torch.no_grad()
def read_bytes(layer: Any, x: Tensor) -> float:
    """Bytes of the weights that a forward pass of tokens x must read: without experts that none of them chose."""
    every = sum(parameter.nbytes for parameter in layer.parameters())
    if isinstance(layer, Dense):
        return every
    chosen = len(layer.router(x).top_k_index.unique()) / layer.num_experts
    return every - (1 - chosen) * sum(core.nbytes for core in layer.experts.own_cores)


def layers_comparison(
    sizes: tuple[int, int],
    tokens: int,
    layers: int,
    dtype: torch.dtype,
    backends: tuple[str, ...],
    device: str,
    chosen: str = "",
) -> Comparison:
    """`mixtures` whose names hold ``chosen`` on every backend; ``layers`` networks run one after another.

    One layer is checked and timed with its gradients; of several, which need much memory, the first one's result is
    checked, and the forward passes of all are timed on the first of ``backends``, in evaluation mode. Beside them
    `STOCK_LAYERS`, for the same ``chosen``.
    """

    def context() -> Shared:
        torch.manual_seed(0)
        networks = [Dense(sizes[0], "relu", sizes[1], dtype=dtype).to(device) for _ in range(layers)]
        x, grad_y = (torch.randn(tokens, sizes[0]).to(device, dtype) for _ in range(2))
        return networks, x.requires_grad_(), grad_y

    def gradients_of(modules: nn.Module, x: Tensor) -> dict[str, Tensor]:
        first: Any = modules[0]  # type: ignore[index]
        kept = {name: getattr(first, name) for name in ("up", "down") if hasattr(first, name)}
        return {"dx": grad_of(x), **{f"d_{name}": grad_of(layer.weight) for name, layer in kept.items()}}

    def results(modules: nn.Module, shared: Shared, dtype: torch.dtype) -> dict[str, Tensor]:
        _, x, grad_y = shared
        own, leaf = copy.deepcopy(modules).to(dtype), x.detach().to(dtype).requires_grad_()
        y = own(leaf)
        y.backward(grad_y.to(dtype))
        return {name: value.detach().cpu() for name, value in {"y": y, **gradients_of(own, leaf)}.items()}

    def build(shared: Shared, key: str, fields: Mapping[str, Any] | None, backend: str) -> tuple[Contender, Truth]:
        networks, x, grad_y = shared
        torch.manual_seed(1)

        def made(backend: str, networks: Sequence[Dense]) -> Any:
            if key in STOCK_LAYERS:
                return nn.Sequential(*(stock_layer(key, *sizes, tokens, dtype) for _ in networks)).to(device)
            if fields is None:
                return nn.Sequential(*networks)
            config = MPOEConfig(**fields, backend=backend)
            return nn.Sequential(*(mixture(copy.deepcopy(network), config, "relu") for network in networks)).to(device)

        modules, plain = made(backend, networks), made("eager", networks[:1])
        modules.train(layers == 1)
        plain[0].load_state_dict(modules[0].state_dict())
        truth = Truth.of(partial(results, plain, shared), dtype)
        facts: dict[str, Any] = size_facts(sum(p.numel() for p in modules.parameters()), dtype)
        if fields is not None:
            relative = modules[0].relative_flops(fields["router"]["top_k"]) + fields["num_experts"] / (2 * sizes[1])
            facts |= {"backend": backend, "shape": key, "floor": {"forward": relative}}
        if layers > 1:
            if key not in STOCK_LAYERS:
                facts["read_bytes"] = sum(read_bytes(module, x) for module in modules)
            return Contender(lambda: modules[0](x), facts=facts, timed=lambda: modules(x)), truth
        leaves = (x, *modules.parameters())
        own = Contender(lambda: modules(x), grad_y, leaves, lambda: gradients_of(modules, x), facts, resident=True)
        return own, truth

    builds: list[tuple[str, str, Build]] = [(LIMIT, "limit", partial(build, key=LIMIT, fields=None, backend="eager"))]
    for key, fields in ((key, fields) for key, fields in mixtures(sizes[0]).items() if chosen in key):
        for backend in backends if layers == 1 else backends[:1]:
            builds.append((f"{key} [{backend}]", "mpoe", partial(build, key=key, fields=fields, backend=backend)))
    for key in STOCK_LAYERS:
        if chosen in key:
            builds.append((key, "peer", partial(build, key=key, fields=None, backend="")))
    dtype_name = str(dtype).split(".")[-1]
    several = f", {layers} of them" if layers > 1 else ""
    title = f"layers {sizes[0]}x{sizes[1]} T={tokens} {dtype_name}, router included{several}"
    facts = {"tokens": tokens, "layers": layers, "dtype": dtype_name, "model": sizes[0], "hidden": sizes[1]}
    phases = ("forward", "train") if layers == 1 else ("forward",)
    return Comparison("layers", title, context, builds, LIMIT, tokens, facts, phases)
