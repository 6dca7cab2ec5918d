"""Functions of every op with tensors that fit, and the arguments of the raw ops that they lead
to."""

import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import (
    MPOBlocks,
    combine,
    dispatch,
    grouped_mpo_linear,
    hidden_experts,
    mpo_embedding,
    mpo_ffn,
    mpo_linear,
    neuron_experts,
    route,
    use_backend,
)
from tests.cases import SMALL_SHAPES

SHAPE = SMALL_SHAPES["separable"]
TOKENS, EXPERTS, TOP_K = 5, 3, 2


def given(blocks, left, central):
    return MPOBlocks(left, central, blocks.right, blocks.in_features, blocks.out_features)


def problems(shape=SHAPE, strategy="auto"):
    """By public name: a function of floating tensors, and those."""
    index = expert_choice("zipf", TOKENS, EXPERTS, TOP_K)
    routing = route(index, EXPERTS)
    gates = torch.rand(TOKENS, TOP_K)
    one, up, gate = (
        random_blocks(shape, experts, torch.float32) for experts in (1, EXPERTS, EXPERTS)
    )
    down = random_blocks(shape.mirrored(), EXPERTS, torch.float32)
    x, bias = torch.randn(TOKENS, shape.in_features), torch.randn(shape.out_features)
    wide = torch.randn(TOKENS, 12)
    offsets, rows = routing.expert_offsets, routing.token_of_slot
    ids = torch.tensor([0, 3, 3, 7, 1])

    def grouped(x, left, central, bias):
        how = {"row_index": rows, "activation": "gelu", "strategy": strategy}
        return grouped_mpo_linear(x, given(up, left, central), offsets, bias, **how)

    def ffn(x, gates, left, central):
        return mpo_ffn(
            x, routing, gates, given(up, left, central), down, gate_proj=gate, activation="silu"
        )

    def hidden(u, gates, right, left, bias, *of_gate):
        u_gate, right_gate = of_gate
        both = {"u_gate": u_gate, "right_gate": right_gate}
        return hidden_experts(u, gates, index, right, left, bias, activation="silu", **both)

    def neurons(x, gates, up, down, bias, gate_up):
        return neuron_experts(x, gates, index, up, down, bias, activation="silu", gate_up=gate_up)

    own = torch.randn(EXPERTS, 4, 12)
    side = torch.randn(EXPERTS, 1, 3, 3)
    inside = torch.randn(EXPERTS, 12), wide.flip(0), side.clone()
    return {
        "grouped_mpo_linear": (grouped, (x, up.left, up.central, bias)),
        "mpo_linear": (lambda x, *b: mpo_linear(x, given(one, *b)), (x, one.left, one.central)),
        "mpo_ffn": (ffn, (x, gates, up.left, up.central)),
        "hidden_experts": (hidden, (wide, gates, side, side.clone(), *inside)),
        "neuron_experts": (
            neurons,
            (wide, gates, own, torch.randn(EXPERTS, 4, 7), torch.randn(EXPERTS, 4), own.clone()),
        ),
        "dispatch": (lambda x: dispatch(x, routing), (x,)),
        "combine": (
            lambda y, gates: combine(y, routing, gates),
            (torch.randn(TOKENS * TOP_K, 4), gates),
        ),
        "mpo_embedding": (lambda *b: mpo_embedding(ids, given(one, *b)), (one.left, one.central)),
    }


class Recorder(TorchDispatchMode):
    """Keeps the arguments, by name, with which every raw op was called first."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mpoe":
            schema = function._schema
            values = [
                *args,
                *(argument.default_value for argument in schema.arguments[len(args) :]),
            ]
            named = {
                argument.name: value
                for argument, value in zip(schema.arguments, values, strict=True)
            }
            found = {
                n: value.detach() if isinstance(value, Tensor) else value
                for n, value in named.items()
            }
            self.calls.setdefault(schema.name.removeprefix("mpoe::"), found)
        return function(*args, **(kwargs or {}))


def calls(backend, op, shape=SHAPE, strategy="auto"):
    """Arguments that fit a raw op, by the names of its schema."""
    made, public = problems(shape, strategy), op.removesuffix("_backward")
    with use_backend(backend), Recorder() as recorder:
        if op == "route":
            route(
                torch.randint(0, EXPERTS, (TOKENS, TOP_K)),
                EXPERTS,
                2,
                torch.ones(TOKENS, dtype=torch.bool),
            )
        else:
            leaves = [value.requires_grad_() for value in made[public][1]]
            y = made[public][0](*leaves)
            torch.autograd.grad(y, leaves, torch.randn_like(y))
    return recorder.calls[op]


def run(op, arguments, recorded=False):
    """``recorded``: with a gradient for every tensor that can have one."""
    values = [*arguments.values()]
    if recorded:
        values = [
            v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for v in values
        ]
    return getattr(torch.ops.mpoe, op)(*values)
