"""One call of `neuron_experts` with its gradients: inputs, and the comparison of a backend with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.neurons import neuron_experts
from mpoe_kernels.neurons.reference import neuron_experts_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory

NAMES = ("x", "gates", "up", "down", "bias", "gate_up")


@dataclass
class NeuronProblem:
    """Inputs in float64, rounded to ``dtype``: T tokens, E experts, K choices, widths I and O, m neurons each.

    Of the choices ``none_share`` are -1.
    """

    tokens: int = 7
    experts: int = 5
    top_k: int = 2
    width: int = 12
    out: int = 9
    neurons: int = 6
    gated: bool = False
    with_bias: bool = False
    activation: str = "gelu"
    dtype: torch.dtype = torch.float64
    none_share: float = 0.2
    seed: int = 0
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(self.dtype)

        up = (self.experts, self.neurons, self.width)
        self.index = torch.randint(0, self.experts, (self.tokens, self.top_k), generator=g)
        self.index[torch.rand(self.index.shape, generator=g) < self.none_share] = -1
        # The router's gates stay float32 beside half precision.
        gates = torch.rand(self.tokens, self.top_k, generator=g, dtype=torch.float64) * 2 - 0.5
        self.inputs: dict[str, Tensor | None] = {
            "x": random(self.tokens, self.width),
            "gates": gates.to(torch.promote_types(self.dtype, torch.float32)),
            "up": random(*up, scale=self.width**-0.5),
            "down": random(self.experts, self.neurons, self.out, scale=self.neurons**-0.5),
            "bias": random(self.experts, self.neurons) if self.with_bias else None,
            "gate_up": random(*up, scale=self.width**-0.5) if self.gated else None,
        }
        self.grad = random(self.tokens, self.out)

    def arguments(self, backend: str = "eager") -> tuple[Any, ...]:
        """The arguments of ``mpoe::neuron_experts``; floating ones are leaves."""
        values = {n: None if x is None else x.detach().requires_grad_() for n, x in self.inputs.items()}
        head = (values["x"], values["gates"], self.index, values["up"], values["down"])
        return (*head, values["bias"], values["gate_up"], self.activation, backend)

    def run(self, op: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        """``o`` and every gradient, by ``op`` in ``dtype``; gates and their gradient in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {
            name: None if value is None else value.to(wide if name == "gates" else dtype).detach().requires_grad_()
            for name, value in self.inputs.items()
        }
        out = op(**leaves, top_k_index=self.index, activation=self.activation, **options)
        given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found: tuple[Tensor | None, ...] = (None,) * len(given)
        if out.requires_grad:
            found = torch.autograd.grad(out, list(given.values()), self.grad.to(dtype), allow_unused=True)
        grads = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(given.items(), found, strict=True)}
        return {"o": out, **{f"d{name}": value for name, value in grads.items()}}

    def check(self, backend: str, factor: float = 2) -> None:
        """Compare with the reference in float64, calibrated by the reference in the same dtype."""
        with poisoned_memory():
            actual = self.run(neuron_experts, self.dtype, backend=backend)
        truth = self.run(neuron_experts_reference, torch.float64)
        same = self.run(neuron_experts_reference, self.dtype)
        assert actual.keys() == truth.keys()
        for name, value in actual.items():
            assert_calibrated(value, truth[name], same[name], f"{name} ({backend})", factor)
