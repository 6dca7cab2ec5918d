"""One helper that registers an op (custom_op, fake kernel, autograd, autocast, refusals) and dispatches to backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from mpoe_kernels.backends import kernel_for
from mpoe_kernels.checks import AUTOCAST_DEVICES, LOWERED, describe, holds_values, refuse_jit_trace
from mpoe_kernels.signatures import check_signature

NAMESPACE = "mpoe"
AUTOCAST_KEYS = dict(zip(AUTOCAST_DEVICES, ("AutocastCPU", "AutocastCUDA"), strict=True))
_NO_SECOND_DERIVATIVES = NAMESPACE + "::{} cannot be differentiated: second derivatives of MPO ops are not supported"
# torch.library keeps registrations only as long as the Library object lives.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def run_kernel(op: str, call: Any, like: Tensor, **sizes: int) -> Any:
    """Call the kernel of the backend that the registry selects for this op and for the device and dtype of ``like``."""
    return kernel_for(op, like.device, like.dtype, call.backend, **sizes)(call)


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
    kernel: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: Sequence[str] = (),
) -> Any:
    """Register ``mpoe::<name>``, whose arguments are the fields of a dataclass, and which returns tensors.

    Args:
        name: of the op.
        signature: dataclass whose fields are the arguments of kernels, fake and schema. Not frozen: making a
            frozen one at every call takes several times as long.
        results: how many tensors it returns.
        kernel, fake: take an instance of ``signature``; the fake returns the shapes and dtypes of the results.
        setup_context, backward: autograd formula. Without one the op refuses to be differentiated (that is how
            double backward is refused).
        autocast: fields that autocast casts to its dtype.

    Returns:
        A function that calls the op.
    """
    declared = fields(signature)
    arguments = ", ".join(
        f"{_SCHEMA_TYPES[str(field.type)]} {field.name}{'=None' if field.default is None else ''}" for field in declared
    )
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    names = [field.name for field in declared]

    def body(*values: Any) -> Any:
        return kernel(signature(*values))

    def checked(*values: Any) -> Any:
        check_signature(name, names, values)
        return body(*values)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", checked, mutates_args=(), schema=schema)
    positions = tuple(names.index(field) for field in autocast)
    return _register(op, body, name, lambda *values: fake(signature(*values)), setup_context, backward, positions)


def _register(
    op: Any,
    body: Callable[..., Any],
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
    autocast_positions: tuple[int, ...],
) -> Any:
    op.register_fake(_on_one_device(fake, name))
    if backward is None or setup_context is None:
        setup_context, backward = _nothing_to_set_up, _refuse_autograd(name)
    recorded = _register_autograd(op, body, name, setup_context, backward)
    # Of a backward, which `torch.func.jacrev` maps over; users give a batch as tokens.
    op.register_vmap(_one_after_the_other(op) if name.endswith("_backward") else _refuse_vmap(name))
    if autocast_positions:
        for device_type, key in AUTOCAST_KEYS.items():
            _LIBRARY.impl(name, _autocast_kernel(op, device_type, autocast_positions), key)

    def call(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
            _refuse_other_modes(name, arguments)
        if not is_plain_call(arguments):
            return op(*arguments)
        if not needs_gradients(arguments):
            return body(*arguments)
        return (op if recorded is None or _is_below_autograd() else recorded)(*arguments)

    return call


def needs_gradients(arguments: Sequence[Any]) -> bool:
    """Whether autograd must record a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def is_plain_call(arguments: Sequence[Any]) -> bool:
    """Whether the dispatcher would only call the kernel, and record it for a gradient if one is needed.

    Dispatching takes as long as the kernel for one token. False if a mode, a transform, a tensor subclass, a compiler
    or a profiler intercepts the call, if a meta tensor among others makes PyTorch call the fake, or if a tensor's
    memory does not hold its values: the dispatcher resolves negative bits, zeros without memory and the wrappers that
    transforms leave, and the kernel it calls refuses the others.
    """
    if torch.compiler.is_dynamo_compiling() or _others_see_calls():
        return False
    device_type = None
    try:
        for value in arguments:
            if type(value) in _PLAIN:
                device_type = device_type or value.device.type
                if value.is_meta or value.is_neg() or not holds_values(value):
                    return False
            elif isinstance(value, Tensor):
                return False
    except RuntimeError:  # a layout or a wrapper without an address
        return False
    return device_type in AUTOCAST_DEVICES and not torch.is_autocast_enabled(device_type)


_PLAIN = (Tensor, torch.nn.Parameter)


def _others_see_calls() -> bool:
    """Modes, transforms (`torch.func`), tracers, forward derivatives and the profiler."""
    return (
        forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _in_transform() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _is_below_autograd() -> bool:
    """Inside another op's kernel, where PyTorch records nothing."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def _register_autograd(
    op: Any, body: Callable[..., Any], name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any] | None:
    """Replaces ``op.register_autograd``, which looks up the defaults of all arguments at every call.

    Returns:
        The function that runs a plain call and records it for its gradient; None where only PyTorch can do so.
    """
    overload, below = op._opoverload, getattr(torch._C, "_after_autograd_keyset", None)
    if below is None:  # a PyTorch with other internal names
        op.register_autograd(backward, setup_context=setup_context)
        return None
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    def run_below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & below, *arguments)

    def run_next_level(keyset: Any, arguments: Sequence[Any]) -> Any:
        """A function's forward records nothing; the transforms and the autograd around this level do."""
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run_below(keyset, arguments)

    # The key set (None for a plain call) comes last, because ``needs_input_grad`` counts from the first argument.
    def forward(ctx: Any, *given: Any) -> Any:
        *arguments, keyset = given
        if keyset is None or is_plain_call(arguments):
            output = body(*arguments)
        else:
            output = (run_next_level if _in_transform() else run_below)(keyset, arguments)
        setup_context(ctx=ctx, inputs=tuple(arguments), output=output)
        return output

    def backward_of(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads), None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of)}
    # PyTorch's transforms (`torch.func.grad`, `vjp`, `jacrev`) dispatch an op once at each of their levels, and let
    # only a function of the second kind record it there.
    made: Any = (
        type(f"Backward_{NAMESPACE}_{name}", (base,), members)
        for base in (torch.autograd.Function, _SingleLevelFunction)
    )
    function, of_one_level = made

    def recorded(*arguments: Any) -> Any:
        return function.apply(*arguments, *defaults[len(arguments) :], None)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        arguments = (*arguments, *defaults[len(arguments) :])  # the dispatcher drops default values
        _refuse_other_modes(name, arguments)
        if not needs_gradients(arguments):
            return run_below(keyset, arguments)
        if not _in_transform():
            return function.apply(*arguments, keyset)
        with enable_single_level_autograd_function():
            return of_one_level.apply(*arguments, keyset)

    with warnings.catch_warnings():  # PyTorch 2.11 has registered its own kernel, and warns that it is replaced
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
        _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True, allow_override=True)
    return recorded


def _on_one_device(fake: Callable[..., Any], name: str) -> Callable[..., Any]:
    """With a meta tensor among others PyTorch calls the fake, whose results are uninitialised memory."""

    def checked(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.device != tensors[0].device:
                raise ValueError(
                    f"{NAMESPACE}::{name} needs its tensors on one device; "
                    f"got {', '.join(describe(tensor) for tensor in tensors)}"
                )
        return fake(*arguments)

    return checked


def _refuse_other_modes(name: str, arguments: tuple[Any, ...]) -> None:
    """PyTorch silently drops the tangents of a custom op's arguments."""
    refuse_jit_trace(f"{NAMESPACE}::{name}")
    for value in arguments:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            if name.endswith("_backward"):
                raise NotImplementedError(_NO_SECOND_DERIVATIVES.format(name))
            raise NotImplementedError(
                f"{NAMESPACE}::{name} does not support forward-mode derivatives (torch.func.jvp, jacfwd, forward_ad); "
                "use reverse mode (torch.autograd.grad, torch.func.vjp, jacrev)"
            )


def _nothing_to_set_up(**_: Any) -> None:
    """Of an op without a backward."""


def _refuse_autograd(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_NO_SECOND_DERIVATIVES.format(name))

    return refuse


def _one_after_the_other(op: Any) -> Callable[..., Any]:
    """A rule for `torch.vmap` that calls the op once for each entry."""

    def run(info: Any, in_dims: Any, *arguments: Any) -> Any:
        found = [
            op(*(v.select(dim, k) if isinstance(dim, int) else v for v, dim in zip(arguments, in_dims, strict=True)))
            for k in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    return run


def _refuse_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} does not support torch.vmap; give it the batch as tokens (rows) instead"
        )

    return refuse


def _autocast_kernel(op: Any, device_type: str, positions: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = list(arguments)
        for k in positions:
            value = cast[k]
            # float64 is left alone: torch's autocast never lowers it elsewhere either.
            if isinstance(value, Tensor) and value.dtype in LOWERED:
                cast[k] = value.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return op(*cast)

    return kernel
