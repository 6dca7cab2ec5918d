"""Whole models: an AdamW step, and `generate`, of a T5 that is dense, has dense experts, or experts of each shape."""

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
from mpoe_bench.subjects import size_facts

DENSE = "dense T5"


class Step:
    """One model with its optimizer; ``step`` runs a whole step, ``logits`` returns the batch's logits."""

    def __init__(self, model: Any, ids: Tensor, new_tokens: int = 0) -> None:
        self.model, self.ids, self.new_tokens = model.eval(), ids, new_tokens  # no dropout: all do the same work
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def logits(self) -> Tensor:
        return self.model(input_ids=self.ids, decoder_input_ids=self.ids).logits

    def generate(self) -> Tensor:
        count = {"min_new_tokens": self.new_tokens, "max_new_tokens": self.new_tokens}
        return self.model.generate(self.ids, do_sample=False, **count)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


SHAPES: dict[str, dict[str, Any]] = {  # lossless, so that every model must compute what the dense one does
    "neurons": {"shape": "neurons"},
    "hidden": {"shape": "hidden"},
    "separable": {"shape": "separable"},
    "light": {"shape": "light"},
    "paper": {"shape": "paper"},
}


def dense_t5(sizes: tuple[int, int], layers: int, dtype: torch.dtype) -> Any:
    """A T5 with random weights: model and hidden size, layers in the encoder and in the decoder."""
    import transformers

    config = transformers.T5Config(
        d_model=sizes[0],
        d_ff=sizes[1],
        d_kv=max(8, sizes[0] // 12),
        num_heads=12 if sizes[0] >= 96 else 2,
        num_layers=layers,
        vocab_size=512,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).to(dtype).eval()


def model_comparison(
    key: str,
    shape_names: Sequence[str],
    sizes: tuple[int, int],
    experts: int,
    tokens: tuple[int, int],
    device: str,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """A T5's train steps, or the tokens that it generates.

    Args:
        key: ``"train_step"``: an AdamW step; ``"generate"``: a greedy call, the encoder's pass included, alone.
        shape_names: of `SHAPES`.
        sizes: model and hidden size.
        experts: E.
        tokens: batch and sequence length; of `generate`, batch and new tokens.
        device: where to run.
        layers: in the encoder and in the decoder.
        dtype: of the weights.
    """
    generates = key == "generate"
    dense = dense_t5(sizes, layers, dtype)
    ids = torch.randint(2, 512, (tokens[0], 16) if generates else tokens, device=device)
    with torch.no_grad():
        exact = copy.deepcopy(dense).double().to(device)(input_ids=ids, decoder_input_ids=ids).logits.cpu()
        same = copy.deepcopy(dense).to(device)(input_ids=ids, decoder_input_ids=ids).logits.cpu()
    truth = Truth({"y": exact}, {"y": relative_error(same, exact)}, dtype)

    def build(name: str, kind: str, fields: dict[str, Any] | None) -> tuple[Contender, Truth]:
        own = copy.deepcopy(dense)
        model = own if fields is None else convert_to_mpoe(own, MPOEConfig(num_experts=experts, **fields), inplace=True)
        step = Step(model.to(device), ids, tokens[1] if generates else 0)
        count = sum(p.numel() for p in model.parameters())
        facts = {**size_facts(count, dtype), **({} if fields is None else {"shape": name.removeprefix("mpoe T5 ")})}
        parameters = tuple(model.parameters())
        run = {"timed": step.generate} if generates else {"step": step.step}
        return Contender(name, kind, step.logits, leaves=parameters, facts=facts, **run), truth

    found: dict[str, tuple[str, dict[str, Any] | None]] = {DENSE: ("limit", None)}
    found["T5 with dense experts (Switch)"] = ("peer", {"expert_type": "dense"})
    found |= {f"mpoe T5 {name}": ("mpoe", SHAPES[name]) for name in shape_names}
    builds: list[tuple[str, str, Build]] = [
        (name, kind, lambda name=name, kind=kind, fields=fields: build(name, kind, fields))  # type: ignore[misc]
        for name, (kind, fields) in found.items()
    ]
    count, dtype_name = tokens[0] * tokens[1], str(dtype).split(".")[-1]
    what = f"generate: {tokens[0]} x {tokens[1]} new tokens" if generates else f"train step: {count} tokens, AdamW"
    title = f"{what}, T5 {layers}+{layers} layers {sizes[0]}x{sizes[1]} E={experts} {dtype_name}"
    facts = {"experts": experts, "tokens": count, "model": sizes[0], "hidden": sizes[1], "dtype": dtype_name}
    return Comparison(key, title, builds, DENSE, count, facts, ("forward",) if generates else ("forward", "train"))
