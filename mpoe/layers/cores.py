"""Weights of E experts: `MPOCores`, matrix product operators that share their central core, and
`ExpertWeights`, full matrices ``[E, I, F]``, the Switch-style baseline."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mpoe.config.checks import check_integer, check_number, check_type
from mpoe_kernels import (
    Decomposition,
    MPOBlocks,
    MPOShape,
    decompose_with_errors,
    expert_weights,
    fold,
)

Device = torch.device | str | None
DType = torch.dtype | None


def check_placement(device: Device, dtype: DType) -> None:
    """Refuse what is no device that this machine has, or no dtype of floating-point numbers
    (ValueError); None means the default."""
    try:
        is_floating = torch.empty(0, device=device, dtype=dtype).is_floating_point()
    except Exception as error:  # torch raises several kinds
        raise ValueError(
            f"device and dtype must be ones that this machine has; got {device!r}, {dtype!r}"
        ) from error
    if not is_floating:
        raise ValueError(f"dtype must be of floating-point numbers; got {dtype}")


class FromInitialValues(nn.Module):
    """A module that initialises its parameters and buffers from `initial_values`; `from_pretrained`
    uses them for missing ones."""

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def initial_values(self) -> dict[str, Tensor]:
        """New values by name."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to new initial values; does nothing on the meta device."""
        tensors = self.named_tensors()
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        for name, value in self.initial_values().items():
            tensors[name].copy_(value)


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
        central_masked: while True (the gradient mask), `blocks` returns the central core detached,
            so its gradient is not even computed.
        rate_ratios: RMS(core) / RMS(weight) for every core in chain order; per-core learning rates
            use it.
    """

    def __init__(
        self,
        shape: MPOShape,
        num_experts: int,
        bias: bool = False,
        init_std: float = 0.02,
        *,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        check_type("shape", shape, MPOShape, "an MPOShape")
        check_integer("num_experts", num_experts, 1)
        check_number("init_std", init_std, 0.0)
        check_placement(device, dtype)
        self.shape = shape
        self.num_experts = num_experts
        self.init_std = init_std
        self.central_masked = False
        self.rate_ratios = self._expected_rate_ratios()
        options: dict = {"device": device, "dtype": dtype}
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
        """All cores in chain order; the central one ``[d, i, j, d']``, auxiliary ones ``[E, d, i,
        j, d']``."""
        # Iterating over a ParameterList takes as long as a small product; a parametrized core is
        # not among its parameters.
        parameters = self.auxiliary._parameters.values()
        is_plain = len(parameters) == len(self.auxiliary)
        cores: list = list(parameters if is_plain else self.auxiliary)
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
        """Parameter names of the cores in chain order, e.g. ``["auxiliary.0", "central",
        "auxiliary.1"]``."""
        names = [f"auxiliary.{k}" for k in range(self.shape.num_cores - 1)]
        names.insert(self.shape.central, "central")
        return names

    def blocks(self) -> MPOBlocks:
        """The chain folded around its central core, for the kernels."""
        return fold(self.cores(), self.shape.central, self.shape, self.num_experts)

    def dense_weights(self) -> Tensor:
        """Every expert's weight ``[E, I, F]``: for inspection and export, never on the fast
        path."""
        return expert_weights(self.blocks())

    # ---------------------------------------------------------------- values

    def _expected_rate_ratios(self) -> tuple[float, ...]:
        """Ratios of a random initialisation (`initial_values`), from shapes alone."""
        stds = [rows**-0.5 for rows, _ in self._frame_sizes()]
        stds[self.shape.central] = self._central_std()
        return tuple(std / (self.init_std or 1.0) for std in stds)

    def _frame_sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of every core as a matrix of orthonormal columns: a bond has at most as
        many columns as its core has rows."""
        central = self.shape.central
        return [
            (d * i * j, e) if k < central else (i * j * e, d)
            for k, (d, i, j, e) in enumerate(self.shape.core_shapes)
        ]

    def _central_std(self) -> float:
        """Isometries on both sides preserve the norm, so the central core alone determines it."""
        padded = self.shape.padded_in * self.shape.padded_out
        return (self.init_std or 1.0) * math.sqrt(padded / self.shape.central_parameters)

    def initial_values(self) -> dict[str, Tensor]:
        """New random values by parameter name: isometric auxiliary cores, a Gaussian centre, zero
        bias.

        The weights then have mean square ``init_std ** 2`` and, at full bonds, independent Gaussian
        entries.
        """
        options: dict = {"device": self.central.device, "dtype": torch.float32}
        std = self._central_std() if self.init_std else 0.0
        values = {"central": torch.randn(self.central.shape, **options) * std}
        named_sizes = zip(self.core_names(), self._frame_sizes(), strict=True)
        for k, (name, size) in enumerate(named_sizes):
            if name == "central":
                continue
            frame = torch.linalg.qr(torch.randn(self.num_experts, *size, **options)).Q
            frame = frame if k < self.shape.central else frame.mT
            values[name] = frame.reshape(self.num_experts, *self.shape.core_shapes[k])
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
        # Decompose in at least float32: half precision would round twice and lose the conversion's
        # exactness.
        work = weight.detach()
        work = work if work.dtype == torch.float64 else work.float()
        result = decompose_with_errors(work, self.shape, gauge)
        self.set_cores_(result.cores)
        self.rate_ratios = rate_ratios(result.cores, work)
        return result

    @torch.no_grad()
    def set_cores_(self, cores: Sequence[Tensor]) -> None:
        """Copy a chain of cores ``[d, i, j, d']`` into every expert; cores ``[E, d, i, j, d']``
        hold one per expert."""
        for parameter, core in zip(self.chain(), cores, strict=True):
            parameter.copy_(core.expand_as(parameter))

    def extra_repr(self) -> str:
        return f"{self.shape}, num_experts={self.num_experts}"


def rate_ratios(cores: Sequence[Tensor], weight: Tensor) -> tuple[float, ...]:
    """RMS of every core divided by that of the weight; 1 for a zero weight."""
    scale = float(weight.double().square().mean().sqrt())
    return tuple(
        float(core.double().square().mean().sqrt()) / scale if scale else 1.0 for core in cores
    )


def _grouped_mm_runs(x: Tensor, weight: Tensor) -> bool:
    """`torch.nn.functional.grouped_mm` needs float32 or half precision and rows aligned to 16
    bytes. On a CPU, few rows take one product after another, which reads the weights of the experts
    that have some, and no others'."""
    is_few = x.device.type == "cpu" and x.shape[0] < weight.shape[0]
    if is_few and not torch.compiler.is_compiling():
        return False
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return False
    aligned = 16 // x.element_size()
    return weight.shape[1] % aligned == 0 and weight.shape[2] % aligned == 0


def grouped_dense_linear(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``y[s] = x[s] @ weight[e] + bias`` for the slots s of every expert e: one grouped product if
    torch supports these sizes, else one product per expert.

    Args:
        x: ``[N, I]`` in slot order.
        weight: ``[E, I, F]``.
        expert_offsets: int32 ``[E + 1]``.
        bias: ``[F]``, shared by the experts, or ``[E, F]``.

    Returns:
        ``[N, F]``; rows from ``expert_offsets[-1]`` on are zero, also in gradients.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    # a row for every slot; those past the last offset are dropped below
    if bias is not None and bias.dim() == 2:
        slots = torch.arange(x.shape[0], device=x.device, dtype=expert_offsets.dtype)
        expert = torch.searchsorted(expert_offsets[1:].contiguous(), slots, right=True)
        bias = bias[expert.clamp_max(len(weight) - 1)]
    if _grouped_mm_runs(x, weight):
        used = (torch.arange(x.shape[0], device=x.device) < expert_offsets[-1])[:, None]
        # grouped_mm leaves rows past the last offset uninitialised, in the result and in the
        # gradient of x: both are replaced (not multiplied: garbage may be NaN).
        zero = x.new_zeros(())
        y = nn.functional.grouped_mm(torch.where(used, x, zero), weight, offs=expert_offsets[1:])
        y = y if bias is None else y + bias
        return torch.where(used, y, zero)
    bounds = expert_offsets.tolist()
    spans = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
    parts = [x[start:stop] @ weight[e] for e, start, stop in spans or [(0, 0, 0)]]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    y = y if bias is None else y + (bias if bias.dim() == 1 else bias[: len(y)])
    return y if len(y) == len(x) else torch.cat([y, y.new_zeros(len(x) - len(y), y.shape[1])])


class ExpertWeights(FromInitialValues):
    """E full weights; the dense counterpart of `MPOCores`.

    Attributes:
        weight: ``[E, I, F]``.
        bias: ``[F]``, shared by the experts, ``[E, F]`` with ``own_bias``, or ``None``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        bias: bool = False,
        init_std: float = 0.02,
        *,
        own_bias: bool = False,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        check_integer("num_experts", num_experts, 1)
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts
        self.init_std = init_std
        options: dict = {"device": device, "dtype": dtype}
        weight = torch.empty(num_experts, in_features, out_features, **options)
        self.weight = nn.Parameter(weight)
        size = (num_experts, out_features) if own_bias else (out_features,)
        self.bias = nn.Parameter(torch.empty(size, **options)) if bias or own_bias else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """New random values by parameter name."""
        options: dict = {"device": self.weight.device, "dtype": torch.float32}
        values = {"weight": torch.randn(self.weight.shape, **options) * self.init_std}
        if self.bias is not None:
            values["bias"] = torch.zeros(self.bias.shape, **options)
        return values

    @torch.no_grad()
    def load_weight_(self, weight: Tensor) -> None:
        """Set every expert to ``weight [I, F]``, or take ``[E, I, F]`` unchanged."""
        self.weight.copy_(weight)

    def dense_weights(self) -> Tensor:
        """``[E, I, F]``."""
        return self.weight

    def forward(self, x: Tensor, expert_offsets: Tensor) -> Tensor:
        """`grouped_dense_linear` of ``x [N, I]`` -> ``[N, F]``; PEFT's adapters of the weight act
        here."""
        return grouped_dense_linear(x, self.weight, expert_offsets, self.bias)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, num_experts={self.num_experts}"
