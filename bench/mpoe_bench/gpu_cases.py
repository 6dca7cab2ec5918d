"""Layers that a GPU must compute fast, with limits: tools/gpu_floors.py bounds them, `bench/gpu.sh` measures them.

``python -m mpoe_bench.gpu_cases`` runs four of them once, forward and backward, for a profiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import ACTIVATIONS, MPOEFeedForward
from mpoe.layers.neurons import NeuronFeedForward

TOKENS = 4096
PHASES = ("forward", "training")


class Dense(nn.Module):
    """``down(act(up x))``, four times as wide inside unless ``hidden`` says otherwise."""

    def __init__(self, model: int, activation: str, hidden: int | None = None, **placed: Any) -> None:
        super().__init__()
        self.act, hidden = ACTIVATIONS[activation], hidden or 4 * model
        self.up, self.down = (nn.Linear(*s, False, **placed) for s in ((model, hidden), (hidden, model)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


@dataclass(frozen=True)
class Case:
    """One layer with its router.

    Attributes:
        shape: of its experts, with ``options`` of `MPOEConfig`.
        model: model size d; the hidden size is 4 d.
        experts, top_k: E and the experts of a token.
        limits: the largest times allowed, x dense: forward, and with the backward; None: reported.
        masked: the central cores get no gradient.
    """

    shape: str
    model: int
    experts: int
    top_k: int
    limits: tuple[float | None, float | None] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    @property
    def name(self) -> str:
        """``paper max_bond 64 masked d=768 E=8 k=1``."""
        words = [self.shape, *(f"{key} {value}" for key, value in self.options.items()), "masked" * self.masked]
        return f"{' '.join(filter(None, words))} d={self.model} E={self.experts} k={self.top_k}"

    def layer(
        self,
        device: str,
        backend: str | None = None,
        activation: str = "relu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> nn.Module:
        """With random weights, also of experts that start adding nothing, so that every gradient is one of numbers."""
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        config = MPOEConfig(
            num_experts=self.experts,
            shape=self.shape,
            router=RouterConfig(top_k=self.top_k),
            backend=backend,
            **self.options,
        )
        sizes = self.model, 4 * self.model
        if self.shape == "neurons":
            dense = Dense(self.model, activation, **placed)
            names = {"up": "up", "down": "down"}
            made = NeuronFeedForward(*sizes, config, names=names, activation=activation, **placed)
            made.around(dense, {"up": dense.up, "down": dense.down})
            layer: Any = made
        else:
            layer = MPOEFeedForward(*sizes, config, activation=activation, **placed)
        if self.shape in ("neurons", "hidden"):
            with torch.no_grad():
                for core in layer.experts.own_cores:
                    core.add_(0.02 * torch.randn_like(core))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not (self.masked and "central" in name))
        return layer


def cases(models: tuple[int, ...] = (768, 4096)) -> Iterator[Case]:
    """Neurons, hidden-side experts, separable ones and the fused chain, masked and not."""
    for model in models:
        bond, neurons = min(64, model // 4), min(64, model // 4)
        yield Case("neurons", model, 8, 2, (1.3, 1.4), {"neurons": neurons})
        yield Case("neurons", model, 64, 8, (1.3, 1.4) if model >= 4096 else (2.0, 2.2), {"neurons": neurons})
        for experts in (8, 64):
            yield Case("hidden", model, experts, 2, (1.5, 1.7))
        yield Case("separable", model, 8, 1, (1.5, 1.7))
        for masked in (False, True):
            yield Case("paper", model, 8, 1, (None, None), {"max_bond": bond}, masked)
        yield Case("light", model, 8, 1, (None, None), {"max_bond": bond})


def main() -> None:
    device, sizes = ("cuda", (TOKENS, 768)) if torch.cuda.is_available() else ("cpu", (64, 32))
    for case in cases(sizes[1:]):
        if case.experts == 8 and not case.masked:
            case.layer(device)(torch.randn(sizes, device=device, dtype=torch.bfloat16)).sum().backward()
            print(case.name, flush=True)


if __name__ == "__main__":
    main()
