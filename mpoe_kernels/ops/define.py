"""One helper that registers an op: custom_op + fake + autograd + autocast + refusals, with backends below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import registry
from mpoe_kernels.checks import FLOATING

NAMESPACE = "mpoe"
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# torch.library keeps registrations only as long as the Library object lives.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def run_kernel(op: str, backend: str, like: Tensor, *arguments: Any, **sizes: Any) -> Any:
    """Call the kernel of the backend that the registry selects for this op, device and dtype."""
    request = registry.Request(op, str(like.device), like.dtype, sizes)
    return registry.select(request, backend)(*arguments)


def define_op(
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast_arguments: Sequence[int] = (),
) -> Any:
    """Register ``mpoe::<body.__name__>``.

    Args:
        body: annotated function; its annotations are the schema. It calls `run_kernel`.
        fake: shapes and dtypes of the results.
        setup_context, backward: autograd formula. Without one the op refuses to be differentiated (that is how
            double backward is refused).
        autocast_arguments: positions of the tensors that autocast brings to its dtype.

    Returns:
        The custom op.
    """
    name = body.__name__
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", body, mutates_args=())
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    else:
        _refuse_autograd(op, name)
    op.register_vmap(_refuse_vmap(name))
    if autocast_arguments:
        for device_type, key in AUTOCAST_KEYS.items():
            _LIBRARY.impl(name, _autocast_kernel(op, device_type, tuple(autocast_arguments)), key)
    return op


def _refuse_autograd(op: Any, name: str) -> None:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} cannot be differentiated: second derivatives of MPO ops are not supported"
        )

    op.register_autograd(refuse)


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
            # float64 stays: autocast never lowers it elsewhere in torch either.
            if isinstance(value, Tensor) and value.dtype in FLOATING and value.dtype != torch.float64:
                cast[k] = value.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return op(*cast)

    return kernel


def autocast_active(device: torch.device) -> bool:
    """Whether floating arguments on ``device`` will be cast by autocast, so that their dtypes may differ."""
    return device.type in AUTOCAST_KEYS and torch.is_autocast_enabled(device.type)
