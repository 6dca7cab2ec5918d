"""Calls that must end in one of our own errors: wrong sizes, indices and devices, and modes that ops do not support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
    Routing,
    backend_reasons,
    combine,
    decompose,
    decompose_with_errors,
    dispatch,
    expert_weights,
    fold,
    grouped_mpo_linear,
    mpo_embedding,
    mpo_ffn,
    mpo_linear,
    reconstruct,
    route,
    use_backend,
)

SHAPE = MPOShape((2, 3), (3, 2))
CORES = [torch.ones(1, 2, 3, 6), torch.ones(6, 3, 2, 1)]
BACKENDS = ("eager", "native")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reasons = backend_reasons()[request.param]
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def two_experts() -> MPOBlocks:
    return fold([torch.ones(2, 1, 2, 3, 6), CORES[1]], 1)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", ["left", "central", "right"])
def test_blocks_without_elements(name: str, axis: int) -> None:
    sizes = {"left": [1, 2, 3, 4], "central": [4, 3, 2, 5], "right": [1, 5, 2, 2]}
    sizes[name][axis] = 0
    with pytest.raises(ValueError, match=f"{name} must have no axis of size 0"):
        MPOBlocks(*(torch.ones(s) for s in sizes.values()), 1, 1)


@pytest.mark.parametrize("values", [(1, 3, 5), (0, -1, 3), (0, 3, 2), (0, 2, 6), (-1, 2, 3)])
def test_offsets_that_are_none(backend: str, values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expert_offsets must start at 0, not fall, and end at 5 at most; got"):
        grouped_mpo_linear(torch.ones(5, 6), two_experts(), offsets(*values), backend=backend)
    arguments = (torch.ones(5, 6), *(two_experts().left, two_experts().central, two_experts().right))
    with pytest.raises(ValueError, match="expert_offsets must start at 0"):
        torch.ops.mpoe.grouped_mpo_linear_backward(
            *(*arguments, offsets(*values), None, None, 6, 6, "none", "rebuild", backend),
            *(torch.ones(5, 6), torch.ones(0), torch.ones(0), [True] * 4 + [False]),
        )


@pytest.mark.parametrize("row", [-1, 5, 9])
def test_rows_that_are_none(backend: str, row: int) -> None:
    rows = torch.tensor([0, row, 1])
    with pytest.raises(ValueError, match=rf"row_index must lie in 0\.\.4; got {row}"):
        grouped_mpo_linear(torch.ones(5, 6), two_experts(), offsets(0, 2, 3), row_index=rows, backend=backend)


@pytest.mark.parametrize("capacity", [None, 1])
@pytest.mark.parametrize("expert", [-1, 3, 2**40])
def test_experts_that_are_none(backend: str, expert: int, capacity: int | None) -> None:
    with pytest.raises(ValueError, match=rf"top_k_index must lie in 0\.\.2; got {expert}"):
        route(torch.tensor([[0], [expert]]), 3, capacity, backend=backend)


@pytest.mark.parametrize("slot", [-2, 4])
def test_slots_that_are_none(backend: str, slot: int) -> None:
    routing = route(torch.tensor([[0, 1], [1, 0]]), 2, backend=backend)
    wrong = replace(routing, slot_of_token=torch.tensor([[0, 1], [slot, 3]]))
    rows, gates = torch.ones(4, 3, requires_grad=True), torch.ones(2, 2)
    with pytest.raises(ValueError, match=rf"slot_of_token must lie in -1\.\.3; got {slot}"):
        combine(rows, wrong, gates, backend=backend)
    with pytest.raises(ValueError, match="slot_of_token must lie in"):
        torch.ops.mpoe.dispatch_backward(torch.ones(4, 3), wrong.slot_of_token, backend)
    for need_weights in (True, False):
        with pytest.raises(ValueError, match="slot_of_token must lie in"):
            torch.ops.mpoe.combine_backward(
                *(torch.ones(2, 3), rows.detach(), wrong.token_of_slot, wrong.slot_of_token, gates),
                *(True, need_weights, backend),
            )
    for token in (-1, 2):
        tokens = replace(routing, token_of_slot=torch.tensor([0, 1, token, 1]))
        with pytest.raises(ValueError, match=rf"token_of_slot must lie in 0\.\.1; got {token}"):
            dispatch(torch.ones(2, 3), tokens, backend=backend)


def test_tensors_on_two_devices() -> None:
    x, blocks, where = torch.ones(3, 6), two_experts(), offsets(0, 1, 3)
    rows, routing = torch.arange(3), route(torch.tensor([[0], [1], [1]]), 2)
    elsewhere = route(torch.tensor([[0], [1], [1]]).to("meta"), 2)
    one = fold(CORES, 1)
    calls: dict[str, Callable[[], object]] = {
        "expert_offsets": lambda: grouped_mpo_linear(x, blocks, where.to("meta")),
        "row_index": lambda: grouped_mpo_linear(x, blocks, where, row_index=rows.to("meta")),
        "slot_of_token": lambda: grouped_mpo_linear(
            x, blocks, where, row_index=rows, slot_of_token=rows[:, None].to("meta")
        ),
        "ids": lambda: mpo_embedding(rows.to("meta"), one),
        "token_mask": lambda: route(rows[:, None], 3, token_mask=torch.ones(3, dtype=torch.bool, device="meta")),
        "routing": lambda: dispatch(x, elsewhere),
        "top_k_weights": lambda: combine(x, routing, torch.ones(3, 1, device="meta")),
        "token_of_slot": lambda: replace(routing, token_of_slot=routing.token_of_slot.to("meta")),
        "central": lambda: grouped_mpo_linear(
            x, MPOBlocks(blocks.left, blocks.central.to("meta"), blocks.right, 6, 6), where
        ),
    }
    for name, call in calls.items():
        for autocast in (False, True):
            with (
                torch.autocast("cpu", enabled=autocast),
                pytest.raises(ValueError, match=f"^{name} must be on the device of"),
            ):
                call()
    with pytest.raises(ValueError, match="cores must be on one device"):
        fold([CORES[0], CORES[1].to("meta")], 1)


def test_ops_called_directly_with_tensors_on_two_devices() -> None:
    """PyTorch sends such a call to the op's fake, which must not return uninitialised memory."""
    blocks, x = fold(CORES, 1), torch.ones(3, 6)
    tensors = (x, blocks.left, blocks.central, blocks.right, offsets(0, 3).to("meta"))
    with pytest.raises(ValueError, match="needs its tensors on one device"):
        torch.ops.mpoe.grouped_mpo_linear(*tensors, None, None, 6, 6, "none", "auto", "auto", False)
    with pytest.raises(ValueError, match="needs its tensors on one device"):
        torch.ops.mpoe.dispatch(x, offsets(0, 3), torch.arange(3).to("meta"), torch.zeros(3, 1).long(), "auto")


def test_meta_device() -> None:
    cores = [core.to("meta") for core in CORES]
    blocks = fold(cores, 1)
    assert (blocks.left.device.type, blocks.num_experts) == ("meta", 1)
    assert mpo_linear(torch.ones(3, 6, device="meta"), blocks).shape == (3, 6)
    assert reconstruct(cores).shape == (6, 6)
    with pytest.raises(ValueError, match=r"weight must have values to decompose; got float32 .* on meta"):
        decompose(torch.ones(6, 6, device="meta"), SHAPE)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "grouped_mpo_linear": lambda x: mpo_linear(x, fold(CORES, 1)),
    "dispatch": lambda x: dispatch(x, route(torch.zeros(3, 1).long(), 1)),
    "combine": lambda x: combine(x, route(torch.zeros(3, 1).long(), 1), torch.ones(3, 1)),
    "mpo_embedding": lambda x: mpo_embedding(
        torch.arange(3),
        MPOBlocks(torch.ones(1, 1, 1, 1), x.sum() * torch.ones(1, 3, 2, 1), torch.ones(1, 1, 1, 1), 3, 2),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_modes(name: str) -> None:
    call, x = OPS[name], torch.randn(3, 6, requires_grad=True)
    with pytest.raises(NotImplementedError, match=rf"mpoe::{name} does not support torch\.vmap"):
        torch.vmap(call)(torch.randn(2, 3, 6))
    with (
        pytest.warns(),
        pytest.raises(NotImplementedError, match=r"does not support torch\.jit\.trace; use torch\.compile"),
    ):
        torch.jit.trace(call, (x.detach(),))
    first = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives of MPO ops are not supported"):
        first.sum().backward()


def test_tracing_a_fold_is_refused_in_words() -> None:
    cores = (torch.ones(2, 1, 3, 3, 2), torch.ones(2, 2, 2, 1))
    with pytest.raises(NotImplementedError, match=r"fold does not support torch\.jit\.trace"), pytest.warns():
        torch.jit.trace(lambda core: fold([core, cores[1]], central=1).left, (cores[0],))


def test_words_instead_of_an_error_from_inside() -> None:
    x, one = torch.ones(3, 6), fold(CORES, 1)
    routing, gates = route(torch.zeros(3, 1).long(), 1), torch.ones(3, 1)
    pairs = torch.zeros(3, 1).long()
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: fold(None), TypeError, "cores must be a non-empty sequence"),
        (lambda: reconstruct(None), TypeError, "cores must be a non-empty sequence"),
        (lambda: reconstruct(CORES, 3), TypeError, "shape must be an MPOShape or None; got int 3"),
        (lambda: fold(CORES, 1, num_experts=0), ValueError, "num_experts must be at least 1; got 0"),
        (lambda: fold(CORES, 1, num_experts="2"), TypeError, "num_experts must be an integer; got str '2'"),
        (lambda: Routing(None, None, None), TypeError, "expert_offsets must be a tensor"),
        (lambda: replace(routing, expert_offsets=offsets(0)), ValueError, r"expert_offsets must be .* with E >= 1"),
        (lambda: replace(routing, token_of_slot=torch.arange(4)), ValueError, r"must have N = T \* K"),
        (lambda: mpo_ffn(x, None, gates, one, one), TypeError, "routing must be a Routing .*; got NoneType"),
        (lambda: mpo_ffn(x, routing, gates, one, one, dropout=-1), ValueError, "dropout must lie .*; got -1"),
        (lambda: mpo_ffn(x, routing, gates, one, one, dropout=1.5), ValueError, r"dropout must lie .*; got 1\.5"),
        (lambda: mpo_ffn(x, routing, gates, one, one, dropout="x"), TypeError, "dropout must be a number; got str 'x'"),
        (lambda: MPOBlocks(one.left, one.central, one.right, "6", 6), TypeError, "in_features must be an integer"),
        (lambda: MPOBlocks(one.left, one.central, one.right, 6, 6.0), TypeError, "out_features must be an integer"),
        (lambda: route(pairs, None), TypeError, "num_experts must be an integer; got NoneType None"),
        (lambda: route(pairs, 3.0), TypeError, r"num_experts must be an integer; got float 3\.0"),
        (lambda: route(pairs, True), TypeError, "num_experts must be an integer; got bool True"),
        (
            lambda: route(pairs, 2**63),
            ValueError,
            "num_experts must lie between 1 and 1048576; got 9223372036854775808",
        ),
        (lambda: route(pairs, 2**31), ValueError, "num_experts must lie between 1 and 1048576; got 2147483648"),
        (lambda: route(pairs, 1, capacity=1.5), TypeError, r"capacity must be an integer; got float 1\.5"),
        (lambda: route(pairs[:1].expand(2**31, 1), 1), ValueError, r"top_k_index must be .* T \* K <= 2147483647"),
        (lambda: route(pairs[:1].expand(2**30, 2), 2), ValueError, r"top_k_index must be .* T \* K <= 2147483647"),
        (lambda: use_backend(None).__enter__(), TypeError, "name must be that of a backend; got None"),
        (lambda: route(pairs, 1, backend=[]), ValueError, r"backend must be one of .*; got \[\]"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    assert route(pairs, 1, capacity=2**70).expert_load.tolist() == [3]
    most = torch.empty(2**31 - 1, 1, dtype=torch.int64, device="meta")
    assert route(most, 2**20).expert_offsets.shape == (2**20 + 1,)


def test_dtypes_under_autocast() -> None:
    """Autocast leaves float64 alone, so it must not be mixed with other dtypes; integers are refused."""
    x, one = torch.randn(3, 6), fold(CORES, 1)
    wide = fold([core.double() for core in CORES], 1)
    with torch.autocast("cpu"):
        with pytest.raises(
            TypeError, match="bias must have the dtype of x, float32; autocast leaves float64; got float64"
        ):
            mpo_linear(x, one, torch.ones(6, dtype=torch.float64))
        with pytest.raises(TypeError, match="left must have the dtype of x, float64; autocast leaves float64"):
            mpo_linear(x.double(), one)
        with pytest.raises(TypeError, match="left must have the dtype of x"):
            mpo_linear(x, replace(one, left=one.left.long()))
        assert mpo_linear(x.double(), wide, torch.ones(6).double()).dtype == torch.float64
        assert mpo_linear(x, one, torch.ones(6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal", "identity"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e37), (torch.float64, 1e300), (torch.bfloat16, 1e37)])
@pytest.mark.parametrize("factors", [((2, 3, 2), (3, 2, 2)), ((2, 6), (6, 2)), ((12,), (12,))])
def test_decompose_large_numbers(gauge: str, dtype: torch.dtype, size: float, factors: tuple) -> None:
    weight = (torch.randn(12, 12, dtype=torch.float64) / 3).to(dtype)
    shape = MPOShape(*factors)
    same, found = (decompose_with_errors(w, shape, gauge) for w in (weight, weight * size))
    assert found.norm == pytest.approx(same.norm * size, rel=0.02)
    cores = [core.double() for core in found.cores]
    assert all(bool(torch.isfinite(core).all()) for core in cores)
    cores[-1] = cores[-1] / size
    rounding = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(reconstruct(cores, shape), weight.double(), rtol=rounding, atol=rounding)


def test_decompose_past_the_range() -> None:
    weight = torch.full((6, 6), 3e38)
    with pytest.raises(ValueError, match="weight is too large: with the gauge 'orthogonal' its cores pass the range"):
        decompose(weight, SHAPE, "orthogonal")
    assert all(bool(torch.isfinite(core).all()) for core in decompose(weight, SHAPE))


def test_decompose_under_autocast() -> None:
    weight = torch.randn(6, 6)
    with torch.autocast("cpu"):
        cores = decompose(weight, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(cores, decompose(weight, SHAPE), strict=True))


def test_blocks_of_another_kind_and_layout() -> None:
    with pytest.raises(TypeError, match=r"blocks must be MPOBlocks .*; got tuple"):
        expert_weights((1, 2))  # type: ignore[arg-type]
    blocks = fold([torch.ones(1, 2, 2, 1)])
    with pytest.raises(ValueError, match="central must be on the device of left, cpu; got"):
        expert_weights(replace(blocks, central=blocks.central.to("meta")))
    with pytest.raises(ValueError, match=r"weight must be a dense tensor; got one of the layout torch\.sparse_coo"):
        decompose(torch.eye(8).to_sparse(), MPOShape((2, 4), (2, 4)))
