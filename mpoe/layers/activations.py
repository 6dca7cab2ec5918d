"""Activations between an expert's projections, by the names that Hugging Face configs use."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

import torch.nn.functional as F
from torch import Tensor


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
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    close = get_close_matches(str(name), ACTIVATIONS, n=3, cutoff=0.4)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {name!r}{hint}")
