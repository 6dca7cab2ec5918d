"""Where the tensors of a launch plan lie: what a call brings, and temporaries in one piece of scratch memory.

A plan is recorded by computing once with tensors that have no memory (device ``meta``). A step of it names a tensor by
the call's number of it, or by its place in the scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SCRATCH = -1  # instead of the number of a tensor
ALIGNMENT = 256  # bytes


@dataclass
class Piece:
    """Memory of a recorded tensor.

    Attributes:
        tensor: keeps the storage, so that no other gets its identity.
        number: of the call's tensor, or `SCRATCH`.
        first, last: steps that use it.
        place: first byte in the scratch memory.
    """

    tensor: Tensor
    number: int = SCRATCH
    first: int = -1
    last: int = -1
    place: int = 0

    @property
    def size(self) -> int:
        """Bytes, in whole units of the alignment; two of no elements are two all the same."""
        return max(1, -(-self.tensor.untyped_storage().nbytes() // ALIGNMENT)) * ALIGNMENT


class Memory:
    """The pieces of a recording, by their storages."""

    def __init__(self) -> None:
        self._pieces: dict[int, Piece] = {}
        self._given = 0

    def _piece(self, tensor: Tensor) -> Piece:
        return self._pieces.setdefault(tensor.untyped_storage()._cdata, Piece(tensor))

    def give(self, tensor: Tensor) -> None:
        """The next tensor that every call brings, or gets as a result."""
        self._piece(tensor).number = self._given
        self._given += 1

    def use(self, tensor: Tensor, step: int) -> Piece:
        """A step reads or writes a tensor; steps come in their order."""
        piece = self._piece(tensor)
        piece.first, piece.last = step if piece.first < 0 else piece.first, step
        return piece

    def lay_out(self) -> int:
        """Give all temporaries their places: where others lie that no step uses any more. Returns the bytes in all."""
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
