"""`MPOEmbedding`: a drop-in for `nn.Embedding` whose table is an MPO, and modules that use the same table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpoe.config.checks import check_integer
from mpoe.layers.cores import MPOCores
from mpoe_kernels import MPOBlocks, MPOShape, mpo_embedding, mpo_linear


class MPOEmbedding(nn.Module):
    """Rows of a table ``[num_embeddings, embedding_dim]`` in MPO form.

    The factors may multiply to more than the vocabulary; the rows beyond its true size are not visible to the user.

    Args:
        shape: `MPOShape` with ``in_features`` = vocabulary and ``out_features`` = embedding size.
        padding_idx: as in `nn.Embedding`: lookups give this row no gradient.
        backend: name of a kernel backend, or ``None``.
    """

    def __init__(
        self,
        shape: MPOShape,
        padding_idx: int | None = None,
        backend: str | None = None,
        init_std: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(shape, MPOShape):
            raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
        if padding_idx is not None:
            check_integer("padding_idx", padding_idx, -shape.in_features)
            if not -shape.in_features <= padding_idx < shape.in_features:
                raise ValueError(f"padding_idx must be within the {shape.in_features} embeddings; got {padding_idx}")
            padding_idx %= shape.in_features
        self.cores = MPOCores(shape, 1, False, init_std, device=device, dtype=dtype)
        self.padding_idx, self.backend = padding_idx, backend

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        shape: MPOShape | None = None,
        gauge: str = "symmetric",
        backend: str | None = None,
    ) -> MPOEmbedding:
        """Decompose an `nn.Embedding`; ``shape=None`` takes automatic factors, with a padded vocabulary, lossless."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding; got {type(embedding).__name__}")
        weight = embedding.weight
        shape = MPOShape.automatic(*weight.shape) if shape is None else shape
        module = cls(shape, embedding.padding_idx, backend, device=weight.device, dtype=weight.dtype)
        module.cores.load_weight_(weight, gauge)
        return module.train(embedding.training)

    @property
    def num_embeddings(self) -> int:
        return self.cores.in_features

    @property
    def embedding_dim(self) -> int:
        return self.cores.out_features

    @property
    def weight(self) -> Tensor:
        """The table ``[num_embeddings, embedding_dim]`` rebuilt (a temporary); for inspection."""
        return self.cores.dense_weights()[0]

    def transposed_blocks(self) -> MPOBlocks:
        """Blocks of the tied output head, ``[embedding_dim, num_embeddings]``."""
        return self.cores.blocks().transposed()

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` int32/int64 -> ``[..., embedding_dim]``."""
        rows = mpo_embedding(ids, self.cores.blocks(), backend=self.backend)
        if self.padding_idx is None:
            return rows
        return torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)

    def logits(self, x: Tensor) -> Tensor:
        """Tied head: ``x [..., embedding_dim] @ table^T -> [..., num_embeddings]``."""
        return mpo_linear(x, self.transposed_blocks(), backend=self.backend)


class SharedEmbedding(nn.Module):
    """Looks up the table of an `MPOEmbedding` that lives elsewhere in the model; has no parameters of its own."""

    def __init__(self, embedding: MPOEmbedding) -> None:
        super().__init__()
        # In a tuple, so that the cores belong to one module only and are saved once.
        self._owner = (embedding,)

    @property
    def padding_idx(self) -> int | None:
        return self._owner[0].padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """As `MPOEmbedding.forward`."""
        return self._owner[0](ids)


class TiedHead(SharedEmbedding):
    """Language-model head ``[..., embedding_dim] -> [..., num_embeddings]``: the transposed table of an embedding.

    Args:
        embedding: the embedding that owns the table.
        bias: ``[num_embeddings]`` or ``None``; the head's own.
    """

    def __init__(self, embedding: MPOEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Logits of hidden states ``x [..., embedding_dim]``."""
        logits = self._owner[0].logits(x)
        return logits if self.bias is None else logits + self.bias
