"""Hidden-side experts over two processes: loss, gradients and a step as in one; refusals."""

from __future__ import annotations

import pytest

from mpoe.training import split_hidden_experts

from .ranks import HIDDEN, torchrun
from .tiny import mpoe_model


@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    answer = torchrun("ranks_tensor")
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.count("alike") == 2


class Mesh:
    """What is asked of a mesh before anything is split."""

    def __init__(self, size: int, ndim: int = 1) -> None:
        self.ndim, self._size = ndim, size

    def size(self) -> int:
        return self._size


def test_refusals() -> None:
    with pytest.raises(ValueError, match="mesh must be one-dimensional; got 2 dimensions"):
        split_hidden_experts(mpoe_model("t5", **HIDDEN), Mesh(2, 2))
    with pytest.raises(ValueError, match="must have experts on the hidden side"):
        split_hidden_experts(mpoe_model("t5"), Mesh(2))
    with pytest.raises(ValueError, match=r"has \d+ groups of hidden units, which 7 ranks do not divide"):
        split_hidden_experts(mpoe_model("t5", **HIDDEN), Mesh(7))
    with pytest.raises(ValueError, match=r"its up projection must be an nn\.Linear; got Conv1D"):
        split_hidden_experts(mpoe_model("gpt2", **HIDDEN), Mesh(1))
