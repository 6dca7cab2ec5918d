"""`grouped_mpo_linear`: each expert's MPO product on its slots; `mpo_linear` is the single-expert
case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import BACKENDS, kernel_for, nothing, places_rows
from mpoe_kernels.checks import check_choice, describe
from mpoe_kernels.contract import ALL_GRADIENTS
from mpoe_kernels.contract.autotune import chosen_for
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.cuda_library import CUDA_OPS
from mpoe_kernels.define import define_op, needs_gradients, requested_backend
from mpoe_kernels.linear import eager, native
from mpoe_kernels.linear import triton as on_triton
from mpoe_kernels.linear.cuda import LinearKernels
from mpoe_kernels.linear.gradients import Backward, Forward
from mpoe_kernels.mpo.fold import MPOBlocks, check_blocks
from mpoe_kernels.routing.op import CombineCall
from mpoe_kernels.signatures import as_index

# Activation names of users and Hugging Face configs -> the formula.
ACTIVATIONS = {
    "none": "none",
    "linear": "none",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_CUDA = LinearKernels(CUDA_OPS)
# Backend -> how it computes a contraction, and the reasons why it cannot.
CANDIDATES = {
    "native": (native.candidates, native.contraction_reasons),
    "eager": (eager.candidates, nothing),
    "triton": (on_triton.candidates, on_triton.contraction_reasons),
    "cuda": (_CUDA.candidates, _CUDA.contraction_reasons),
}
for _name, (_candidates, _reasons) in CANDIDATES.items():
    BACKENDS[_name].candidates = _candidates
    BACKENDS[_name].contraction_reasons = _reasons


@dataclass
class LinearCall:
    """One call of `mpoe_kernels.grouped_mpo_linear`, forward or backward.

    Attributes:
        x: ``[T, I]``; without ``row_index`` ``[N, I]``, in slot order.
        left, central, right: folded blocks ``[E, iL, jL, a]``, ``[a, iC, jC, b]``, ``[E, b, iR,
            jR]``, dtype of x.
        expert_offsets: integers ``[E + 1]``.
        bias: ``[F]`` or None.
        row_index: int64 ``[N]`` or None.
        in_features, out_features: I and F.
        activation: a value of `ACTIVATIONS`.
        strategy: one of `mpoe_kernels.contract.STRATEGIES`; ``"auto"`` until `chosen_for` has
            chosen.
        backend: the requested backend, or ``"auto"``.
    """

    x: Tensor
    left: Tensor
    central: Tensor
    right: Tensor
    expert_offsets: Tensor
    bias: Tensor | None
    row_index: Tensor | None
    in_features: int
    out_features: int
    activation: str
    strategy: str
    backend: str

    @cached_property
    def dims(self) -> BlockDims:
        """Sizes of the blocks."""
        return BlockDims.of_blocks(
            self.left, self.central, self.right, self.in_features, self.out_features
        )

    @property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """left, central, right."""
        return self.left, self.central, self.right

    @property
    def num_experts(self) -> int:
        """E."""
        return self.left.shape[0]

    @property
    def slots(self) -> int:
        """N."""
        if self.row_index is None:
            return self.x.shape[0]
        return self.row_index.shape[0]


@dataclass
class ForwardCall(LinearCall):
    """A forward pass. Its kernel returns ``(y [N, F], h, z)``; h and z are empty unless a backward
    will need them.

    Attributes:
        save: whether a backward may follow.
        slot_of_token: for the backward, or with ``out_index``.
        out_index: int64 ``[N]``, a permutation: the row of y to which each slot is scattered, times
            its gate; empty slots write zeros. Never with ``save``, and only for backends that place
            rows; `mpo_ffn` alone asks for it.
        gates: float32 ``[N]`` by row of y, with ``out_index``.
    """

    save: bool
    slot_of_token: Tensor | None = None
    out_index: Tensor | None = None
    gates: Tensor | None = None

    @cached_property
    def saves_h(self) -> bool:
        """Whether the strategy is ``separable`` and h, the rows ``[N jC, b]`` after its central
        step, is saved.

        The rule does not depend on slot counts, so it also works for fakes and before one is
        chosen.
        """
        is_separable = (
            self.strategy in ("auto", "separable")
            and self.left.shape[2] == self.right.shape[2] == 1
        )
        return self.save and is_separable

    @property
    def around(self) -> tuple[Tensor | None, Tensor | None, str, Tensor | None, Tensor | None]:
        """What surrounds the product of rows and weights: row_index, bias, activation, out_index,
        gates."""
        return self.row_index, self.bias, self.activation, self.out_index, self.gates

    @property
    def saves_z(self) -> bool:
        """Whether z, the pre-activation ``[N, F]``, is saved: the gradient of relu reads y; without
        an activation neither is read."""
        return self.save and self.activation not in ("none", "relu")


@dataclass
class BackwardCall(LinearCall):
    """A backward pass. Its kernel returns ``(dx, dleft, dcentral, dright, dbias)``; gradients that
    are not needed are empty.

    Attributes: grad: ``[N, F]``. h: from the forward. saved: y for relu, z for other activations.
        need: which of the results. slot_of_token: int64 ``[T, K]`` or None, the slots that read
        each row of x; -1: none.
    """

    grad: Tensor
    h: Tensor
    saved: Tensor
    need: list[bool]
    slot_of_token: Tensor | None = None
    around = None, None, "none", None, None  # see `ForwardCall`

    @property
    def need_of_plan(self) -> tuple[bool, bool, bool, bool]:
        """All except the bias's, which no contraction computes."""
        x, left, central, right, _ = self.need
        return x, left, central, right

    @property
    def saved_h(self) -> Tensor | None:
        """h, if the strategy reads it and the forward saved it."""
        if self.strategy == "separable" and self.h.numel():
            return self.h
        return None


def _forward_kernel(call: ForwardCall) -> Forward:
    candidate = chosen_for("grouped_mpo_linear", call, call.slots, ALL_GRADIENTS, call.saves_h)
    if call.out_index is None or places_rows(candidate.backend):
        return candidate.run(call)
    assert call.gates is not None, "out_index comes with gates"
    assert call.slot_of_token is not None, "and with the slots"
    y, h, z = candidate.run(replace(call, out_index=None, gates=None))
    where = call.expert_offsets, call.out_index, call.slot_of_token
    combine = kernel_for("combine", y.device, y.dtype, call.backend)
    return combine(CombineCall(y, *where, call.gates[:, None], call.backend)), h, z


def _forward_fake(call: ForwardCall) -> Forward:
    x = call.x
    central = call.central
    slots = call.slots
    y = x.new_empty(slots, call.out_features)
    h = x.new_empty(0)
    z = x.new_empty(0)
    if call.saves_h:
        h = x.new_empty(slots * central.shape[2], central.shape[3])
    if call.saves_z:
        z = torch.empty_like(y)
    return y, h, z


def _backward_kernel(call: BackwardCall) -> Backward:
    op = "grouped_mpo_linear_backward"
    candidate = chosen_for(op, call, call.slots, call.need_of_plan, False)
    return candidate.run(call)


def _backward_fake(call: BackwardCall) -> Backward:
    gradients = []
    for tensor, needed in zip((call.x, *call.blocks, call.bias), call.need, strict=True):
        gradient = call.grad.new_empty(0)
        if needed and tensor is not None:
            gradient = tensor.new_empty(tensor.shape)
        gradients.append(gradient)
    dx, dleft, dcentral, dright, dbias = gradients
    return dx, dleft, dcentral, dright, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    tensors = (*inputs[:7], inputs[13])
    ctx.settings = inputs[7:12]
    activation = inputs[9]
    y, h, z = output
    ctx.set_materialize_grads(False)
    # relu's backward reads the output, other activations' the pre-activation; without an activation
    # neither is needed.
    ctx.save_for_backward(*tensors, h, y if activation == "relu" else z)


def _autograd(
    ctx: Any, grad: Tensor | None, _grad_h: Any, _grad_z: Any
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    needs = ctx.needs_input_grad
    need = [needs[0], needs[1], needs[2], needs[3], needs[5]]
    *tensors, slot_of_token, h, saved = ctx.saved_tensors
    grads = backward_op(*tensors, *ctx.settings, grad.contiguous(), h, saved, need, slot_of_token)
    dx, dleft, dcentral, dright, dbias = (
        g if n else None for g, n in zip(grads, need, strict=True)
    )
    return dx, dleft, dcentral, dright, None, dbias, *(None,) * 10


backward_op = define_op(
    "grouped_mpo_linear_backward", BackwardCall, 5, _backward_fake, kernel=_backward_kernel
)
forward_op = define_op(
    "grouped_mpo_linear",
    ForwardCall,
    3,
    _forward_fake,
    kernel=_forward_kernel,
    setup_context=_setup,
    backward=_autograd,
    autocast=("x", "left", "central", "right", "bias"),
)


def grouped_mpo_linear(
    x: Tensor,
    blocks: MPOBlocks,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    row_index: Tensor | None = None,
    slot_of_token: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor:
    """``y[s] = activation(x[row_index[s]] @ W_e + bias)`` for the slots s of every expert e.

    On CPUs no more than two experts' rebuilt weights exist at any time; on GPUs, where no fused
    kernel keeps them on chip, those of a quarter of the experts, or two. None is saved for
    backward.

    Args:
        x: ``[T, I]`` with ``row_index``, else ``[N, I]`` already in slot order; floating.
        blocks: folded cores of E experts, dtype of x (any floating dtype under autocast).
        expert_offsets: int32 ``[E + 1]``, from 0 to N at most, non-decreasing; expert e owns slots
            ``[offsets[e], offsets[e + 1])``. Values are checked on the CPU, also those of
            ``row_index``; GPU kernels do not check them, because that would wait for the device:
            with invalid values the result is undefined.
        bias: ``[F]``, shared by the experts.
        row_index: int ``[N]``, the row of x that each slot reads.
        slot_of_token: int ``[T, K]``, the inverse of ``row_index`` as returned by `route`: the
            slots that read each row of x, -1 for none; slots from ``expert_offsets[-1]`` on may be
            left out. With it a GPU sums gradients of x without sorting ``row_index``; it has no
            other use.
        activation: ``None``, ``"relu"``, ``"gelu"``, ``"gelu_new"`` (tanh form), ``"silu"``.
        backend: name of a backend; default: the one set by `use_backend`, else the one that is
            chosen by timing.
        strategy: force one strategy for forward and backward, instead of the choice by one timing:
            ``"rebuild"``, ``"half_left"``, ``"half_right"``, ``"chain"``, ``"separable"``.

    Returns:
        ``[N, F]``; rows from ``expert_offsets[-1]`` on are zero, also in gradients. Differentiable
        in x, the blocks and the bias; gradients that are not needed are not computed. Second
        derivatives and vmap are refused.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, by name.
        BackendError: the named backend, or every backend, cannot run this; with reasons.
    """
    check_blocks("blocks", blocks)
    if activation is None:
        activation = "none"
    check_choice("activation", activation, ACTIVATIONS)
    y, _, _ = forward_op(
        x,
        blocks.left,
        blocks.central,
        blocks.right,
        expert_offsets,
        bias,
        as_index("row_index", row_index),
        blocks.in_features,
        blocks.out_features,
        ACTIVATIONS[activation],
        "auto" if strategy is None else strategy,
        requested_backend(backend),
        needs_gradients((x, blocks.left, blocks.central, blocks.right, bias)),
        as_index("slot_of_token", slot_of_token),
    )
    return y


def mpo_linear(
    x: Tensor,
    blocks: MPOBlocks,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
    strategy: str | None = None,
) -> Tensor:
    """``activation(x @ W + bias)`` for a single MPO weight.

    Args:
        x: ``[..., I]``, floating.
        blocks: folded cores with E = 1.
        bias: ``[F]``.
        activation, backend, strategy: as in `grouped_mpo_linear`, which also lists the errors
            raised.

    Returns:
        ``[..., F]``.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise ValueError(f"x must be a tensor [..., I]; got {describe(x)}")
    if isinstance(blocks, MPOBlocks) and blocks.num_experts != 1:
        raise ValueError(f"blocks must hold one expert for mpo_linear; got {blocks.num_experts}")
    rows = x.reshape(-1, x.shape[-1])
    offsets = torch.arange(2, dtype=torch.int32, device=x.device) * rows.shape[0]
    y = grouped_mpo_linear(
        rows, blocks, offsets, bias, activation=activation, backend=backend, strategy=strategy
    )
    return y.view(*x.shape[:-1], blocks.out_features)
