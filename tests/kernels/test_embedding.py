"""mpo_embedding against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mpoe_kernels import MPOShape, mpo_embedding
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.embedding import eager
from mpoe_kernels.embedding.op import EmbeddingCall
from mpoe_kernels.reference import mpo_embedding_reference
from tests.assertions import assert_calibrated, poisoned_memory
from tests.cases import SMALL_SHAPES

from .backend_cases import DTYPES, LAYOUTS, cast, leaves

every_shape = pytest.mark.parametrize(
    "name", ["light", "padded", "one_core", "centre_last", "seven_cores", "separable"]
)


@every_shape
@pytest.mark.parametrize("rows", [0, 1, 5, 400])
def test_embedding_against_reference(name: str, rows: int) -> None:
    shape = SMALL_SHAPES[name]
    true = random_blocks(shape, 1, requires_grad=True)
    ids = torch.randint(0, shape.in_features, (rows,))
    want = mpo_embedding_reference(ids, true)
    grad = torch.randn(want.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(want, leaves(true), grad)
    for dtype in DTYPES:
        for layout in LAYOUTS.values():
            blocks, plain = cast(true, dtype, layout), cast(true, dtype)
            with poisoned_memory():
                got = mpo_embedding(ids, blocks)
                grads = torch.autograd.grad(got, leaves(blocks), grad.to(dtype))
            same = mpo_embedding_reference(ids, plain)
            assert_calibrated(got, want, same, "rows")
            own = torch.autograd.grad(same, leaves(plain), grad.to(dtype))
            for each, truth, of_torch in zip(grads, wanted, own, strict=True):
                assert_calibrated(each, truth, of_torch, "gradient", factor=4)
    assert mpo_embedding(ids.view(-1, 1).int(), true).shape == (rows, 1, shape.out_features)


@pytest.mark.parametrize("rows", [1, 500])
@pytest.mark.parametrize("bad", [-1, 11])
def test_embedding_refuses_ids_outside_the_table(rows: int, bad: int) -> None:
    ids = torch.full((rows,), bad)
    with pytest.raises(IndexError, match=rf"ids must lie in 0\.\.10; got {bad}"):
        mpo_embedding(ids, random_blocks(SMALL_SHAPES["padded"], 1))


def test_pytorch_computes_it_whichever_backend_is_named() -> None:
    blocks, ids = random_blocks(SMALL_SHAPES["padded"], 1, torch.float32), torch.tensor([3, 0, 10])
    for name in ("eager", "native", "triton", "cuda"):
        assert torch.equal(mpo_embedding(ids, blocks, backend=name), mpo_embedding(ids, blocks))


def test_opcheck() -> None:
    left, central, right = leaves(random_blocks(SMALL_SHAPES["light"], 1, torch.float32, requires_grad=True))
    ids = torch.tensor([3, 0, 11, 3])
    opcheck(torch.ops.mpoe.mpo_embedding.default, (ids, left, central, right, 12, 12, "auto"))
    detached = tuple(t.detach() for t in (left, central, right))
    backward = (ids, *detached, 12, 12, "auto", torch.randn(4, 12), [True, False, True])
    opcheck(torch.ops.mpoe.mpo_embedding_backward.default, backward)


@pytest.mark.parametrize("way", ["gather", "pairs", "rebuild"])
@every_shape
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("elements", [1, 2**19], ids=["parts", "whole"])
def test_every_eager_way(way: str, name: str, rows: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_way", lambda *_: way)
    monkeypatch.setattr(eager, "_ELEMENTS", elements)  # one group at a time, or all at once
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 1, requires_grad=True)
    ids = torch.randint(0, shape.in_features, (rows,))
    with poisoned_memory():
        got = mpo_embedding(ids, blocks)
        grad = torch.randn(got.shape, dtype=torch.float64)
        grads = torch.autograd.grad(got, leaves(blocks), grad)
    want = mpo_embedding_reference(ids, blocks)
    assert torch.allclose(got, want)
    for a, b in zip(grads, torch.autograd.grad(want, leaves(blocks), grad), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@every_shape
@pytest.mark.parametrize("rows", [1, 3, 10, 40, 400])
def test_the_way_with_the_fewest_flops(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that copy no more than rebuilding."""
    shape = SMALL_SHAPES[name]
    blocks, dims = random_blocks(shape, 1), BlockDims.of_shape(shape)
    ids = torch.arange(rows) % shape.in_features
    call = EmbeddingCall(ids, *leaves(blocks), shape.in_features, shape.out_features, "auto")
    copied = {"rebuild": 0, "gather": rows * dims.b * dims.jR, "pairs": rows * dims.jL * dims.jC * dims.jR}
    chosen, flops = eager._way(dims, rows), {}
    for way in [way for way, elements in copied.items() if elements <= 2 * dims.weight_elements]:
        monkeypatch.setattr(eager, "_way", lambda *_, way=way: way)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            eager.forward(call)
        flops[way] = counter.get_total_flops()
    assert flops[chosen] == min(flops.values())


def test_rows_decide_the_eager_way() -> None:
    dims = BlockDims.of_shape(MPOShape.paper(32128, 768, max_bond=64))
    found = [eager._way(dims, rows) for rows in (512, 4096, 2**20)]
    assert found == ["gather", "pairs", "rebuild"]
    assert eager._way(dims, 512, "cuda") == "rebuild"  # the other ways count the rows of every group on the CPU


def test_copies_of_right_count() -> None:
    """A separable table's only slice of right is large; it would be copied for every row."""
    dims = BlockDims.of_shape(MPOShape.separable(8000, 768))
    assert [eager._way(dims, rows) for rows in (10, 1000, 2**20)] == ["gather", "pairs", "rebuild"]
