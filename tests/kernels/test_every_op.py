"""What holds for every op on every backend: registration, gradients, memory, transforms, refusals
of raw calls."""

import inspect
from itertools import combinations

import pytest
import torch
from mpoe_bench.cases import relative_error
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.library import opcheck

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, MPOLinear
from mpoe_kernels import MPOShape, use_backend
from mpoe_kernels.signatures import ARGUMENTS
from tests.assertions import poisoned_memory, refuses
from tests.cases import SMALL_SHAPES, in_half_precision
from tests.linear_problem import LAYOUTS

from .backend_cases import choices_of, need_of, on_every_backend
from .problems import SHAPE, TOKENS, calls, run
from .problems import problems as of_ops

OPS = sorted(of_ops())


# ------------------------------------------------------------------ registration

FEW_UTILS = ("test_schema", "test_faketensor")
ALL_UTILS = (*FEW_UTILS, "test_autograd_registration", "test_aot_dispatch_dynamic")


MANY_BLOCKS = MPOShape((8, 13, 16), (8, 11, 16), max_bond=20)


def fitting(op, backend):
    """Arguments of an op; of the linear one by every strategy, of two shapes."""
    if "linear" not in op:
        yield calls(backend, op)
        return
    for shape in (SHAPE, SMALL_SHAPES["padded"], *([MANY_BLOCKS] if backend == "native" else [])):
        for strategy in choices_of(backend, shape, torch.float32):
            yield calls(backend, op, shape, strategy)


@on_every_backend
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op, backend):
    """Of a few gradients each has the bits that it has among all; a result, if nothing is kept for
    a backward."""
    need_of(op.removesuffix("_backward"), backend, trains=False)
    for number, given in enumerate(fitting(op, backend)):
        check = getattr(torch.ops.mpoe, op).default
        utils = (
            FEW_UTILS if number else ALL_UTILS
        )  # the others take most of the time, and depend on no size
        if not op.endswith("_backward"):
            leaves = [
                v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
                for v in given.values()
            ]
            opcheck(check, tuple(leaves), test_utils=utils)
            if "save" in given:
                opcheck(check, tuple({**given, "save": False}.values()), test_utils=FEW_UTILS)
                assert torch.equal(run(op, {**given, "save": False})[0], run(op, given)[0])
            continue
        if "need" not in given:
            opcheck(check, tuple(given.values()), test_utils=utils)
            continue
        count = len(given["need"])
        whole = run(op, {**given, "need": [True] * count})
        for wanted in (
            each for size in (1, 2, count - 1, count) for each in combinations(range(count), size)
        ):
            need = [place in wanted for place in range(count)]
            alone = len(wanted) == 1 and (
                not number or number % count in wanted
            )  # further cases take turns
            if alone or len(wanted) == count:
                opcheck(
                    check,
                    tuple({**given, "need": need}.values()),
                    test_utils=utils if all(need) else FEW_UTILS,
                )
            with poisoned_memory():
                found = run(op, {**given, "need": need})
            assert [grad.numel() > 0 for grad in found] == need
            for grad, among_all in zip(found, whole, strict=True):
                # Few gradients may be planned in another way; of a bias alone PyTorch sums all rows
                # at once.
                planned = given.get("strategy") == "auto" or (backend == "eager" and "linear" in op)
                assert not grad.numel() or torch.equal(grad, among_all) or planned
                torch.testing.assert_close(
                    grad, among_all if grad.numel() else grad, rtol=1e-4, atol=1e-4
                )


@on_every_backend
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "dense"])
@pytest.mark.parametrize("name", OPS)
def test_layouts_of_memory(name, layout, backend):
    """Of the inputs; the gradient of a sum is one number expanded."""
    need_of(name, backend)
    function, inputs = of_ops()[name]

    def results(place):
        leaves = [place(value).detach().requires_grad_() for value in inputs]
        with use_backend(backend):
            y = function(*leaves)
            return [y, *torch.autograd.grad(y.sum(), leaves)]

    for found, wanted in zip(results(LAYOUTS[layout]), results(torch.clone), strict=True):
        if backend == "native" and name != "mpo_embedding":
            assert torch.equal(found, wanted)
        else:  # torch's own products may round differently there
            assert relative_error(found, wanted) < 1e-6


@on_every_backend
@in_half_precision
@pytest.mark.parametrize(
    "name", ["grouped_mpo_linear", "mpo_linear", "mpo_ffn", "hidden_experts", "neuron_experts"]
)
def test_autocast_is_a_cast_of_all_but_the_gates(name, dtype, backend):
    need_of(name, backend, dtype)
    function, inputs = of_ops()[name]
    leaves = [value.requires_grad_() for value in inputs]
    names = [*inspect.signature(function).parameters, *[""] * len(leaves)]
    low = [
        leaf if n == "gates" else leaf.detach().to(dtype)
        for n, leaf in zip(names, leaves, strict=False)
    ]
    with torch.autocast("cpu", dtype), use_backend(backend):
        y, same = function(*leaves), function(*low)
    assert y.dtype == dtype
    assert torch.equal(y, same)
    assert {grad.dtype for grad in torch.autograd.grad(y.float().sum(), leaves)} == {torch.float32}
    with use_backend(backend):
        assert relative_error(y, function(*leaves)) < 0.05


# ------------------------------------------------------------------ transforms


def problems():
    """Functions of every op and layer, of floating tensors, and those."""
    found = of_ops()
    found["MPOLinear"] = of_module(MPOLinear(12, 8), torch.randn(TOKENS, 12))
    for shape, top_k in (("paper", 2), ("separable", 1), ("hidden", 2)):
        config = MPOEConfig(num_experts=3, shape=shape, router=RouterConfig(top_k=top_k))
        found[f"MPOEFeedForward {shape}"] = of_module(
            MPOEFeedForward(12, 24, config).eval(), torch.randn(TOKENS, 12)
        )
    return found


def of_module(module, x):
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *values):
        return func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    return call, (x, *(parameter.detach().clone() for parameter in parameters))


NAMES = sorted(problems())
NO_SECOND = "second derivatives of MPO ops are not supported"


@on_every_backend
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_transforms_are_autograds(name, backend):
    need_of(name, backend)
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
        nested = func.grad(
            lambda *v: (func.vjp(function, *v)[0] * weights).sum(), argnums=all_of_them
        )(*inputs)
    assert torch.equal(same, y)
    for want, *found in zip(wanted, pulled, graded, nested, strict=True):
        assert all(torch.equal(each, want) for each in found)
    torch.testing.assert_close(
        torch.tensordot(weights, of_first, dims=weights.dim()), wanted[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_transforms_refuse(name):
    """In words; a transform never returns a number that leaves a derivative out."""
    function, inputs = problems()[name]
    gradient = func.grad(lambda *v: function(*v).square().sum())

    def in_dual_level():
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])

    for call in (
        lambda: func.jvp(function, inputs, inputs),
        lambda: func.jacfwd(function)(*inputs),
        lambda: func.hessian(lambda *v: function(*v).square().sum())(*inputs),
        in_dual_level,
    ):
        refuses(
            NotImplementedError,
            r"does not support forward-mode derivatives .* use reverse mode",
            call,
        )
    twice = func.grad(lambda *v: gradient(*v).sum())
    refuses(NotImplementedError, NO_SECOND, twice, *inputs)
    leaf = inputs[0].clone().requires_grad_()
    first = torch.autograd.grad(
        function(leaf, *inputs[1:]).square().sum(), leaf, create_graph=True
    )[0]
    refuses(NotImplementedError, NO_SECOND, first.sum().backward)
    if name in OPS:
        batched = torch.vmap(lambda x: function(x, *inputs[1:]))
        words = r"mpoe::\w+ does not support torch\.vmap"
        refuses(NotImplementedError, words, batched, torch.stack([inputs[0]] * 2))
        with (
            pytest.warns(),
            pytest.raises(
                NotImplementedError, match=r"does not support torch\.jit\.trace; use torch\."
            ),
        ):
            torch.jit.trace(lambda x: function(x, *inputs[1:]), (inputs[0],))


def test_autograd_around_a_transform():
    function, (x, *others) = problems()["mpo_linear"]
    outer = x.clone().requires_grad_()
    func.vjp(lambda left: function(outer, left, others[1]), others[0])[0].sum().backward()
    leaf = x.clone().requires_grad_()
    function(leaf, *others).sum().backward()
    assert torch.equal(outer.grad, leaf.grad)
    by_left = func.grad(lambda left: function(outer, left, others[1]).sum())(others[0])
    refuses(NotImplementedError, NO_SECOND, by_left.sum().backward)


# ------------------------------------------------------------------ memory


def stand_ins(value):
    return [
        (torch._neg_view(value), -value),
        (torch._efficientzerotensor(value.shape), torch.zeros_like(value)),
    ]


@on_every_backend
@pytest.mark.parametrize("name", OPS)
def test_what_stands_for_other_values_is_resolved(name, backend):
    """Negative bits and zeros without memory, as input and as gradient."""
    need_of(name, backend)
    function, inputs = of_ops()[name]
    with use_backend(backend):
        for k, value in enumerate(inputs):
            for stand_in, real in stand_ins(value):
                y, wanted = (
                    function(*inputs[:k], each, *inputs[k + 1 :]) for each in (stand_in, real)
                )
                assert torch.equal(y, wanted)
            leaf = value.clone().requires_grad_()
            y = function(*inputs[:k], leaf, *inputs[k + 1 :])
            grad = torch.randn_like(y)
            for stand_in, real in stand_ins(grad):
                found, wanted = (
                    torch.autograd.grad(y, leaf, g, retain_graph=True)[0] for g in (stand_in, real)
                )
                assert torch.equal(found, wanted)


def test_views_of_larger_and_of_shared_memory_are_fine():
    function, (x, *others) = problems()["mpo_linear"]
    row = x[:1].expand(TOKENS, -1)
    assert torch.equal(function(row, *others), function(row.clone(), *others))
    long = torch.randn(3 * TOKENS, SHAPE.in_features)[TOKENS::2][:TOKENS]
    assert torch.equal(function(long, *others), function(long.clone(), *others))
    cut = torch.randn(2 * TOKENS, SHAPE.in_features)
    second = cut[TOKENS:]
    cut.untyped_storage().resize_(second.nbytes)  # as long as the view, which begins in its middle
    with use_backend("eager"), pytest.raises(ValueError, match="x must hold its values"):
        torch.ops.mpoe.dispatch(
            second,
            torch.tensor([0, TOKENS]),
            torch.arange(TOKENS),
            torch.arange(TOKENS)[:, None],
            "auto",
        )
