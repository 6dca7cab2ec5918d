"""Predicted times of operations that are not planned, with the planner's model: dense linears, dense experts and
copies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpoe_kernels.planner import Hardware, Step, hardware_of
from mpoe_kernels.planner.contraction import expected_busy_experts
from mpoe_kernels.planner.cost import step_time


@dataclass(frozen=True)
class Device:
    """A device and the dtype of activations and products.

    Attributes:
        name: a name for the planner: ``cpu``, ``cuda`` or a name of its hardware table.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: a device that the planner does not know.
    """

    name: str
    dtype: torch.dtype

    @property
    def hardware(self) -> Hardware:
        """The planner's numbers; for a device of this machine, measured ones if available."""
        return hardware_of(self.name)

    @property
    def element_size(self) -> int:
        return self.dtype.itemsize

    def in_float32(self) -> Device:
        """The same device, computing in float32."""
        return replace(self, dtype=torch.float32)

    def seconds(self, step: Step) -> float:
        return step_time(step, self.dtype, self.hardware).total

    def copy_seconds(self, moved: float) -> float:
        """Read or write ``moved`` bytes of memory."""
        return self.seconds(Step("copy", "copy", 0, 0, 0, 1, round(moved), 0)) if moved else 0.0

    def linear_seconds(
        self, rows: int, in_features: int, out_features: int, experts: int, training: bool, one_call: bool = False
    ) -> float:
        """Time of ``rows`` rows, distributed over ``experts`` weights ``[in_features, out_features]`` (1 = a dense
        linear).

        ``one_call``: a CPU, too, computes all experts in one call.

        The output and, with training, the gradients of the rows and of the weights; each reads its operands once.
        Weights of experts without rows are not touched.
        """
        busy = expected_busy_experts(experts, rows)
        if not busy:
            return 0.0
        kind = "gemm" if experts == 1 else "grouped_gemm"
        size, mean = self.element_size, rows / busy
        x, y, weights = (n * size for n in (rows * in_features, rows * out_features, busy * in_features * out_features))
        steps = [Step("x W", kind, mean, out_features, in_features, busy, x + weights, y)]
        if training:
            steps += [
                Step("d x", kind, mean, in_features, out_features, busy, y + weights, x),
                Step("d W", kind, in_features, out_features, mean, busy, x + y, weights),
            ]
        saved = self.hardware.call_seconds.of(self.dtype) * (busy - 1) if one_call else 0.0
        return sum(self.seconds(step) - saved for step in steps)
