"""Memory layout of a launch plan: the call's tensors, and temporaries in one scratch buffer.

A plan is recorded by computing once with tensors that have no memory (device ``meta``). Its steps refer to a tensor by
its index in the call, or by its offset in the scratch buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SCRATCH = -1  # instead of the index of a tensor
ALIGNMENT = 256  # bytes


@dataclass
class Piece:
    """Memory of a recorded tensor.

    Attributes:
        tensor: keeps the storage alive, so that no other gets its identity.
        number: index of the call's tensor, or `SCRATCH`.
        first, last: first and last steps that use it.
        place: first byte in the scratch buffer.
    """

    tensor: Tensor
    number: int = SCRATCH
    first: int = -1
    last: int = -1
    place: int = 0

    @property
    def size(self) -> int:
        """Bytes, rounded up to the alignment, and at least one unit, so that empty pieces stay distinct."""
        return max(1, -(-self.tensor.untyped_storage().nbytes() // ALIGNMENT)) * ALIGNMENT


class Memory:
    """The pieces of a recording, by their storages."""

    def __init__(self) -> None:
        self._pieces: dict[int, Piece] = {}
        self._given = 0

    def _piece(self, tensor: Tensor) -> Piece:
        return self._pieces.setdefault(tensor.untyped_storage()._cdata, Piece(tensor))

    def give(self, tensor: Tensor) -> None:
        """Register the next tensor that every call passes, or gets as a result."""
        self._piece(tensor).number = self._given
        self._given += 1

    def use(self, tensor: Tensor, step: int) -> Piece:
        """Record that a step reads or writes a tensor; steps must come in order."""
        piece = self._piece(tensor)
        piece.first, piece.last = step if piece.first < 0 else piece.first, step
        return piece

    def lay_out(self) -> int:
        """Assign offsets to all temporaries, reusing memory that no later step uses. Returns the total bytes."""
        total, alive = 0, list[Piece]()
        for piece in self._pieces.values():
            if piece.number != SCRATCH:
                continue
            alive = sorted((p for p in alive if p.last >= piece.first), key=lambda p: p.place)
            for other in alive:
                if other.place - piece.place >= piece.size:
                    break
                piece.place = other.place + other.size
            alive.append(piece)
            total = max(total, piece.place + piece.size)
        return total
