"""The compiled CPU kernels, `mpoe_kernels/_C.abi3.so`, loaded if possible.

The library has a plain C interface (csrc/interface.h) and does not link to torch: `ctypes` calls it, and it uses
torch's threads through function pointers that it gets here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from mpoe_kernels.compiled import FOLDER, load_library
from mpoe_kernels.native_interface import STRUCTS

LIBRARY = "_C.abi3.so"
# setup.py writes it where it does not build.
REASON_FILE = "_native_missing.txt"
# The library's description: what it was built from, the torch it needs, and which instructions it uses here
# (``isa_compiled``: names, separated by spaces).
INFO_KEYS = {"version", "torch", "compiler", "isa_compiled", "isa_detected", "isa_used"}


def _opened(path: Path) -> tuple[str, ctypes.CDLL]:
    # Looks up symbols in libraries that torch has already loaded: libtorch_cpu, wherever it is.
    torch_library = ctypes.CDLL(torch._C.__file__)
    library = ctypes.CDLL(str(path))
    library.mpoe_use_threads(torch_library.torch_parallel_for, torch_library.torch_get_num_threads)
    library.mpoe_message.restype = ctypes.c_char_p
    library.mpoe_build_info.restype = ctypes.c_char_p
    return library.mpoe_build_info().decode(), library


NATIVE_LIBRARY = load_library(
    FOLDER / LIBRARY,
    _opened,
    REASON_FILE,
    INFO_KEYS,
    {"struct_bytes": " ".join(str(ctypes.sizeof(struct)) for struct in STRUCTS)},
)
ERRORS = {1: ValueError, 2: MemoryError}  # MpoeStatus of csrc/interface.h


def call_native(function: str, *arguments: ctypes.Structure) -> None:
    """Call a function of the library.

    Args:
        function: its name.
        arguments: its structs. The memory behind their pointers must live until this returns.

    Raises:
        ValueError: the library refuses the arguments.
        MemoryError: it got no memory.
    """
    library = NATIVE_LIBRARY.functions
    status = getattr(library, function)(*map(ctypes.byref, arguments))
    if status:
        raise ERRORS[status](library.mpoe_message().decode())
