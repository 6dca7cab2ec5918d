"""The models of a study's arms, their sizes and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe.config import MPOEConfig
from mpoe.layers import DenseExperts
from mpoe.models import convert_to_mpoe
from mpoe_bench.study.language import BLOCK
from mpoe_bench.study.plan import Arm, Study

LAYERS = 2
VOCABULARY = 256
# GPT-2's .02 is for models ten times as wide; here, models would learn so slowly that width would be mistaken for
# capacity.
INIT_STD = 0.1


def dense_model(model: int, hidden: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of bytes with random weights from ``seed``: ``LAYERS`` layers of size ``model``."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=BLOCK,
        n_embd=model,
        n_layer=LAYERS,
        n_head=max(model // 16, 1),
        n_inner=hidden,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own in one op
        initializer_range=INIT_STD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    made = GPT2LMHeadModel(config)
    made.loss_type = "ForCausalLM"
    return made


def convert(dense: GPT2LMHeadModel, arm: Arm, model: int, seed: int) -> nn.Module:
    """``dense`` as the mixture of an arm, in place."""
    torch.manual_seed(20_000 + seed)
    mixture = convert_to_mpoe(dense, MPOEConfig(**arm.fields(model)), inplace=True)
    if arm.own_start:
        for module in mixture.modules():
            if isinstance(module, DenseExperts):
                for projection in module.projections().values():
                    torch.nn.init.normal_(projection.weight, std=INIT_STD)
    return mixture


def feed_forward_parts(model: Any) -> list[nn.Module]:
    """The feed-forward module of every layer."""
    return [block.mlp for block in model.transformer.h]


@dataclass(frozen=True)
class Costs:
    """Sizes of an arm's feed-forward layers and its model's FLOPs.

    Attributes:
        weights: matrices of the dense network and the experts; ``parameters``: biases and the router too.
        flops: multiply-adds of a token in a feed-forward layer, router in.
        whole: of a token in the whole model, head in; attention sees half of a block on average.
    """

    weights: int
    parameters: int
    flops: float
    whole: float


def costs(arm: Arm, model: int, hidden: int) -> Costs:
    """The costs of an arm whose dense network has ``hidden`` hidden units, after its conversion."""
    made: Any = dense_model(model, hidden, 0)
    dense = 2 * model * hidden
    flops = float(dense)
    if arm.experts is not None:
        made = convert(made, arm, model, 0)
        config: MPOEConfig = made.mpoe_config
        kept: Any = feed_forward_parts(made)[0]
        relative = kept.relative_flops(config.top_k) if config.keeps_network else config.top_k
        flops = relative * dense + model * config.num_experts
    named = [(n, p) for part in feed_forward_parts(made) for n, p in part.named_parameters()]
    weights = sum(p.numel() for n, p in named if p.ndim > 1 and "router" not in n and "bias" not in n)
    attention = 4 * model**2 + 2 * model * (BLOCK + 1) / 2
    whole = LAYERS * (attention + flops) + model * VOCABULARY
    return Costs(weights, sum(p.numel() for _, p in named), flops, whole)


def dense_hidden(study: Study, key: str, model: int) -> int:
    """Hidden size of an arm's dense network: its own, or, to the next multiple of 8, as costly as another arm's."""
    arm = study.arms[key]
    if arm.flops_of:
        other = study.arms[arm.flops_of]
        return round(costs(other, model, dense_hidden(study, arm.flops_of, model)).flops / (2 * model) / 8) * 8
    if arm.size_of:
        other = study.arms[arm.size_of]
        parameters = costs(other, model, dense_hidden(study, arm.size_of, model)).parameters / LAYERS
        return round((parameters - model) / (2 * model + 1) / 8) * 8  # each hidden unit has a bias, and each output
    return int(Fraction(arm.hidden) * 4 * model)


def steps_of(study: Study, key: str, model: int, steps: int) -> int:
    """The steps of an arm: those of the corner, or as many as another arm's training FLOPs allow."""
    arm = study.arms[key]
    if arm.budget_of is None:
        return steps
    other, hidden = study.arms[arm.budget_of], dense_hidden(study, arm.budget_of, model)
    mixture, before = costs(other, model, hidden).whole, costs(Arm(""), model, hidden).whole
    until = other.dense_until if other.experts else 1.0
    spent = until * before + (1 - until) * mixture
    return round(steps * spent / costs(arm, model, dense_hidden(study, key, model)).whole)
