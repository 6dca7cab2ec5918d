"""How ops are registered; `torch.func` through every op and layer; tensors whose memory does not hold their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, MPOLinear
from mpoe_kernels import (
    decompose,
    decompose_shared,
    expert_weights,
    use_backend,
)
from mpoe_kernels.define import define_op, is_plain_call

from .backend_cases import on_every_backend, require
from .problems import SHAPE, TOKENS, Function
from .problems import problems as of_ops


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


def problems() -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    """Functions of every op and layer, of floating tensors, and those."""
    found = of_ops()
    found["MPOLinear"] = of_module(MPOLinear(12, 8), torch.randn(TOKENS, 12))
    for kind, config in {
        "paper": MPOEConfig(num_experts=3, shape="paper", router=RouterConfig(top_k=2)),
        "separable": MPOEConfig(num_experts=3, shape="separable"),
        "hidden": MPOEConfig(num_experts=3, shape="hidden", router=RouterConfig(top_k=2)),
    }.items():
        found[f"MPOEFeedForward {kind}"] = of_module(MPOEFeedForward(12, 24, config).eval(), torch.randn(TOKENS, 12))
    return found


def of_module(module: nn.Module, x: Tensor) -> tuple[Function, tuple[Tensor, ...]]:
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    return call, (x, *(parameter.detach().clone() for parameter in parameters))


NAMES = sorted(problems())


@on_every_backend
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_transforms_are_autograds(name: str, backend: str) -> None:
    require(backend, "mpo_embedding" if name == "mpo_embedding" else "grouped_mpo_linear", torch.float32)
    function, inputs = problems()[name]
    all_of_them = tuple(range(len(inputs)))
    with use_backend(backend):
        leaves = [value.clone().requires_grad_() for value in inputs]
        y = function(*leaves)
        weights = torch.randn_like(y)
        wanted = torch.autograd.grad(y, leaves, weights, allow_unused=True, materialize_grads=True)
        same, pull = func.vjp(function, *inputs)
        # The pull runs outside of the transform, on what the transform left.
        pulled = pull(weights)
        graded = func.grad(lambda *v: (function(*v) * weights).sum(), argnums=all_of_them)(*inputs)
        of_first = func.jacrev(function)(*inputs)
        nested = func.grad(lambda *v: (func.vjp(function, *v)[0] * weights).sum(), argnums=all_of_them)(*inputs)
    assert torch.equal(same, y)
    for want, *found in zip(wanted, pulled, graded, nested, strict=True):
        assert all(torch.equal(each, want) for each in found)
    torch.testing.assert_close(torch.tensordot(weights, of_first, dims=weights.dim()), wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_transforms_refuse(name: str) -> None:
    """In words; a transform never returns a number that leaves a derivative out."""
    function, inputs = problems()[name]
    gradient = func.grad(lambda *v: function(*v).square().sum())

    def in_dual_level() -> Tensor:
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])

    for call in (
        lambda: func.jvp(function, inputs, inputs),
        lambda: func.jacfwd(function)(*inputs),
        lambda: func.hessian(lambda *v: function(*v).square().sum())(*inputs),
        in_dual_level,
    ):
        with pytest.raises(NotImplementedError, match=r"does not support forward-mode derivatives .* use reverse mode"):
            call()
    with pytest.raises(NotImplementedError, match="second derivatives of MPO ops are not supported"):
        func.grad(lambda *v: gradient(*v).sum())(*inputs)


def test_autograd_around_a_transform() -> None:
    function, (x, *others) = problems()["mpo_linear"]
    outer = x.clone().requires_grad_()
    func.vjp(lambda left: function(outer, left, others[1]), others[0])[0].sum().backward()
    leaf = x.clone().requires_grad_()
    function(leaf, *others).sum().backward()
    assert outer.grad is not None
    assert torch.equal(outer.grad, leaf.grad)
    by_left = func.grad(lambda left: function(outer, left, others[1]).sum())(others[0])
    with pytest.raises(NotImplementedError, match="second derivatives of MPO ops are not supported"):
        by_left.sum().backward()


def test_raw_ops_in_forward_mode() -> None:
    blocks, offsets = random_blocks(SHAPE, 1, torch.float32), torch.tensor([0, TOKENS], dtype=torch.int32)
    sizes = blocks.in_features, blocks.out_features

    def call(x: Tensor, *, save: bool = False) -> Tensor:
        op = torch.ops.mpoe.grouped_mpo_linear
        return op(
            x, blocks.left, blocks.central, blocks.right, offsets, None, None, *sizes, "none", "auto", "auto", save
        )[0]

    x = torch.randn(TOKENS, SHAPE.in_features)
    with pytest.raises(NotImplementedError, match=r"does not support forward-mode derivatives"):
        func.jvp(call, (x,), (x,))
    assert torch.equal(func.vjp(call, x)[0], call(x))


# ------------------------------------------------------------------ memory


@on_every_backend
@pytest.mark.parametrize("name", [name for name in NAMES if "MPO" not in name])
def test_what_stands_for_other_values_is_resolved(name: str, backend: str) -> None:
    """Negative bits and zeros without memory, as input and as gradient."""
    require(backend, "mpo_embedding" if name == "mpo_embedding" else "grouped_mpo_linear", torch.float32)
    function, inputs = problems()[name]
    with use_backend(backend):
        for k, value in enumerate(inputs):
            for stand_in, real in (
                (torch._neg_view(value), -value),
                (torch._efficientzerotensor(value.shape), torch.zeros_like(value)),
            ):
                y, wanted = (function(*inputs[:k], each, *inputs[k + 1 :]) for each in (stand_in, real))
                assert torch.equal(y, wanted)
                leaf = value.clone().requires_grad_()
                y = function(*inputs[:k], leaf, *inputs[k + 1 :])
                grad = torch.randn_like(y)
                for stand_in_grad, real_grad in (
                    (torch._neg_view(grad), -grad),
                    (torch._efficientzerotensor(y.shape), torch.zeros_like(y)),
                ):
                    found, wanted = (
                        torch.autograd.grad(y, leaf, each, retain_graph=True)[0] for each in (stand_in_grad, real_grad)
                    )
                    assert torch.equal(found, wanted)


@on_every_backend
@pytest.mark.parametrize("name", [name for name in NAMES if "MPO" not in name])
@pytest.mark.parametrize("left_over", [0, 10])
def test_a_resized_storage_is_refused(name: str, backend: str, left_over: int) -> None:
    """By the op, or by PyTorch where a view is made first."""
    require(backend, "mpo_embedding" if name == "mpo_embedding" else "grouped_mpo_linear", torch.float32)
    function, inputs = problems()[name]
    refused = "|".join(
        (rf"must hold its values, in \d+ bytes; got .* of {left_over} bytes", "setStorage: .* are out of bounds")
    )
    with use_backend(backend):
        for k, value in enumerate(inputs):
            leaf = value.clone().requires_grad_()
            y = function(*inputs[:k], leaf, *inputs[k + 1 :])
            grad = torch.randn_like(y)
            for emptied, call in ((value.clone(), function), (grad, lambda *given, y=y, k=k: y.backward(given[k]))):
                emptied.untyped_storage().resize_(left_over)
                for lost in (emptied, torch._neg_view(emptied)):
                    with pytest.raises((ValueError, RuntimeError), match=refused):
                        call(*inputs[:k], lost, *inputs[k + 1 :])


def test_weights_without_memory() -> None:
    blocks = random_blocks(SHAPE, 2, torch.float32)
    weights = expert_weights(blocks).clone()
    weight = weights[0].clone()
    for tensor in (blocks.left, weights, weight):
        tensor.untyped_storage().resize_(tensor.nbytes // 2)
    for name, call in {
        "left": lambda: expert_weights(blocks),
        "weight": lambda: decompose(weight, SHAPE),
        "weights": lambda: decompose_shared(weights, SHAPE),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must hold its values"):
            call()


def test_views_of_larger_and_of_shared_memory_are_fine() -> None:
    function, (x, *others) = problems()["mpo_linear"]
    row = x[:1].expand(TOKENS, -1)
    assert torch.equal(function(row, *others), function(row.clone(), *others))
    long = torch.randn(3 * TOKENS, SHAPE.in_features)
    assert torch.equal(function(long[TOKENS::2][:TOKENS], *others), function(long[TOKENS::2][:TOKENS].clone(), *others))
    cut = torch.randn(2 * TOKENS, SHAPE.in_features)
    second = cut[TOKENS:]
    cut.untyped_storage().resize_(second.nbytes)  # as long as the view, which begins in its middle
    with use_backend("eager"), pytest.raises(ValueError, match="x must hold its values"):
        torch.ops.mpoe.dispatch(
            second, torch.tensor([0, TOKENS]), torch.arange(TOKENS), torch.arange(TOKENS)[:, None], "auto"
        )
