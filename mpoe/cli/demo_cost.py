"""The cost of the demo's arms: a wider dense model of the same size; parameters and time of a layer of T5-base."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.cli.demo_arms import DemoArm, Settings
from mpoe.layers import MPOEFeedForward, routing_context

TOKENS = 512
ROUNDS = 3
_HIDDEN = {"t5": "d_ff", "gpt2": "n_inner"}  # fields of the configurations


def hidden_size(config: Any) -> int:
    """F of a T5 or GPT-2."""
    return int(getattr(config, _HIDDEN[config.model_type]) or 4 * config.n_embd)


class _Dense(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, hidden, bias=False), nn.Linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def _layer(arm: DemoArm, features: int, hidden: int) -> nn.Module:
    if arm.experts is None:
        return _Dense(features, hidden)
    return MPOEFeedForward(features, hidden, arm.config(large=True))


def large_costs(settings: Settings, tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """The cost of every arm in the large model that the stand-in represents.

    Returns:
        By arm: ``parameters`` of the whole model, and ``forward`` and ``training``, the CPU time of one feed-forward
        layer on ``tokens`` tokens over the dense layer's: one thread, medians over rounds in which all arms take turns.
    """
    from mpoe.estimation.inventory import take_inventory

    inventory = take_inventory(settings.large)
    up = inventory.layers[0].matrices[0]
    features, hidden = up.rows, up.columns
    layers: dict[str, nn.Module] = {}
    for arm in settings.arms:
        if arm.as_large_as is None:
            layers[arm.key] = _layer(arm, features, hidden)
    for arm in settings.arms:
        if arm.as_large_as is not None:
            wide = _size(layers[arm.as_large_as]) // (2 * features)
            layers[arm.key] = _layer(arm, features, wide)
    x = torch.randn(tokens, features)
    times: dict[str, dict[str, list[float]]] = {key: {"forward": [], "training": []} for key in layers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time then hardly depends on other processes
    try:
        for turn in range(rounds + 1):
            for key, layer in layers.items():
                for phase, seconds in times[key].items():
                    taken = _seconds(layer, x, phase == "training")
                    if turn:  # the first one is a warm-up
                        seconds.append(taken)
    finally:
        torch.set_num_threads(threads)
    base = _size(layers["dense"])
    return {
        key: {"parameters": inventory.parameters + len(inventory.layers) * (_size(layers[key]) - base)}
        | {
            phase: statistics.median(a / b for a, b in zip(seconds, times["dense"][phase], strict=True))
            for phase, seconds in times[key].items()
        }
        for key in layers
    }


def _size(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _seconds(layer: nn.Module, x: Tensor, training: bool) -> float:
    start = time.thread_time()
    if training:
        with routing_context(record=False):
            layer(x).sum().backward()
    else:
        with torch.inference_mode():
            layer(x)
    return time.thread_time() - start
