"""Drop-ins in MPO form: `MPOLinear` for `nn.Linear` and GPT-2's `Conv1D`, `MPOEmbedding` for
`nn.Embedding`, and modules that use the same table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config.checks import check_integer, check_type
from mpoe.layers.cores import Device, DType, MPOCores
from mpoe_kernels import MPOBlocks, MPOShape, mpo_embedding, mpo_linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, recognised by its attributes: layers do not import
    transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_weight(module: nn.Module) -> Tensor:
    """Weight ``[in, out]`` of an `nn.Linear` (transposed view) or a `Conv1D` (unchanged).

    Raises:
        TypeError: a module that is neither.
    """
    if isinstance(module, nn.Linear):
        return module.weight.T
    if is_conv1d(module):
        return module.weight  # type: ignore[return-value]
    raise TypeError(f"expected an nn.Linear or a Conv1D; got {type(module).__name__}")


class MPOLinear(nn.Module):
    """``y = x @ W + bias`` with W ``[in_features, out_features]`` in MPO form.

    ``MPOLinear(in_features, out_features, ...)`` as `nn.Linear`: the paper's factors at full bonds,
    and random weights of `nn.Linear`'s standard deviation, ``1 / sqrt(3 in_features)``; or
    ``MPOLinear(shape)``.

    Args:
        in_features: size of the input, or an `MPOShape`.
        out_features: size of the output; not with a shape.
        bias: whether there is a bias.
        backend: name of a kernel backend, or ``None``.
        init_std: of the weight's entries; default: see above, .02 with a shape.
        shape: `MPOShape` of the weight, in place of the sizes.

    Raises:
        TypeError: neither sizes nor a shape, or both.
    """

    def __init__(
        self,
        in_features: int | MPOShape | None = None,
        out_features: int | None = None,
        bias: bool = True,
        backend: str | None = None,
        init_std: float | None = None,
        *,
        shape: MPOShape | None = None,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        if shape is None and not isinstance(in_features, int):
            in_features, shape = None, in_features
        sizes: Any = (in_features, out_features)
        if None in sizes if shape is None else sizes != (None, None):
            raise TypeError(
                "MPOLinear takes in_features and out_features, as nn.Linear does, or a shape alone "
                f"(then bias goes by name); got in_features {in_features!r}, out_features "
                f"{out_features!r}, shape {shape!r}"
            )
        if shape is None:
            shape = MPOShape.paper(*sizes)
            init_std = (3 * sizes[0]) ** -0.5 if init_std is None else init_std
        std = 0.02 if init_std is None else init_std
        self.cores = MPOCores(shape, 1, bias, std, device=device, dtype=dtype)
        self.backend = backend

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        shape: MPOShape | None = None,
        gauge: str = "symmetric",
        backend: str | None = None,
    ) -> MPOLinear:
        """Decompose an `nn.Linear` or `Conv1D`; ``shape=None`` takes the paper's factors at full
        bonds (lossless)."""
        weight = linear_weight(linear)
        shape = MPOShape.paper(*weight.shape) if shape is None else shape
        bias = getattr(linear, "bias", None)
        module = cls(
            shape, None, bias is not None, backend, device=weight.device, dtype=weight.dtype
        )
        module.cores.load_weight_(weight, gauge)
        if bias is not None:
            module.cores.bias.data.copy_(bias)  # type: ignore[union-attr]
        return module.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.cores.in_features

    @property
    def out_features(self) -> int:
        return self.cores.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.cores.bias

    @property
    def weight(self) -> Tensor:
        """The weight ``[out, in]`` rebuilt (a temporary, oriented like `nn.Linear.weight`); for
        inspection."""
        return self.cores.dense_weights()[0].T

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return mpo_linear(x, self.cores.blocks(), self.cores.bias, backend=self.backend)


# ------------------------------------------------------------- embeddings


class MPOEmbedding(nn.Module):
    """Rows of a table ``[num_embeddings, embedding_dim]`` in MPO form.

    The factors may multiply to more than the vocabulary; the rows beyond its true size are not
    visible to the user.

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
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        check_type("shape", shape, MPOShape, "an MPOShape")
        if padding_idx is not None:
            check_integer("padding_idx", padding_idx, -shape.in_features)
            if padding_idx >= shape.in_features:
                raise ValueError(
                    f"padding_idx must be within the {shape.in_features} embeddings; got "
                    f"{padding_idx}"
                )
            padding_idx %= shape.in_features
        self.cores = MPOCores(shape, 1, False, init_std, device=device, dtype=dtype)
        self.padding_idx = padding_idx
        self.backend = backend

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        shape: MPOShape | None = None,
        gauge: str = "symmetric",
        backend: str | None = None,
    ) -> MPOEmbedding:
        """Decompose an `nn.Embedding`; ``shape=None`` takes automatic factors, with a padded
        vocabulary, lossless."""
        check_type("embedding", embedding, nn.Embedding, "an nn.Embedding")
        weight = embedding.weight
        shape = MPOShape.automatic(*weight.shape) if shape is None else shape
        module = cls(
            shape, embedding.padding_idx, backend, device=weight.device, dtype=weight.dtype
        )
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
    """Looks up the table of an `MPOEmbedding` that lives elsewhere in the model; has no parameters
    of its own."""

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
    """Language-model head ``[..., embedding_dim] -> [..., num_embeddings]``: the transposed table
    of an embedding.

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
