"""A call of `hidden_experts` or `neuron_experts` with its gradients: inputs, and the comparison
with the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mpoe_kernels import hidden_experts, neuron_experts
from mpoe_kernels.experts.op import HiddenBackwardCall, HiddenCall, NeuronBackwardCall, NeuronCall
from mpoe_kernels.experts.reference import hidden_experts_reference, neuron_experts_reference

from .assertions import assert_calibrated, poisoned_memory


@dataclass
class _Problem:
    """Inputs in float64, rounded to ``dtype``: T tokens, E experts, K choices, of which
    ``none_share`` are -1.

    Attributes:
        OP, REFERENCE: what is compared.
        CALLS: what kernels get, forward and backward.
        NAMES: of the differentiable arguments; ROWS: the one whose rows are the tokens.
        inputs: the differentiable arguments by name, None for those that are not given.
        index, grad: ``top_k_index``, and the gradient of the result.
        known: what the reference computed, by dtype; it is not computed again after a change of the
            inputs.
    """

    OP: ClassVar[Callable[..., Tensor]]
    REFERENCE: ClassVar[Callable[..., Tensor]]
    CALLS: ClassVar[tuple[type, type]]
    NAMES: ClassVar[tuple[str, ...]]
    ROWS: ClassVar[str]
    tokens: int = 7
    experts: int = 5
    top_k: int = 2
    gated: bool = False
    with_bias: bool = False
    activation: str = "gelu"
    dtype: torch.dtype = torch.float64
    none_share: float = 0.2
    seed: int = 0
    index: Tensor = field(init=False)
    inputs: dict[str, Tensor | None] = field(init=False)
    grad: Tensor = field(init=False)
    known: dict[torch.dtype, dict[str, Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self):
        self._generator = torch.Generator().manual_seed(self.seed)
        self.index = torch.randint(
            0, self.experts, (self.tokens, self.top_k), generator=self._generator
        )
        self.index[torch.rand(self.index.shape, generator=self._generator) < self.none_share] = -1
        # The router's gates stay float32 beside half precision.
        gates = (
            torch.rand(self.tokens, self.top_k, generator=self._generator, dtype=torch.float64) * 2
            - 0.5
        )
        self._gates = gates.to(torch.promote_types(self.dtype, torch.float32))

    def _random(self, *shape, scale=1.0):
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale).to(
            self.dtype
        )

    def run(self, op, dtype, **options):
        """``o`` and every gradient, by ``op`` in ``dtype``; gates and their gradient in float32 at
        least."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {
            name: None
            if value is None
            else value.to(wide if name == "gates" else dtype).detach().requires_grad_()
            for name, value in self.inputs.items()
        }
        out = op(**leaves, top_k_index=self.index, activation=self.activation, **options)
        given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found = (None,) * len(given)
        if out.requires_grad:
            found = torch.autograd.grad(
                out, list(given.values()), self.grad.to(dtype), allow_unused=True
            )
        grads = {
            n: torch.zeros_like(x) if g is None else g
            for (n, x), g in zip(given.items(), found, strict=True)
        }
        return {"o": out, **{f"d{name}": value for name, value in grads.items()}}

    def call(self, backend="auto"):
        """What its forward kernels are called with."""
        given = {"top_k_index": self.index, "activation": self.activation, "backend": backend}
        return self.CALLS[0](**self.inputs, **given)

    def backward_call(self, need=None, backend="auto"):
        """What its backward kernels are called with; by default all gradients are needed."""
        needed = [True] * len(self.NAMES) if need is None else need
        return self.CALLS[1](**vars(self.call(backend)), grad=self.grad, need=needed)

    def on_quarters(self):
        """All inputs are multiples of 1/4, which multiply and add without rounding: it does not
        decide on which side of zero a pre-activation is, where the gradient of ReLU jumps."""
        self.inputs = {
            n: None if x is None else (x * 4).round() / 4 for n, x in self.inputs.items()
        }
        return self

    def computed(self, backend):
        """`run` by the public op, in its dtype."""
        with poisoned_memory(self.index.device):
            return self.run(type(self).OP, self.dtype, backend=backend)

    def check(self, backend, factor=2):
        """Compare with the reference in float64, calibrated by the reference in the same dtype."""
        self.check_results(self.computed(backend), backend, factor)

    def check_results(self, actual, computed_by, factor):
        """The same for what `run` returned, or something like it."""
        for dtype in {torch.float64, self.dtype} - self.known.keys():
            self.known[dtype] = self.run(type(self).REFERENCE, dtype)
        truth, same = self.known[torch.float64], self.known[self.dtype]
        assert actual.keys() == truth.keys()
        for name, value in actual.items():
            assert_calibrated(value, truth[name], same[name], f"{name} ({computed_by})", factor)


@dataclass
class HiddenProblem(_Problem):
    """G groups of b hidden units, blocks of their own ``per_group``."""

    OP, REFERENCE = staticmethod(hidden_experts), staticmethod(hidden_experts_reference)
    CALLS, NAMES, ROWS = (HiddenCall, HiddenBackwardCall), HiddenCall.DIFFERENTIABLE, "u"
    groups: int = 3
    block: int = 4
    per_group: bool = False

    def __post_init__(self):
        super().__post_init__()
        rows, own = (self.tokens, self.groups * self.block), self.groups if self.per_group else 1
        blocks, scale = (self.experts, own, self.block, self.block), self.block**-0.5
        self.inputs = {
            "u": self._random(*rows),
            "gates": self._gates,
            "right": self._random(*blocks, scale=scale),
            "left": self._random(*blocks, scale=scale),
            "bias": self._random(self.experts, rows[1]) if self.with_bias else None,
            "u_gate": self._random(*rows) if self.gated else None,
            "right_gate": self._random(*blocks, scale=scale) if self.gated else None,
        }
        self.grad = self._random(*rows)


@dataclass
class NeuronProblem(_Problem):
    """Widths I and O, m neurons of each expert."""

    OP, REFERENCE = staticmethod(neuron_experts), staticmethod(neuron_experts_reference)
    CALLS, NAMES, ROWS = (NeuronCall, NeuronBackwardCall), NeuronCall.DIFFERENTIABLE, "x"
    width: int = 12
    out: int = 9
    neurons: int = 6

    def __post_init__(self):
        super().__post_init__()
        up = (self.experts, self.neurons, self.width)
        self.inputs = {
            "x": self._random(self.tokens, self.width),
            "gates": self._gates,
            "up": self._random(*up, scale=self.width**-0.5),
            "down": self._random(self.experts, self.neurons, self.out, scale=self.neurons**-0.5),
            "bias": self._random(self.experts, self.neurons) if self.with_bias else None,
            "gate_up": self._random(*up, scale=self.width**-0.5) if self.gated else None,
        }
        self.grad = self._random(self.tokens, self.out)
