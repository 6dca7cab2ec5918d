"""mpo_ffn against the float64 reference, and compiled; products by PyTorch's grouped GEMMs, as a
GPU would run them."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks

from mpoe_kernels import MPOShape, Routing, combine, grouped_mpo_linear, mpo_ffn, route
from mpoe_kernels.backends import places_rows
from mpoe_kernels.contract import ALL_GRADIENTS, STRATEGIES, Contraction
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.linear import ffn, grouped
from mpoe_kernels.linear.eager import candidates
from mpoe_kernels.linear.eager.library import Library
from mpoe_kernels.linear.ffn import placed_mpo_linear
from tests.assertions import poisoned_memory
from tests.cases import SMALL_SHAPES, either, in_two_dtypes
from tests.linear_problem import KernelProblem, check_ffn
from tests.linear_scenarios import LinearScenarios
from tests.routing_problem import parts_of

from .backend_cases import on_every_backend, require_strategies


def test_ffn_dropout_drops_hidden_activations():
    shape = SMALL_SHAPES["separable"]
    up, down = random_blocks(shape, 2), random_blocks(shape.mirrored(), 2)
    routing = route(torch.zeros(4, 1, dtype=torch.int64), 2)
    x, weights = torch.randn(4, 12, dtype=torch.float64), torch.ones(4, 1)
    plain = mpo_ffn(x, routing, weights, up, down)
    assert not torch.equal(mpo_ffn(x, routing, weights, up, down, dropout=0.5), plain)
    assert bool((mpo_ffn(x, routing, weights, up, down, dropout=1.0) == 0).all())


@on_every_backend
@either("gated")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ffn_on_every_backend(backend, dtype, gated):
    shape = SMALL_SHAPES["padded_separable"]
    if "separable" not in require_strategies(backend, shape, dtype):
        shape = SMALL_SHAPES["padded"]  # the CUDA kernels compute rebuilt weights only
    check_ffn(backend, shape, dtype, gated)


TOKENS, EXPERTS = 13, 4
MASK = torch.arange(TOKENS) % 5 != 1


def routing_of():
    """Some tokens are masked, some are dropped, and one expert is idle."""
    return route(
        expert_choice("some_idle", TOKENS, EXPERTS, 1), EXPERTS, capacity=3, token_mask=MASK
    )


def gates_of(dtype=torch.float32):
    gates = torch.rand(TOKENS, 1)
    gates[~MASK] = float("nan")  # gates of tokens without a slot, whose rows must still be zero
    return gates.to(dtype)


@on_every_backend
@in_two_dtypes
@pytest.mark.parametrize("name", ["separable", "padded", "paper"])
@either("biased")
def test_the_bits_of_combine(name, backend, dtype, biased):
    shape = SMALL_SHAPES[name]
    able = require_strategies(backend, shape, dtype)
    blocks, routing, gates = random_blocks(shape, EXPERTS, dtype), routing_of(), gates_of()
    x, bias = (
        torch.randn(TOKENS, shape.in_features).to(dtype),
        torch.randn(shape.out_features).to(dtype),
    )
    rows = x, blocks, routing.expert_offsets, bias if biased else None
    for strategy in able:
        with poisoned_memory():
            placed = placed_mpo_linear(*rows, routing, gates, backend, strategy)
        y = grouped_mpo_linear(*rows, backend=backend, strategy=strategy)
        assert torch.equal(placed, combine(y, routing, gates, backend=backend))
        assert not placed[routing.slot_of_token[:, 0] < 0].any()


@on_every_backend
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_without_gradients_places_its_rows(backend, gate_dtype, monkeypatch):
    shape = SMALL_SHAPES["separable"]
    require_strategies(backend, shape, torch.float32)
    up, down = (random_blocks(s, EXPERTS, torch.float32) for s in (shape, shape.mirrored()))
    routing, gates, x = routing_of(), gates_of(gate_dtype), torch.randn(TOKENS, shape.in_features)
    placed = []
    once = ffn.placed_mpo_linear
    monkeypatch.setattr(
        ffn, "placed_mpo_linear", lambda *arguments: placed.append(1) or once(*arguments)
    )
    y = mpo_ffn(x, routing, gates, up, down, backend=backend)
    assert len(placed) == places_rows(backend)
    monkeypatch.setattr(ffn, "places_rows", lambda _: False)
    assert torch.equal(y, mpo_ffn(x, routing, gates, up, down, backend=backend))


@pytest.mark.parametrize(
    "case", ["two slots", "by hand", "replaced", "gate", "block", "another device"]
)
def test_when_rows_are_not_placed(case, monkeypatch):
    """With two slots, a token's result is a sum; a routing that `route` did not make might leave
    rows unwritten; gradients of gates need the rows before gating."""
    monkeypatch.setattr(ffn, "places_rows", lambda _: case != "another device")
    top_k = 2 if case == "two slots" else 1
    routing = route(torch.zeros(3, top_k, dtype=torch.int64), 2)
    if case == "by hand":
        routing = Routing(*parts_of(routing))
    if case == "replaced":
        routing = replace(routing)
    hidden, gates = torch.randn(3 * top_k, 12), torch.ones(3, top_k, requires_grad=case == "gate")
    down = random_blocks(SMALL_SHAPES["separable"], 2, torch.float32, requires_grad=case == "block")
    assert not ffn._may_place(hidden, down, None, routing, gates, None)
    with torch.no_grad():
        assert ffn._may_place(hidden, down, None, routing, gates, None) == (
            case in ("gate", "block")
        )


# ------------------------------------------------------------------ grouped GEMMs


LIBRARY = SimpleNamespace(
    forward=lambda call: grouped.forward(call, Library()),
    backward=lambda call: grouped.backward(call, Library()),
)


@dataclass
class Problem(KernelProblem):
    """Six experts, some of them idle; some slots come after the last expert's."""

    KERNELS, BACKEND = staticmethod(lambda _: LIBRARY), "auto"
    tokens: int = 9
    experts: int = 6
    kind: str = "some_idle"

    def __post_init__(self):
        super().__post_init__()
        self.grad[self.filled :] = 0

    def _common(self, strategy):
        """An idle expert's blocks must never be read."""
        x, left, central, right, *others = super()._common(strategy)
        idle = self.routing.expert_offsets.diff() == 0
        left, right = (
            block.masked_fill(idle.view(-1, 1, 1, 1), torch.nan) for block in (left, right)
        )
        return x, left, central, right, *others


class TestScenarios(LinearScenarios):
    problem, of_every_shape = Problem, STRATEGIES
    test_rows_placed_elsewhere_have_the_same_bits = None  # nobody asks the library for it


def test_without_the_slots_of_tokens():
    Problem(SMALL_SHAPES["padded"], inverse=False).check("chain")


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_on_a_gpu_eager_offers_them_where_they_do_not_wait(phase, monkeypatch):
    """Under separate names; PyTorch has a kernel for bfloat16 and two generations of GPUs."""
    dims, card = BlockDims.of_shape(SMALL_SHAPES["separable"]), {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card["capability"])

    def offered(strategy, dtype, device):
        plan = Contraction(strategy, dims, 8, 64, dtype, phase, ALL_GRADIENTS, device)
        return [(candidate.name, candidate.waits) for candidate in candidates(plan)]

    for strategy in ("separable", "rebuild"):
        alone, able = [(strategy, True)], (f"{strategy} by grouped GEMMs", False)
        for card["capability"] in ((9, 0), (10, 0)):
            assert offered(strategy, torch.bfloat16, "cuda:0") == [*alone, able]
            assert (
                offered(strategy, torch.float32, "cuda:0")
                == offered(strategy, torch.bfloat16, "cpu")
                == alone
            )
        for card["capability"] in ((8, 0), (8, 9), (12, 0)):
            assert offered(strategy, torch.bfloat16, "cuda:0") == alone
    monkeypatch.setattr(torch.version, "hip", "6.4")
    card["capability"] = (9, 4)
    assert offered("rebuild", torch.bfloat16, "cuda:0") == [("rebuild", True)]


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("built", [("LC", "W"), ("CR", "W"), ("LC",), ("CR",)])
def test_what_is_built_and_its_copy_fit_two_weights_or_a_quarter(built, experts):
    for bond in (16, 64, None):
        dims = BlockDims.of_shape(MPOShape.paper(768, 3072, max_bond=bond))
        at_once = grouped.experts_at_once(dims, built, experts)
        taken = 2 * at_once * max(dims.elements(INDICES[name]) for name in built)
        assert at_once == 1 or taken <= max(2, experts // 4) * dims.weight_elements
    assert grouped.experts_at_once(dims, (), experts) == experts
