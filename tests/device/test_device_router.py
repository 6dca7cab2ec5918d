"""The router's logits on any device, against float64."""

from __future__ import annotations

import pytest
import torch

from mpoe.layers.logits import float32_logits


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float32_logits(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 96, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(6, 96, generator=generator).to(device, weight_dtype).requires_grad_()
    logits = float32_logits(x, weight)
    truth = x.detach().double() @ weight.detach().double().T
    torch.testing.assert_close(logits.double(), truth, rtol=1e-5, atol=1e-4)
    dx, dweight = torch.autograd.grad(logits.sum(), (x, weight))
    rounding = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(dx.double(), weight.detach().double().sum(0).expand(70, 96), **rounding)
    torch.testing.assert_close(dweight.double(), x.detach().double().sum(0).expand(6, 96), **rounding)
