"""Folding a chain of cores around its central core into three blocks: exact, cheap and
differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mpoe_kernels.checks import check_integer, check_tensor, describe, no_autocast, refuse_jit_trace
from mpoe_kernels.mpo.shape import MPOShape


@dataclass(frozen=True)
class MPOBlocks:
    """The chain of every expert, folded around the shared central core.

    Attributes:
        left: ``[E, iL, jL, a]``.
        central: ``[a, iC, jC, b]``, shared by the experts.
        right: ``[E, b, iR, jR]``.
        in_features: true input size I; ``iL iC iR`` may exceed it (zero padding at the end).
        out_features: true output size F; ``jL jC jR`` may exceed it.
        shape: the shape the blocks came from, if known.

    Raises:
        TypeError, ValueError: sizes that are 0 or do not match.
    """

    left: Tensor
    central: Tensor
    right: Tensor
    in_features: int
    out_features: int
    shape: MPOShape | None = None

    def __post_init__(self) -> None:
        refuse_jit_trace("MPOBlocks")
        left = check_tensor("left", self.left, ("E", "iL", "jL", "a"))
        central = check_tensor("central", self.central, ("a", "iC", "jC", "b"))
        right = check_tensor("right", self.right, ("E", "b", "iR", "jR"))
        for name, block in (("left", left), ("central", central), ("right", right)):
            if 0 in block.shape:
                raise ValueError(f"{name} must have no axis of size 0; got {describe(block)}")
        if left.shape[3] != central.shape[0]:
            raise ValueError(
                f"left [.., a] and central [a, ..] must agree in a; got {describe(left)}, "
                f"{describe(central)}"
            )
        if right.shape[1] != central.shape[3]:
            raise ValueError(
                f"right [E, b, ..] and central [.., b] must agree in b; got {describe(right)}, "
                f"{describe(central)}"
            )
        if left.shape[0] != right.shape[0]:
            raise ValueError(
                f"left and right must hold the same number of experts; got {describe(left)} and "
                f"{describe(right)}"
            )
        padded_in = left.shape[1] * central.shape[1] * right.shape[2]
        padded_out = left.shape[2] * central.shape[2] * right.shape[3]
        check_integer("in_features", self.in_features, 1, padded_in, "iL*iC*iR")
        check_integer("out_features", self.out_features, 1, padded_out, "jL*jC*jR")

    @property
    def num_experts(self) -> int:
        return self.left.shape[0]

    def transposed(self) -> MPOBlocks:
        """Blocks of the transposed weights ``[F, I]``; the tensors are views."""
        return MPOBlocks(
            self.left.transpose(1, 2),
            self.central.transpose(1, 2),
            self.right.transpose(2, 3),
            self.out_features,
            self.in_features,
        )


def check_blocks(name: str, blocks: MPOBlocks) -> None:
    """Refuse what is not `MPOBlocks`, by name."""
    if not isinstance(blocks, MPOBlocks):
        raise TypeError(f"{name} must be MPOBlocks (see fold); got {type(blocks).__name__}")


def _experts_of(cores: Sequence[Tensor]) -> int:
    counts = {core.shape[0] for core in cores if core.dim() == 5}
    if len(counts) > 1:
        raise ValueError(
            f"auxiliary cores must agree in their number of experts; got {sorted(counts)}"
        )
    if counts:
        return counts.pop()
    return 1


def _check_cores(cores: Sequence[Tensor], central: int) -> None:
    check_integer("central", central, 0, len(cores) - 1, f"the last of {len(cores)} cores")
    for k, core in enumerate(cores):
        axes = (4,) if k == central else (4, 5)
        if not isinstance(core, Tensor) or core.dim() not in axes:
            kind = "[d, i, j, d'] or [E, d, i, j, d']"
            if k == central:
                kind = "[d, i, j, d'] (the central core is shared)"
            raise ValueError(f"cores[{k}] must be {kind}; got {describe(core)}")
    for k, (core, following) in enumerate(zip(cores, cores[1:], strict=False)):
        if core.device != following.device:
            raise ValueError(
                f"cores must be on one device; cores[{k}] is {describe(core)}, cores[{k + 1}] "
                f"{describe(following)}"
            )
        if core.shape[-1] != following.shape[-4]:
            raise ValueError(
                f"cores[{k}] and cores[{k + 1}] must share a bond; got {describe(core)} and "
                f"{describe(following)}"
            )
    first_bond = cores[0].shape[-4]
    last_bond = cores[-1].shape[-1]
    if first_bond != 1 or last_bond != 1:
        raise ValueError(
            f"the outer bonds of the chain must be 1; got {first_bond} and {last_bond}"
        )


def _fold_left(cores: Sequence[Tensor], experts: int, like: Tensor) -> Tensor:
    if not cores:
        return like.new_ones(experts, 1, 1, 1)
    first = cores[0]
    block = first.expand(experts, *first.shape[-4:])
    block = block.squeeze(1)  # [E, i, j, d]
    for core in cores[1:]:
        d, i, j, d_next = core.shape[-4:]
        _, rows, columns, _ = block.shape
        matrix = core.reshape(-1, d, i * j * d_next)
        product = block.reshape(experts, rows * columns, d) @ matrix
        # [E, I, J, i, j, d'] -> [E, (I i), (J j), d']
        product = product.view(experts, rows, columns, i, j, d_next).transpose(2, 3)
        block = product.reshape(experts, rows * i, columns * j, d_next)
    return block


def _fold_right(cores: Sequence[Tensor], experts: int, like: Tensor) -> Tensor:
    if not cores:
        return like.new_ones(experts, 1, 1, 1)
    last = cores[-1]
    block = last.expand(experts, *last.shape[-4:])
    block = block.squeeze(-1)  # [E, d, i, j]
    for core in reversed(cores[:-1]):
        d, i, j, d_next = core.shape[-4:]
        _, _, rows, columns = block.shape
        following = block.reshape(experts, d_next, rows * columns)
        product = core.reshape(-1, d * i * j, d_next) @ following
        # [E, d, i, j, I, J] -> [E, d, (i I), (j J)]
        product = product.view(experts, d, i, j, rows, columns).transpose(3, 4)
        block = product.reshape(experts, d, i * rows, j * columns)
    return block


def fold(
    cores: Sequence[Tensor],
    central: int | None = None,
    shape: MPOShape | None = None,
    num_experts: int | None = None,
) -> MPOBlocks:
    """Fold a chain of cores around its central core.

    ``W_e[iL iC iR, jL jC jR] = sum_ab left_e[iL,jL,a] central[a,iC,jC,b] right_e[b,iR,jR]`` holds
    exactly.

    Args:
        cores: ``[d, i, j, d']`` each; auxiliary cores may be ``[E, d, i, j, d']``.
        central: index of the central core; default ``shape.central`` or the middle one.
        shape: gives the true sizes when the factors pad them.
        num_experts: E, needed only if no core has an expert axis (a chain without auxiliary cores).

    Returns:
        The blocks; a side without cores is filled with ones, and E = 1 without an expert axis.
        Differentiable.

    Raises:
        TypeError, ValueError: cores that do not form a chain.
    """
    if not isinstance(cores, Sequence) or not cores:
        raise TypeError(
            f"cores must be a non-empty sequence of tensors [d, i, j, d']; got {describe(cores)}"
        )
    if shape is not None and not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape or None; got {describe(shape)}")
    if isinstance(central, MPOShape):
        raise TypeError(
            "central must be the index of the central core, or None; got an MPOShape, which goes "
            "by name: fold(cores, shape=shape)"
        )
    refuse_jit_trace("fold")
    if central is None:
        central = len(cores) // 2
        if shape is not None:
            central = shape.central
    _check_cores(cores, central)
    middle = cores[central]
    experts = _experts_of(cores)
    if num_experts is not None and check_integer("num_experts", num_experts, 1) != experts:
        if experts != 1:
            raise ValueError(
                f"num_experts must equal the cores' expert axis, {experts}; got {num_experts}"
            )
        experts = num_experts
    # The fold is exact in the cores' own dtype; autocast would round every partial product.
    with no_autocast(middle.device):
        left = _fold_left(cores[:central], experts, middle)
        right = _fold_right(cores[central + 1 :], experts, middle)
    if shape is None:
        in_features = left.shape[1] * middle.shape[1] * right.shape[2]
        out_features = left.shape[2] * middle.shape[2] * right.shape[3]
    else:
        in_features = shape.in_features
        out_features = shape.out_features
    return MPOBlocks(left, middle, right, in_features, out_features, shape)
