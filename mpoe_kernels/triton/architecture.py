"""This machine's capabilities for Triton, determined without importing it."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch

# Shared memory that one program may use, in bytes.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
ARCHITECTURES = tuple(SHARED_MEMORY)
INTERPRETER = "interpreter"
NO_LIMIT = 1 << 62
# Entry of the planner's table that represents an architecture.
HARDWARE_NAMES = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300", INTERPRETER: "h100"}


def in_interpreter() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def gpu_available() -> bool:
    return torch.cuda.is_available()


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=16)
def _gpu_architecture(index: int) -> str:
    """Nearest shipped table for a GPU."""
    name = getattr(torch.cuda.get_device_properties(index), "gcnArchName", "")
    if torch.version.hip is not None and name:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def architecture_of(device: torch.device) -> str:
    """Key of the configuration tables for tensors on ``device``."""
    if device.type != "cuda" or in_interpreter():
        return INTERPRETER
    return _gpu_architecture(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=16)
def _gpu_shared_memory(index: int) -> int:
    """Of one program on a GPU, which may have less than the architecture its tables were made for."""
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", 0) or SHARED_MEMORY[_gpu_architecture(index)]


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on ``device``; the interpreter has no limit."""
    if device.type != "cuda" or in_interpreter() or not gpu_available():
        return NO_LIMIT
    return _gpu_shared_memory(device.index if device.index is not None else torch.cuda.current_device())


class Target(NamedTuple):
    """The target of a compiled kernel.

    Attributes:
        architecture: key of the configuration tables.
        shared_memory: bytes that one program may use.
    """

    architecture: str
    shared_memory: int


def target_named(architecture: str) -> Target:
    """The target of an architecture by its vendor's specification; the device need not be present."""
    return Target(architecture, SHARED_MEMORY.get(architecture, NO_LIMIT))


def target_of(device: torch.device) -> Target:
    """The target of a device of this machine; it may have less shared memory than the architecture of its tables."""
    named = target_named(architecture_of(device))
    return named._replace(shared_memory=min(named.shared_memory, shared_memory_of(device)))


OLDEST = (3, 6)


@lru_cache(maxsize=1)
def triton_reasons() -> tuple[str, ...]:
    """Why Triton itself cannot be used."""
    if not triton_installed():
        return ("the package triton is not installed",)
    found = version("triton")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return (f"it needs triton {'.'.join(map(str, OLDEST))} or newer; found {found}",)
    return ()
