"""A strategy as launches: build what it builds for a few experts, let x meet it, and take gradients in reverse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpoe_kernels.backends.triton.cost import experts_at_once
from mpoe_kernels.backends.triton.launch import block_gradient, merge_blocks, rows_times_block
from mpoe_kernels.backends.triton.operands import Operand, activations, block, scratch
from mpoe_kernels.planner.orders import BlockDims, recipe

Merge = tuple[str, str, str]


def operands_of(left: Tensor, central: Tensor, right: Tensor) -> dict[str, Operand]:
    return {"L": block(left, "L"), "C": block(central, "C"), "R": block(right, "R")}


def chunks(dims: BlockDims, built: tuple[str, ...], experts: int) -> Iterator[tuple[int, int]]:
    """Ranges of experts whose built weights, and as many again for gradients, fit two whole weights."""
    size = experts_at_once(dims, built) or max(experts, 1)
    for first in range(0, experts, size):
        yield first, min(first + size, experts)


def build(
    blocks: dict[str, Operand],
    merges: tuple[Merge, ...],
    dims: BlockDims,
    offsets: Tensor,
    keep: bool,
    last: bool = True,
) -> dict[str, Operand]:
    """Blocks and what is built from them.

    Args:
        keep: also keep what was only built on the way.
        last: also build the last result.
    """
    built = dict(blocks)
    for position, (result, first, second) in enumerate(merges if last else merges[:-1]):
        out = scratch(result, offsets.shape[0] - 1, dims, built[first].data)
        built[result] = merge_blocks(built[first], built[second], out, dims, offsets)
        if not keep and position > 0:
            for name in (first, second):
                if name not in blocks:
                    del built[name]
    return built


def _experts(blocks: dict[str, Operand], first: int, last: int) -> dict[str, Operand]:
    return {name: operand.experts(first, last) for name, operand in blocks.items()}


def x_rows(x: Tensor, dims: BlockDims) -> Operand:
    return activations(x, ("iL", "iC", "iR"), dims, dims.in_features)


def y_rows(y: Tensor, dims: BlockDims) -> Operand:
    return activations(y, ("jL", "jC", "jR"), dims, dims.out_features)


def forward(
    x: Tensor,
    blocks: dict[str, Operand],
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    strategy: str,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    pre: Tensor | None = None,
    h: Tensor | None = None,
) -> None:
    """Write ``y [N, F]``; ``h`` receives the rows after the central step of a separable shape."""
    merges, order = recipe(dims, strategy)
    slots, experts = y.shape[0], offsets.shape[0] - 1
    for first, last in chunks(dims, tuple(result for result, _, _ in merges), experts):
        near = offsets[first : last + 1]
        built = build(_experts(blocks, first, last), merges, dims, near, keep=False)
        rows = x_rows(x, dims)
        for position, name in enumerate(order):
            final = position == len(order) - 1
            options: dict[str, object] = {}
            if final:
                options = {"out": y_rows(y, dims), "bias": bias, "activation": activation, "pre": pre}
            elif h is not None and name == "C":
                options = {"out": activations(h, ("jC", "b"), dims)}
            rows = rows_times_block(
                rows,
                built[name],
                dims,
                near,
                slots,
                row_index=row_index if position == 0 else None,
                tail=last == experts,
                **options,  # type: ignore[arg-type]
            )
        built.clear()  # or the next experts' weights would be built beside these


def backward(
    dz: Tensor,
    x: Tensor,
    blocks: dict[str, Operand],
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    strategy: str,
    grads: dict[str, Operand],
    dx: Tensor | None,
    h: Tensor | None = None,
) -> None:
    """Fill ``grads`` (of the blocks that need one; the central one is float32 and added to) and ``dx [N, I]``."""
    merges, order = recipe(dims, strategy)
    experts = offsets.shape[0] - 1
    for first, last in chunks(dims, tuple(result for result, _, _ in merges), experts):
        _backward_of_chunk(
            dz, x, _experts(blocks, first, last), offsets[first : last + 1], row_index, dims, merges, order,
            {name: grad.experts(first, last) for name, grad in grads.items()}, dx, h, last == experts,
        )  # fmt: skip


def _needs(name: str, grads: dict[str, Operand]) -> bool:
    """Whether a block, or one it was built from, needs a gradient."""
    parts = "LCR" if name == "W" else name
    return any(part in grads for part in parts)


def _backward_of_chunk(
    dz: Tensor,
    x: Tensor,
    blocks: dict[str, Operand],
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    merges: tuple[Merge, ...],
    order: tuple[str, ...],
    grads: dict[str, Operand],
    dx: Tensor | None,
    h: Tensor | None,
    tail: bool,
) -> None:
    slots = dz.shape[0]
    built = build(blocks, merges, dims, offsets, keep=any(name in grads for name in "LCR"))
    before = [x_rows(x, dims)]  # what every operand of ``order`` met
    last_needed = max((k for k, name in enumerate(order) if _needs(name, grads)), default=0)
    for position, name in enumerate(order[:last_needed]):
        if h is not None and name == "C":
            before.append(activations(h, ("jC", "b"), dims))
        elif h is not None and position == 0 and not any(_needs(later, grads) for later in order[:2] if later != "L"):
            before.append(before[0])  # only h is read, not what led to it
        else:
            before.append(
                rows_times_block(
                    before[-1],
                    built[name],
                    dims,
                    offsets,
                    slots,
                    row_index=row_index if position == 0 else None,
                    tail=tail,
                )
            )
    after = y_rows(dz, dims)
    gradients: dict[str, Operand] = {}
    for position in reversed(range(len(order))):
        name = order[position]
        earlier = position > 0 and any(_needs(other, grads) for other in order[:position])
        onward = None
        if earlier or dx is not None:
            target = x_rows(dx, dims) if position == 0 and dx is not None else None
            onward = rows_times_block(after, built[name], dims, offsets, slots, out=target, tail=tail)
        if _needs(name, grads):
            if name == "W":
                del built["W"]  # its memory serves its gradient
            own = grads[name] if name in grads and name != "C" else None
            found = block_gradient(
                before[position], after, name, dims, offsets, row_index=row_index if position == 0 else None, out=own
            )
            if name == "C":
                grads["C"].data.add_(found.data.view_as(grads["C"].data))
            elif own is None:
                gradients[name] = found
        if onward is None:
            break
        after = onward
    project(gradients, built, merges, grads, dims, offsets)


def project(
    gradients: dict[str, Operand],
    built: dict[str, Operand],
    merges: tuple[Merge, ...],
    grads: dict[str, Operand],
    dims: BlockDims,
    offsets: Tensor,
) -> None:
    """Bring the gradients of what was built down to the blocks' ``grads``; uses up ``gradients`` and ``built``."""
    experts = offsets.shape[0] - 1
    for result, first, second in reversed(merges):
        whole = gradients.pop(result, None)
        if whole is None:
            continue
        # The plain block first: once its gradient is known, the built one's memory serves that one's gradient.
        for wanted, other in sorted(
            ((first, second), (second, first)), key=lambda pair: pair[0] in built and len(pair[0]) > 1
        ):
            if not _needs(wanted, grads):
                continue
            if wanted == "C":
                merge_blocks(*_in_order(whole, built[other], grads["C"]), grads["C"], dims, offsets, accumulate=True)
            elif wanted in grads:
                merge_blocks(*_in_order(whole, built[other], grads[wanted]), grads[wanted], dims, offsets)
            else:
                built.pop(wanted)
                out = scratch(wanted, experts, dims, whole.data)
                gradients[wanted] = merge_blocks(*_in_order(whole, built[other], out), out, dims, offsets)
        del whole


def _in_order(first: Operand, second: Operand, out: Operand) -> tuple[Operand, Operand]:
    """The operand that holds the result's slowest axis gives the rows."""
    slowest = max(out.axes, key=lambda axis: out.strides[axis])
    return (first, second) if slowest in first.axes else (second, first)


def central_accumulator(central: Tensor) -> Operand:
    """Float32 zeros ``[a, iC, jC, b]`` in which the experts' shares are summed."""
    data = torch.zeros(central.shape, dtype=torch.float32, device=central.device)
    return Operand(data, block(data, "C").strides, 0)
