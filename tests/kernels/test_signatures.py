"""Raw ops refuse in words what does not fit: no kernel of any backend sees it; how ops are
registered."""

from __future__ import annotations  # a signature is read from the annotations' texts

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import BackendError, route, signatures
from mpoe_kernels.define import define_op, is_plain_call
from mpoe_kernels.signatures import ARGUMENTS, MOST_EXPERTS
from tests.assertions import refuses
from tests.cases import either, resized

from .backend_cases import need_of, on_every_backend
from .problems import TOKENS, TOP_K, calls, run

EXCHANGES = {
    "complex": lambda t: t.to(torch.complex64),
    "other kind": lambda t: t.long() if t.is_floating_point() else t.float(),
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t.flatten()[:1].squeeze(0),
    "without memory": lambda t: resized(t, 0),
}


@on_every_backend
@pytest.mark.parametrize("op", ARGUMENTS)
def test_every_tensor_of_every_op(op, backend):
    """Refused for its dtype, number of axes or memory, by its name. Layouts other than dense
    PyTorch refuses."""
    need_of(op.removesuffix("_backward"), backend)
    given = calls(backend, op)
    run(op, given)
    for name, value in given.items():
        for exchange, recorded in product(EXCHANGES.values(), (False, True)):
            if not isinstance(value, Tensor) or name in ("h", "saved"):  # whose sizes vary
                continue
            arguments = {**given, name: exchange(value)}
            refuses((TypeError, ValueError), rf"{name} must .*; got", run, op, arguments, recorded)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            lost = torch._neg_view(resized(value, 0))
            refuses(
                ValueError,
                rf"every tensor of mpoe::{op} must hold its values",
                run,
                op,
                {**given, name: lost},
            )


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_missing_tensor(op):
    """PyTorch's dispatcher lets None through where a schema wants a tensor, also to the fake of
    meta tensors."""
    own = calls("auto", op)
    wanted = [
        a.name
        for a in getattr(torch.ops.mpoe, op).default._schema.arguments
        if str(a.type) == "Tensor"
    ]
    on_meta = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in own.items()
    }
    for name, given in product(wanted, (own, on_meta)):
        refuses(
            TypeError, f"{name} must be a tensor; got NoneType None", run, op, {**given, name: None}
        )


def chosen(last):
    """``[T, K]``, all 0 but for the last."""
    return torch.tensor([0] * (TOKENS * TOP_K - 1) + [last]).view(TOKENS, TOP_K)


PLACED = {
    "slot_of_token": torch.arange(10)[:, None],
    "out_index": torch.arange(10),
    "gates": torch.ones(10),
    "save": False,
}
WRONG = [
    (
        "route",
        {"num_experts": 2**31},
        f"num_experts must lie between 1 and {MOST_EXPERTS}; got 2147483648",
    ),
    ("combine", {"backend": "relu"}, "backend must be one of .*; got 'relu'"),
    *(
        (
            op,
            {"expert_offsets": torch.zeros(size, dtype=torch.int32)},
            r"expert_offsets must be .* \[E\+1\], E = ",
        )
        for op in ("dispatch", "combine", "grouped_mpo_linear")
        for size in (0, 1)
    ),
    ("route", {"top_k_index": torch.zeros(TOKENS, 0).long()}, "top_k_index must be .* with K >= 1"),
    ("grouped_mpo_linear", {"in_features": 99}, r"I = 99|I must be at most"),
    ("grouped_mpo_linear", {"out_features": 0}, "out_features must be at least 1"),
    (
        "grouped_mpo_linear",
        {"out_features": 99, "bias": None},
        r"F must be at most jL\*jC\*jR = 10; got 99",
    ),
    ("grouped_mpo_linear_backward", {"need": [True]}, "need must name every gradient, 5; got"),
    (
        "grouped_mpo_linear_backward",
        {"activation": "gelu", "saved": torch.ones(1, 10, 9)},
        r"saved must be \[N, F\]",
    ),
    ("hidden_experts_backward", {"need": [True]}, "need must name every gradient, 7; got"),
    ("neuron_experts_backward", {"need": [True]}, "need must name every gradient, 6; got"),
    (
        "mpo_embedding",
        {"left": torch.randn(1, 2, 2, 3000)},
        r"central must be .* \[a, iC, jC, b\], a = 3000",
    ),
    *(
        (
            op,
            {"ids": torch.tensor([0, 0, 0, 0, 2**30])},
            r"ids must lie in 0\.\.\d+; got 1073741824",
        )
        for op in ("mpo_embedding", "mpo_embedding_backward")
    ),
    ("mpo_embedding", {"num_embeddings": 10**6}, r"V must be at most iL\*iC\*iR = 12; got 1000000"),
    # what a kernel would write or read beyond a tensor's end
    *(
        (
            op,
            {"expert_offsets": torch.tensor(ends).int()},
            "expert_offsets must start at 0, not fall, and end at 10 at",
        )
        for op in ("grouped_mpo_linear", "grouped_mpo_linear_backward")
        for ends in ((1, 3, 5, 10), (0, -1, 3, 10), (0, 3, 2, 10), (0, 2, 6, 11), (-1, 2, 3, 10))
    ),
    *(
        (
            op,
            {"row_index": torch.tensor([0] * 9 + [row])},
            rf"row_index must lie in 0\.\.4; got {row}",
        )
        for op in ("grouped_mpo_linear", "grouped_mpo_linear_backward")
        for row in (-1, 5, 9)
    ),
    *(
        (
            "route",
            {"capacity": most, "top_k_index": chosen(expert)},
            rf"top_k_index must lie in 0\.\.2; got {expert}",
        )
        for most in (None, 1)
        for expert in (-1, 3, 2**40)
    ),
    *(
        (
            op,
            {"slot_of_token": chosen(slot), **more},
            rf"slot_of_token must lie in -1\.\.9; got {slot}",
        )
        for op, more in (
            *(("combine", {}), ("dispatch_backward", {}), ("combine_backward", {})),
            ("combine_backward", {"need_weights": False}),
        )
        for slot in (-2, 10)
    ),
    *(
        (
            "dispatch",
            {"token_of_slot": torch.tensor([0] * 9 + [row])},
            rf"token_of_slot must lie in 0\.\.4; got {row}",
        )
        for row in (-1, 5)
    ),
    # rows that are placed need gates and slots
    ("grouped_mpo_linear", {**PLACED, "gates": None}, "gates must be given with out_index"),
    (
        "grouped_mpo_linear",
        {**PLACED, "slot_of_token": None},
        "slot_of_token must be given with out_index",
    ),
    (
        "grouped_mpo_linear",
        {**PLACED, "slot_of_token": torch.zeros(7, 1, dtype=torch.int64)},
        "gates must be one for every entry of slot_of_token",
    ),
]


@on_every_backend
@pytest.mark.parametrize("number", range(len(WRONG)))
def test_other_arguments(number, backend):
    op, changes, message = WRONG[number]
    need_of(op.removesuffix("_backward"), backend)
    arguments, errors = (
        {**calls(backend, op), **changes},
        (TypeError, ValueError, IndexError, BackendError),
    )
    for recorded in (False, True):
        refuses(errors, message, run, op, arguments, recorded)


# ------------------------------------------------------------------ how ops are defined


@dataclass(frozen=True)
class ScaledCall:
    x: Tensor
    factor: float
    of_nothing: Tensor | None = None


def scaled(name):
    """An op ``mpoe::<name>``: x times a factor, with the gradient of x."""

    def setup(ctx, inputs, output):
        assert len(inputs) == 3, "defaults that the dispatcher drops are there again"
        ctx.factor = inputs[1]

    def backward(ctx, grad):
        return grad * ctx.factor if ctx.needs_input_grad[0] else None, None, None

    return define_op(
        name,
        ScaledCall,
        1,
        lambda call: torch.empty_like(call.x),
        kernel=lambda call: call.x * call.factor,
        setup_context=setup,
        backward=backward,
    )


@either("raw")
def test_gradients(raw):
    """Of a plain call, and of the op that PyTorch's dispatcher calls."""
    op = scaled(f"scaled{'_raw' * raw}")
    if raw:
        op = torch.ops.mpoe.scaled_raw
    x = torch.ones(3, requires_grad=True)
    y = op(x, 2.5)
    assert f"mpoe_scaled{'_raw' * raw}" in type(y.grad_fn).__name__
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.5))
    assert op(x.detach(), 2.5).grad_fn is None
    with torch.no_grad():
        assert op(x, 2.5).grad_fn is None


class Subclass(Tensor):
    """A tensor subclass, which only PyTorch's dispatcher may handle."""


def test_a_plain_call_skips_the_dispatcher():
    op = scaled("scaled_plainly")
    dispatched = []
    real = torch.ops.mpoe.scaled_plainly.default

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is real:
                dispatched.append("mode")
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Seen():
        assert torch.equal(op(x, 2.0), 2 * x)
    assert dispatched == ["mode"]
    for plain, value in (
        (True, x),
        (True, nn.Parameter(x, requires_grad=False)),
        (False, x.as_subclass(Subclass)),
    ):
        assert is_plain_call((value, 2.0)) == plain
    assert not is_plain_call((x.to("meta"), 2.0))
    assert not is_plain_call((x, 2.0, x.to("meta")))
    message = "of_nothing must be on the device of x, cpu"
    refuses(ValueError, message, op, x, 2.0, x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain_call((x, 2.0))
    assert torch.equal(
        torch.compile(lambda y: op(y, 2.0), fullgraph=True, backend="aot_eager")(x), 2 * x
    )
    with torch.profiler.profile() as profile:
        op(x, 2.0)
    assert any(event.key == "mpoe::scaled_plainly" for event in profile.key_averages())


def test_a_plain_call_is_seen_by_function_modes():
    op = scaled("scaled_in_a_function_mode")
    seen = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Seen():
        y = op(x, 2.0)
    assert [name for name in seen if "scaled_in_a_function_mode" in name]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))


def test_a_plain_call_is_recorded_for_its_gradient_without_the_dispatcher(monkeypatch):
    """The same gradients in fewer steps."""
    op = scaled("scaled_and_recorded")
    x = torch.ones(3, requires_grad=True)
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.library.CustomOpDef, "__call__", lambda *_: pytest.fail("is dispatched")
        )
        y = op(x, 2.5)
        assert op(x.detach(), 2.5).grad_fn is None
        with torch.no_grad():
            assert op(x, 2.5).grad_fn is None
    dispatched = torch.ops.mpoe.scaled_and_recorded(x, 2.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(dispatched.sum(), x)[0])


def test_a_plain_call_never_hides_from_transforms():
    op = scaled("scaled_in_transforms")
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda x: op(x, 2.0))(torch.ones(2, 3))
    functional = torch.func.functionalize(lambda x: op(x, 2.0))
    assert torch.equal(functional(torch.ones(3)), torch.full((3,), 2.0))
    graph = make_fx(lambda x: op(x, 2.0))(torch.ones(3))
    assert "mpoe.scaled_in_transforms" in graph.code


def test_a_call_like_an_earlier_one_is_checked_once(monkeypatch):
    """A refused one each time; and what only looks alike."""
    checked = []
    check = signatures.check_signature

    def counted(op, *values, **options):
        checked.append(op)
        check(op, *values, **options)

    monkeypatch.setattr(signatures, "check_signature", counted)
    monkeypatch.setattr(signatures, "_ACCEPTED", set())
    monkeypatch.setattr(signatures, "MOST_ACCEPTED", 3)
    pairs = torch.zeros(5, 1, dtype=torch.int64)
    for _ in range(3):
        route(pairs, 1)
    assert checked == ["route"]
    refuses(TypeError, "num_experts must be an integer; got bool True", route, pairs, True)
    refuses(TypeError, "top_k_index must be int32 or int64", route, pairs.float(), 1)
    refuses(TypeError, "top_k_index must be int32 or int64", route, pairs.float(), 1)
    assert checked == ["route"] * 4
    for tokens in range(6, 12):
        route(torch.zeros(tokens, 1, dtype=torch.int64), 1)
        assert len(signatures._ACCEPTED) <= 3
    assert checked == ["route"] * 10
