"""Named shapes, workloads and token distributions of benchmarks and tests."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product

import torch
from torch import Tensor

from mpoe_kernels.mpo.fold import MPOBlocks, fold
from mpoe_kernels.mpo.shape import MPOShape


@cache
def workload_shape(name: str, in_features: int, out_features: int) -> MPOShape:
    """``paper_full``, ``paper_B`` (bond B), ``light_P``, or ``separable`` for a weight ``[in,
    out]``.

    Raises:
        ValueError: another name.
    """
    kind, _, size = name.partition("_")
    number = int(size) if size.isdigit() else None
    if name == "separable":
        return MPOShape.separable(in_features, out_features)
    if kind == "paper" and (number or size == "full"):
        return MPOShape.paper(in_features, out_features, max_bond=number)
    if kind == "light" and number:
        return MPOShape.light(in_features, out_features, number)
    raise ValueError(
        f"name must be 'separable', 'paper_full', 'paper_BOND' or 'light_P'; got {name!r}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` instead of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Workload:
    """One product of a batch with the experts of a matrix.

    Attributes:
        shape_name: see `workload_shape`.
        in_features, out_features: sizes of the weight.
        num_experts: E.
        num_tokens: T, routed to one expert each.
        dtype: of activations and cores.
        training: forward and backward instead of forward.
        mask_central: training without the central gradient.
    """

    shape_name: str
    in_features: int
    out_features: int
    num_experts: int
    num_tokens: int
    dtype: torch.dtype
    training: bool
    mask_central: bool = False

    @property
    def shape(self) -> MPOShape:
        return workload_shape(self.shape_name, self.in_features, self.out_features)

    @property
    def name(self) -> str:
        """E.g. ``paper_64-768x3072-E8-T2048-float32-training``."""
        phase = "training" if self.training else "forward"
        if self.mask_central:
            phase = "masked"
        sizes = f"{self.in_features}x{self.out_features}-E{self.num_experts}-T{self.num_tokens}"
        return f"{self.shape_name}-{sizes}-{dtype_name(self.dtype)}-{phase}"


def _held_out() -> tuple[Workload, ...]:
    """Every 37th of 1,800 combinations, so that every size, shape, number, dtype and phase meets
    the others."""
    sizes = ((512, 2048), (2048, 512), (1024, 4096), (4096, 1024), (3072, 768))
    shapes = ("paper_full", "paper_48", "paper_24", "light_32", "separable")
    phases = ((False, False), (True, False), (True, True))
    experts_of = (4, 16, 48)
    dtypes = (torch.float32, torch.bfloat16)
    tokens_of = (1, 24, 256, 1024)
    combinations = product(shapes, experts_of, dtypes, tokens_of, phases, sizes)
    return tuple(
        Workload(shape, *size, experts, tokens, dtype, *phase)
        for shape, experts, dtype, tokens, phase, size in islice(combinations, 0, None, 37)
    )


# The choice by one timing is judged on these, against the best of another timing on a CPU.
JUDGED_WORKLOADS = _held_out()


def random_cores(
    shape: MPOShape,
    num_experts: int,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Cores with entries of unit-variance products; auxiliary ones carry the expert axis."""
    cores = []
    for k, size in enumerate(shape.core_shapes):
        full = size if k == shape.central else (num_experts, *size)
        core = torch.randn(full, dtype=torch.float64)
        core /= (size[0] * size[1]) ** 0.5
        cores.append(core.to(dtype).requires_grad_(requires_grad))
    return cores


def random_blocks(
    shape: MPOShape,
    num_experts: int,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> MPOBlocks:
    """Blocks as leaves, for tests of the ops themselves."""
    blocks = fold(random_cores(shape, num_experts, dtype), shape=shape, num_experts=num_experts)
    leaves = {}
    for name in ("left", "central", "right"):
        leaf = getattr(blocks, name).detach().contiguous()
        leaves[name] = leaf.requires_grad_(requires_grad)
    return replace(blocks, **leaves)


def expert_choice(kind: str, num_tokens: int, num_experts: int, top_k: int = 1) -> Tensor:
    """``[T, K]`` expert numbers: ``uniform``, ``zipf`` (weights 1/rank), ``all_to_one`` or
    ``some_idle``."""
    if kind == "all_to_one":
        first = torch.full((num_tokens,), num_experts - 1)
        return torch.stack([(first + k) % num_experts for k in range(top_k)], 1)
    experts = torch.arange(num_experts)
    weights = {
        "uniform": torch.ones(num_experts),
        "zipf": 1.0 / (experts + 1),
        "some_idle": (experts % 2 == 0).double() + 1e-12,
    }
    if kind not in weights:
        raise ValueError(
            f"kind must be 'uniform', 'zipf', 'all_to_one' or 'some_idle'; got {kind!r}"
        )
    if num_tokens == 0:
        return torch.zeros(0, top_k, dtype=torch.int64)
    return torch.multinomial(weights[kind].expand(num_tokens, -1), top_k)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """``||actual - truth||_2 / ||truth||_2`` in float64; the absolute error where the truth is
    zero."""
    truth = truth.detach().double()
    difference = float((actual.detach().double() - truth).norm())
    norm = float(truth.norm())
    return difference / norm if norm else difference
