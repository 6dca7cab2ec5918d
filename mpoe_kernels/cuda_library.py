"""The compiled CUDA kernels, `mpoe_kernels/_C_cuda.abi3.so`, loaded if this PyTorch has CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from mpoe_kernels.compiled import FOLDER, CompiledLibrary, load_library, open_ops

LIBRARY = "_C_cuda.abi3.so"
# setup.py writes it if it does not build.
REASON_FILE = "_cuda_missing.txt"
# ``architectures``: CMake's names, separated by spaces: 90a-real is machine code, 100-virtual is
# PTX.
INFO_KEYS = {"version", "torch", "compiler", "architectures"}


def _load() -> CompiledLibrary:
    path = FOLDER / LIBRARY
    if path.is_file() and torch.version.cuda is None:
        return CompiledLibrary(path, (f"this torch, {torch.__version__}, is built without CUDA",))
    return load_library(path, open_ops("mpoe_cuda"), REASON_FILE, INFO_KEYS)


CUDA_LIBRARY = _load()


class RefusingOps:
    """The ops of a namespace. Their refusals (csrc/cuda/bind.h), which PyTorch raises as
    RuntimeError, become ValueErrors."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._ops, name)

        def call(*arguments: Any) -> Any:
            try:
                return op(*arguments)
            except RuntimeError as error:
                _, refused, reason = str(error).partition("mpoe refuses: ")
                if refused:
                    raise ValueError(reason) from None
                raise

        setattr(self, name, call)
        return call


CUDA_OPS = RefusingOps(torch.ops.mpoe_cuda)


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code for ``architectures`` (see `INFO_KEYS`) runs on a GPU of this compute
    capability.

    Machine code runs on later minor versions of its major version, PTX on all later ones; of 100f
    both run on its family, which is its major version; 90a only on its own.
    """
    for name in architectures.split():
        number, _, kind = name.partition("-")
        target = divmod(int(number.rstrip("af")), 10)
        runs = target <= (major, minor)
        if number.endswith("a"):
            runs = target == (major, minor)
        elif number.endswith("f") or kind == "real":
            runs = runs and target[0] == major
        if runs:
            return True
    return False


@lru_cache(maxsize=16)
def card_reasons(device: torch.device) -> tuple[str, ...]:
    """Why the kernels cannot run on a GPU of this machine: they are not compiled for it."""
    compiled = CUDA_LIBRARY.info.get("architectures", "")
    if device.type != "cuda" or not compiled or not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability(device)
    if runs_on(compiled, major, minor):
        return ()
    return (f"it was compiled for {compiled}, {device} is sm_{major}{minor}",)


def unavailable_reasons() -> list[str]:
    """Why no compiled CUDA kernel can run here: on none of the GPUs."""
    reasons = list(CUDA_LIBRARY.reasons)
    if not torch.cuda.is_available():
        return [*reasons, "no CUDA device was found"]
    of_cards: list[str] = []
    for index in range(torch.cuda.device_count()):
        of_card = card_reasons(torch.device("cuda", index))
        if not of_card:
            return reasons
        of_cards += of_card
    return reasons + of_cards
