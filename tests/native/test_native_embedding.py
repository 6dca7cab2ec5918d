"""What only the compiled embedding kernel guarantees: exact choice of rows, the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels import MPOShape, mpo_embedding
from mpoe_kernels.reference import mpo_embedding_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory, torch_threads
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks

from ..kernels.backend_cases import cast

pytestmark = pytest.mark.usefixtures("native_library")
# Axes longer than a panel and sums of more than one piece; iR = 1 and jL = 1; two slices of right per panel; cropped
# columns.
SHAPES = {
    "halves": MPOShape((25, 6, 7), (12, 4, 16), max_bond=33, in_features=1040, out_features=765),
    "paper": MPOShape.paper(3000, 100, max_bond=40),
    "full": MPOShape.paper(4800, 96),
    "separable": MPOShape.separable(1000, 70),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40, 2000])
def test_rows_of_larger_tables(name: str, dtype: torch.dtype, rows: int) -> None:
    """Left first or right first, depending on the shape and on how many rows share digits."""
    true = random_blocks(SHAPES[name], 1)
    blocks, ids = cast(true, dtype), torch.randint(0, true.in_features, (rows,))
    ids[-1] = ids[0]
    with poisoned_memory(), torch.no_grad():
        got = mpo_embedding(ids, blocks, backend="native")
        with torch_threads(2):
            assert torch.equal(mpo_embedding(ids, blocks, backend="native"), got)
        assert_calibrated(got, mpo_embedding_reference(ids, true), mpo_embedding_reference(ids, blocks))
    assert torch.equal(got[-1], got[0])


@pytest.mark.parametrize(
    ("ids", "sizes", "words"),
    [
        ([0], (13, 12), r"num_embeddings must lie in 0\.\.12; got 13"),
        ([], (-1, 12), r"num_embeddings must lie in 0\.\.12; got -1"),
        ([0], (12, 13), r"embedding_dim must lie in 0\.\.12; got 13"),
        ([0, 2], (2, 12), r"ids must lie in 0\.\.1; got 2"),
    ],
)
def test_sizes_that_the_blocks_do_not_have_never_reach_memory(
    ids: list[int], sizes: tuple[int, int], words: str
) -> None:
    blocks = random_blocks(SMALL_SHAPES["light"], 1, torch.float32)  # 12 x 12
    with pytest.raises((ValueError, IndexError), match=words):
        torch.ops.mpoe.mpo_embedding(
            torch.tensor(ids, dtype=torch.int64), blocks.left, blocks.central, blocks.right, *sizes, "native"
        )


def test_an_empty_axis_is_refused() -> None:
    left, central, right = torch.zeros(1, 2, 3, 0), torch.zeros(0, 2, 2, 4), torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="no empty axis"):
        torch.ops.mpoe.mpo_embedding(torch.tensor([0]), left, central, right, 8, 12, "native")
