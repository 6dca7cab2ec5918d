"""Hidden-side experts over two processes: loss, gradients and a step as in one; refusals."""

from __future__ import annotations

import pytest
from transformers import Phi3Config, Phi3ForCausalLM

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.training import split_hidden_experts

from .ranks import HIDDEN, torchrun
from .tiny import mpoe_model


@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    answer = torchrun("ranks_tensor", "hidden")
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
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    joined = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    with pytest.raises(ValueError, match="up and gate_proj share one projection, whose halves the ranks would mix"):
        split_hidden_experts(convert_to_mpoe(joined, MPOEConfig(num_experts=2)), Mesh(1))
