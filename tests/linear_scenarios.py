"""What the kernels of every backend are tested with beside their own tests: `KernelProblem` in
unusual situations."""

from collections.abc import Callable, Collection
from itertools import product
from typing import Any

import pytest
import torch

from mpoe_kernels.linear import gradients, grouped
from mpoe_kernels.mpo.shape import MPOShape
from tests.assertions import assert_calibrated
from tests.cases import SMALL_SHAPES, pairwise
from tests.linear_problem import NAMES, planned_strategies

IN_BFLOAT16 = ("paper", "light", "separable", "padded", "uneven_bonds")


class LinearScenarios:
    """Tests for pytest; a class ``Test...`` below it says what they run.

    Attributes:
        problem: a `KernelProblem` of some kernels.
        strategies: the strategies of a shape.
        of_every_shape: the strategies that every shape is tested with by default; others are, of
            all but two shapes, left to the exhaustive suite.
    """

    problem: Callable[..., Any]
    strategies: Callable[[MPOShape], list[str]] = staticmethod(planned_strategies)
    of_every_shape: Collection[str]

    def strategy_of_separable(self):
        """``separable``, if these kernels have it."""
        return (
            "separable" if "separable" in self.strategies(SMALL_SHAPES["separable"]) else "rebuild"
        )

    def pytest_generate_tests(self, metafunc):
        if "strategy" not in metafunc.fixturenames:
            return
        pairs = [
            (name, strategy)
            for name, shape in SMALL_SHAPES.items()
            for strategy in self.strategies(shape)
        ]
        found = []
        for (name, strategy), dtype in product(pairs, (torch.float32, torch.bfloat16)):
            if dtype == torch.float32 or name in IN_BFLOAT16:
                few = name not in ("light", "separable") and strategy not in self.of_every_shape
                few |= dtype == torch.bfloat16 and name in ("paper", "uneven_bonds")
                found.append(
                    pytest.param(name, strategy, dtype, marks=[pytest.mark.exhaustive] * few)
                )
        metafunc.parametrize("name, strategy, dtype", found)

    def test_shapes(self, name, strategy, dtype):
        self.problem(SMALL_SHAPES[name], dtype).check(strategy)

    @pytest.mark.parametrize(
        "activation, gathered",
        pairwise(["none", "relu", "gelu", "gelu_tanh", "silu"], [False, True]),
    )
    def test_activations_with_and_without_gather(self, activation, gathered):
        shape = SMALL_SHAPES["separable"]
        self.problem(shape, activation=activation, gathered=gathered).check(
            self.strategy_of_separable()
        )
        light = self.problem(
            SMALL_SHAPES["light"], activation=activation, gathered=gathered, with_bias=False
        )
        light.check("rebuild")

    @pytest.mark.parametrize(
        "name, kind", pairwise(["light", "separable"], ["all_to_one", "some_idle"])
    )
    def test_distributions(self, name, kind):
        shape = SMALL_SHAPES[name]
        for strategy in self.strategies(shape):
            case = self.problem(
                shape, tokens=5, experts=4, top_k=1, capacity=None, kind=kind, activation="silu"
            )
            case.check(strategy)

    @pytest.mark.parametrize("name", ["light", "separable"])
    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_no_tokens(self, name, activation):
        for strategy in self.strategies(SMALL_SHAPES[name]):
            self.problem(SMALL_SHAPES[name], tokens=0, top_k=1, activation=activation).check(
                strategy
            )

    @pytest.mark.parametrize("name", ["paper", "separable"])
    def test_backward_strategy_is_chosen_on_its_own(self, name):
        shape = SMALL_SHAPES[name]
        strategies = self.strategies(shape)
        for forward, backward in zip(strategies, [*strategies[1:], strategies[0]], strict=True):
            self.problem(shape, activation="relu").check(forward, backward)

    @pytest.mark.parametrize(
        "name, dtype",
        [
            pytest.param("light", torch.float32, marks=pytest.mark.exhaustive),
            ("separable", torch.float32),
            ("separable", torch.bfloat16),
        ],
    )
    def test_each_gradient_alone_and_the_masked_central_core(self, name, dtype):
        """Against float64, not bit for bit: other products run than for all gradients, in other
        tiles."""
        case = self.problem(SMALL_SHAPES[name], dtype, tokens=3, experts=2, capacity=2)
        truth, same = case.reference(torch.float64)[1:], case.reference(dtype)[1:]
        for strategy in self.strategies(case.shape):
            saved = case.forward(strategy)
            for wanted in (*({k} for k in range(5)), {0, 1, 3, 4}):
                grads = case.backward(strategy, saved, [k in wanted for k in range(5)])
                for k, grad in enumerate(grads):
                    if k in wanted:
                        assert_calibrated(
                            grad, truth[k], same[k], f"{NAMES[k + 1]} ({strategy}, {wanted})"
                        )
                    else:
                        assert grad.numel() == 0

    @pytest.mark.parametrize("name", ["separable", "separable_mirrored"])
    def test_a_nan_row_spoils_no_other_row_and_no_other_expert_s_block(self, name):
        case = self.problem(
            SMALL_SHAPES[name],
            torch.bfloat16,
            9,
            2,
            1,
            "uniform",
            None,
            activation="relu",
            with_bias=False,
        )
        slot, owner, other = (
            int(case.routing.expert_offsets[1]),
            1,
            0,
        )  # in one tile with the other expert's rows
        token = int(case.routing.token_of_slot[slot])
        strategy = self.strategy_of_separable()
        clean = case.run(strategy)
        case.x[token] = torch.nan
        y, dx, dleft, dcentral, dright = case.run(strategy)
        slots, tokens = (torch.arange(9) != own for own in (slot, token))
        assert torch.equal(y[slots], clean[0][slots])
        assert torch.equal(dx[tokens], clean[1][tokens])
        for found, wanted in ((dleft, clean[2]), (dright, clean[4])):
            assert torch.equal(found[other], wanted[other])
            assert found[owner].isnan().any()
        assert dcentral.isnan().any()

    def test_a_nan_row_stays_its_token_s(self):
        """Beside other rows of its expert, in one tile; in x and in the gradient of y."""
        case = self.problem(
            SMALL_SHAPES["paper"], tokens=9, experts=2, top_k=1, capacity=None, activation="silu"
        )
        case.x[3] = torch.nan
        slots, tokens = torch.arange(9) != int(case.slot_of_token[3, 0]), torch.arange(9) != 3
        for strategy in self.strategies(case.shape):
            y, *_ = saved = case.forward(strategy)
            assert y[~slots].isnan().all()
            assert y[slots].isfinite().all()
            dx = case.backward(strategy, saved, [True, False, False, False, False])[0]
            assert dx[tokens].isfinite().all()

    def test_experts_by_parts(self, monkeypatch):
        """Weights of two experts at a time, then of the third."""
        for module in (gradients, grouped):
            monkeypatch.setattr(module, "experts_at_once", lambda *_, **__: 2)
        for strategy in (
            each for each in self.strategies(SMALL_SHAPES["padded"]) if each != "chain"
        ):  # which builds none
            self.problem(SMALL_SHAPES["padded"], activation="silu").check(strategy)

    def test_the_same_bits_every_time(self):
        case = self.problem(SMALL_SHAPES["paper"], torch.bfloat16)
        for strategy in self.strategies(case.shape):
            for first, second in zip(case.run(strategy), case.run(strategy), strict=True):
                assert torch.equal(first, second)

    @pytest.mark.parametrize(
        "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str
    )
    @pytest.mark.parametrize("name", ["light", "separable", "separable_mirrored"])
    def test_rows_placed_elsewhere_have_the_same_bits(self, name, dtype):
        """The gate multiplies the rounded result; rows of slots without an expert are zero,
        whatever their gates."""
        case = self.problem(SMALL_SHAPES[name], dtype, tokens=13, experts=3, top_k=1, capacity=3)
        out_index, gates = torch.randperm(13), torch.rand(13) + 0.5
        assert 0 < case.filled < 13
        gates[out_index[case.filled :]] = torch.nan
        for strategy in self.strategies(case.shape):
            y = case.forward(strategy, save=False)[0]
            placed = case.forward(strategy, save=False, out_index=out_index, gates=gates)[0]
            wanted = (y.float() * gates[out_index][:, None]).to(dtype)
            wanted[case.filled :] = 0
            assert torch.equal(placed[out_index], wanted)
