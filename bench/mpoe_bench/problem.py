"""A feed-forward problem: one case, one kind of MPO shape, its tensors, and the float64 results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.cases import expert_choice, random_cores, relative_error, workload_shape
from mpoe_kernels import MPOShape, fold, plan_contraction
from mpoe_kernels.linear.reference import activation_reference, weight_reference

PROBE_COLUMNS = 4  # a dense expert's weight gradient is compared through this many random projections
# Allowed error: a multiple of the error of the reference run in the same dtype, with a floor in units of rounding.
ERROR_FACTOR = 3.0
ERROR_UNITS = 16.0
# Where a pre-activation is this close to zero, in units of their root mean square, rounding decides whether it passes
# ReLU. One such element in float32 can change a gradient by a thousand times the rounding error.
KINK = 1e-5


@dataclass(frozen=True)
class FFNCase:
    """Sizes of a mixture-of-experts feed-forward network and of its batch.

    Attributes:
        model, hidden: ``[T, model] -> [T, hidden] -> [T, model]``.
        experts, tokens: E and T; one expert per token.
        dtype: of activations and parameters.
        load: how tokens are distributed over experts, see `mpoe_bench.cases.expert_choice`.
        train: whether forward + backward is also measured.
        device: ``"cpu"`` or ``"cuda"``.
    """

    model: int = 768
    hidden: int = 3072
    experts: int = 8
    tokens: int = 2048
    dtype: torch.dtype = torch.float32
    load: str = "uniform"
    train: bool = True
    device: str = "cpu"

    @property
    def title(self) -> str:
        """E.g. ``768x3072 E=8 T=2048 float32``."""
        load = "" if self.load == "uniform" else f" {self.load}"
        return f"{self.model}x{self.hidden} E={self.experts} T={self.tokens} {str(self.dtype).split('.')[-1]}{load}"

    def facts(self) -> dict[str, Any]:
        """The case in a form that JSON can hold."""
        return {**self.__dict__, "dtype": str(self.dtype).split(".")[-1]}


def ffn_shapes(name: str, model: int, hidden: int) -> tuple[MPOShape, MPOShape]:
    """Shapes of the up and the down projection, as `mpoe.convert_to_mpoe` would choose them.

    ``name`` is a name that `mpoe_bench.cases.workload_shape` knows.
    """
    up = workload_shape(name, model, hidden)
    return up, up.mirrored() if up.is_separable else workload_shape(name, hidden, model)


@dataclass(frozen=True)
class Batch:
    """The inputs of every contender of a case.

    Attributes:
        x: ``[T, model]``, requires grad.
        index: the chosen experts, int64 ``[T, 1]``.
        gates: float32 ``[T, 1]``.
        grad_y: ``[T, model]``, the gradient that enters the backward pass.
    """

    x: Tensor
    index: Tensor
    gates: Tensor
    grad_y: Tensor


def make_batch(case: FFNCase, seed: int = 0) -> Batch:
    """Random inputs, the same each time for the same case."""
    torch.manual_seed(seed)
    x = torch.randn(case.tokens, case.model).to(case.device, case.dtype).requires_grad_(case.train)
    grad_y = torch.randn(case.tokens, case.model).to(case.device, case.dtype)
    gates = (torch.rand(case.tokens, 1) / 2 + 0.5).to(case.dtype).float().to(case.device)
    return Batch(x, expert_choice(case.load, case.tokens, case.experts).to(case.device), gates, grad_y)


@dataclass
class Truth:
    """Float64 results by name, and the error of the same formulas in the dtype under test.

    Names: ``y``, ``dx``, ``d_up.k`` and ``d_down.k`` for core k, ``d_up_probe`` and ``d_down_probe`` for dense experts'
    weight gradients ``[E, rows, PROBE_COLUMNS]``.
    """

    values: Mapping[str, Tensor]
    own_errors: Mapping[str, float]
    dtype: torch.dtype

    @classmethod
    def of(cls, results: Callable[[torch.dtype], Mapping[str, Tensor]], dtype: torch.dtype) -> Truth:
        """Of formulas that give their results in any dtype."""
        exact, same = results(torch.float64), results(dtype)
        return cls(exact, {name: relative_error(same[name], value) for name, value in exact.items()}, dtype)

    def allowed(self, name: str) -> float:
        """Largest relative L2 error that passes."""
        return max(ERROR_FACTOR * self.own_errors[name], ERROR_UNITS * torch.finfo(self.dtype).eps)

    def errors(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Relative L2 error of every result."""
        return {name: relative_error(value.cpu(), self.values[name]) for name, value in results.items()}

    def faults(self, results: Mapping[str, Tensor]) -> list[str]:
        """What is wrong, in words; empty when every result is right."""
        found = []
        for name, value in results.items():
            truth = self.values[name]
            if value.shape != truth.shape:
                found.append(f"{name} is {list(value.shape)} instead of {list(truth.shape)}")
                continue
            error = relative_error(value.cpu(), truth)
            if not error <= self.allowed(name):  # true for NaN
                found.append(f"error of {name} is {error:.1e}, allowed {self.allowed(name):.1e}")
        return found


@dataclass
class Problem:
    """One case with one kind of shape.

    Attributes:
        case, batch, shape_name: what the problem is made from.
        up, down: cores of all experts (auxiliary ones ``[E, d, i, j, d']``), in the case's dtype, no gradients.
    """

    case: FFNCase
    shape_name: str
    batch: Batch
    up_shape: MPOShape = field(init=False)
    down_shape: MPOShape = field(init=False)
    up: list[Tensor] = field(init=False)
    down: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.up_shape, self.down_shape = ffn_shapes(self.shape_name, case.model, case.hidden)
        torch.manual_seed(1)
        self.up = [c.to(case.device) for c in random_cores(self.up_shape, case.experts, case.dtype)]
        self.down = [c.to(case.device) for c in random_cores(self.down_shape, case.experts, case.dtype)]

    def weight(self, kind: str, e: int, cores: Sequence[Tensor]) -> Tensor:
        """Expert e's weight ``[in, out]`` of a projection, ``up`` or ``down``, from the cores of all experts."""
        shape: MPOShape = self.up_shape if kind == "up" else self.down_shape
        own = [core if k == shape.central else core[e : e + 1] for k, core in enumerate(cores)]
        return weight_reference(fold(own, shape=shape, num_experts=1), 0)

    @cached_property
    def dense_experts(self) -> tuple[Tensor, Tensor]:
        """The experts' full weights, up ``[E, hidden, model]`` and down ``[E, model, hidden]`` (as in `nn.Linear`)."""
        case = self.case
        up = torch.empty(case.experts, case.hidden, case.model, dtype=case.dtype, device=case.device)
        down = torch.empty(case.experts, case.model, case.hidden, dtype=case.dtype, device=case.device)
        for e in range(case.experts):
            up[e], down[e] = self.weight("up", e, self.up).T, self.weight("down", e, self.down).T
        return up.requires_grad_(case.train), down.requires_grad_(case.train)

    @cached_property
    def grad_y(self) -> Tensor | None:
        """The gradient that enters the backward pass, see `without_kinks`; ``None`` without training."""
        case, batch = self.case, self.batch
        if not case.train:
            return None
        index, cores = batch.index[:, 0], [core.double() for core in self.up]
        x = batch.x.detach().double()
        z = x.new_zeros(case.tokens, case.hidden)
        for e in index.unique().tolist():
            rows = (index == e).nonzero()[:, 0]
            z[rows] = x[rows] @ self.weight("up", e, cores)
        return without_kinks(batch.grad_y, z)

    @cached_property
    def truth(self) -> Truth:
        """Float64 results of the experts as MPOs."""
        return Truth.of(lambda dtype: reference_ffn(self, dtype), self.case.dtype)

    def floor(self, mask_central: bool = False) -> dict[str, float | None]:
        """Fewest FLOPs of any strategy relative to the dense FFN's, forward and forward + backward."""
        floors: dict[str, float | None] = {}
        for phase, training in (("forward", False), ("train", True)):
            sizes = (self.case.experts, self.case.tokens, self.case.dtype)
            plans = [
                plan_contraction(shape, *sizes, training=training, mask_central=mask_central)
                for shape in (self.up_shape, self.down_shape)
            ]
            dense = sum(plan.dense_flops for plan in plans)
            floors[phase] = sum(plan.flops for plan in plans) / dense if dense else None
        return floors

    def parameters(self) -> int:
        """Number of elements in both projections' cores, of all experts."""
        return sum(core.numel() for core in (*self.up, *self.down))


class Problems:
    """What the contenders of a case share: one batch, and a problem per name of a shape."""

    def __init__(self, case: FFNCase) -> None:
        self.case, self.batch = case, make_batch(case)
        self._known: dict[str, Problem] = {}

    def of(self, shape: str) -> Problem:
        """The problem of a shape, made once."""
        if shape not in self._known:
            self._known[shape] = Problem(self.case, shape, self.batch)
        return self._known[shape]


def grad_of(leaf: Tensor) -> Tensor:
    """A leaf's gradient; zeros where the backward pass never reached it (an idle expert)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def without_kinks(grad_y: Tensor, z: Tensor) -> Tensor:
    """``grad_y [T, model]`` with zeros in the rows whose pre-activations ``z [T, hidden]`` come too close to zero.

    Such rows, a few in a hundred, then contribute to no gradient of any contender, so that gradients differ only by
    rounding. In bfloat16 every row has such elements; there the reference's own error includes them.
    """
    if grad_y.dtype != torch.float32:
        return grad_y
    clear = (z.abs() > KINK * z.square().mean().sqrt()).all(1)
    return grad_y * clear.to(grad_y.device, grad_y.dtype)[:, None]


def probe(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The random projection ``[columns, PROBE_COLUMNS]`` of weight gradients."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(columns, PROBE_COLUMNS, generator=generator, dtype=torch.float64).to(dtype)


def reference_ffn(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """``gate * down_e(relu(up_e x))`` and its gradients, one expert at a time, by `mpoe_kernels.reference`.

    Runs in ``dtype`` on the case's device; at most one expert's weights are alive. See `Truth` for the names.
    """
    case, batch = problem.case, problem.batch
    cores = {"up": problem.up, "down": problem.down}
    leaves = {k: [c.detach().to(dtype).clone().requires_grad_(case.train) for c in v] for k, v in cores.items()}
    x, gates, index = batch.x.detach().to(dtype), batch.gates.to(dtype), batch.index[:, 0]
    grad_y = None if problem.grad_y is None else problem.grad_y.to(dtype)
    probes = {size: probe(size, dtype).to(x.device) for size in (case.model, case.hidden)}
    y = torch.zeros_like(x)
    results = {"y": y}
    if case.train:
        results["dx"] = torch.zeros_like(x)
        results["d_up_probe"] = x.new_zeros(case.experts, case.model, PROBE_COLUMNS)
        results["d_down_probe"] = x.new_zeros(case.experts, case.hidden, PROBE_COLUMNS)
    for e in index.unique().tolist():
        rows = (index == e).nonzero()[:, 0]
        with torch.set_grad_enabled(case.train):
            x_e = x[rows].requires_grad_(case.train)
            up, down = (problem.weight(kind, e, leaves[kind]) for kind in ("up", "down"))
            y_e = activation_reference("relu", x_e @ up) @ down * gates[rows]
        y[rows] = y_e.detach()
        if grad_y is not None:
            for weight in (up, down):
                weight.retain_grad()
            y_e.backward(grad_y[rows])
            assert x_e.grad is not None
            assert up.grad is not None
            assert down.grad is not None
            results["dx"][rows] = x_e.grad
            results["d_up_probe"][e] = up.grad @ probes[case.hidden]
            results["d_down_probe"][e] = down.grad @ probes[case.model]
    if case.train:
        results |= {f"d_{kind}.{k}": grad_of(leaf) for kind, own in leaves.items() for k, leaf in enumerate(own)}
    return {name: value.detach().cpu() for name, value in results.items()}
