"""Registers an op (custom_op, fake kernel, autograd, autocast, refusals), and calls it on the
backend asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mpoe_kernels.backends import AUTO, BACKENDS, BackendError, check_backend, kernel_for
from mpoe_kernels.checks import AUTOCAST_DEVICES, PLAIN, holds_values
from mpoe_kernels.op_rules import (
    NAMESPACE,
    autocast_kernel,
    lowered,
    negative_kernel,
    on_one_device,
    one_after_the_other,
    refuse_autograd,
    refuse_jvp,
    refuse_unseen,
    refuse_vmap,
)
from mpoe_kernels.signatures import check_once, check_signature, check_tensors

AUTOCAST_KEYS = dict(zip(AUTOCAST_DEVICES, ("AutocastCPU", "AutocastCUDA"), strict=True))
# torch.library keeps registrations only as long as the Library object lives.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class _Requested(threading.local):
    """What `use_backend` set in this thread. torch.compile traces a ``threading.local``, not a
    ``ContextVar``."""

    name: str = AUTO


_requested = _Requested()


def requested_backend(name: str | None) -> str:
    """The argument if given, else what `use_backend` set, else ``"auto"``."""
    if name is None:
        return _requested.name
    check_backend(name)
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside this context (and its backward) on one backend; ``"auto"`` restores the
    automatic choice.

    It applies only to the calling thread.

    Raises:
        TypeError, ValueError: None, an unknown name.
        BackendError: the backend cannot run on this machine.
    """
    if name is None:
        raise TypeError("name must be that of a backend; got None")
    check_backend(name)
    if name != AUTO:
        reasons = BACKENDS[name].unavailable_reasons()
        if reasons:
            raise BackendError(f"backend {name!r} cannot run here: {'; '.join(reasons)}")
    previous = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = previous


def backend_kernel(op: str) -> Callable[[Any], Any]:
    """A kernel that calls the one that `mpoe_kernels.backends.select` finds for the device and
    dtype of the call's first tensor."""

    def run(call: Any) -> Any:
        tensor = next(iter(vars(call).values()))
        return kernel_for(op, tensor.device, tensor.dtype, call.backend)(call)

    return run


# Annotated types of a signature's fields -> types in the schema.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "list[bool]": "bool[]",
}


def define_op(
    name: str,
    signature: type[Any],
    results: int,
    fake: Callable[[Any], Any],
    *,
    kernel: Callable[[Any], Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    saves: Sequence[str] = (),
    autocast: Sequence[str] = (),
) -> Any:
    """Register ``mpoe::<name>``, whose arguments are the fields of a dataclass, and which returns
    tensors.

    Args:
        name: of the op.
        signature: dataclass whose fields are the arguments of kernels, fake and schema. Not frozen:
            making a frozen one at every call takes several times as long.
        results: how many tensors it returns.
        fake: takes an instance of ``signature``; returns the shapes and dtypes of the results.
        kernel: computes them; by default that of a backend.
        backward: autograd formula. Without one the op refuses to be differentiated (that is how
            double backward is refused).
        saves: fields that it reads: tensors as ``ctx.saved_tensors``, the others as
            ``ctx.settings``.
        setup_context: saves what it reads instead, results too, after the kernel.
        autocast: fields that autocast casts to its dtype.

    Returns:
        A function that calls the op.
    """
    kernel = kernel or backend_kernel(name)
    declared = fields(signature)
    kinds = {field.name: str(field.type) for field in declared}
    names = list(kinds)
    defaults = [None] * len(names)  # of those at the end that a call leaves out
    required = {field for field, kind in kinds.items() if kind == "Tensor"}

    def body(*values: Any, ctx: Any = None, kept: Any = None) -> Any:
        """``ctx`` gets what a forward keeps for its backward, whose ``kept`` it is, see
        `Differentiable`."""
        request = signature(*values)
        if kept is not None:
            request.kept = kept
        result = kernel(request)
        if ctx is not None:
            ctx.kept = getattr(request, "kept", None)
        return result

    def checked(*values: Any) -> Any:
        check_signature(name, names, values, required)
        return body(*values)

    def faked(*values: Any) -> Any:  # PyTorch calls it alone if a tensor is on meta
        check_tensors(names, values, required)
        return fake(signature(*values))

    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", checked, mutates_args=(), schema=_schema(declared, results)
    )
    op.register_fake(on_one_device(faked, name))
    gradients = backward or refuse_autograd(name)
    saves_for_backward = setup_context or _saving(kinds, saves)
    op.register_autograd(gradients, setup_context=saves_for_backward)
    _LIBRARY.impl(name, negative_kernel(op, name), "Negative")
    positions = tuple(names.index(field) for field in autocast)
    if autocast:
        for device_type, key in AUTOCAST_KEYS.items():
            _LIBRARY.impl(name, autocast_kernel(op, device_type, positions), key)

    def record(ctx: Any, *values: Any) -> Any:
        output = body(*values, ctx=ctx)
        saves_for_backward(ctx=ctx, inputs=values, output=output)
        return output

    def call(*arguments: Any, kept: Any = None) -> Any:
        # While a graph is traced, `checked` refuses; a backward's arguments are its forward's.
        if not (name.endswith("_backward") or torch.compiler.is_dynamo_compiling()):
            check_once(name, names, arguments, required)
        if is_plain_call(arguments):
            if not needs_gradients(arguments):
                return body(*arguments, kept=kept)
            return recorded.apply(*arguments, *defaults[len(arguments) :])
        if torch.compiler.is_dynamo_compiling():
            return op(*arguments)
        refuse_unseen(name, arguments)
        if needs_gradients(arguments) and torch._C._are_functorch_transforms_active():
            values = (*arguments, *defaults[len(arguments) :])
            return lowered(values, positions, transformed.apply)
        return op(*arguments)

    # Of a backward, which `torch.func.jacrev` maps over; users give a batch as tokens.
    vmap = one_after_the_other(call) if name.endswith("_backward") else refuse_vmap(name)
    op.register_vmap(vmap)
    recorded = _function(name, forward=record, backward=gradients)
    # In `torch.func`, whose transforms do not differentiate an op itself.
    transformed = _function(
        name,
        forward=lambda *values: op(*values),
        setup_context=saves_for_backward,
        backward=gradients,
        jvp=refuse_jvp(name),
        vmap=vmap,
    )
    return call


def _function(op: str, **methods: Callable[..., Any]) -> Any:
    """An autograd function, whose nodes PyTorch prints by the op's name."""
    members = {method: staticmethod(function) for method, function in methods.items()}
    return type(f"{NAMESPACE}_{op}", (torch.autograd.Function,), members)


def _schema(declared: Sequence[Any], results: int) -> str:
    arguments = []
    for field in declared:
        default = ""
        if field.default is None:
            default = "=None"
        arguments.append(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}{default}")
    returned = ", ".join(["Tensor"] * results)
    return f"({', '.join(arguments)}) -> ({returned})"


def _saving(kinds: Mapping[str, str], saves: Sequence[str]) -> Callable[..., None]:
    names = list(kinds)
    tensors: list[int] = []
    settings: list[int] = []
    for field in saves:
        positions = tensors if kinds[field].startswith("Tensor") else settings
        positions.append(names.index(field))

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*[inputs[position] for position in tensors])
        ctx.settings = tuple([inputs[position] for position in settings])

    return setup_context


class Differentiable:
    """Base of the calls of `define_differentiable`: tensors, then settings, then ``grad`` and
    ``need`` of a backward.

    Attributes:
        DIFFERENTIABLE: names of the fields that have gradients, in the order in which the backward
            returns them.
        kept: no field: what a forward kernel computed that the backward of a plain call finds here,
            else None.
    """

    DIFFERENTIABLE: ClassVar[tuple[str, ...]]
    kept: Any = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The values of those fields."""
        return tuple([getattr(self, name) for name in self.DIFFERENTIABLE])

    @property
    def wanted(self) -> list[bool]:
        """Of a backward: which gradients are needed and belong to an argument that was given."""
        need: list[bool] = self.need  # type: ignore[attr-defined]
        pairs = zip(self.differentiable, need, strict=True)
        return [value is not None and wants for value, wants in pairs]


def define_differentiable(
    name: str,
    signature: type[Differentiable],
    of_backward: type[Differentiable],
    fake: Callable[[Any], Any],
    *,
    autocast: Sequence[str],
    kernels: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
) -> Any:
    """`define_op` for an op with one result that saves its arguments, and for its backward, which
    takes them again.

    Args:
        name, fake, autocast: as in `define_op`.
        signature: of the op.
        of_backward: the same, with the fields ``grad`` (of the result) and ``need`` (which
            gradients).
        kernels: of the op and of ``<name>_backward``, which returns the gradients; empty where they
            are not `wanted`. By default those of a backend.
    """
    names = [field.name for field in fields(signature)]  # type: ignore[arg-type]
    positions = [names.index(field) for field in signature.DIFFERENTIABLE]

    def backward_fake(call: Any) -> tuple[Tensor, ...]:
        gradients = []
        for value, wants in zip(call.differentiable, call.wanted, strict=True):
            gradient = call.grad.new_empty(0)
            if value is not None:
                gradient = value.new_empty(value.shape if wants else 0)
            gradients.append(gradient)
        return tuple(gradients)

    of_gradients = f"{name}_backward"
    backward_op = define_op(
        of_gradients,
        of_backward,
        len(positions),
        backward_fake,
        kernel=kernels.get(of_gradients),
    )

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = [bool(ctx.needs_input_grad[position]) for position in positions]
        kept = getattr(ctx, "kept", None)
        grads = backward_op(*ctx.saved_tensors, *ctx.settings, grad.contiguous(), need, kept=kept)
        gradients: list[Tensor | None] = [None] * len(names)
        for position, gradient, wanted in zip(positions, grads, need, strict=True):
            if wanted:
                gradients[position] = gradient
        return tuple(gradients)

    return define_op(
        name,
        signature,
        1,
        fake,
        kernel=kernels.get(name),
        backward=backward,
        saves=names,
        autocast=autocast,
    )


def needs_gradients(arguments: Sequence[Any]) -> bool:
    """Whether autograd must record a call with these arguments."""
    if torch.is_grad_enabled():
        for value in arguments:  # no generator: making one takes as long as asking three tensors
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def is_plain_call(arguments: Sequence[Any]) -> bool:
    """Whether the dispatcher would only call the kernel, and record it for a gradient if one is
    needed.

    Dispatching takes as long as the kernel for one token. False if a mode, a transform, a tensor
    subclass, a compiler or a profiler intercepts the call, if a meta tensor among others makes
    PyTorch call the fake, or if a tensor's memory does not hold its values: the dispatcher resolves
    negative bits, zeros without memory and the wrappers that transforms leave, and the kernel it
    calls refuses the others.
    """
    if torch.compiler.is_dynamo_compiling() or _others_see_calls():
        return False
    device_type = None
    try:
        for value in arguments:
            if type(value) in PLAIN:
                device_type = device_type or value.device.type
                if value.is_neg():
                    return False
                # The first questions of `holds_values` alone answer for most tensors, without a
                # call.
                size = value.nbytes
                begins = value.is_contiguous() and not value.storage_offset()
                fits = (
                    size
                    and begins
                    and value.untyped_storage().nbytes() >= size
                    and value.data_ptr()
                )
                if not fits and (value.is_meta or (size and not holds_values(value))):
                    return False
            elif isinstance(value, Tensor):
                return False
    except RuntimeError:  # a layout or a wrapper without an address
        return False
    return device_type in AUTOCAST_DEVICES and not torch.is_autocast_enabled(device_type)


def _others_see_calls() -> bool:
    """Modes, transforms (`torch.func`), tracers, forward derivatives and the profiler: PyTorch has
    no public names for these questions."""
    return (
        forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )
