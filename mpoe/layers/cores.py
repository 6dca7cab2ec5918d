"""`MPOCores`: the weights of E experts as matrix product operators that share their central core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config.checks import check_integer, check_number
from mpoe.layers.initial import FromInitialValues, check_placement
from mpoe_kernels import (
    Decomposition,
    MPOBlocks,
    MPOShape,
    SharedDecomposition,
    decompose_shared,
    decompose_with_errors,
    expert_weights,
    fold,
)


class MPOCores(FromInitialValues):
    """Cores of E weights ``[I, F]``: one central core for all, auxiliary cores for each expert.

    Args:
        shape: how the weight is factorised.
        num_experts: E.
        bias: whether there is a bias ``[F]``; the experts share it.
        init_std: standard deviation of a random weight.

    Attributes:
        central: ``[d, i, j, d']``.
        auxiliary: ``[E, d, i, j, d']`` each, in chain order without the central core.
        bias: ``[F]`` or ``None``.
        central_masked: while True (the gradient mask), `blocks` returns the central core detached, so its gradient is
            not even computed.
        rate_ratios: RMS(core) / RMS(weight) for every core in chain order; per-core learning rates use it.
    """

    def __init__(
        self,
        shape: MPOShape,
        num_experts: int,
        bias: bool = False,
        init_std: float = 0.02,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(shape, MPOShape):
            raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
        check_integer("num_experts", num_experts, 1)
        check_number("init_std", init_std, 0.0)
        check_placement(device, dtype)
        self.shape, self.num_experts, self.init_std = shape, num_experts, init_std
        self.central_masked = False
        self.rate_ratios = self._expected_rate_ratios()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.central = nn.Parameter(torch.empty(shape.core_shapes[shape.central], **options))
        self.auxiliary = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, *core, **options))
            for k, core in enumerate(shape.core_shapes)
            if k != shape.central
        )
        self.bias = nn.Parameter(torch.empty(shape.out_features, **options)) if bias else None
        self.reset_parameters()

    # ------------------------------------------------------------- structure

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    def cores(self) -> list[Tensor]:
        """All cores in chain order; the central one ``[d, i, j, d']``, auxiliary ones ``[E, d, i, j, d']``."""
        # Iterating over a ParameterList takes as long as a small product; a parametrized core is not among its
        # parameters.
        own = self.auxiliary._parameters.values()
        cores: list[Any] = list(own if len(own) == self.shape.num_cores - 1 else self.auxiliary)
        central = self.central.detach() if self.central_masked else self.central
        cores.insert(self.shape.central, central)
        return cores

    def chain(self) -> list[nn.Parameter]:
        """The parameters of the cores in chain order."""
        chain: list[nn.Parameter] = list(self.auxiliary)
        chain.insert(self.shape.central, self.central)
        return chain

    def central_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that all experts share, by name."""
        return {"central": self.central}

    def own_parameters(self) -> int:
        """Numbers that the experts own, all together."""
        return sum(core.numel() for core in self.auxiliary)

    def core_names(self) -> list[str]:
        """Parameter names of the cores in chain order, e.g. ``["auxiliary.0", "central", "auxiliary.1"]``."""
        names = [f"auxiliary.{k}" for k in range(self.shape.num_cores - 1)]
        names.insert(self.shape.central, "central")
        return names

    def blocks(self) -> MPOBlocks:
        """The chain folded around its central core, for the kernels."""
        return fold(self.cores(), self.shape.central, self.shape, self.num_experts)

    def dense_weights(self) -> Tensor:
        """Every expert's weight ``[E, I, F]``: for inspection and export, never on the fast path."""
        return expert_weights(self.blocks())

    # ---------------------------------------------------------------- values

    def _expected_rate_ratios(self) -> tuple[float, ...]:
        """Ratios of a random initialisation (`initial_values`), from shapes alone."""
        shape, std = self.shape, self.init_std or 1.0
        ratios = []
        for k, (d, i, j, e) in enumerate(shape.core_shapes):
            if k == shape.central:
                ratios.append(self._central_std() / std)
            else:
                ratios.append(1.0 / math.sqrt(max(d * i * j, e) if k < shape.central else max(i * j * e, d)) / std)
        return tuple(ratios)

    def _central_std(self) -> float:
        """Isometries on both sides preserve the norm, so the central core alone determines it."""
        padded = self.shape.padded_in * self.shape.padded_out
        return (self.init_std or 1.0) * math.sqrt(padded / self.shape.central_parameters)

    def initial_values(self) -> dict[str, Tensor]:
        """New random values by parameter name: isometric auxiliary cores, a Gaussian centre, zero bias.

        The weights then have mean square ``init_std ** 2`` and, at full bonds, independent Gaussian entries.
        """
        options: dict[str, Any] = {"device": self.central.device, "dtype": torch.float32}
        std = self._central_std() if self.init_std else 0.0
        values = {"central": torch.randn(self.central.shape, **options) * std}
        for k, (name, (d, i, j, e)) in enumerate(zip(self.core_names(), self.shape.core_shapes, strict=True)):
            if name == "central":
                continue
            rows, columns = (d * i * j, e) if k < self.shape.central else (i * j * e, d)
            flat = torch.randn(self.num_experts, max(rows, columns), min(rows, columns), **options)
            frame = torch.linalg.qr(flat).Q
            frame = frame if rows >= columns else frame.transpose(-1, -2)
            frame = frame if k < self.shape.central else frame.transpose(-1, -2)
            values[name] = frame.reshape(self.num_experts, d, i, j, e)
        if self.bias is not None:
            values["bias"] = torch.zeros(self.bias.shape, **options)
        return values

    @torch.no_grad()
    def load_weight_(self, weight: Tensor, gauge: str = "symmetric") -> Decomposition:
        """Set every expert to the decomposed ``weight [I, F]``.

        Returns:
            The `Decomposition`, with the error of every bond.

        Raises:
            TypeError, ValueError: see `mpoe_kernels.decompose_with_errors`.
        """
        # Decompose in at least float32: half precision would round twice and lose the conversion's exactness.
        work = weight.detach()
        work = work if work.dtype == torch.float64 else work.float()
        result = decompose_with_errors(work, self.shape, gauge)
        self.set_cores_(result.cores)
        self.rate_ratios = rate_ratios(result.cores, work)
        return result

    @torch.no_grad()
    def load_weights_(self, weights: Tensor) -> SharedDecomposition:
        """Fit the experts to ``weights [E, I, F]``, with one central core for all.

        Returns:
            The `SharedDecomposition`, with the error of every expert.

        Raises:
            TypeError, ValueError: see `mpoe_kernels.decompose_shared`.
        """
        result = decompose_shared(weights, self.shape)
        self.set_cores_(result.cores)
        self.rate_ratios = rate_ratios(result.cores, weights)
        return result

    @torch.no_grad()
    def set_cores_(self, cores: Sequence[Tensor]) -> None:
        """Copy a chain of cores ``[d, i, j, d']`` into every expert; cores ``[E, d, i, j, d']`` hold one per expert."""
        for parameter, core in zip(self.chain(), cores, strict=True):
            parameter.copy_(core.expand_as(parameter))

    @torch.no_grad()
    def add_noise_(self, relative: float) -> None:
        """Add Gaussian noise to the auxiliary cores, ``relative`` to each core's RMS, so that the experts differ."""
        for core in self.auxiliary:
            core.add_(torch.randn_like(core) * (relative * core.square().mean().sqrt()))

    def extra_repr(self) -> str:
        return f"{self.shape}, num_experts={self.num_experts}"


def rate_ratios(cores: Sequence[Tensor], weight: Tensor) -> tuple[float, ...]:
    """RMS of every core divided by that of the weight; 1 for a zero weight."""
    scale = float(weight.double().square().mean().sqrt())
    return tuple(float(core.double().square().mean().sqrt()) / scale if scale else 1.0 for core in cores)
