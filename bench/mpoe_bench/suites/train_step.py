"""Train steps: a whole AdamW step of a small T5, dense, with dense experts, and with MPO experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe_bench.cases import relative_error
from mpoe_bench.contender import Contender
from mpoe_bench.problem import Truth
from mpoe_bench.section import Build, Comparison

DENSE = "dense T5"


class Step:
    """One model with its optimizer; ``step`` runs a whole step, ``logits`` returns the batch's logits."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model.eval(), ids  # no dropout: every contender does the same work
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def logits(self) -> Tensor:
        return self.model(input_ids=self.ids, decoder_input_ids=self.ids).logits

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train_step_comparison(
    shape_names: Sequence[str], sizes: tuple[int, int], experts: int, tokens: tuple[int, int], device: str
) -> Comparison:
    """Train steps of a T5 with one encoder layer and one decoder layer.

    Args:
        shape_names: lossless shapes of `MPOEConfig`, so that every model must compute what the dense one does.
        sizes: model and hidden size.
        experts: E.
        tokens: batch and sequence length.
        device: where to run.
    """
    import transformers

    config = transformers.T5Config(
        d_model=sizes[0],
        d_ff=sizes[1],
        d_kv=max(8, sizes[0] // 12),
        num_heads=12 if sizes[0] >= 96 else 2,
        num_layers=1,
        vocab_size=512,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    dense = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 512, tokens, device=device)
    with torch.no_grad():
        exact = copy.deepcopy(dense).double().to(device)(input_ids=ids, decoder_input_ids=ids).logits.cpu()
        same = copy.deepcopy(dense).to(device)(input_ids=ids, decoder_input_ids=ids).logits.cpu()
    truth = Truth({"y": exact}, {"y": relative_error(same, exact)}, torch.float32)

    def build(name: str, kind: str, expert_config: MPOEConfig | None) -> tuple[Contender, Truth]:
        model = copy.deepcopy(dense) if expert_config is None else convert_to_mpoe(dense, expert_config)
        step = Step(model.to(device), ids)
        count = sum(p.numel() for p in model.parameters())
        facts = {"parameters": count, "weight_bytes": 4 * count, "optimizer_bytes": 8 * count}
        return Contender(name, kind, step.logits, leaves=tuple(model.parameters()), facts=facts, step=step.step), truth

    builds: list[tuple[str, str, Build]] = [(DENSE, "limit", lambda: build(DENSE, "limit", None))]
    name = "T5 with dense experts (Switch)"
    builds.append((name, "peer", lambda: build(name, "peer", MPOEConfig(num_experts=experts, expert_type="dense"))))
    for shape in shape_names:

        def build_mpoe(shape: str = shape) -> tuple[Contender, Truth]:
            return build(f"mpoe T5 {shape}", "mpoe", MPOEConfig(num_experts=experts, shape=shape))

        builds.append((f"mpoe T5 {shape}", "mpoe", build_mpoe))
    count = tokens[0] * tokens[1]
    title = f"train step: T5 1+1 layers {sizes[0]}x{sizes[1]} E={experts}, {count} tokens, AdamW"
    facts = {"experts": experts, "tokens": count, "model": sizes[0], "hidden": sizes[1], "dtype": "float32"}
    return Comparison("train_step", title, builds, DENSE, count, facts)
