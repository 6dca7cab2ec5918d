"""Raw ops refuse in words what does not fit: no kernel of any backend sees it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoe.layers.context import check_mask
from mpoe_kernels import BackendError
from mpoe_kernels.signatures import ARGUMENTS, MOST_EXPERTS

from .backend_cases import on_every_backend
from .problems import EXPERTS, TOKENS, TOP_K, calls, run

EXCHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "complex": lambda t: t.to(torch.complex64),
    "other kind": lambda t: t.long() if t.is_floating_point() else t.float(),
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t.flatten()[:1].squeeze(0),
    "without memory": lambda t: emptied(t.clone()),
}


def emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@on_every_backend
@pytest.mark.parametrize("op", ARGUMENTS)
def test_every_tensor_of_every_op(op: str, backend: str) -> None:
    """Refused for its dtype, number of axes or memory, by its name. Layouts other than dense PyTorch refuses."""
    fitting = calls(backend)[op]
    run(op, fitting)
    for name, value in fitting.items():
        for exchange in EXCHANGES.values():
            if not isinstance(value, Tensor) or name in ("h", "saved"):  # whose sizes vary
                continue
            arguments = {**fitting, name: exchange(value)}
            with pytest.raises((TypeError, ValueError), match=rf"{name} must .*; got"):
                run(op, arguments)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            lost = torch._neg_view(emptied(value.clone()))
            with pytest.raises(ValueError, match=rf"every tensor of mpoe::{op} must hold its values"):
                run(op, {**fitting, name: lost})


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_missing_tensor(op: str) -> None:
    """PyTorch's dispatcher lets None through where a schema wants a tensor, also to the fake of meta tensors."""
    fitting = calls("auto")[op]
    wanted = [a.name for a in getattr(torch.ops.mpoe, op).default._schema.arguments if str(a.type) == "Tensor"]
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in fitting.items()}
    for name, given in product(wanted, (fitting, on_meta)):
        with pytest.raises(TypeError, match=f"{name} must be a tensor; got NoneType None"):
            run(op, {**given, name: None})


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("route", {"num_experts": 2**31}, f"num_experts must lie between 1 and {MOST_EXPERTS}; got 2147483648"),
    ("route", {"num_experts": 0}, "num_experts must"),
    ("combine", {"backend": "relu"}, "backend must be one of .*; got 'relu'"),
    ("grouped_mpo_linear_backward", {"row_index": torch.full((10,), -1)}, r"row_index must lie in 0\.\.4; got -1"),
    ("route", {"capacity": 0}, "capacity must be at least 1; got 0"),
    *(
        (op, {"expert_offsets": torch.zeros(size, dtype=torch.int32)}, r"expert_offsets must be .* \[E\+1\], E = ")
        for op in ("dispatch", "combine", "grouped_mpo_linear")
        for size in (0, 1)
    ),
    ("route", {"top_k_index": torch.zeros(TOKENS, 0).long()}, "top_k_index must be .* with K >= 1"),
    ("route", {"token_mask": torch.zeros(TOKENS)}, r"token_mask must be bool \[T\], T = 5; got float32"),
    ("grouped_mpo_linear", {"activation": "tanh"}, "activation must be one of .*; got 'tanh'"),
    ("grouped_mpo_linear", {"strategy": "fast"}, "strategy must be one of .*; got 'fast'"),
    ("grouped_mpo_linear", {"in_features": 99}, r"I = 99|I must be at most"),
    ("grouped_mpo_linear", {"out_features": 0}, "out_features must be at least 1"),
    ("grouped_mpo_linear", {"out_features": 99, "bias": None}, r"F must be at most jL\*jC\*jR = 10; got 99"),
    ("grouped_mpo_linear_backward", {"need": [True]}, "need must name every gradient, 5; got"),
    ("hidden_experts_backward", {"need": [True]}, "need must name every gradient, 7; got"),
    ("neuron_experts_backward", {"need": [True]}, "need must name every gradient, 6; got"),
    ("neuron_experts", {"down": torch.randn(EXPERTS, 5, 9)}, r"down must be of x's dtype \[E, m, F\], E = 3, m = 4"),
    ("hidden_experts", {"u_gate": None}, "u_gate and right_gate must be given together"),
    ("hidden_experts", {"activation": "gelu_pytorch"}, "activation must be one of"),
    (
        "hidden_experts",
        {n: torch.randn(EXPERTS, 1, 5, 5) for n in ("right", "left", "right_gate")},
        r"right must be \[E, G, b, b\] with b a divisor of F = 12",
    ),
    (
        "mpo_embedding",
        {"left": torch.randn(1, 2, 2, 3000)},
        r"central must be of left's dtype \[a, iC, jC, b\], a = 3000",
    ),
    *(
        (op, {"ids": torch.tensor([0, 0, 0, 0, 2**30])}, r"ids must lie in 0\.\.\d+; got 1073741824")
        for op in ("mpo_embedding", "mpo_embedding_backward")
    ),
    ("mpo_embedding", {"num_embeddings": 10**6}, r"V must be at most iL\*iC\*iR = 12; got 1000000"),
]


@on_every_backend
@pytest.mark.parametrize("number", range(len(WRONG)))
def test_other_arguments(number: int, backend: str) -> None:
    op, changes, message = WRONG[number]
    with pytest.raises((TypeError, ValueError, IndexError, BackendError), match=message):
        run(op, {**calls(backend)[op], **changes})


@pytest.mark.parametrize("missing", ["gates", "slot_of_token"])
def test_rows_are_placed_with_gates_and_slots(missing: str) -> None:
    fitting = {**calls("eager")["grouped_mpo_linear"], "save": False}
    rows = TOKENS * TOP_K
    more = {"slot_of_token": torch.arange(rows)[:, None], "out_index": torch.arange(rows), "gates": torch.ones(rows)}
    run("grouped_mpo_linear", {**fitting, **more})
    with pytest.raises(ValueError, match=f"{missing} must be given with out_index"):
        run("grouped_mpo_linear", {**fitting, **more, missing: None})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), r"mask must be bool \(or integers\), .* not additive; got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.complex64), "not additive"),
        (torch.ones(2, 3).bool().to_sparse(), "mask must be a dense tensor; got one of the layout torch.sparse_coo"),
        (torch.ones(2, 3).to_mkldnn(), "mask must be a dense tensor; got one of the layout torch._mkldnn"),
        (torch.nested.nested_tensor([torch.ones(3)]), "mask must be a dense tensor; got one of the layout nested"),
        ([[True] * 3] * 2, "mask must be a bool tensor .2, 3.; got list"),
        (torch.ones(3, 2).bool(), r"mask must be \[2, 3\]; got \[3, 2\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(getattr(value, "dtype", "list")),
)
def test_masks(mask: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_mask("mask", mask, (2, 3))
    assert torch.equal(check_mask("mask", torch.eye(2).long(), (2, 2)), torch.eye(2).bool())
