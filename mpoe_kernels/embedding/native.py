"""The compiled CPU kernel of csrc/cpu/embedding/embedding.h: float32 and bfloat16.

The backward is eager's: its products are large, and the gradient of a plain table costs more, which has as many rows as
the table. Unlike the forward's, its bits may depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.embedding.call import EmbeddingCall
from mpoe_kernels.indices import check_ids
from mpoe_kernels.native_library import DTYPES, EmbeddingArguments, call_native, dense, dense_index, dense_like
from mpoe_kernels.registry import Request


def reasons(request: Request) -> list[str]:
    """Why the kernel cannot run a request (empty: it can)."""
    if request.dtype in (torch.float32, torch.bfloat16):
        return []
    return [f"it computes mpo_embedding in float32 and bfloat16, not in {request.dtype}"]


def forward(call: EmbeddingCall) -> Tensor:
    """Every distinct row once."""
    d, dtype = call.dims, call.central.dtype
    ids = dense_index("ids", call.ids, 1)
    check_ids(ids, call.num_embeddings)
    kept = (
        ids,
        dense_like("left", call.left, (1, d.iL, d.jL, d.a), dtype),
        dense("central", call.central),
        dense_like("right", call.right, (1, d.b, d.iR, d.jR), dtype),
        call.central.new_empty(ids.shape[0], call.embedding_dim),
    )
    sizes = (ids.shape[0], call.num_embeddings, call.embedding_dim, d.iL, d.jL, d.a, d.iC, d.jC, d.b, d.iR, d.jR)
    name = DTYPES.get(dtype, str(dtype).encode())
    call_native("mpoe_embedding", EmbeddingArguments(name, *sizes, *(tensor.data_ptr() for tensor in kept)))
    return kept[-1]
