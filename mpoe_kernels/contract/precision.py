"""How PyTorch rounds products and their factors."""

import torch
from torch import Tensor


def may_round_to_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch may round the factors of a product to TF32 on a GPU, whichever setting was
    used.

    ``torch.backends.cuda.matmul.allow_tf32`` would raise once a program has used PyTorch's newer
    settings.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def float32_mm(first: Tensor, second: Tensor) -> Tensor:
    """The product, accumulated and returned in at least float32."""
    if first.dtype in (torch.float32, torch.float64):
        return first @ second
    if first.is_cpu:
        return first.float() @ second.float()
    return torch.mm(first, second, out_dtype=torch.float32)
