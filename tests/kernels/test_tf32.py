"""Everything that runs on a GPU asks whether float32 products may round to TF32, however PyTorch was configured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mpoe_bench.cases import random_blocks

from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.linear.cuda import LinearKernels
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from tests.cases import SMALL_SHAPES

MATMUL = torch.backends.cuda.matmul


def _set(where: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(where, name, value)


# The older settings, then the newer ones; once a newer one is used, PyTorch refuses to read the older ones.
WAYS = {
    "nothing": (lambda: None, False),
    "allow_tf32": (_set(MATMUL, "allow_tf32", True), True),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "everywhere tf32": (_set(torch.backends, "fp32_precision", "tf32"), True),
    "everywhere ieee": (_set(torch.backends, "fp32_precision", "ieee"), False),
    "matmul tf32": (_set(MATMUL, "fp32_precision", "tf32"), True),
}


@pytest.fixture(params=WAYS)
def allowed(request: pytest.FixtureRequest):
    """Configures PyTorch in one of the ways; yields whether TF32 is then allowed."""

    def reset() -> None:
        torch.backends.fp32_precision = MATMUL.fp32_precision = "none"

    tell, expected = WAYS[request.param]
    reset()
    try:
        tell()
        yield expected
    finally:
        torch.set_float32_matmul_precision("highest")
        reset()


def test_only_float32_is_rounded(allowed: bool) -> None:
    assert may_round_to_tf32(torch.float32) == allowed
    assert not may_round_to_tf32(torch.bfloat16)
    assert not may_round_to_tf32(torch.float64)


def test_triton_follows(allowed: bool) -> None:
    pytest.importorskip("triton")
    from mpoe_kernels.triton.start import precision

    assert precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_follows(allowed: bool, dtype: torch.dtype) -> None:
    shape, told = SMALL_SHAPES["light"], []

    class Ops:
        """Every op notes its schema's argument ``tf32``."""

        def rebuilt_product(self, *arguments: object) -> None:
            told.append(arguments[11])

        def weight_gradient_product(self, *arguments: object) -> None:
            told.append(arguments[7])

    made = random_blocks(shape, 2)
    common = (
        torch.zeros(3, shape.in_features, dtype=dtype),
        *(t.to(dtype) for t in (made.left, made.central, made.right)),
        *(torch.tensor([0, 1, 3], dtype=torch.int32), None, None),
        *(shape.in_features, shape.out_features, "none", "rebuild", "cuda"),
    )
    grad, nothing = torch.zeros(3, shape.out_features, dtype=dtype), torch.zeros(0)
    kernels = LinearKernels(Ops())
    kernels.forward(ForwardCall(*common, False))
    kernels.backward(BackwardCall(*common, grad, nothing, nothing, [True] * 5))
    assert len(told) >= 4
    assert set(told) == {allowed and dtype == torch.float32}
