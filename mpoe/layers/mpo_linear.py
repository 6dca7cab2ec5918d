"""`MPOLinear`: a drop-in for `nn.Linear` and GPT-2's `Conv1D` whose weight is an MPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpoe.layers.cores import MPOCores
from mpoe_kernels import MPOShape, mpo_linear


def linear_weight(module: nn.Module) -> Tensor:
    """Weight ``[in, out]`` of an `nn.Linear` (transposed view) or a `Conv1D` (as it is).

    Raises:
        TypeError: a module that is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.T
    # transformers' Conv1D, known by its shape: layers do not import transformers.
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight
    raise TypeError(f"expected an nn.Linear or a Conv1D; got {type(module).__name__}")


class MPOLinear(nn.Module):
    """``y = x @ W + bias`` with W ``[in_features, out_features]`` in MPO form.

    Args:
        shape: `MPOShape` of the weight.
        bias: whether there is a bias.
        backend: name of a kernel backend, or ``None``.
    """

    def __init__(
        self,
        shape: MPOShape,
        bias: bool = True,
        backend: str | None = None,
        init_std: float = 0.02,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cores = MPOCores(shape, 1, bias, init_std, device=device, dtype=dtype)
        self.backend = backend

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        shape: MPOShape | None = None,
        gauge: str = "symmetric",
        backend: str | None = None,
    ) -> MPOLinear:
        """Decompose an `nn.Linear` or `Conv1D`; ``shape=None`` takes the paper's factors at full bonds (lossless)."""
        weight = linear_weight(linear)
        rows, columns = weight.shape
        shape = MPOShape.paper(rows, columns) if shape is None else shape
        bias = getattr(linear, "bias", None)
        module = cls(shape, bias is not None, backend, device=weight.device, dtype=weight.dtype)
        module.cores.load_weight_(weight, gauge)
        if bias is not None:
            with torch.no_grad():
                module.cores.bias.copy_(bias)  # type: ignore[union-attr]
        return module.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.cores.in_features

    @property
    def out_features(self) -> int:
        return self.cores.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.cores.bias

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` rebuilt (a temporary, oriented like `nn.Linear.weight`); for inspection."""
        return self.cores.dense_weights()[0].T

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return mpo_linear(x, self.cores.blocks(), self.cores.bias, backend=self.backend)
