"""Activations between an expert's projections, by the names that Hugging Face configs use."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from mpoe.config.checks import check_choice


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


# `mpoe_kernels.grouped_mpo_linear` supports every name too, and fuses it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
}


def check_activation(name: object) -> str:
    """Return ``name`` if experts can compute it.

    Raises:
        ValueError: an unknown activation; the message suggests similar names.
    """
    check_choice("activation", name, tuple(ACTIVATIONS))
    return str(name)
