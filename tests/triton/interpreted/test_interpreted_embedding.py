"""Rows of an MPO table and their gradients, by gathering and by rebuilding, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import MPOBlocks, mpo_embedding
from mpoe_kernels.embedding import triton as embedding
from mpoe_kernels.embedding.call import EmbeddingBackwardCall
from mpoe_kernels.reference import mpo_embedding_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("name", ["light", "padded", "one_core", "centre_last", "seven_cores", "separable"])
@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.float32), (9, torch.float32), (9, torch.bfloat16)])
def test_rows_and_gradients(
    name: str, rows: int, dtype: torch.dtype, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "gather_is_cheaper", lambda *_: gather)
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 1)
    rounded = [t.to(dtype) for t in (blocks.left, blocks.central, blocks.right)]
    ids = torch.randint(0, shape.in_features, (rows,))
    grad = torch.randn(rows, shape.out_features).to(dtype)

    def run(function, kind: torch.dtype, **options: str) -> list[torch.Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in rounded]
        y = function(ids, MPOBlocks(*leaves, shape.in_features, shape.out_features), **options)
        return [y, *torch.autograd.grad(y, leaves, grad.to(kind))]

    with poisoned_memory():
        actual = run(mpo_embedding, dtype, backend="triton")
    truth, same = run(mpo_embedding_reference, torch.float64), run(mpo_embedding_reference, dtype)
    for label, a, t, s in zip(("y", "dleft", "dcentral", "dright"), actual, truth, same, strict=True):
        assert_calibrated(a, t, s, label)


@pytest.mark.parametrize("bad", [-1, 11])
def test_ids_outside_the_table(bad: int) -> None:
    blocks = random_blocks(SMALL_SHAPES["padded"], 1, torch.float32)
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.10; got"):
        mpo_embedding(torch.tensor([0, bad]), blocks, backend="triton")


def test_few_rows_are_counted_and_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ordering is by one digit of the id, so counting is enough."""
    monkeypatch.setattr(embedding, "gather_is_cheaper", lambda *_: True)
    shape = SMALL_SHAPES["padded"]
    blocks = random_blocks(shape, 1, torch.float32)
    ids, grad = torch.randint(0, shape.in_features, (9,)), torch.randn(9, shape.out_features)
    given = ids, blocks.left, blocks.central, blocks.right, shape.in_features, shape.out_features

    class Operations(TorchDispatchMode):
        """Records what PyTorch computes."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Operations() as operations:
        embedding.backward(EmbeddingBackwardCall(*given, "triton", grad))
    assert "index" in operations.seen
    assert not operations.seen & {"sort", "searchsorted"}
