"""Inf and NaN stay with their token and their expert: nobody else multiplies by them, not even with
a gate of zero."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, TopKRouter
from mpoe.layers.neurons import NeuronExperts
from mpoe_kernels import (
    BackendError,
    MPOBlocks,
    combine,
    dispatch,
    grouped_mpo_linear,
    mpo_embedding,
    mpo_ffn,
    route,
    use_backend,
)
from mpoe_kernels.contract import STRATEGIES
from tests.assertions import refuses
from tests.cases import SMALL_SHAPES
from tests.expert_problems import HiddenProblem, NeuronProblem

from .backend_cases import on_every_backend, require

FEW, MANY = 6, 66  # tokens
# Of six tokens; token 5 has none. With two experts each token that has one chooses both or one of
# them.
CHOICES = {
    3: torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [2, 1], [-1, -1]]),
    2: torch.tensor([[0, -1], [1, -1], [0, -1], [1, -1], [1, -1], [-1, -1]]),
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "large": 3e4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choices(experts, tokens):
    return CHOICES[experts].repeat(tokens // FEW, 1)


def tokens_of(tokens, width, dtype):
    return torch.randn(tokens, width).to(dtype)


@dataclass
class Case:
    """A function of tensors ``[T, ...]`` and ``[E, ...]``.

    Attributes:
        call: the function, to rows ``[T, ...]``.
        of_tokens, of_experts: its differentiable arguments, in the order in which it takes them.
        index: ``[T, K]``, experts of every token; -1: none.
        exact: the others keep their bits; otherwise other tokens' products may round differently.
    """

    call: Callable[..., Tensor]
    of_tokens: dict[str, Tensor]
    index: Tensor
    of_experts: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = True

    def run(self, grad=None):
        """``y``, also without gradients, and the gradients."""
        leaves = {
            name: t.clone().requires_grad_()
            for name, t in {**self.of_tokens, **self.of_experts}.items()
        }
        y = self.call(*leaves.values())
        grads = torch.autograd.grad(
            y, list(leaves.values()), torch.ones_like(y) if grad is None else grad
        )
        with torch.no_grad():
            again = self.call(*leaves.values())
        return {"y": y.detach(), "again": again, **dict(zip(leaves, grads, strict=True))}

    def places(self, turn, grad):
        """What is spoiled in this turn, in words and as a row, and the tokens and experts that it
        may change."""
        chosen = [set(row) for row in self.index.tolist()]
        token = turn % len(grad)
        for name, rows in {**self.of_tokens, "grad": grad}.items():
            yield f"{name} of token {token}", rows[token], {token}, chosen[token]
        for name, stack in self.of_experts.items():
            expert = turn % len(stack)
            tokens = {token for token, experts in enumerate(chosen) if expert in experts}
            yield f"{name} of expert {expert}", stack[expert], tokens, {expert}

    def check(self, value, turn):
        """Everything of other tokens and experts is as it is without."""
        clean = self.run()
        grad = torch.ones_like(clean["y"])
        for what, row, tokens, experts in self.places(turn, grad):
            kept = row.clone()
            row.fill_(value)
            found = self.run(grad)
            row.copy_(kept)
            for name, before in clean.items():
                mine = experts if name in self.of_experts else tokens
                others = [each for each in range(len(before)) if each not in mine]
                same = torch.equal if self.exact else partial(torch.allclose, rtol=0.02, atol=0.02)
                assert same(found[name][others], before[others]), (what, name)


def of_experts(kind, experts, gated, tokens, dtype, **own):
    made = kind(tokens, experts, gated=gated, with_bias=True, dtype=dtype, **own)
    given = {name: value for name, value in made.inputs.items() if value is not None}
    rows = {name: value for name, value in given.items() if name in ("u", "x", "gates", "u_gate")}
    weights, index = (
        {name: value for name, value in given.items() if name not in rows},
        choices(experts, tokens),
    )

    def call(*values):
        return made.OP(
            **dict(zip((*rows, *weights), values, strict=True)),
            top_k_index=index,
            activation="silu",
        )

    return Case(call, rows, index, weights)


def hidden(experts, gated, per_group, tokens, dtype):
    return of_experts(HiddenProblem, experts, gated, tokens, dtype, per_group=per_group)


def neurons(experts, gated, tokens, dtype):
    return of_experts(NeuronProblem, experts, gated, tokens, dtype)


def latent(gated, tokens, dtype):
    """Neurons between shared maps, whose gradients every token reaches."""
    index = choices(3, tokens)
    layer = NeuronExperts(12, 3, 5, 4, "gelu", gated, bias=True).to(dtype)
    own = {
        name: torch.randn_like(value)
        for name, value in layer.named_parameters()
        if name not in layer.shared
    }

    def call(x, gates, *values):
        return torch.func.functional_call(
            layer, dict(zip(own, values, strict=True)), (x, gates, index)
        )

    return Case(
        call, {"x": tokens_of(tokens, 12, dtype), "gates": torch.rand(tokens, 2)}, index, own
    )


def given(blocks, left, right):
    """The shared core, whose gradient every token reaches, is no argument of a case."""
    return MPOBlocks(left, blocks.central, right, blocks.in_features, blocks.out_features)


def linear(name, strategy, tokens, dtype):
    """Rows gathered from tokens."""
    shape, index = SMALL_SHAPES[name], choices(3, tokens)
    routing = route(index.clamp_min(0), 3, token_mask=index[:, 0] >= 0)
    blocks = random_blocks(shape, 3, dtype)

    def call(x, left, right):
        where = {"row_index": routing.token_of_slot, "slot_of_token": routing.slot_of_token}
        own = given(blocks, left, right)
        y = grouped_mpo_linear(
            x, own, routing.expert_offsets, activation="silu", strategy=strategy, **where
        )
        padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
        return padded[routing.slot_of_token]  # -1: zeros

    x = tokens_of(tokens, shape.in_features, dtype)
    return Case(call, {"x": x}, index, {"left": blocks.left, "right": blocks.right})


def ffn(gated, tokens, dtype):
    shape, index = SMALL_SHAPES["separable"], choices(3, tokens)
    routing = route(index.clamp_min(0), 3, token_mask=index[:, 0] >= 0)
    up, gate = random_blocks(shape, 3, dtype), random_blocks(shape, 3, dtype) if gated else None
    down = random_blocks(shape.mirrored(), 3, dtype)

    def call(x, gates, left, right):
        return mpo_ffn(
            x, routing, gates, given(up, left, right), down, gate_proj=gate, activation="gelu"
        )

    rows = {"x": tokens_of(tokens, shape.in_features, dtype), "gates": torch.rand(tokens, 2)}
    return Case(call, rows, index, {"left": up.left, "right": up.right})


def slots(capacity, tokens, dtype):
    """There and back; choices beyond the capacity have no slot."""
    index = choices(3, tokens)
    routing = route(index.clamp_min(0), 3, capacity, token_mask=index[:, 0] >= 0)

    def call(x, gates):
        return combine(dispatch(x, routing), routing, gates)

    return Case(call, {"x": tokens_of(tokens, 12, dtype), "gates": torch.rand(tokens, 2)}, index)


def gating(top_k, scoring, tokens, dtype):
    router = TopKRouter(12, 4, RouterConfig(top_k=top_k, scoring_func=scoring), dtype=dtype)
    x = tokens_of(tokens, 12, dtype)
    return Case(lambda x: router(x).top_k_weights, {"x": x}, router(x).top_k_index, exact=False)


def embedding(part, tokens, dtype):
    """Of one of the cores, the slice of an id's digit is its expert; how many they are decides how
    it is computed."""
    shape = SMALL_SHAPES["padded"]
    blocks = random_blocks(shape, 1, dtype)
    ids = torch.arange(tokens) * 5 % shape.in_features
    _, i_c, i_r = shape.in_factors
    digits = {"left": ids // (i_c * i_r), "central": ids // i_r % i_c, "right": ids % i_r}
    axis = {"left": 1, "central": 1, "right": 2}[part]
    cores = {name: getattr(blocks, name) for name in digits}

    def call(slices):
        own = {**cores, part: slices.movedim(0, axis)}
        return mpo_embedding(ids, MPOBlocks(*own.values(), shape.in_features, shape.out_features))

    return Case(call, {}, digits[part][:, None], {part: cores[part].movedim(axis, 0).contiguous()})


def mixture(shape, gated, top_k, tokens, dtype):
    """A layer: a token that is not finite chooses any expert, so that other tokens' products round
    differently."""
    config = MPOEConfig(num_experts=3, shape=shape, router=RouterConfig(top_k=top_k))
    layer = MPOEFeedForward(12, 24, config, activation="gelu", gated=gated).eval().to(dtype)
    return Case(
        layer, {"x": tokens_of(tokens, 12, dtype)}, torch.full((tokens, 1), -1), exact=False
    )


def problems():
    def over(make, *choices):
        picked = itertools.product(*choices)
        return {" ".join((make.__name__, *map(str, each))): partial(make, *each) for each in picked}

    strategies = {
        name: [
            each for each in STRATEGIES if each != "separable" or SMALL_SHAPES[name].is_separable
        ]
        for name in ("separable", "padded_separable", "light", "paper", "padded")
    }
    return {
        **over(hidden, (2, 3), (False, True), (False, True)),
        **over(neurons, (2, 3), (False, True)),
        **over(latent, (False, True)),
        **{
            n: p
            for name, each in strategies.items()
            for n, p in over(linear, (name,), tuple(each)).items()
        },
        **over(ffn, (False, True)),
        **over(slots, (None, 2)),
        **over(gating, (1, 2), ("softmax", "sigmoid")),
        **over(embedding, ("left", "central", "right")),
        **over(mixture, ("hidden", "separable", "light", "paper"), (False, True), (1, 2)),
    }


PROBLEMS = problems()
EVERY = 17  # of the cases one is in the default suite


CASES = [
    pytest.param(
        *names, number, marks=[pytest.mark.slow] if number % EVERY else [], id=", ".join(names)
    )
    for number, names in enumerate(itertools.product(PROBLEMS, DTYPES, VALUES))
]


@on_every_backend
@pytest.mark.parametrize("problem, dtype, value, turn", CASES)
def test_others_do_not_change(backend, problem, dtype, value, turn):
    require(backend)
    try:
        with use_backend(backend):
            PROBLEMS[problem](MANY if turn % 2 else FEW, DTYPES[dtype]).check(VALUES[value], turn)
    except BackendError as error:
        pytest.skip(f"no such kernel: {error}")


def test_a_gate_of_zero_is_noticed():
    case = Case(lambda x: x + 0.0 * x.sum(0), {"x": torch.randn(FEW, 3)}, torch.full((FEW, 1), -1))
    case.check(VALUES["large"], 1)
    refuses(AssertionError, "x of token 1", case.check, VALUES["nan"], 1)
