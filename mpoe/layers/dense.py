"""Dense expert weights ``[E, I, F]`` and their grouped product: the Switch-style baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.layers.context import current_routing
from mpoe.layers.initial import FromInitialValues

# Transformers' names of the ways to compute experts
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def _grouped_mm_runs(x: Tensor, weight: Tensor) -> bool:
    """`torch.nn.functional.grouped_mm` needs float32 or half precision and rows aligned to 16 bytes."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return False
    aligned = 16 // x.element_size()
    return weight.shape[1] % aligned == 0 and weight.shape[2] % aligned == 0


def _expert_of_slot(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Expert of every row; rows past the last offset, which are dropped later, get the last one."""
    slots = torch.arange(x.shape[0], device=x.device, dtype=expert_offsets.dtype)
    expert = torch.searchsorted(expert_offsets[1:].contiguous(), slots, right=True)
    return expert.clamp_max(weight.shape[0] - 1)


def grouped_dense_linear(
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """``y[s] = x[s] @ weight[e] + bias`` for the slots s of every expert e.

    Args:
        x: ``[N, I]`` in slot order.
        weight: ``[E, I, F]``.
        expert_offsets: int32 ``[E + 1]``.
        bias: ``[F]``, shared by the experts, or ``[E, F]``.
        implementation: ``"grouped_mm"`` or ``None``: one grouped product if torch supports these sizes, else one
            product per expert; ``"eager"``: one per expert; ``"batched_mm"``: one batched product with a weight per
            slot, ``N I F`` numbers, for few tokens. The results are equal up to rounding.

    Returns:
        ``[N, F]``; rows from ``expert_offsets[-1]`` on are zero, also in gradients.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if bias is not None and bias.dim() == 2:  # a row for every slot; those past the last offset are dropped below
        bias = bias[_expert_of_slot(x, weight, expert_offsets)]
    if implementation == "batched_mm" or (implementation != "eager" and _grouped_mm_runs(x, weight)):
        used = (torch.arange(x.shape[0], device=x.device) < expert_offsets[-1])[:, None]
        # grouped_mm leaves rows past the last offset uninitialised, in the result and in the gradient of x: both
        # are replaced (not multiplied: garbage may be NaN).
        zero = x.new_zeros(())
        rows = torch.where(used, x, zero)
        if implementation == "batched_mm":
            y = torch.bmm(rows[:, None], weight[_expert_of_slot(x, weight, expert_offsets)])[:, 0]
        else:
            y = nn.functional.grouped_mm(rows, weight, offs=expert_offsets[1:])
        y = y if bias is None else y + bias
        return torch.where(used, y, zero)
    bounds = expert_offsets.tolist()
    parts = [x[start:stop] @ w for start, stop, w in zip(bounds, bounds[1:], weight.unbind(0), strict=False)]
    y = torch.cat(parts)
    y = y if bias is None else y + (bias if bias.dim() == 1 else bias[: len(y)])
    return torch.cat([y, y.new_zeros(x.shape[0] - bounds[-1], y.shape[1])])


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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1; got {num_experts}")
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.init_std = num_experts, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features, device=device, dtype=dtype))
        size = (num_experts, out_features) if own_bias else (out_features,)
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if bias or own_bias else None
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """New random values by parameter name."""
        options: dict[str, Any] = {"device": self.weight.device, "dtype": torch.float32}
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
        """`grouped_dense_linear` of ``x [N, I]`` -> ``[N, F]``, with the implementation of the call in progress; PEFT's
        adapters of the weight act here."""
        call = current_routing()
        implementation = None if call is None else call.experts_implementation
        return grouped_dense_linear(x, self.weight, expert_offsets, self.bias, implementation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}"
