"""How PyTorch may round the factors of products."""

import torch


def may_round_to_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch may round the factors of a product to TF32 on a GPU, whichever setting was used.

    ``torch.backends.cuda.matmul.allow_tf32`` would raise once a program has used PyTorch's newer settings.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
