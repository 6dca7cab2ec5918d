"""The compiled CPU kernels, the extension module `mpoe_kernels._C`, loaded if possible, and the
tensors it is given.

The module does not link to torch: its functions (csrc/bindings) take the tensors' addresses and
sizes, and it uses torch's threads through function pointers that it gets here. Addresses are taken
anew at every call.
"""

from __future__ import annotations

import ctypes
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.compiled import FOLDER, load_library

LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# setup.py writes it where it does not build.
REASON_FILE = "_native_missing.txt"
# The library's description: what it was built from, the torch it needs, and which instructions it
# uses here (``isa_compiled``: names, separated by spaces).
INFO_KEYS = {"version", "torch", "compiler", "isa_compiled", "isa_detected", "isa_used"}
# As the library calls them.
DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def _opened(path: Path) -> tuple[str, ModuleType]:
    # Looks up symbols in libraries that torch has already loaded: libtorch_cpu, wherever it is.
    torch_library = ctypes.CDLL(torch._C.__file__)
    functions = (torch_library.torch_parallel_for, torch_library.torch_get_num_threads)
    spec = spec_from_loader("mpoe_kernels._C", ExtensionFileLoader("mpoe_kernels._C", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.use_threads(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
    return module.build_info(), module


NATIVE_LIBRARY = load_library(
    FOLDER / LIBRARY, _opened, REASON_FILE, INFO_KEYS, FOLDER.parent / "csrc" / "bindings"
)


def name_of(dtype: torch.dtype) -> str:
    """As the library calls it; it refuses the names that it does not know."""
    return DTYPES.get(dtype, str(dtype))


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor of `dense` begins; it must live until the call returns."""
    if tensor is None:
        return None
    return tensor.data_ptr()


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it: its address may be handed to the library.

    That its memory holds its values was asked at the door, see `mpoe_kernels.define.is_plain_call`,
    and what its sizes and dtype are: by the public function or, of a raw op, by
    `mpoe_kernels.signatures`.

    Raises:
        ValueError: it is not on the CPU.
    """
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU; got {describe(tensor)}")
    if tensor.is_contiguous():
        return tensor
    return tensor.contiguous()


def dense_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor, or a contiguous copy of it.

    Raises:
        ValueError: another shape or dtype, or as in `dense`.
    """
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} {list(shape)}; got "
            f"{describe(tensor)}"
        )
    return dense(name, tensor)


def dense_index(name: str, tensor: Tensor) -> Tensor:
    """Dense int64 values of an integer tensor; the library checks them."""
    tensor = dense(name, tensor)
    if tensor.dtype == torch.int64:
        return tensor
    return tensor.long()
