"""The CUDA kernels, compiled for the CPU and run by the emulator of tests/emulator: ops
``torch.ops.mpoe_emulated``."""

import ctypes
import os
import platform
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from mpoe_kernels.backends import BACKENDS, add_kernels, cuda_backend, register_backend
from mpoe_kernels.cuda_library import RefusingOps
from mpoe_kernels.linear.cuda import LinearKernels
from mpoe_kernels.routing import op as routing
from mpoe_kernels.routing.cuda import RoutingKernels
from tests.emulator import cuda_emulate

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # numbered as in csrc/common/types.h
OPS = torch.ops.mpoe_emulated


class Schedule(NamedTuple):
    """Which ready thread runs next, and when asynchronous copies take place."""

    order: str
    copies: str


# The exception type of an op's refusal depends on torch's version.
REFUSED = (ValueError, RuntimeError)
SCHEDULE_PARTS = ("ascending", "descending"), ("lazy", "eager")
SCHEDULES = [Schedule(*pair) for pair in product(*SCHEDULE_PARTS)]


def missing():
    """Reasons why the kernels cannot be emulated here."""
    reasons = []
    if platform.machine() not in ("x86_64", "AMD64"):
        reasons.append("the emulator switches stacks on x86-64 only")
    if cuda_emulate.compiler() is None:
        reasons.append("no C++ compiler was found")
    return reasons


class Emulator:
    """Functions of tests/emulator/control.cpp in a built library; loading it registers the ops.

    Args:
        path: the library's path.
    """

    ORDERS = ("ascending", "descending", "random")
    COUNTERS = ("launches", "mma", "ldmatrix", "wavefronts", "cp_async")

    def __init__(self, path):
        self._library = ctypes.CDLL(path)

    def configure(self, order="ascending", copies="lazy", seed=0):
        """Set which ready thread runs next (blocks likewise), and whether cp.async copies at the
        wait or at issue."""
        lazy = ("eager", "lazy").index(copies)
        self._library.emu_configure(self.ORDERS.index(order), lazy, ctypes.c_uint64(seed))

    def counters(self):
        """Event counts since the last call."""
        counts = (ctypes.c_uint64 * len(self.COUNTERS))()
        self._library.emu_counters(counts)
        return dict(zip(self.COUNTERS, counts, strict=True))


@lru_cache(maxsize=1)
def library():
    """The emulated kernels, compiled if necessary; ``MPOE_EMULATED`` names another build, such as
    one with a sanitizer."""
    return Emulator(os.environ.get("MPOE_EMULATED") or str(cuda_emulate.library()))


# The backend ``cuda`` with the emulated kernels, for CPU tensors; it runs only if named.
EMULATED = cuda_backend("emulated", "cpu", missing)
REFUSING = RefusingOps(OPS)
ROUTING = RoutingKernels(REFUSING)


@contextmanager
def schedule(order="ascending", copies="lazy", seed=0):
    library().configure(order, copies, seed)
    try:
        yield
    finally:
        library().configure()


def stats():
    """Event counts since the last call."""
    return library().counters()


KERNELS = LinearKernels(REFUSING, "emulated")


def register():
    """The backend ``emulated``, until `unregister`."""
    library()
    EMULATED.candidates, EMULATED.contraction_reasons = (
        KERNELS.candidates,
        KERNELS.contraction_reasons,
    )
    register_backend(EMULATED)
    add_kernels("emulated", ROUTING, routing.FUNCTIONS)


def unregister():
    del BACKENDS["emulated"]
