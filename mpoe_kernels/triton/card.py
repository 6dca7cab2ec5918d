"""Numbers of the GPU that launches are made for, or recorded for."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.triton.architecture import HARDWARE_NAMES, INTERPRETER
from mpoe_kernels.triton.hardware import HARDWARE, Hardware, hardware_here
from mpoe_kernels.triton.start import architecture_of


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products, following PyTorch's setting."""
    return "tf32" if may_round_to_tf32(dtype) else "ieee"


@lru_cache(maxsize=16)
def _card(device: torch.device, architecture: str) -> Hardware:
    if device.type == "cuda":
        units = torch.cuda.get_device_properties(device).multi_processor_count
        return replace(hardware_here(str(device)), units=units)
    named = HARDWARE[HARDWARE_NAMES[architecture]]
    # Programs of the interpreter run one after the other.
    return replace(named, units=1) if architecture == INTERPRETER else named


def card(device: torch.device) -> Hardware:
    """Numbers of a device, or of the GPU that represents the architecture for which launches are recorded."""
    return _card(device, architecture_of(device))


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 in the interpreter."""
    return card(device).units
