"""What the GPU kernels of `hidden_experts` and `neuron_experts` are tested with, emulated and in
Triton's interpreter.

Those of the CPU have tests of their own, tests/kernels/test_experts.py, which run on the emulated
kernels too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch

from tests.assertions import poisoned_memory
from tests.expert_problems import HiddenProblem, NeuronProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
ACTIVATIONS = ("relu", "gelu_new", "none", "silu")


class ExpertScenarios:
    """Tests for pytest; a class ``Test...`` below it says what they run.

    Attributes:
        backend: that computes CPU tensors.
        kernels: its functions ``forward`` and ``backward`` of a call, for each kind of experts.
        dtypes: of values and gradients; parameters of pytest, of which some may be slow.
        slow_cases: names of `CASES` that take it long.
    """

    backend: ClassVar[str]
    kernels: ClassVar[Mapping[type[Any], Any]]
    dtypes: ClassVar[Sequence[Any]] = DTYPES
    slow_cases: ClassVar[Collection[str]] = ()

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            found, slow = [], {True: [pytest.mark.slow], False: []}
            for kind, named in CASES.items():
                for name, case in named.items():
                    marks = slow[name in self.slow_cases]
                    found.append(
                        pytest.param(kind, case, id=f"{kind.__name__}-{name}", marks=marks)
                    )
            metafunc.parametrize("kind, case", found)
        elif "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    def test_values_and_gradients(self, kind, case, dtype):
        kind(**case, dtype=dtype).check(self.backend)

    @pytest.mark.slow
    def test_every_form(self, kind, case, dtype):
        """Gated and not, the groups' blocks shared and not, all with biases."""
        for gated in (False, True):
            for more in (
                ({"per_group": False}, {"per_group": True}) if kind is HiddenProblem else ({},)
            ):
                form = {**case, **more, "gated": gated, "with_bias": True}
                kind(**form, dtype=dtype, seed=1).check(self.backend)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation(self, kind, activation):
        sizes = {"tokens": 9, "experts": 1, **({"groups": 1} if kind is HiddenProblem else {})}
        for gated in (False, True):
            problem = kind(**sizes, gated=gated, activation=activation, dtype=torch.float32)
            (problem.on_quarters() if activation == "relu" else problem).check(self.backend)

    def test_an_expert_chosen_twice_and_rows_of_nan_without_one(self, kind):
        problem = kind(tokens=17, experts=2, dtype=torch.float32, none_share=0.0, with_bias=True)
        problem.index[:, 1] = problem.index[:, 0]
        problem.index[3:6] = -1
        problem.check(self.backend)
        clean = problem.computed(self.backend)
        for name in (problem.ROWS, "gates"):
            problem.inputs[name][3:6] = torch.nan
        for name, value in problem.computed(self.backend).items():
            assert torch.equal(value, clean[name]), name

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_spoiled_token_spoils_no_other(self, kind, value, dtype):
        """Nor the gradients of experts that it did not choose."""
        problem = kind(
            tokens=24, experts=3, gated=True, with_bias=True, dtype=dtype, none_share=0.0
        )
        problem.index[:, 1] = (problem.index[:, 0] + 1) % 3
        clean = problem.computed(self.backend)
        problem.inputs[problem.ROWS][5] = value
        others = [t for t in range(24) if t != 5]
        left_out = 3 - int(problem.index[5].sum())
        found = problem.computed(self.backend)
        assert not found["o"][5].isfinite().any()
        for name, each in found.items():
            kept = left_out if each.shape[0] == 3 else others
            assert torch.equal(each[kept], clean[name][kept]), name

    def test_each_gradient_alone(self, kind):
        backward = self.kernels[kind].backward
        problem = kind(tokens=5, experts=2, gated=True, with_bias=True, dtype=torch.float32)
        with poisoned_memory():
            everything = backward(problem.backward_call())
        for needed in problem.NAMES:
            with poisoned_memory():
                alone = backward(problem.backward_call([name == needed for name in problem.NAMES]))
            for name, value, whole in zip(problem.NAMES, alone, everything, strict=True):
                assert torch.equal(value, whole) if name == needed else value.numel() == 0
