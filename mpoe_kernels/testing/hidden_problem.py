"""One call of `hidden_experts` with its gradients: inputs, and the comparison of a backend with the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.hidden_experts import hidden_experts
from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.reference import hidden_experts_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory

NAMES = ("u", "gates", "right", "left", "bias", "u_gate", "right_gate")


def arguments_of(call: HiddenCall) -> tuple[Any, ...]:
    """As the op takes them."""
    return tuple(getattr(call, each.name) for each in fields(call))


@dataclass
class HiddenProblem:
    """Inputs in float64, rounded to ``dtype``: T tokens, E experts, K choices, G groups of b.

    Of the choices ``none_share`` are -1.
    """

    tokens: int = 7
    experts: int = 5
    top_k: int = 2
    groups: int = 3
    block: int = 4
    per_group: bool = False
    gated: bool = False
    with_bias: bool = False
    activation: str = "gelu"
    dtype: torch.dtype = torch.float64
    none_share: float = 0.2
    seed: int = 0
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        features, own = self.groups * self.block, self.groups if self.per_group else 1

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(self.dtype)

        blocks = (self.experts, own, self.block, self.block)
        scale = self.block**-0.5
        self.index = torch.randint(0, self.experts, (self.tokens, self.top_k), generator=g)
        self.index[torch.rand(self.index.shape, generator=g) < self.none_share] = -1
        # The router's gates stay float32 beside half precision.
        gates = torch.rand(self.tokens, self.top_k, generator=g, dtype=torch.float64) * 2 - 0.5
        self.inputs: dict[str, Tensor | None] = {
            "u": random(self.tokens, features),
            "gates": gates.to(torch.promote_types(self.dtype, torch.float32)),
            "right": random(*blocks, scale=scale),
            "left": random(*blocks, scale=scale),
            "bias": random(self.experts, features) if self.with_bias else None,
            "u_gate": random(self.tokens, features) if self.gated else None,
            "right_gate": random(*blocks, scale=scale) if self.gated else None,
        }
        self.grad = random(self.tokens, features)

    def call(self, backend: str = "auto") -> HiddenCall:
        """What its forward kernels are called with."""
        own = self.inputs
        head = (own["u"], own["gates"], self.index, own["right"], own["left"])
        return HiddenCall(*head, own["bias"], own["u_gate"], own["right_gate"], self.activation, backend)  # type: ignore[arg-type]

    def backward_call(self, need: list[bool], backend: str = "auto") -> HiddenBackwardCall:
        """What its backward kernels are called with."""
        return HiddenBackwardCall(**vars(self.call(backend)), grad=self.grad, need=need)

    def run(self, op: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        """``o`` and every gradient, by ``op`` in ``dtype``; gates and their gradient in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {
            name: None if value is None else value.to(wide if name == "gates" else dtype).detach().requires_grad_()
            for name, value in self.inputs.items()
        }
        keywords = {name: leaves[name] for name in ("u_gate", "right_gate")}
        out = op(
            leaves["u"],
            leaves["gates"],
            self.index,
            leaves["right"],
            leaves["left"],
            leaves["bias"],
            activation=self.activation,
            **keywords,
            **options,
        )
        given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found: tuple[Tensor | None, ...] = (None,) * len(given)
        if out.requires_grad:
            found = torch.autograd.grad(out, list(given.values()), self.grad.to(dtype), allow_unused=True)
        grads = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(given.items(), found, strict=True)}
        return {"o": out, **{f"d{name}": value for name, value in grads.items()}}

    def check(self, backend: str, factor: float = 2) -> None:
        """Compare with the reference in float64, calibrated by the reference in the same dtype."""
        with poisoned_memory():
            actual = self.run(hidden_experts, self.dtype, backend=backend)
        self.check_results(actual, backend, factor)

    def check_results(self, actual: dict[str, Tensor], computed_by: str, factor: float = 2) -> None:
        """The same for what `run` returned, or something like it."""
        truth = self.run(hidden_experts_reference, torch.float64)
        same = self.run(hidden_experts_reference, self.dtype)
        assert actual.keys() == truth.keys()
        for name, value in actual.items():
            assert_calibrated(value, truth[name], same[name], f"{name} ({computed_by})", factor)
