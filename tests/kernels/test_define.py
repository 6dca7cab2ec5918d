"""How ops are registered: the package's own autograd kernel, or PyTorch's if PyTorch's internal names differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.define import define_op, is_plain_call


@dataclass(frozen=True)
class ScaledCall:
    x: Tensor
    factor: float
    of_nothing: Tensor | None = None


def scaled(name: str) -> Any:
    """An op ``mpoe::<name>``: x times a factor, with the gradient of x."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert len(inputs) == 3, "defaults that the dispatcher drops are there again"
        ctx.factor = inputs[1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return grad * ctx.factor if ctx.needs_input_grad[0] else None, None, None

    return define_op(
        name,
        ScaledCall,
        1,
        lambda call: call.x * call.factor,
        lambda call: torch.empty_like(call.x),
        setup_context=setup,
        backward=backward,
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


class Subclass(Tensor):
    """A tensor subclass, which only PyTorch's dispatcher may handle."""


def test_a_plain_call_skips_the_dispatcher() -> None:
    op = scaled("scaled_plainly")
    dispatched: list[str] = []
    real = torch.ops.mpoe.scaled_plainly.default

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is real:
                dispatched.append("mode")
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Seen():
        assert torch.equal(op(x, 2.0), 2 * x)
    assert dispatched == ["mode"]
    for plain, value in ((True, x), (True, nn.Parameter(x, requires_grad=False)), (False, x.as_subclass(Subclass))):
        assert is_plain_call((value, 2.0)) == plain
    assert not is_plain_call((x.to("meta"), 2.0))
    assert not is_plain_call((x, 2.0, x.to("meta")))
    with pytest.raises(ValueError, match="needs its tensors on one device"):
        op(x, 2.0, x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain_call((x, 2.0))
    assert torch.equal(torch.compile(lambda y: op(y, 2.0), fullgraph=True, backend="aot_eager")(x), 2 * x)
    with torch.profiler.profile() as profile:
        op(x, 2.0)
    assert any(event.key == "mpoe::scaled_plainly" for event in profile.key_averages())


def test_a_plain_call_is_seen_by_function_modes() -> None:
    op = scaled("scaled_in_a_function_mode")
    seen: list[str] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Seen():
        y = op(x, 2.0)
    assert [name for name in seen if "scaled_in_a_function_mode" in name]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


def test_a_plain_call_is_recorded_for_its_gradient_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients in fewer steps; nothing is recorded inside another op's kernel, as in PyTorch."""
    op = scaled("scaled_and_recorded")
    x = torch.ones(3, requires_grad=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.library.CustomOpDef, "__call__", lambda *_: pytest.fail("is dispatched"))
        y = op(x, 2.5)
        assert op(x.detach(), 2.5).grad_fn is None
        with torch.no_grad():
            assert op(x, 2.5).grad_fn is None
    dispatched = torch.ops.mpoe.scaled_and_recorded(x, 2.5)
    assert type(y.grad_fn) is type(dispatched.grad_fn)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(dispatched.sum(), x)[0])
    assert not y.detach().requires_grad
    with torch._C._AutoDispatchBelowAutograd():
        assert op(x, 2.5).grad_fn is None


def test_a_plain_call_never_hides_from_transforms() -> None:
    op = scaled("scaled_in_transforms")
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: op(x, 2.0))(torch.ones(2, 3))
    functional = torch.func.functionalize(lambda x: op(x, 2.0))
    assert torch.equal(functional(torch.ones(3)), torch.full((3,), 2.0))
    graph = make_fx(lambda x: op(x, 2.0))(torch.ones(3))
    assert "mpoe.scaled_in_transforms" in graph.code
