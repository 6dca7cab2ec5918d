"""How ops are registered: the package's own autograd kernel, and PyTorch's where its inner names are others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mpoe_kernels.define import define_op


def scaled(name: str) -> Any:
    """An op ``mpoe::<name>``: x times a factor, with the gradient of x."""

    def body(x: Tensor, factor: float, of_nothing: Tensor | None = None) -> Tensor:
        return x * factor

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert len(inputs) == 3, "defaults that the dispatcher drops are there again"
        ctx.factor = inputs[1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return grad * ctx.factor if ctx.needs_input_grad[0] else None, None, None

    body.__name__ = name
    return define_op(
        body, lambda x, factor, of_nothing=None: torch.empty_like(x), setup_context=setup, backward=backward
    )


@pytest.mark.parametrize("ours", [True, False])
def test_gradients(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        if not ours:
            patched.delattr(torch._C, "_after_autograd_keyset")
        op = scaled(f"scaled_by_{'ours' if ours else 'pytorch'}")
    x = torch.ones(3, requires_grad=True)
    y = op(x, 2.5)
    assert ("Backward_mpoe" in type(y.grad_fn).__name__) == ours
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 2.5))
    assert op(x.detach(), 2.5).grad_fn is None
    with torch.no_grad():
        assert op(x, 2.5).grad_fn is None
