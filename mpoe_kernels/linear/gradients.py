"""What surrounds the products of a linear op on a GPU, for Triton, CUDA and PyTorch's grouped
products.

Slots of some experts, gradients of bias and activation, and blocks' gradients by kernels that keep
the gradient of a weight on chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mpoe_kernels.backends import kernel_for
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.contract.precision import float32_mm
from mpoe_kernels.linear.activation import ACTIVATION_GRADIENT
from mpoe_kernels.routing.op import DispatchBackwardCall

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

Forward = tuple[Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@lru_cache(maxsize=1024)
def experts_at_once(dims: BlockDims, built: tuple[str, ...], experts: int, copies: int = 2) -> int:
    """Experts whose weights are built together: what is built, and by default once more in the
    order in which it is multiplied, takes at most a quarter of the dense experts' memory, or two
    weights if that is more."""
    if not built:
        return max(experts, 1)
    largest = max(dims.elements(INDICES[name]) for name in built)
    memory = max(2, experts // 4) * dims.weight_elements
    return max(1, memory // (copies * largest))


def _all() -> slice:
    return slice(None)


@dataclass(frozen=True)
class Slots:
    """Some experts and the slots in whose rows theirs are.

    Attributes:
        offsets: ``[E + 1]``; expert e owns ``[offsets[e], offsets[e + 1])``. Not read where
            ``of_experts`` is given.
        count: N.
        is_part: there are experts or slots beside them.
        experts: their places among all experts.
        rows: the slots' places among all slots.
        of_experts: how many each owns, and together all of them; None: nobody has read the offsets.
    """

    offsets: Tensor
    count: int
    is_part: bool = False
    experts: slice | list[int] = field(default_factory=_all)
    rows: slice = field(default_factory=_all)
    of_experts: list[int] | None = None

    @property
    def busy(self) -> Tensor:
        """Which experts have slots, ``[E]``."""
        return self.offsets[1:] > self.offsets[:-1]

    @property
    def owned(self) -> Tensor:
        """Which slots an expert owns, ``[N]``."""
        number = torch.arange(self.count, device=self.offsets.device)
        is_late = number >= self.offsets[0]
        is_early = number < self.offsets[-1]
        return is_late & is_early

    def clear(self, rows: Tensor) -> Tensor:
        """Rows ``[N, ...]``, zero where no expert owns the slot."""
        if self.of_experts is not None:
            return rows
        ones = [1] * (rows.dim() - 1)
        return torch.where(self.owned.view(-1, *ones), rows, 0)


def parts_of(call: LinearCall, size: int) -> Iterator[Slots]:
    """A call's experts, ``size`` at a time."""
    experts = call.num_experts
    for first in range(0, experts, size):
        last = min(first + size, experts)
        offsets = call.expert_offsets[first : last + 1]
        yield Slots(offsets, call.slots, size < experts, slice(first, last))


def around_gradients(
    call: BackwardCall, gradients: Callable[[Tensor], Gradients], activates: bool = False
) -> Backward:
    """Gradients of bias and activation, and of x by its own rows.

    Args:
        call: of the op.
        gradients: dz ``[N, F]`` -> those of slots ``[N, I]``, left, central, right; None where not
            needed.
        activates: it applies the activation's itself.
    """
    dz = call.grad
    if not activates:
        dz = ACTIVATION_GRADIENT[call.activation](dz, call.saved)
    dbias = None
    if call.need[4]:
        rows = Slots(call.expert_offsets, call.slots).clear(dz)
        widest = torch.promote_types(dz.dtype, torch.float32)
        dbias = rows.sum(0, dtype=widest).to(dz.dtype)
    dx = dleft = dcentral = dright = None
    if any(call.need_of_plan):
        dx, dleft, dcentral, dright = gradients(dz)
    if dx is not None and call.row_index is not None:
        if call.slot_of_token is None:  # by sorting: atomics would add in any order
            dx = dx.new_zeros(call.x.shape).index_put_((call.row_index,), dx, accumulate=True)
        else:
            sum_rows = kernel_for("dispatch_backward", dx.device, dx.dtype, call.backend)
            dx = sum_rows(DispatchBackwardCall(dx, call.slot_of_token, call.backend))
    dense = []
    for result in (dx, dleft, dcentral, dright, dbias):
        dense.append(dz.new_empty(0) if result is None else result.contiguous())
    dx, dleft, dcentral, dright, dbias = dense
    return dx, dleft, dcentral, dright, dbias


Call = TypeVar("Call", "ForwardCall", "BackwardCall")
_DENSE = (
    "expert_offsets",
    "bias",
    "row_index",
    "slot_of_token",
    "out_index",
    "gates",
    "grad",
    "h",
    "saved",
)


def prepared(call: Call, *more: str) -> Call:
    """The call with dense tensors except for x and the blocks, as far as ``more`` does not name
    them; the columns of x are contiguous."""
    changed: dict[str, Any] = {}
    for name in (*_DENSE, *more):
        tensor = getattr(call, name, None)
        if tensor is not None and not tensor.is_contiguous():
            changed[name] = tensor.contiguous()
    if call.x.stride(1) != 1 and call.x.shape[1] != 1:
        changed["x"] = call.x.contiguous()
    if changed:
        return replace(call, **changed)
    return call


# A kernel that multiplies rows by weights that it rebuilds on chip: call, rows, what it writes to,
# the pre-activation or None, and whether by the transposed weights.
Product = Callable[[Any, Tensor, Tensor, Tensor | None, bool], None]
# See `block_gradients`.
Times = Callable[["BackwardCall", Tensor, Tensor, bool, Slots], Tensor]


def fused_forward(call: ForwardCall, product: Product) -> Forward:
    """``(y, h, z)``, see `ForwardCall`. One launch."""
    y = call.x.new_empty(call.slots, call.out_features)
    h = y.new_empty(0)
    if not call.saves_z:
        product(call, call.x, y, None, False)
        return y, h, y.new_empty(0)
    z = torch.empty_like(y)
    product(call, call.x, y, z, False)
    return y, h, z


def fused_backward(call: BackwardCall, product: Product, times: Times) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""

    def gradients(dz: Tensor) -> Gradients:
        dx = None
        if call.need[0]:
            dx = dz.new_empty(call.slots, call.in_features)
            product(call, dz, dx, None, True)
        return dx, *block_gradients(call, dz, times)

    return around_gradients(call, gradients)


def block_gradients(
    call: BackwardCall, dz: Tensor, times: Times
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of left, central and right that are needed, by a kernel that keeps the gradient of
    a weight on chip.

    It multiplies ``dW_e = x^T dz`` by right, which gives the gradient of left · central, or by left
    · central, which gives the gradient of right. The rest is shared products. Some experts' left ·
    central exist at a time.

    Args:
        call: of the op.
        dz: ``[N, F]``.
        times: function of call, dz, right ``[E, b, iR, jR]`` or left · central ``[E, iL, jL, iC,
            jC, b]`` of some experts, whether it is the latter, and their slots; returns the product
            in the shape of the other one.
    """
    d = call.dims
    _, need_left, need_central, need_right = call.need_of_plan
    lefts: list[Tensor] = []
    centrals: list[Tensor] = []
    rights: list[Tensor] = []
    if not (need_left or need_central or need_right):
        return None, None, None
    central = call.central.reshape(d.a, -1)
    size = experts_at_once(d, ("LC",), call.num_experts, copies=1)
    for slots in parts_of(call, size):
        busy = slots.busy[:, None, None, None]
        left = torch.where(busy, call.left[slots.experts], 0)
        left = left.reshape(-1, d.a)
        if need_left or need_central:
            half = times(call, dz, call.right[slots.experts], False, slots)
            half = half.view(len(left), -1)
            if need_left:
                lefts.append(half @ central.T)
            if need_central:
                centrals.append(float32_mm(left.T, half))
        if need_right:
            half = left @ central
            half = half.view(-1, d.iL, d.jL, d.iC, d.jC, d.b)
            rights.append(times(call, dz, half, True, slots))
    dleft = dcentral = dright = None
    if need_left:
        dleft = torch.cat(lefts).view(call.left.shape)
    if need_central:
        total = torch.stack(centrals).sum(0)
        dcentral = total.to(dz.dtype).view(call.central.shape)
    if need_right:
        dright = torch.cat(rights).to(dz.dtype)
    return dleft, dcentral, dright
