"""Sizes that the kernels of `hidden_experts` and `neuron_experts` are tested with, on the CPU and
in Triton's interpreter."""

from tests.expert_problems import HiddenProblem, NeuronProblem


def case(tokens, top_k, experts, **form):
    """Sizes, and what is not as by default."""
    return {"tokens": tokens, "top_k": top_k, "experts": experts, **form}


# Blocks of 16 and 64 units are copied 16 bytes at a time, others element by element.
CASES = {
    HiddenProblem: {
        "one token": case(1, 1, 1),
        "decoding": case(1, 4, 8, groups=2, block=16, none_share=0.0, gated=True),
        "top-1": case(33, 1, 3, groups=2, block=16, gated=True),
        "top-4": case(19, 4, 4, groups=1, block=64, gated=True, with_bias=True),
        "no full tile": case(37, 2, 3, groups=2, block=5, per_group=True, with_bias=True),
        "parts of a tile": case(37, 2, 2, groups=2, block=40, per_group=True, gated=True),
        "parts of a block": case(19, 2, 2, groups=1, block=24, gated=True, with_bias=True),
        "wide blocks": case(9, 2, 2, groups=2, block=72, gated=True, with_bias=True),
        "shared by groups": case(20, 2, 2, groups=5, block=4, with_bias=True),
        "many experts": case(9, 8, 64, groups=5, block=8, with_bias=True),
        "sixteen choices": case(2, 16, 18, groups=1, block=4),
        "one unit": case(5, 2, 2, groups=3, block=1, per_group=True),
        "all to one": case(40, 1, 1, groups=2, none_share=0.0),
        "no expert": case(4, 2, 5, none_share=1.0, with_bias=True, groups=1),
        "no token": case(0, 2, 5, gated=True, with_bias=True),
    },
    NeuronProblem: {
        "decoding": case(1, 8, 20, none_share=0.0, width=48, out=40, neurons=16),
        "no full tile": case(37, 2, 3, width=33, out=65, neurons=35, with_bias=True),
        "whole tiles": case(70, 2, 2, width=64, out=128, neurons=64, gated=True),
        "gated": case(40, 3, 4, gated=True, with_bias=True, activation="silu"),
        "many neurons": case(20, 2, 2, width=24, out=16, neurons=200, with_bias=True),
        "many experts": case(40, 16, 300, width=16, out=8, neurons=8),
        "sixteen choices": case(2, 16, 18, neurons=8, width=8, out=8),
        "one neuron": case(9, 8, 9, width=15, out=3, neurons=1, gated=True),
        "all to one": case(40, 1, 1, none_share=0.0),
        "no expert": case(4, 2, 5, none_share=1.0, with_bias=True),
        "no token": case(0, 2, 5, gated=True, with_bias=True),
    },
}
