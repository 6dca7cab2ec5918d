"""Walks over the modules of a model: its MPO cores, its layers with routers, networks that keep
their projections; and their names."""

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

from torch import nn

from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.layers.neurons import NeuronFeedForward

M = TypeVar("M", bound=nn.Module)


def modules_of(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Every module of this class in a model by name, in the order in which a forward pass runs
    them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def mpo_modules(model: nn.Module) -> Iterator[tuple[str, MPOCores]]:
    """Every `MPOCores` of a model with its name."""
    return iter(modules_of(model, MPOCores).items())


def rate_ratios_of(model: nn.Module) -> dict[str, list[float]]:
    """The rate ratios of every `MPOCores`, by name: what a configuration keeps of them."""
    return {name: list(cores.rate_ratios) for name, cores in mpo_modules(model)}


def routed_layers(model: nn.Module) -> list[tuple[str, RoutedFeedForward]]:
    """The layers that have a router, in order."""
    return [
        (name, layer)
        for name, layer in modules_of(model, RoutedFeedForward).items()
        if layer.router is not None
    ]


# The networks of a model that kept their projections, and those of the shape "neurons".
kept_modules = partial(modules_of, kind=KeptFeedForward)


neuron_modules = partial(modules_of, kind=NeuronFeedForward)


def short_name(name: str) -> str:
    """A module's name without the parts that all modules of its kind have."""
    skipped = {
        "transformer",
        "model",
        "block",
        "layer",
        "experts",
        "DenseReluDense",
        "mlp",
        "cores",
    }
    return ".".join(part for part in name.split(".") if part not in skipped)


def names_in_checkpoints(model: Any, name: str) -> tuple[str, str, str]:
    """A module's names in checkpoints of this model, of the model with a head, and of its base."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)
