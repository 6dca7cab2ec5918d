"""A mixture's native calls without the ops around them: for passes that nobody differentiates, compiles or watches.

While decoding, the ops of `route`, `grouped_mpo_linear` and `combine` (checks, dispatch) take longer than their
kernels. Whoever calls these functions has asked `mpoe_kernels.routing.gating.can_route_natively`. The kernels and
their order are those of the ops, so the results are the same to the last bit.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.contract import ALL_GRADIENTS
from mpoe_kernels.contract.autotune import chosen_for
from mpoe_kernels.linear.call import ForwardCall
from mpoe_kernels.linear.native.kernels import fixed_arguments
from mpoe_kernels.linear.op import ACTIVATIONS
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.native_library import (
    DTYPES,
    CombineArguments,
    LinearArguments,
    RouteArguments,
    RouterArguments,
    call_native,
)
from mpoe_kernels.registry import BACKENDS, requested_backend
from mpoe_kernels.routing import native
from mpoe_kernels.routing.call import CombineCall, RouteCall
from mpoe_kernels.routing.gating import Gating, native_gating

_ALIGNED = 64


class Slots(NamedTuple):
    """The tensors of a `Routing`, not checked again."""

    expert_offsets: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor


class Rule(NamedTuple):
    """How a router distributes tokens.

    Attributes:
        top_k, raw: as in `native_gating`.
        capacity: as in `mpoe_kernels.route`.
    """

    top_k: int
    raw: bool
    capacity: int | None


def native_slots(x: Tensor, weight: Tensor, rule: Rule, token_mask: Tensor | None) -> tuple[Gating, Slots]:
    """What a router of weight ``[E, I]`` decides for tokens ``x [T, I]``, and the slots.

    Args:
        x, weight: as in `native_gating`.
        rule: see `Rule`.
        token_mask: as in `mpoe_kernels.route`.
    """
    gating = native_gating(x, weight, rule.top_k, rule.raw)
    call = RouteCall(gating.top_k_index, weight.shape[0], rule.capacity, token_mask, "native")
    return gating, Slots(*native.route(call))


def native_combine(rows: Tensor, slots: Slots, gates: Tensor) -> Tensor:
    """``[N, F] -> [T, F]``, as `mpoe_kernels.combine`."""
    return native.combine(CombineCall(rows, *slots, gates, "native"))


class Chains(NamedTuple):
    """A feed-forward network's projections, ``down(activation(up x))`` or ``down(activation(gate x) * up x)``.

    Attributes:
        up, down, gate: folded blocks; gate may be None.
        up_bias, down_bias: ``[hidden]`` and ``[I]``, or None.
        activation: see `mpoe_kernels.grouped_mpo_linear`.
    """

    up: MPOBlocks
    down: MPOBlocks
    gate: MPOBlocks | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    @property
    def of_rows(self) -> tuple[tuple[MPOBlocks, Tensor | None, str], ...]:
        """The projections of tokens, with their biases and formulas: the gate, if there is one, then up."""
        formula = ACTIVATIONS[self.activation]
        if self.gate is None:
            return ((self.up, self.up_bias, formula),)
        return (self.gate, None, formula), (self.up, self.up_bias, "none")


def _call(
    x: Tensor, blocks: MPOBlocks, offsets: Tensor, bias: Tensor | None, index: Tensor | None, formula: str, backend: str
) -> ForwardCall:
    sizes = (blocks.in_features, blocks.out_features, formula, "auto", backend, False)
    return ForwardCall(x, blocks.left, blocks.central, blocks.right, offsets, bias, index, *sizes)


def plain_ffn(x: Tensor, slots: Slots, gates: Tensor, chains: Chains, backend: str | None) -> Tensor:
    """As `mpoe_kernels.mpo_ffn`: tokens ``x [T, I] -> [T, I]``."""
    asked = requested_backend(backend)

    def product(rows: Tensor, blocks: MPOBlocks, bias: Tensor | None, index: Tensor | None, formula: str) -> Tensor:
        call = _call(rows, blocks, slots.expert_offsets, bias, index, formula, asked)
        candidate, call = chosen_for("grouped_mpo_linear", call, ALL_GRADIENTS, False)
        y: Tensor = candidate.run(call)[0]
        return y

    hidden = None
    for blocks, bias, formula in chains.of_rows:
        rows = product(x, blocks, bias, slots.token_of_slot, formula)
        hidden = rows if hidden is None else hidden * rows
    assert hidden is not None
    return native_combine(product(hidden, chains.down, chains.down_bias, None, "none"), slots, gates)


def circumstances(backend: str | None) -> tuple[Any, ...]:
    """Everything besides sizes that a `OneCall` depends on."""
    fixed = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return requested_backend(backend), *BACKENDS.values(), *fixed


class OneCall:
    """A mixture's forward for a fixed number of tokens as one native call, whose structs are filled in advance.

    Args:
        x: ``[T, I]``, for its sizes and dtype.
        weight: of the router, ``[E, I]``, for its dtype.
        rule: see `Rule`.
        chains: must stay unchanged in memory.
        backend: as in `plain_ffn`.

    Attributes:
        is_possible: whether the planner chooses native kernels for every projection, and sizes and layouts fit.
    """

    def __init__(self, x: Tensor, weight: Tensor, rule: Rule, chains: Chains, backend: str | None) -> None:
        (tokens, features), experts, (top_k, raw, capacity) = x.shape, weight.shape[0], rule
        slots = tokens * top_k
        self._kept = chains
        hidden = slots * chains.up.out_features * x.element_size()
        sizes = {
            "logits": 4 * tokens * experts,
            "gates": 4 * slots,
            "index": 8 * slots,
            "offsets": 4 * (experts + 1),
            "token_of_slot": 8 * slots,
            "slot_of_token": 8 * slots,
            "up": hidden,
            "gate": hidden * (chains.gate is not None),
            "down": slots * features * x.element_size(),
        }
        # What the parts hand to each other lies in one piece of memory, each array from a multiple of 64 bytes on.
        rounded = [-(-size // _ALIGNED) * _ALIGNED for size in sizes.values()]
        self._at, self._bytes = dict(zip(sizes, accumulate(rounded, initial=0), strict=False)), sum(rounded)
        dtype = DTYPES[x.dtype]
        self._router = RouterArguments(dtype, DTYPES[weight.dtype], tokens, features, experts, top_k, raw)
        self._route = RouteArguments(tokens, top_k, experts, -1 if capacity is None else capacity)
        self._combine = CombineArguments(dtype, tokens, top_k, slots, features)
        index = x.new_empty(slots, dtype=torch.int64)  # for its size
        found = [
            self._linear(_call(x, *part[:1], index, part[1], index, part[2], requested_backend(backend)))
            for part in (*chains.of_rows, (chains.down, chains.down_bias, "none"))
        ]
        self._linears = [arguments for arguments in found if arguments is not None]
        fits = features == chains.up.in_features == chains.down.out_features and experts == chains.up.num_experts
        self.is_possible = fits and len(self._linears) == len(found)

    @staticmethod
    def _linear(call: ForwardCall) -> LinearArguments | None:
        """What does not change of a projection's arguments; None if another backend is chosen, or memory would have to
        be copied."""
        candidate, call = chosen_for("grouped_mpo_linear", call, ALL_GRADIENTS, False)
        dense = all(each.is_contiguous() for each in (*call.blocks, call.bias) if each is not None)
        if (
            candidate.backend != "native"
            or not dense
            or (call.bias is not None and len(call.bias) != call.out_features)
        ):
            return None
        arguments = fixed_arguments(call)
        arguments.slots, arguments.offset_bytes = call.slots, 4
        arguments.left, arguments.central, arguments.right = (block.data_ptr() for block in call.blocks)
        if call.bias is not None:
            arguments.bias = call.bias.data_ptr()
        return arguments

    def __call__(self, x: Tensor, weight: Tensor, token_mask: Tensor | None) -> Tensor:
        """Tokens ``x [T, I] -> [T, I]``; ``token_mask`` as in `mpoe_kernels.route`."""
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        scratch = x.new_empty(self._bytes + _ALIGNED, dtype=torch.uint8)
        start = -(-scratch.data_ptr() // _ALIGNED) * _ALIGNED
        at = {name: start + offset for name, offset in self._at.items()}
        router, route, combine = (
            type(each).from_buffer_copy(each) for each in (self._router, self._route, self._combine)
        )
        *of_rows, down = (LinearArguments.from_buffer_copy(each) for each in self._linears)
        gate, up = of_rows if len(of_rows) == 2 else (None, of_rows[0])
        router.x, router.weight = x.data_ptr(), weight.data_ptr()
        router.logits, router.gates = at["logits"], at["gates"]
        router.index = route.index = at["index"]
        mask = None if token_mask is None else token_mask.contiguous()
        route.token_mask = None if mask is None else mask.data_ptr()
        route.offsets = up.offsets = down.offsets = at["offsets"]
        route.token_of_slot = up.rows = at["token_of_slot"]
        route.slot_of_token = combine.slot_of_token = at["slot_of_token"]
        up.tokens, up.x, up.y = x.shape[0], x.data_ptr(), at["up"]
        if gate is not None:
            gate.tokens, gate.x, gate.y = x.shape[0], x.data_ptr(), at["gate"]
            gate.offsets, gate.rows = at["offsets"], at["token_of_slot"]
        down.tokens, down.x, down.y = down.slots, at["up"], at["down"]
        combine.gates, combine.rows, combine.out = at["gates"], at["down"], y.data_ptr()
        call_native("mpoe_routed_ffn", router, route, up, gate, down, combine)
        return y
