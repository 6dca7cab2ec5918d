"""Functions of every op with tensors that fit, and the arguments of the raw ops that they lead
to."""

from collections.abc import Callable
from typing import Any

import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
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
Function = Callable[..., Tensor]


def given(blocks: MPOBlocks, left: Tensor, central: Tensor) -> MPOBlocks:
    return MPOBlocks(left, central, blocks.right, blocks.in_features, blocks.out_features)


def problems(
    shape: MPOShape = SHAPE, strategy: str = "auto"
) -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
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

    def grouped(x: Tensor, left: Tensor, central: Tensor, bias: Tensor) -> Tensor:
        how = {"row_index": rows, "activation": "gelu", "strategy": strategy}
        return grouped_mpo_linear(x, given(up, left, central), offsets, bias, **how)

    def ffn(x: Tensor, gates: Tensor, left: Tensor, central: Tensor) -> Tensor:
        return mpo_ffn(
            x, routing, gates, given(up, left, central), down, gate_proj=gate, activation="silu"
        )

    def hidden(
        u: Tensor, gates: Tensor, right: Tensor, left: Tensor, bias: Tensor, *of_gate: Tensor
    ) -> Tensor:
        u_gate, right_gate = of_gate
        both = {"u_gate": u_gate, "right_gate": right_gate}
        return hidden_experts(u, gates, index, right, left, bias, activation="silu", **both)

    def neurons(
        x: Tensor, gates: Tensor, up: Tensor, down: Tensor, bias: Tensor, gate_up: Tensor
    ) -> Tensor:
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

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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


def calls(backend: str, op: str, shape: MPOShape = SHAPE, strategy: str = "auto") -> dict[str, Any]:
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


def run(op: str, arguments: dict[str, Any], recorded: bool = False) -> Any:
    """``recorded``: with a gradient for every tensor that can have one."""
    values = [*arguments.values()]
    if recorded:
        values = [
            v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for v in values
        ]
    return getattr(torch.ops.mpoe, op)(*values)
