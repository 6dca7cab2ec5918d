"""`MPOLinear`: a drop-in for `nn.Linear` and GPT-2's `Conv1D` whose weight is an MPO."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from mpoe.layers.cores import MPOCores
from mpoe_kernels import MPOShape, mpo_linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, recognised by its attributes: layers do not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor:
    """Weight ``[in, out]`` of an `nn.Linear` (transposed view) or a `Conv1D` (unchanged).

    Raises:
        TypeError: a module that is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.T
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight
    raise TypeError(f"expected an nn.Linear or a Conv1D; got {type(module).__name__}")


class _Asked(NamedTuple):
    """Arguments of an `MPOLinear`, in whichever form they were given."""

    shape: MPOShape
    bias: bool
    backend: str | None
    init_std: float
    device: torch.device | str | None
    dtype: torch.dtype | None


def _by_shape(
    shape: MPOShape,
    bias: bool = True,
    backend: str | None = None,
    init_std: float = 0.02,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> _Asked:
    return _Asked(shape, bias, backend, init_std, device, dtype)


def _by_sizes(
    in_features: int,
    out_features: int,
    bias: bool = True,
    backend: str | None = None,
    init_std: float | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> _Asked:
    shape = MPOShape.paper(in_features, out_features)
    return _Asked(shape, bias, backend, (3 * in_features) ** -0.5 if init_std is None else init_std, device, dtype)


class MPOLinear(nn.Module):
    """``y = x @ W + bias`` with W ``[in_features, out_features]`` in MPO form.

    ``MPOLinear(shape, ...)``, or ``MPOLinear(in_features, out_features, ...)`` as `nn.Linear`: the paper's factors at
    full bonds, and random weights of `nn.Linear`'s standard deviation, ``1 / sqrt(3 in_features)``.

    Args:
        shape: `MPOShape` of the weight.
        bias: whether there is a bias.
        backend: name of a kernel backend, or ``None``.
        init_std: of the weight's entries.

    Raises:
        TypeError: arguments of neither form.
    """

    @overload
    def __init__(
        self,
        shape: MPOShape,
        bias: bool = True,
        backend: str | None = None,
        init_std: float = 0.02,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        backend: str | None = None,
        init_std: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__()
        sizes = "in_features" in named or (bool(values) and isinstance(values[0], int))
        read: Callable[..., _Asked] = _by_sizes if sizes else _by_shape
        try:
            inspect.signature(read).bind(*values, **named)
        except TypeError as error:
            raise TypeError(
                f"MPOLinear takes (shape, ...) or, as nn.Linear does, (in_features, out_features, ...): {error}"
            ) from None
        asked = read(*values, **named)
        self.cores = MPOCores(asked.shape, 1, asked.bias, asked.init_std, device=asked.device, dtype=asked.dtype)
        self.backend = asked.backend

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


# The signature that tools show: the first form.
MPOLinear.__signature__ = inspect.signature(_by_shape).replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
