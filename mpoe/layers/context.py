"""The context of one model call: token masks travel down to the MPOE layers, router outputs travel
up; and the losses of these outputs, on raw logits, over valid tokens, in a `global_batch` over
those of all processes.

Feed-forward modules of Hugging Face models receive only hidden states. The model that owns them
opens a `RoutingContext` for the duration of its forward; every `MPOEFeedForward` below it reads its
mask there and stores its router's output. Contexts are per thread, and activation checkpointing
restores them when it recomputes a layer.

The balancing loss is a product of two means over tokens, so the mean of the processes' losses
differs from the loss of the whole batch and is stricter: it requires the few tokens of every
process to be balanced by themselves (Qiu et al., *Demons in the Detail*, arXiv 2501.11873). Only
the fractions f need the other processes, and no gradient flows through them: one small all-reduce
of counts, ``[layers, E]``, makes a step of many processes equal to that of one process.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mpoe_kernels.checks import check_dense


def check_mask(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """Require a mask of this shape, bool or of the integers 0 and 1; returns it as bool.

    An additive mask, 0 for what counts, would mean the opposite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor {list(shape)}; got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(
            f"{name} must be bool (or integers), True for tokens and False for padding, not "
            f"additive; got {value.dtype}"
        )
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
    return value.bool()


@dataclass(frozen=True)
class RouterRecord:
    """What one layer's router did in one call.

    Attributes:
        stream: ``"encoder"``, ``"decoder"`` or ``"main"``.
        logits: raw router logits, float32 ``[T, E]``.
        top_k_index: the chosen experts that the balancing loss counts, int64 ``[T, K]``.
        expert_load: slots that every expert processed, int32 ``[E]``, without padding and dropped
            tokens.
        token_mask: bool ``[T]`` or ``None``.
    """

    stream: str
    logits: Tensor
    top_k_index: Tensor
    expert_load: Tensor
    token_mask: Tensor | None


@dataclass
class RoutingContext:
    """Masks for the layers below, and the records that they store.

    Attributes:
        masks: for every stream, bool ``[B, S]`` (``False`` = padding) or ``None``.
        records: one `RouterRecord` per MPOE layer in order of execution; ``None`` = do not record
            (recomputation, generation).
        is_generating: inside `generate`, which reads nothing of a routing.
    """

    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    records: list[RouterRecord] | None = field(default_factory=list)
    is_generating: bool = False


class _Current(threading.local):
    """One value per thread. torch.compile can trace reads and writes of a ``threading.local``, but
    not of a ``ContextVar``."""

    routing: RoutingContext | None = None
    is_global: bool = False  # in a `global_batch`, of this group
    group: dist.ProcessGroup | None = None


_current = _Current()


def current_routing() -> RoutingContext | None:
    """The context of the model call in progress in this thread, if any."""
    return _current.routing


def is_recorded() -> bool:
    """Whether the model call in progress asks for the routers' records."""
    call = current_routing()
    return call is not None and call.records is not None


class Entered(AbstractContextManager["RoutingContext | None"]):
    """Makes a context current; may be entered again, also in another thread."""

    def __init__(self, context: RoutingContext | None) -> None:
        self._context, self._previous = context, context

    def __enter__(self) -> RoutingContext | None:
        self._previous, _current.routing = _current.routing, self._context
        return self._context

    def __exit__(self, *exc: object) -> None:
        _current.routing = self._previous


def routing_context(
    masks: Mapping[str, Tensor | None] | None = None, record: bool = True
) -> AbstractContextManager[RoutingContext]:
    """Run MPOE layers with token masks, and collect their routers' records.

    Example::

        with routing_context({"main": attention_mask.bool()}) as routing:
            y = feed_forward(x)
        loss = load_balancing_loss(routing.records[0].logits, routing.records[0].top_k_index)
    """
    return Entered(RoutingContext(dict(masks or {}), [] if record else None))  # type: ignore[return-value]


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """``context_fn`` for `torch.utils.checkpoint.checkpoint` (non-reentrant).

    Called in the forward pass; the recomputation, which autograd may run in another thread, sees
    the same masks and stores no second record.
    """
    captured = current_routing()
    return nullcontext(), Entered(
        None if captured is None else dataclasses.replace(captured, records=None)
    )


@contextmanager
def _joined(
    outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]
) -> Iterator[None]:
    with outer, inner:
        yield


def checkpoint_arguments(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for `torch.utils.checkpoint.checkpoint`: the user's, with our contexts around the
    user's."""
    chosen = {"use_reentrant": False, **(kwargs or {})}
    users: Any = chosen.get("context_fn")
    if chosen["use_reentrant"]:
        # A reentrant checkpoint recomputes layers without the masks of the call, and its routers
        # get no gradient.
        warnings.warn(
            "MPOE models checkpoint activations with use_reentrant=False, which gives the same "
            "gradients; "
            "use_reentrant=True is not used",
            stacklevel=3,
        )

    def both() -> tuple[AbstractContextManager[Any], ...]:
        return tuple(_joined(*pair) for pair in zip(checkpoint_contexts(), users(), strict=True))

    return {
        **chosen,
        "use_reentrant": False,
        "context_fn": checkpoint_contexts if users is None else both,
    }


def _checked(logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        got = f"{list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must be [..., T, E]; got {got}")
    logits = logits.float()
    if token_mask is not None:
        token_mask = check_mask("token_mask", token_mask, (logits.shape[-2],))
        # Mask before the softmax: padding may contain NaN or Inf, and masking later would give
        # gradients of 0 x NaN.
        logits = torch.where(token_mask[:, None], logits, logits.new_zeros(()))
    return logits, token_mask


def _mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over axis -2 of ``values [..., T, M]`` for valid tokens; 0 if there are none."""
    if token_mask is None:
        return values.sum(-2) / max(values.shape[-2], 1)
    weights = token_mask.to(values.dtype)
    return (values * weights[:, None]).sum(-2) / weights.sum().clamp_min(1)


def count_choices(
    top_k_index: Tensor, num_experts: int, token_mask: Tensor | None = None
) -> Tensor:
    """How often each expert was chosen by a valid token: ``top_k_index [..., T, K]`` -> int64
    ``[..., E]``."""
    kept = (
        torch.ones_like(top_k_index)
        if token_mask is None
        else token_mask.long()[:, None].expand_as(top_k_index)
    )
    counts = top_k_index.new_zeros(*top_k_index.shape[:-2], num_experts)
    return counts.scatter_add(-1, top_k_index.flatten(-2), kept.flatten(-2))


def load_balancing_loss(
    logits: Tensor,
    top_k_index: Tensor,
    token_mask: Tensor | None = None,
    choices: Tensor | None = None,
) -> Tensor:
    """``E * sum_e f_e P_e`` (Switch Transformers, Fedus et al. 2022, eq. 4-6), without its weight
    alpha.

    ``f_e`` is the fraction of (token, choice) pairs that chose expert e, ``P_e`` the mean
    probability of e. 1 when balanced, at most E. The gradient flows through P only.

    Args:
        logits: raw router logits ``[..., T, E]``; leading axes are layers, computed independently.
        top_k_index: chosen experts, int64 ``[..., T, K]``.
        token_mask: bool ``[T]``; ``False`` tokens are not counted.
        choices: `count_choices` of the whole batch to which these tokens belong, ``[..., E]``;
            default: of these tokens.

    Returns:
        ``[...]`` float32, one loss per layer.

    Raises:
        TypeError, ValueError: mismatched shapes; a mask that is neither bool nor of integers.
    """
    logits, token_mask = _checked(logits, token_mask)
    if top_k_index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"top_k_index must be [..., T, K] with leading axes {list(logits.shape[:-1])}; "
            f"got {list(top_k_index.shape)}"
        )
    experts = logits.shape[-1]
    if choices is None:
        choices = count_choices(top_k_index, experts, token_mask)
    fraction = choices.float() / choices.sum(-1, keepdim=True).clamp_min(1)
    probability = _mean_over_tokens(torch.softmax(logits, -1), token_mask)
    return experts * (fraction * probability).sum(-1)


def router_z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE, Zoph et al. 2022, eq. 5), without its weight.

    Args:
        logits: raw router logits ``[..., T, E]``.
        token_mask: bool ``[T]``.

    Returns:
        ``[...]`` float32.
    """
    logits, token_mask = _checked(logits, token_mask)
    squared = torch.logsumexp(logits, -1, keepdim=True).square()
    return _mean_over_tokens(squared, token_mask).squeeze(-1)


# ------------------------------------------------------------ the global batch


@contextmanager
def global_batch(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside this context, models compute their router losses over the tokens of all ranks.

    ``aux_loss`` of a rank is then its share: the *average* over ranks, as DDP and FSDP average
    gradients, is the loss that one process computes on the whole batch. Every rank must run the
    same number of forward passes inside; with one process, or without `torch.distributed`, nothing
    changes. `MPOETrainer` opens it for training steps.

    Args:
        group: the ranks; default: all.

    Example::

        with global_batch():
            model(**batch).loss.backward()
    """
    previous = (_current.is_global, _current.group)
    _current.is_global, _current.group = True, group
    try:
        yield
    finally:
        _current.is_global, _current.group = previous


def sum_over_ranks(counts: Tensor) -> tuple[Tensor, int]:
    """Counts summed over the ranks of the current `global_batch`, and the number of ranks; outside
    it, ``counts`` and 1."""
    if not (_current.is_global and dist.is_available() and dist.is_initialized()):
        return counts, 1
    counts = counts.clone()
    dist.all_reduce(counts, group=_current.group)
    return counts, dist.get_world_size(_current.group)
