"""The losses of routers, on raw logits, over valid tokens.

The balancing loss is a product of two means over tokens, so the mean of the processes' losses
differs from the loss of the whole batch and is stricter: it requires the few tokens of every
process to be balanced by themselves (Qiu et al., *Demons in the Detail*, arXiv 2501.11873). Only
the fractions f need the other processes, and no gradient flows through them: one small all-reduce
of counts, ``[layers, E]``, makes a step of many processes equal to that of one process.
"""

import torch
from torch import Tensor

from mpoe.layers.context import check_mask


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
    kept = torch.ones_like(top_k_index)
    if token_mask is not None:
        kept = token_mask.long()[:, None].expand_as(top_k_index)
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
