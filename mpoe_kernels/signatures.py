"""What the ops take, and its check: of a public function's call before it starts, of a raw op
``torch.ops.mpoe.*`` behind PyTorch's dispatcher.

A table instead of checks in every function and kernel: whoever made a call, a kernel sees tensors
of these dtypes and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends import check_backend
from mpoe_kernels.checks import (
    AUTOCAST_DEVICES,
    FLOATING,
    LOWERED,
    PLAIN,
    check_choice,
    check_dense,
    check_device,
    check_integer,
    check_memory,
    check_plain_memory,
    describe,
)
from mpoe_kernels.contract import STRATEGIES
from mpoe_kernels.contract.orders import X_AXES, Y_AXES

# Offsets are int32; the bound on experts keeps the table of counts from filling the memory.
MOST_PAIRS = 2**31 - 1
MOST_EXPERTS = 2**20
FORMULAS = ("none", "relu", "gelu", "gelu_tanh", "gelu_new", "silu")

_DTYPES: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "f": ("of a floating dtype", FLOATING),
    "i": ("int32 or int64", (torch.int32, torch.int64)),
    "b": ("bool", (torch.bool,)),
}
_SLOTS = "expert_offsets:i E+1; token_of_slot:i N; slot_of_token:i T K"
_LINEAR = (
    "x:f T I; left:x E iL jL a; central:x a iC jC b; right:x E b iR jR; expert_offsets:i "
    "E+1; bias:x F; row_index:i N"
)
_HIDDEN = (
    "u:f T F; gates:f T K; top_k_index:i T K; right:u E G b b; left:u E G b b; bias:u E F; "
    "u_gate:u T F; right_gate:u E G b b"
)
_NEURONS = (
    "x:f T I; gates:f T K; top_k_index:i T K; up:x E m I; down:x E m F; bias:x E m; gate_up:x E m I"
)
_TABLE = "ids:i T; left:f 1 iL jL a; central:left a iC jC b; right:left 1 b iR jR"
# ``name:dtype axes``: a letter of `_DTYPES` or the argument whose dtype it is; equal axes have
# equal sizes, ``*`` any.
ARGUMENTS = {
    "route": "top_k_index:i T K; token_mask:b T",
    "dispatch": f"{_SLOTS}; x:f T I",
    "dispatch_backward": "grad:f N I; slot_of_token:i T K",
    "combine": f"{_SLOTS}; y_sorted:f N F; top_k_weights:f T K",
    "combine_backward": "grad:f T F; y_sorted:grad N F; token_of_slot:i N; slot_of_token:i T K; "
    "top_k_weights:f T K",
    "grouped_mpo_linear": f"{_LINEAR}; slot_of_token:i P K; out_index:i N; gates:f N",
    "grouped_mpo_linear_backward": f"{_LINEAR}; grad:x N F; h:x *; saved:x *; slot_of_token:i P K",
    "hidden_experts": _HIDDEN,
    "hidden_experts_backward": f"{_HIDDEN}; grad:u T F",
    "neuron_experts": _NEURONS,
    "neuron_experts_backward": f"{_NEURONS}; grad:x T F",
    "mpo_embedding": _TABLE,
    "mpo_embedding_backward": f"{_TABLE}; grad:left T F",
}
_OF_ROUTING = ("route", "dispatch", "dispatch_backward", "combine", "combine_backward")
# How many gradients there are to need.
_GRADIENTS = {
    "grouped_mpo_linear_backward": 5,
    "hidden_experts_backward": 7,
    "neuron_experts_backward": 6,
    "mpo_embedding_backward": 3,
}
# Integers that are sizes of axes.
_SIZES = {"in_features": "I", "out_features": "F", "num_embeddings": "V", "embedding_dim": "F"}


# Axes of a weight, and the axes of its blocks that make them.
_PARTS = {"I": X_AXES, "V": X_AXES, "F": Y_AXES}
# Axes that may have no element: tokens, slots, choices, rows of routing.
_MAY_BE_EMPTY = {"T", "N", "K", "P"}


class _Argument(NamedTuple):
    """An entry of `ARGUMENTS`.

    Attributes:
        name, dtype: as there.
        text: its axes as there.
        axes: their names, and how much longer each is; without ``*``.
        is_open: ``*`` follows.
    """

    name: str
    dtype: str
    text: str
    axes: tuple[tuple[str, int], ...]
    is_open: bool


@lru_cache
def _arguments(op: str) -> tuple[_Argument, ...]:
    arguments = []
    for part in filter(None, ARGUMENTS.get(op, "").split("; ")):
        first, *axes = part.split()
        name, dtype = first.split(":")
        sized = []
        for axis in axes:
            if axis != "*":
                sized.append((axis.removesuffix("+1"), int(axis.endswith("+1"))))
        text = ", ".join(axes)
        is_open = axes[-1] == "*"
        arguments.append(_Argument(name, dtype, text, tuple(sized), is_open))
    return tuple(arguments)


def as_index(name: str, value: Any) -> Any:
    """int64 of int32; anything else as it is, which the op may refuse."""
    if not isinstance(value, Tensor) or value.dtype != torch.int32:
        return value
    check_plain_memory(name, value)
    return value.long()


def check_tensors(names: Sequence[str], values: Sequence[Any], required: Collection[str]) -> None:
    """Refuse what the dispatcher lets through: ``None`` (a TypeError) in place of a tensor that
    must be there."""
    for name, value in zip(names, values, strict=False):
        if name in required and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {describe(value)}")


def check_signature(
    op: str,
    names: Sequence[str],
    values: Sequence[Any],
    required: Collection[str],
    with_memory: bool = True,
) -> None:
    """Refuse arguments of an op that do not fit its entry in `ARGUMENTS`, or each other;
    ``required`` are tensors. ``with_memory``: also those whose memory does not hold their values.

    Raises:
        TypeError, ValueError: the argument, what was expected, and what was given.
    """
    check_tensors(names, values, required)
    given = dict(zip(names, values, strict=False))
    check = check_dense
    if with_memory:
        check = check_memory
    first = next(name for name in names if name in required)
    device = given[first].device
    for name, value in given.items():
        if isinstance(value, Tensor):
            check(name, value)
            if value.device != device:
                check_device(first, given[first], **{name: value})
    sizes: dict[str, int] = {}
    for name, axis in _SIZES.items():
        if name in given:
            sizes[axis] = check_integer(name, given[name], 1)
    for argument in _arguments(op):
        value = given.get(argument.name)
        if value is not None:
            check_tensors([argument.name], [value], [argument.name])
            _check_tensor(argument, value, given, sizes)
        elif argument.name == "row_index":
            sizes["N"] = sizes["T"]
    _check_others(op, given, sizes)


_ACCEPTED: set[tuple[Any, ...]] = set()  # what `check_once` knows of calls
MOST_ACCEPTED = 4096
_VALUES = (int, float, bool, str, type(None))


def check_once(
    op: str, names: Sequence[str], values: Sequence[Any], required: Collection[str]
) -> None:
    """`check_signature` without memory, but of a call like an earlier one nothing is checked again:
    to compare what the check looks at takes a fraction of its time, which a call of few tokens
    would notice."""
    facts = [op, *map(torch.is_autocast_enabled, AUTOCAST_DEVICES)]
    for value in values:
        kind = type(value)
        facts.append(kind)
        if kind in _VALUES:
            facts.append(value)
        elif kind in PLAIN and not value.is_nested:
            facts += (value.dtype, value.device, value.layout, value.shape)
        else:
            check_signature(op, names, values, required, with_memory=False)
            return
    known = tuple(facts)
    if known in _ACCEPTED:
        return
    check_signature(op, names, values, required, with_memory=False)
    if len(_ACCEPTED) >= MOST_ACCEPTED:
        _ACCEPTED.clear()
    _ACCEPTED.add(known)


def _check_tensor(
    argument: _Argument, value: Tensor, given: dict[str, Any], sizes: dict[str, int]
) -> None:
    """Bind the axes that have no size yet."""
    shape = value.shape
    axes = argument.axes
    fits = len(shape) == len(axes)
    if argument.is_open:
        fits = len(shape) >= len(axes)
    if fits:
        for (axis, more), size in zip(axes, shape, strict=False):
            # Offsets are of at least one expert.
            first = size
            if more:
                first = max(size - more, 1)
            wanted = 1
            if axis != "1":
                wanted = sizes.setdefault(axis, first)
            fits = fits and size == wanted + more
    if fits and _has_dtype(argument, value, given):
        return
    words = f"of {argument.dtype}'s dtype"
    hint = ""
    if argument.dtype in _DTYPES:
        words = _DTYPES[argument.dtype][0]
    elif fits:
        name = str(given[argument.dtype].dtype).removeprefix("torch.")
        advice = ", or run under autocast"
        if _is_cast(value):
            advice = "; autocast leaves float64"
        hint = f" ({name}{advice})"
    known = ""
    for axis in dict.fromkeys(axis for axis, _ in axes):
        if axis in sizes:
            known += f", {axis} = {sizes[axis]}"
    error = TypeError if fits else ValueError
    raise error(
        f"{argument.name} must be {words} [{argument.text}]{known}{hint}; got {describe(value)}"
    )


def _has_dtype(argument: _Argument, value: Tensor, given: dict[str, Any]) -> bool:
    kinds = _DTYPES.get(argument.dtype)
    if kinds is not None:
        return value.dtype in kinds[1]
    wanted = given[argument.dtype].dtype
    if value.dtype == wanted:
        return True
    return _is_cast(value) and {value.dtype, wanted} <= LOWERED


def _is_cast(value: Tensor) -> bool:
    """Whether autocast applies to a tensor."""
    device_type = value.device.type
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def _check_others(op: str, given: dict[str, Any], sizes: dict[str, int]) -> None:
    if "backend" in given:
        check_backend(given["backend"])
    if "num_experts" in given:
        check_integer("num_experts", given["num_experts"], 1, MOST_EXPERTS)
    if given.get("capacity") is not None:
        check_integer("capacity", given["capacity"], 1)
    if op == "route" and (sizes["K"] < 1 or sizes["T"] * sizes["K"] > MOST_PAIRS):
        raise ValueError(
            f"top_k_index must be [T, K] with K >= 1 and T * K <= {MOST_PAIRS}; got "
            f"{describe(given['top_k_index'])}"
        )
    if "activation" in given:
        check_choice("activation", given["activation"], FORMULAS)
    if "strategy" in given:
        check_choice("strategy", given["strategy"], (*STRATEGIES, "auto"))
    if "iL" in sizes:
        for axis, parts in _PARTS.items():
            whole = math.prod(sizes[part] for part in parts)
            if sizes.get(axis, 0) > whole:
                raise ValueError(
                    f"{axis} must be at most {'*'.join(parts)} = {whole}; got {sizes[axis]}"
                )
    if op not in _OF_ROUTING:
        for axis, size in sizes.items():
            if size < 1 and axis not in _MAY_BE_EMPTY:
                raise ValueError(f"{axis} must be at least 1; got {sizes}")
    if "G" in sizes:
        # Not by divmod, which sizes that torch.jit.trace records do not have.
        groups = sizes["F"] // sizes["b"]
        if sizes["F"] % sizes["b"] or sizes["G"] not in (1, groups):
            raise ValueError(
                f"right must be [E, G, b, b] with b a divisor of F = {sizes['F']} and G = 1 or "
                f"F / b; got {describe(given['right'])}"
            )
    if given.get("out_index") is not None:
        for name in ("gates", "slot_of_token"):
            if given.get(name) is None:
                raise ValueError(f"{name} must be given with out_index; got None")
        if given["slot_of_token"].numel() != given["gates"].numel():
            raise ValueError(
                f"gates must be one for every entry of slot_of_token, which is "
                f"{describe(given['slot_of_token'])}; got {describe(given['gates'])}"
            )
    elif op == "grouped_mpo_linear" and given.get("slot_of_token") is not None:
        is_indexed = given.get("row_index") is not None
        if not is_indexed or sizes["P"] != sizes["T"]:
            wanted = f"[T, K] with T = {sizes['T']}" if is_indexed else "None without row_index"
            raise ValueError(
                f"slot_of_token must be {wanted}; got {describe(given['slot_of_token'])}"
            )
    if (given.get("u_gate") is None) != (given.get("right_gate") is None):
        raise ValueError("u_gate and right_gate must be given together; got one of them")
    saved = given.get("saved")
    if saved is not None and given["activation"] != "none" and saved.shape != given["grad"].shape:
        raise ValueError(f"saved must be [N, F], as grad is; got {describe(saved)}")
    need = given.get("need")
    gradients = _GRADIENTS.get(op)
    if need is not None and len(need) != gradients:
        raise ValueError(f"need must name every gradient, {gradients}; got {need}")
