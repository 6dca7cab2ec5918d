"""Assertions calibrated against PyTorch's own rounding, poisoned memory, and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mpoe_bench.cases import relative_error
from torch import Tensor


def assert_calibrated(
    actual: Tensor, truth: Tensor, same_dtype: Tensor, name: str = "result", factor: float = 2
) -> None:
    """Require the error of ``actual`` against the float64 ``truth`` to stay within ``factor`` of PyTorch's own.

    Args:
        actual: the result under test.
        truth: float64 reference.
        same_dtype: the reference computed by plain PyTorch in the dtype under test: it sets the tolerance, with a floor
            of four units of rounding of that dtype (128 for a tensor of fewer than 32 elements, 32 in half precision).
        name: the tensor's name in failure messages.

    Raises:
        AssertionError: shape, dtype, non-finite values, or an error too large.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {list(truth.shape)}, got {list(actual.shape)}")
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{name}: expected dtype {same_dtype.dtype}, got {actual.dtype}")
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(f"{name}: holds NaN or Inf")
    own = relative_error(same_dtype, truth)
    few = 32 if actual.dtype.itemsize == 2 else 128
    units = 4 if actual.numel() >= 32 else few  # a few sums may cancel; many do not all cancel
    allowed = max(factor * own, units * torch.finfo(actual.dtype).eps)
    found = relative_error(actual, truth)
    if found > allowed:
        raise AssertionError(f"{name}: relative error {found:.3e}, allowed {allowed:.3e} (PyTorch's own: {own:.3e})")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with the given number of CPU threads; kernels split their work by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill everything that ``torch.empty`` and similar functions return with NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
