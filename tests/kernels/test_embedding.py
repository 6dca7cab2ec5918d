"""mpo_embedding against the float64 reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from mpoe_bench.cases import random_blocks, relative_error
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from mpoe_kernels import MPOShape, mpo_embedding
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.embedding import eager
from mpoe_kernels.embedding.op import EmbeddingCall
from mpoe_kernels.reference import mpo_embedding_reference
from tests.assertions import assert_calibrated, poisoned_memory
from tests.cases import SMALL_SHAPES
from tests.linear_problem import LAYOUTS, cast, leaves

from .backend_cases import DTYPES


@pytest.mark.parametrize(
    ("way", "elements"), [(None, eager._ELEMENTS), *product(["gather", "pairs", "rebuild"], [1, eager._ELEMENTS])]
)
@pytest.mark.parametrize("name", ["light", "padded", "one_core", "centre_last", "seven_cores", "separable"])
@pytest.mark.parametrize("rows", [0, 1, 5, 400])
def test_against_reference(
    way: str | None, elements: int, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the way that is chosen in every dtype and layout; by every way, one group at a time or all at once."""
    if way is not None:
        monkeypatch.setattr(eager, "_way", lambda *_: way)
    monkeypatch.setattr(eager, "_ELEMENTS", elements)
    shape = SMALL_SHAPES[name]
    true = random_blocks(shape, 1, requires_grad=True)
    ids = torch.randint(0, shape.in_features, (rows,))
    want = mpo_embedding_reference(ids, true)
    grad = torch.randn(want.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(want, leaves(true), grad)
    for dtype, layout in product(DTYPES, LAYOUTS.values()) if way is None else [(torch.float64, LAYOUTS["dense"])]:
        blocks, plain = cast(true, dtype, layout), cast(true, dtype)
        with poisoned_memory():
            got = mpo_embedding(ids, blocks)
            grads = torch.autograd.grad(got, leaves(blocks), grad.to(dtype))
        same = mpo_embedding_reference(ids, plain)
        own = torch.autograd.grad(same, leaves(plain), grad.to(dtype))
        for each, truth, of_torch in zip((got, *grads), (want, *wanted), (same, *own), strict=True):
            if dtype == torch.float64:  # the truth has the same rounding
                assert relative_error(each, truth) < 1e-13
            else:
                assert_calibrated(each, truth, of_torch, factor=2 if each is got else 4)
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


@pytest.mark.parametrize("name", ["light", "padded", "one_core", "centre_last", "seven_cores", "separable"])
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


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (MPOShape.paper(32128, 768, max_bond=64), (512, 4096, 2**20)),
        # A separable table's only slice of right is large; it would be copied for every row.
        (MPOShape.separable(8000, 768), (10, 1000, 2**20)),
    ],
)
def test_rows_decide_the_eager_way(shape: MPOShape, rows: tuple[int, ...]) -> None:
    dims = BlockDims.of_shape(shape)
    assert [eager._way(dims, count) for count in rows] == ["gather", "pairs", "rebuild"]
    assert eager._way(dims, rows[0], "cuda") == "rebuild"  # the other ways count the rows of every group on the CPU
