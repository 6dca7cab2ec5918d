"""Whole models: an AdamW step, and `generate`, of a T5 or a Llama: dense, as a Switch, or with experts of a shape."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe_bench.contender import Build, Comparison, Contender, Truth, dtype_name, size_facts

SHAPES: dict[str, dict[str, Any]] = {  # lossless, so that every model must compute what the dense one does
    "neurons": {"shape": "neurons"},
    "hidden": {"shape": "hidden"},
    "separable": {"shape": "separable"},
    "light": {"shape": "light"},
    "paper": {"shape": "paper"},
}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Of an encoder and decoder, both on the same tokens, or of a decoder."""
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def dense_model(name: str, sizes: tuple[int, int], layers: int, dtype: torch.dtype) -> Any:
    """``T5`` or ``Llama`` with random weights: model and hidden size, layers (of T5 in the encoder and the decoder)."""
    import transformers

    torch.manual_seed(0)
    heads = 12 if sizes[0] >= 96 else 2
    if name == "T5":
        widths = {"d_model": sizes[0], "d_ff": sizes[1], "d_kv": max(8, sizes[0] // 12), "num_heads": heads}
        config: Any = transformers.T5Config(**widths, num_layers=layers, vocab_size=512, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    widths = {"hidden_size": sizes[0], "intermediate_size": sizes[1], "num_attention_heads": heads}
    config = transformers.LlamaConfig(**widths, num_hidden_layers=layers, vocab_size=512, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def model_comparison(
    key: str,
    shape_names: Sequence[str],
    sizes: tuple[int, int],
    experts: int,
    tokens: tuple[int, int],
    device: str,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    name: str = "T5",
) -> Comparison:
    """A model's train steps, or the tokens that it generates.

    Args:
        key: ``"train_step"``: an AdamW step; ``"generate"``: a greedy call, the prompt's pass included, alone.
        shape_names: of `SHAPES`.
        sizes: model and hidden size.
        experts: E.
        tokens: batch and sequence length; of `generate`, batch and new tokens.
        device: where to run.
        layers, name: see `dense_model`.
        dtype: of the weights.
    """
    generates = key == "generate"

    def context() -> tuple[Any, Tensor, Truth]:
        dense = dense_model(name, sizes, layers, dtype)
        ids = torch.randint(2, 512, (tokens[0], 16) if generates else tokens, device=device)

        @torch.no_grad()
        def results(dtype: torch.dtype) -> dict[str, Tensor]:
            model = copy.deepcopy(dense).to(device, dtype)
            return {"y": logits_of(model, ids).cpu()}

        return dense, ids, Truth.of(results, dtype)

    def build(shared: tuple[Any, Tensor, Truth], shape: str, fields: dict[str, Any] | None) -> tuple[Contender, Truth]:
        dense, ids, truth = shared
        model = copy.deepcopy(dense)
        if fields is not None:
            model = convert_to_mpoe(model, MPOEConfig(num_experts=experts, **fields), inplace=True)
        model = model.to(device).eval()  # no dropout: all do the same work
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        length = {"min_new_tokens": tokens[1], "max_new_tokens": tokens[1]}

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        facts = size_facts(sum(p.numel() for p in model.parameters()), dtype) | ({"shape": shape} if fields else {})
        run = {"timed": partial(model.generate, ids, do_sample=False, **length)} if generates else {"step": step}
        return Contender(partial(logits_of, model, ids), leaves=tuple(model.parameters()), facts=facts, **run), truth

    builds: list[tuple[str, str, Build]] = [
        (f"dense {name}", "limit", partial(build, shape="dense", fields=None)),
        (
            f"{name} with dense experts (Switch)",
            "peer",
            partial(build, shape="Switch", fields={"expert_type": "dense"}),
        ),
        *((f"mpoe {name} {each}", "mpoe", partial(build, shape=each, fields=SHAPES[each])) for each in shape_names),
    ]
    count = tokens[0] * tokens[1]
    what = f"generate: {tokens[0]} x {tokens[1]} new tokens" if generates else f"train step: {count} tokens, AdamW"
    title = f"{what}, {name} {layers} layers {sizes[0]}x{sizes[1]} E={experts} {dtype_name(dtype)}"
    facts = {"experts": experts, "tokens": count, "model": sizes[0], "hidden": sizes[1], "dtype": dtype_name(dtype)}
    phases = ("forward",) if generates else ("forward", "train")
    return Comparison(key, title, context, builds, f"dense {name}", count, facts, phases)
