"""Experts and LoRA adapters beside one base model: how they are trained and opened, and losses on
pieces of texts."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe.models import start_expert
from mpoe_bench.study.arms import BETAS, train_steps

BATCH = 4
SAMPLED = 64  # pieces for an expert's statistics
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Give me three names for a cat.",
    "Explain in two sentences why the sky is blue.",
    "Translate to Spanish: Good morning, my friend.",
    "How do I boil an egg?",
    "Name a prime number larger than 50 and say why it is prime.",
    "Write a polite reply that declines an invitation.",
)


def drawn(train_pieces: Sequence[Tensor], steps: int, seed: int) -> list[Tensor]:
    """Batches of each text in turn, the same for every kind of expert."""
    generator = torch.Generator().manual_seed(seed)
    texts = [train_pieces[step % len(train_pieces)] for step in range(steps)]
    return [text[torch.randint(len(text), (BATCH,), generator=generator)] for text in texts]


def trained(
    kind: str,
    base: Any,
    size: int,
    batches: Sequence[Tensor],
    rate: float,
    seed: int,
    targets: str | Sequence[str] = PROJECTIONS,
) -> Any:
    """An expert (``kind`` "neurons") or a LoRA adapter beside ``base``, on its feed-forward
    networks or on PEFT's ``targets``, trained by AdamW.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)
    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=size, lora_alpha=2 * size, target_modules=modules, task_type="CAUSAL_LM")
    model = (
        start_expert(base, size)
        if kind == "neurons"
        else get_peft_model(copy.deepcopy(base), config)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    train_steps(model.train(), adam, len(batches), enumerate(batches))
    return model.eval()


@torch.inference_mode()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Of every token of the pieces ``ids [N, T]`` that is predicted, float32 ``[N, T - 1]``."""
    parts = []
    for part in ids.split(8):
        logits = model(input_ids=part).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        parts.append(loss.view(len(part), -1))
    return torch.cat(parts)


def adapters(base: Any, places: Mapping[str, Path]) -> Any:
    """One model with several adapters, by name."""
    names = iter(places.items())
    first, place = next(names)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(place), adapter_name=first)
    for name, place in names:
        model.load_adapter(str(place), adapter_name=name)
    return model.eval()


def mean(losses: Tensor) -> float:
    return round(float(losses.mean()), 5)


def batched(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(8)]


def started(arguments: argparse.Namespace) -> tuple[Path, Any, Any]:
    """The folder that keeps files of experts, the tokenizer, and the base in float32.

    Raises:
        ValueError: an option that is needed and missing.
    """
    for name in ("data_dir", "model", "work_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{name} must be given for quiet experts; got none")
    folder: Path = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    base.generation_config.pad_token_id = tokenizer.eos_token_id
    return folder, tokenizer, base


@torch.inference_mode()
def mean_inputs(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The mean input ``[I]`` of every layer's feed-forward network."""
    sums: dict[int, Tensor] = {}
    handles = []
    for number, layer in enumerate(model.model.layers):

        def add(module: Any, given: tuple[Tensor, ...], number: int = number) -> None:
            rows = given[0].flatten(0, -2)
            sums[number] = sums.get(number, torch.zeros(rows.shape[-1])) + rows.mean(0) / len(
                batches
            )

        handles.append(layer.mlp.register_forward_pre_hook(add))
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return [sums[number] for number in sorted(sums)]
