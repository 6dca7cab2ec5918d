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
    raise _unknown(name)


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
    raise _unknown(name)


def _unknown(name: str) -> ValueError:
    return ValueError(f"activation must be none, relu, gelu, gelu_tanh or silu; got {name!r}")


class Upstream:
    """The incoming gradient of a backward pass; the activation's gradient is applied only when rows are requested, so
    they are still in cache when an expert's kernels read them.

    Every row must be requested exactly once.
    """

    def __init__(self, grad: Tensor, activation: str, saved: Tensor, need_bias: bool) -> None:
        self._grad, self._activation, self._saved = grad, activation, saved
        dtype = torch.promote_types(grad.dtype, torch.float32)
        self.bias = grad.new_zeros(grad.shape[1], dtype=dtype) if need_bias else None

    @property
    def slots(self) -> int:
        return self._grad.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Gradient of the pre-activations of slots ``start..stop``; adds them to the bias gradient."""
        saved = self._saved if self._activation == "none" else self._saved[start:stop]
        dz = activation_backward(self._activation, self._grad[start:stop], saved)
        if self.bias is not None:
            self.bias += dz.sum(0)
        return dz
