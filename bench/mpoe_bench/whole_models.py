"""Whole models: an AdamW step, and `generate`, of a dense model, a Switch and mixtures of ours."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe_bench.cases import dtype_name
from mpoe_bench.contender import Comparison, Contender, Truth, size_facts

VOCABULARY = 512
PROMPT_TOKENS = 16


class Shared(NamedTuple):
    """What the models of a case have in common: the dense model, token ids ``[batch, tokens]`` and
    its logits."""

    dense: Any
    ids: Tensor
    truth: Truth


@dataclass(frozen=True)
class ModelCase:
    """A model whose mixtures all are lossless, so that each must compute what the dense one does.

    Attributes:
        key: ``"train_step"``: an AdamW step; ``"generate"``: a greedy call alone, the prompt's pass
            included.
        shapes: of the mixtures' experts.
        batch, tokens: sequences, and the length of each; of `generate`, its new tokens.
        size: of the model; the hidden size is four times as large.
        experts: E.
        device: where.
        family: ``T5`` or ``Llama``.
        layers: of a T5, in the encoder and in the decoder.
        dtype: of the weights.
    """

    key: str
    shapes: Sequence[str]
    batch: int
    tokens: int
    size: int
    experts: int
    device: str
    family: str = "T5"
    layers: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def generates(self) -> bool:
        return self.key == "generate"

    def dense(self) -> Any:
        """With random weights."""
        import transformers

        torch.manual_seed(0)
        heads = 12 if self.size >= 96 else 2
        hidden = 4 * self.size
        if self.family == "T5":
            config = transformers.T5Config(
                d_model=self.size,
                d_ff=hidden,
                d_kv=max(8, self.size // 12),
                num_heads=heads,
                num_layers=self.layers,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
            )
            model = transformers.T5ForConditionalGeneration(config)
        else:
            config = transformers.LlamaConfig(
                hidden_size=self.size,
                intermediate_size=hidden,
                num_attention_heads=heads,
                num_hidden_layers=self.layers,
                vocab_size=VOCABULARY,
                pad_token_id=0,
            )
            model = transformers.LlamaForCausalLM(config)
        return model.to(self.dtype).eval()

    def context(self) -> Shared:
        dense = self.dense()
        length = PROMPT_TOKENS if self.generates else self.tokens
        ids = torch.randint(2, VOCABULARY, (self.batch, length), device=self.device)

        @torch.no_grad()
        def results(dtype: torch.dtype) -> dict[str, Tensor]:
            model = copy.deepcopy(dense).to(self.device, dtype)
            return {"y": logits_of(model, ids)}

        return Shared(dense, ids, Truth.of(results, self.dtype))

    def build(self, shared: Shared, fields: dict | None) -> tuple[Contender, Truth]:
        """The dense model, or its mixture with these fields of an `MPOEConfig`."""
        model = copy.deepcopy(shared.dense)
        if fields is not None:
            config = MPOEConfig(num_experts=self.experts, **fields)
            model = convert_to_mpoe(model, config, inplace=True)
        model = model.to(self.device).eval()  # no dropout: all do the same work
        contender = Contender(
            partial(logits_of, model, shared.ids),
            dict(model.named_parameters()),
            facts=size_facts(model, self.dtype),
        )
        if self.generates:
            contender.timed = partial(
                model.generate,
                shared.ids,
                do_sample=False,
                min_new_tokens=self.tokens,
                max_new_tokens=self.tokens,
            )
        else:
            adam = torch.optim.AdamW(model.parameters(), lr=1e-5)
            contender.step = partial(train_step, model, adam, shared.ids)
        return contender, shared.truth

    def comparison(self) -> Comparison:
        switch = partial(self.build, fields={"expert_type": "dense"})
        builds = [
            (f"dense {self.family}", "limit", partial(self.build, fields=None)),
            (f"{self.family} with dense experts (Switch)", "peer", switch),
        ]
        for shape in self.shapes:
            mixture = partial(self.build, fields={"shape": shape})
            builds.append((f"mpoe {self.family} {shape}", "mpoe", mixture))
        count = self.batch * self.tokens
        hidden = 4 * self.size
        facts = {
            "experts": self.experts,
            "tokens": count,
            "model": self.size,
            "hidden": hidden,
            "dtype": dtype_name(self.dtype),
        }
        what = f"train step: {count} tokens, AdamW"
        phases = ["forward", "train"]
        if self.generates:
            what = f"generate: {self.batch} x {self.tokens} new tokens"
            phases = ["forward"]
        sizes = f"{self.layers} layers {self.size}x{hidden} E={self.experts} {facts['dtype']}"
        title = f"{what}, {self.family} {sizes}"
        return Comparison(self.key, title, self.context, builds, facts, phases)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Of an encoder and decoder, both on the same tokens, or of a decoder."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs).logits


def train_step(model: Any, adam: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    adam.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    adam.step()
    return loss.detach()
