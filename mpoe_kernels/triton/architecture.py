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
# Multiprocessors of an A100, H100, B200 and MI300X.
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
ARCHITECTURES = tuple(SHARED_MEMORY)
AMD = "gfx942"
INTERPRETER = "interpreter"
NO_LIMIT = 1 << 62


def in_interpreter() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (``TRITON_INTERPRET=1`` before Triton
    is imported)."""
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
    if torch.version.hip is not None:
        return AMD
    major, _ = torch.cuda.get_device_capability(index)
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    return "sm_80"  # sm_120 multiplies as it does


class Target(NamedTuple):
    """The target of a compiled kernel.

    Attributes:
        architecture: key of the tables of tiles.
        shared_memory: bytes that one program may use.
        multiprocessors: number of them; programs of the interpreter run one after the other.
    """

    architecture: str
    shared_memory: int
    multiprocessors: int


def target_named(architecture: str) -> Target:
    """The target of an architecture by its vendor's specification; the device need not be present.

    Raises:
        ValueError: an unknown name.
    """
    if architecture not in (*ARCHITECTURES, INTERPRETER):
        raise ValueError(f"architecture must be one of {ARCHITECTURES}; got {architecture!r}")
    return Target(
        architecture,
        SHARED_MEMORY.get(architecture, NO_LIMIT),
        _MULTIPROCESSORS.get(architecture, 1),
    )


@lru_cache(maxsize=16)
def _gpu(index: int) -> Target:
    """A GPU of this machine, which may have less shared memory than the architecture its tables
    were made for."""
    named = target_named(_gpu_architecture(index))
    properties = torch.cuda.get_device_properties(index)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 0) or named.shared_memory
    return Target(
        named.architecture,
        min(named.shared_memory, shared_memory),
        properties.multi_processor_count,
    )


def _index_of(device: torch.device) -> int:
    """Of a GPU; without one, that of the current GPU."""
    if device.index is None:
        return torch.cuda.current_device()
    return device.index


def target_of(device: torch.device) -> Target:
    """The target of kernels for tensors on ``device``: a GPU, else the interpreter."""
    if device.type != "cuda" or in_interpreter() or not gpu_available():
        return target_named(INTERPRETER)
    return _gpu(_index_of(device))


@lru_cache(maxsize=16)
def card_reasons(device: torch.device) -> tuple[str, ...]:
    """Why no kernel is made for a GPU of this machine: an AMD card with other instructions than an
    MI300's."""
    if torch.version.hip is None or device.type != "cuda" or not gpu_available():
        return ()
    properties = torch.cuda.get_device_properties(_index_of(device))
    name = properties.gcnArchName.partition(":")[0]
    if name == AMD:
        return ()
    return (f"of AMD's cards it runs on {AMD}, not on {name} ({properties.name})",)


OLDEST = (3, 6)


@lru_cache(maxsize=1)
def triton_reasons() -> tuple[str, ...]:
    """Why Triton itself cannot be used."""
    if not triton_installed():
        return ("the package triton is not installed",)
    installed = version("triton")
    numbers = []
    for part in installed.split("+")[0].split(".")[:2]:
        if part.isdigit():
            numbers.append(int(part))
    if tuple(numbers) < OLDEST:
        return (f"it needs triton {'.'.join(map(str, OLDEST))} or newer; found {installed}",)
    return ()
