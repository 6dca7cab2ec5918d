"""Where the kernels do run, what they cannot handle is refused with reasons."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import random_blocks

from mpoe_kernels import BackendError, grouped_mpo_linear
from mpoe_kernels.linear.triton.grouped import tiles_of
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import Target
from tests.cases import SMALL_SHAPES

OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)


def run(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(3, 12, dtype=dtype)
    return grouped_mpo_linear(x, random_blocks(SMALL_SHAPES["light"], 2, dtype), OFFSETS, backend="triton")


def test_float64() -> None:
    with pytest.raises(BackendError) as caught:
        run(torch.float64)
    assert str(caught.value).endswith(
        "cannot run grouped_mpo_linear: it computes in float32, bfloat16, float16, not in float64"
    )


def with_shared_memory(size: int, monkeypatch: pytest.MonkeyPatch, name: str = "interpreter") -> None:
    monkeypatch.setattr(architecture, "target_of", lambda _: Target(name, size, 1))


def test_a_device_with_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with_shared_memory(1024, monkeypatch)
    with pytest.raises(BackendError, match=r"its smallest tile needs \d+ bytes of shared memory; the device has 1024"):
        run()


def test_tiles_that_do_not_fit_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.empty(1, dtype=torch.bfloat16)
    with_shared_memory(163 << 10, monkeypatch, "sm_80")
    assert [tile.rows for tile in tiles_of(like, 4096, 4096, 4096, False)] == [128, 64]
    with_shared_memory(80 << 10, monkeypatch, "sm_80")
    smaller = tiles_of(like, 4096, 4096, 4096, False)
    assert max(tile.shared_bytes(like.dtype) for tile in smaller) <= 80 << 10
    assert [tile.rows for tile in smaller] == [64, 32]
    assert (smaller[0].columns, smaller[0].inner) == (128, 64)
    interleaved = tiles_of(like, 4096, 4096, 4096, True)[0]
    assert (interleaved.columns, interleaved.inner) == (64, 32)
