"""The compiled CPU kernels, `mpoe_kernels/_C.abi3.so`, loaded if possible, and how they are called.

The library has a plain C interface (csrc/interface.h) and does not link to torch: `ctypes` calls it with the structs
below, and it uses torch's threads through function pointers that it gets here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.compiled import FOLDER, load_library

LIBRARY = "_C.abi3.so"
# setup.py writes it where it does not build.
REASON_FILE = "_native_missing.txt"
# The library's description: what it was built from, the torch it needs, and which instructions it uses here
# (``isa_compiled``: names, separated by spaces).
INFO_KEYS = {"version", "torch", "compiler", "isa_compiled", "isa_detected", "isa_used"}
# As the library calls them.
DTYPES = {torch.float32: b"float32", torch.bfloat16: b"bfloat16", torch.float16: b"float16", torch.float64: b"float64"}


def _fields(*, texts: str = "", numbers: str = "", pointers: str = "") -> list[tuple[str, type]]:
    kinds = ((texts, ctypes.c_char_p), (numbers, ctypes.c_int64), (pointers, ctypes.c_void_p))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class LinearArguments(ctypes.Structure):
    """``MpoeLinear``."""

    _fields_ = _fields(
        texts="dtype activation strategy",
        numbers=(
            "in_features out_features tokens slots experts iL jL a iC jC b iR jR "
            "chain_first chain_second chain_third half_first transposed_half_first offset_bytes"
        ),
        pointers=("x left central right offsets rows bias y h z grad kept_h kept_value dx dleft dcentral dright dbias"),
    )


class RouterArguments(ctypes.Structure):
    """``MpoeRouter``."""

    _fields_ = _fields(
        texts="dtype weight_dtype",
        numbers="tokens features experts top_k raw",
        pointers="x weight logits index gates grad dx dweight",
    )


class RouteArguments(ctypes.Structure):
    """``MpoeRoute``."""

    _fields_ = _fields(
        numbers="tokens top_k experts capacity",
        pointers="index token_mask offsets token_of_slot slot_of_token",
    )


class DispatchArguments(ctypes.Structure):
    """``MpoeDispatch``."""

    _fields_ = _fields(
        numbers="tokens slots experts row_bytes stride_bytes offset_bytes",
        pointers="x token_of_slot offsets out",
    )


class CombineArguments(ctypes.Structure):
    """``MpoeCombine``."""

    _fields_ = _fields(
        texts="dtype",
        numbers="tokens top_k slots features",
        pointers="slot_of_token gates rows out grad drows dgates",
    )


class HiddenArguments(ctypes.Structure):
    """``MpoeHidden``."""

    _fields_ = _fields(
        texts="dtype activation",
        numbers="tokens features block experts own_groups top_k",
        pointers=(
            "u u_gate gates index right left right_gate bias out grad du dgates dright dleft dbias du_gate dright_gate"
        ),
    )


class NeuronsArguments(ctypes.Structure):
    """``MpoeNeurons``."""

    _fields_ = _fields(
        texts="dtype activation",
        numbers="tokens in_features out_features neurons experts top_k",
        pointers="x gates index up down bias gate_up out grad dx dgates dup ddown dbias dgate_up",
    )


class EmbeddingArguments(ctypes.Structure):
    """``MpoeEmbedding``."""

    _fields_ = _fields(
        texts="dtype",
        numbers="tokens num_embeddings embedding_dim iL jL a iC jC b iR jR",
        pointers="ids left central right out",
    )


# In the order in which the library tells their sizes.
STRUCTS = (
    LinearArguments,
    RouterArguments,
    RouteArguments,
    DispatchArguments,
    CombineArguments,
    HiddenArguments,
    NeuronsArguments,
    EmbeddingArguments,
)


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


def call_native(function: str, *arguments: ctypes.Structure | None) -> None:
    """Call a function of the library.

    Args:
        function: its name.
        arguments: its structs, None for one that is left out. The memory behind their pointers must live until this
            returns.

    Raises:
        ValueError: the library refuses the arguments.
        MemoryError: it got no memory.
    """
    library = NATIVE_LIBRARY.functions
    status = getattr(library, function)(*(None if each is None else ctypes.byref(each) for each in arguments))
    if status:
        raise ERRORS[status](library.mpoe_message().decode())


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it; its address may be handed to the library.

    Raises:
        ValueError: it is not on the CPU.
    """
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU; got {describe(tensor)}")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def dense_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor, or a contiguous copy of it.

    Raises:
        ValueError: another shape or dtype, or not on the CPU.
    """
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')} {list(shape)}; got {describe(tensor)}")
    return dense(name, tensor)


def dense_index(name: str, tensor: Tensor, axes: int) -> Tensor:
    """Dense int64 values of an integer tensor.

    Raises:
        ValueError: another number of axes, or not on the CPU.
    """
    if tensor.dim() != axes:
        raise ValueError(f"{name} must have {axes} axes; got {describe(tensor)}")
    return dense(name, tensor if tensor.dtype == torch.int64 else tensor.long())


def dense_offsets(offsets: Tensor) -> Tensor:
    """Dense expert_offsets ``[E + 1]``, int32 or int64; the library checks their values.

    Raises:
        ValueError: another shape, or not on the CPU.
    """
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"expert_offsets must be [E + 1]; got {describe(offsets)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        offsets = offsets.long()
    return dense("expert_offsets", offsets)
