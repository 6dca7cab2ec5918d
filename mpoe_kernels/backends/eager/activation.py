"""Activations and their derivatives, on pre-activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_activation_(name: str, z: Tensor) -> Tensor:
    """Activation of ``z``; may overwrite it."""
    if name == "none":
        return z
    if name == "relu":
        return z.relu_()
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "silu":
        return F.silu(z)
    raise ValueError(f"unknown activation {name!r}")


def activation_backward(name: str, grad: Tensor, saved: Tensor) -> Tensor:
    """``d loss / d z``. ``saved`` is the output for relu and the pre-activation for the rest."""
    if name == "none":
        return grad
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, saved, 0)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, saved)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, saved, approximate="tanh")
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, saved)
    raise ValueError(f"unknown activation {name!r}")
