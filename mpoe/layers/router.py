"""`TopKRouter`: which experts a token goes to, and with which weights; its logits in float32,
without a float32 copy of the tokens where the device allows it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe.config import RouterConfig
from mpoe.config.checks import check_integer, check_type
from mpoe.layers.cores import Device, DType, FromInitialValues, check_placement
from mpoe_kernels import Routing, route
from mpoe_kernels.checks import check_plain_memory, no_autocast
from mpoe_kernels.routing.gating import (
    best_experts,
    can_route_natively,
    gating_on_gpu,
    native_gating,
    native_logits,
)


def float32_logits(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """``x [T, I] weight^T [I, E]`` in float32 arithmetic, ``[T, E]``, whatever the dtypes.

    The backward saves x itself instead of a float32 copy. The forward makes no copy either on a
    GPU, where products of two 16-bit numbers are exact in float32, in which tensor cores accumulate
    them, nor in the native kernels; nor does the backward on a GPU for bfloat16. ``backend``: name
    of a kernel backend, or ``None``.
    """
    if x.dtype == torch.float32:
        return F.linear(x, weight.float())
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Logits.apply(x, weight, backend)
    return _logits(x, weight, backend)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _logits(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    if can_route_natively(x, weight, backend):
        return native_logits(x, weight)
    logits = logits_of_low_precision(x, weight) if _on_gpu(x) else None
    return F.linear(x.float(), weight.float()) if logits is None else logits


def logits_of_low_precision(x: Tensor, weight: Tensor) -> Tensor | None:
    """The same with 16-bit products, which PyTorch supports on GPUs; None for dtypes for which they
    are not as exact."""
    if x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32):
        parts = torch.mm(x, bfloat16_parts(weight).flatten(0, 1).t(), out_dtype=torch.float32)
        return parts.view(x.shape[0], 3, weight.shape[0]).sum(1)
    return None  # float16 cannot hold the last digits of a float32 weight


def bfloat16_parts(weight: Tensor) -> Tensor:
    """Three bfloat16 numbers ``[3, E, I]`` whose sum is the float32 one: each holds 8 of its 24
    bits."""
    first = weight.bfloat16()
    rest = weight - first
    second = rest.bfloat16()
    return torch.stack([first, second, (rest - second).bfloat16()])


class _Logits(torch.autograd.Function):
    """The copies that gradients need are made in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
        return _logits(x, weight, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = (grad @ weight.float()).to(x.dtype) if need_x else None
        if not need_weight:
            return dx, None, None
        if _on_gpu(x) and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            grads = bfloat16_parts(grad).mT
            parts = torch.bmm(grads, x.expand(3, *x.shape), out_dtype=torch.float32)
            return dx, parts.sum(0).to(weight.dtype), None
        return dx, (grad.t() @ x.float()).to(weight.dtype), None


Joined = Callable[[Tensor], Tensor]  # what decides in place of a token's own logits [T, E]
_MOST_SLOTS = 2**31 - 1  # slots are counted in 32 bits


@dataclass(frozen=True)
class RouterOutput:
    """Decision of a router.

    Attributes:
        logits: raw, float32 ``[T, E]``, joined with the request's where that decides.
        top_k_index: int64 ``[T, K]``, best expert first.
        top_k_weights: gates, float32 ``[T, K]``; 0 for choices that are not kept.
        kept: bool ``[T, K]``: the choices that a second-expert policy keeps; ``None`` = all.
    """

    logits: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    kept: Tensor | None = None


class TopKRouter(FromInitialValues):
    """Softmax router in float32, regardless of autocast and the parameters' dtype.

    Gate (a new conversion must not change outputs): top-1 multiplies by ``p / stop_grad(p)``, whose
    value is exactly 1 and whose gradient is that of log p; top-k weights are renormalised to sum 1;
    ``is_scale_prob`` uses the raw probabilities, as Switch Transformers does. Sigmoid scores are
    treated alike. Gates are multiplied by ``routed_scaling_factor``. With a second-expert policy
    (GShard) the gates of a token are renormalised over the choices that are kept; a lone one gets
    ``p / stop_grad(p)``.

    Args:
        in_features: size I of a token.
        num_experts: E.
        config: `RouterConfig`.
        backend: name of a kernel backend, or ``None``.

    Attributes:
        e_score_correction_bias: float32 ``[E]``, added to the scores for the choice alone, or
            ``None``; starts at 0. See `mpoe.training.update_correction_bias`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, sizes below 1, ``top_k`` larger than
            ``num_experts``.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterConfig | None = None,
        *,
        backend: str | None = None,
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, 1)
        check_integer("num_experts", num_experts, 1)
        check_type("config", config, RouterConfig | None, "a RouterConfig")
        check_placement(device, dtype)
        self.config = RouterConfig() if config is None else config
        self.top_k = 1 if self.config.top_k is None else self.config.top_k
        if self.top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}; got {self.top_k}")
        self.in_features = in_features
        self.num_experts = num_experts
        self.backend = backend
        self.weight = nn.Parameter(
            torch.empty(num_experts, in_features, device=device, dtype=dtype)
        )
        corrects = self.config.bias_update_rate > 0
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if corrects else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """By name: truncated normal of variance ``init_scale / in_features`` (Switch Transformers,
        section 2.4)."""
        std = math.sqrt(self.config.init_scale / self.in_features)
        value = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        if std:
            nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std)
        else:
            value.zero_()
        values = {"weight": value}
        if self.e_score_correction_bias is not None:
            values["e_score_correction_bias"] = torch.zeros_like(self.e_score_correction_bias)
        return values

    def capacity(self, num_tokens: int) -> int | None:
        """Slots an expert may own, ``ceil(factor * T * K / E)``, with GShard's gating ``ceil(factor
        * T / E)``; at least ``min_capacity`` and at most 2^31 - 1; ``None`` = no limit.

        T counts every token of the batch, including padding, so the bound does not depend on the
        mask.
        """
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is None:
            return None
        choices = num_tokens if self.config.is_gshard else num_tokens * self.top_k
        wanted = min(factor * choices / self.num_experts, _MOST_SLOTS)
        return min(max(self.config.min_capacity, math.ceil(wanted)), _MOST_SLOTS)

    def route(self, decision: RouterOutput, token_mask: Tensor | None = None) -> Routing:
        """Slots of the kept choices, within the capacity; ``token_mask`` as in
        `mpoe_kernels.route`."""
        index = decision.top_k_index
        kept = decision.kept
        capacity = self.capacity(index.shape[0])
        if kept is None:
            return route(index, self.num_experts, capacity, token_mask, backend=self.backend)
        # Dropped choices go to an additional expert, whose slots come after all others and are then
        # treated as empty.
        index = index.masked_fill(~kept, self.num_experts)
        routing = route(index, self.num_experts + 1, capacity, token_mask, backend=self.backend)
        slots = routing.slot_of_token.masked_fill(~kept, -1)
        return Routing(routing.expert_offsets[:-1], routing.token_of_slot, slots)

    def forward(self, x: Tensor, joined: Joined | None = None) -> RouterOutput:
        """Route tokens ``x [T, I]``, by what ``joined`` makes of their logits, if it is given."""
        check_type("x", x, Tensor, "a tensor [T, I]")
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must be [T, I] with I = {self.in_features}; got {list(x.shape)}")
        check_plain_memory("x", x)
        with no_autocast(x.device):
            if self.training and self.config.jitter:
                x = x.float()
                low, high = 1.0 - self.config.jitter, 1.0 + self.config.jitter
                x = x * torch.empty_like(x).uniform_(low, high)
            elif joined is None and self.can_gate_natively(x):
                logits, index, weights = native_gating(
                    x, self.weight, self.top_k, self.config.is_scale_prob
                )
                return RouterOutput(logits, index, self._scaled(weights))
            if joined is None and self._is_softmax_alone:
                gating = gating_on_gpu(
                    x, self.weight, self.top_k, self.config.is_scale_prob, self.scale, self.backend
                )
                if gating is not None:
                    return RouterOutput(*gating)
            logits = float32_logits(x, self.weight, self.backend)
            if joined is not None:
                logits = joined(logits)
            scores, corrected = self.scores(logits)
            index = best_experts(corrected, self.top_k, self.backend)
            weights = scores.gather(-1, index)
            if self.config.is_gshard:
                return self._gshard(logits, weights, index)
            if not self.config.is_scale_prob:
                total = weights.detach() if self.top_k == 1 else weights.sum(-1, keepdim=True)
                weights = weights / total
        return RouterOutput(logits, index, self._scaled(weights))

    def scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Experts' scores ``[T, E]``, and those that choose: with the correction bias."""
        is_sigmoid = self.config.scoring_func == "sigmoid"
        scores = logits.sigmoid() if is_sigmoid else torch.softmax(logits, dim=-1)
        bias = self.e_score_correction_bias
        return scores, scores if bias is None else scores + bias

    @property
    def scale(self) -> float:
        """What gates are multiplied by."""
        return self.config.routed_scaling_factor or 1.0

    def _scaled(self, gates: Tensor) -> Tensor:
        return gates if self.config.routed_scaling_factor is None else gates * self.scale

    def can_gate_natively(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether one native call can do the gating, see `mpoe_kernels.routing.gating`; ``others``
        are its other tensors."""
        if (self.training and self.config.jitter) or not self._is_softmax_alone:
            return False
        return can_route_natively(x, self.weight, self.backend, *others)

    @property
    def _is_softmax_alone(self) -> bool:
        """Whether the gates are the largest probabilities, or these divided by their sum."""
        config = self.config
        return (
            not config.is_gshard
            and config.scoring_func == "softmax"
            and self.e_score_correction_bias is None
        )

    def _gshard(self, logits: Tensor, weights: Tensor, index: Tensor) -> RouterOutput:
        policy = self.config.second_policy if self.training else self.config.eval_second_policy
        share = (weights[:, 1] / weights.sum(-1)).detach()
        if policy == "threshold":
            second = share > self.config.second_threshold
        elif policy == "random":
            second = torch.rand_like(share) * self.config.second_threshold < share
        else:
            second = torch.full_like(share, policy == "all", dtype=torch.bool)
        kept = torch.stack([torch.ones_like(second), second], dim=1)
        weights = weights * kept
        if not self.config.is_scale_prob:
            total = weights.sum(-1, keepdim=True)
            # A lone choice divided by itself would be 1 without a gradient.
            weights = weights / torch.where(second[:, None], total, total.detach())
        return RouterOutput(logits, index, weights, kept)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_experts={self.num_experts}, top_k={self.top_k}"
