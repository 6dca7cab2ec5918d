"""Activations and their derivatives, as PyTorch computes them, by the names of the ops'
arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Of pre-activations, which may be overwritten.
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
# ``d loss / d z`` from the gradient of the output, and from the output for relu, the pre-activation
# for the others.
ACTIVATION_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, _: grad,
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}
