"""What experts and LoRA adapters beside one base model are trained on, how adapters are opened, and
losses on pieces of texts."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from mpoe.data.predict import token_losses
from mpoe.models.background import labelled_batches

BATCH = 4
SAMPLED = 64  # pieces for an expert's statistics
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Give me three names for a cat.",
    "Explain in two sentences why the sky is blue.",
    "Translate to Spanish: Good morning, my friend.",
    "How do I boil an egg?",
    "Name a prime number larger than 50 and say why it is prime.",
    "Write a polite reply that declines an invitation.",
    "Which planet is closest to the sun?",
    "Write a haiku about autumn leaves.",
    "What is the difference between weather and climate?",
    "List five things to pack for a weekend in the mountains.",
    "Explain what a variable is to somebody who has never programmed.",
    "Give me a short recipe for tomato soup.",
    "What does the word 'serendipity' mean?",
    "Write a Python function that returns the larger of two numbers.",
    "Who wrote Romeo and Juliet?",
    "Summarize the story of the tortoise and the hare in one sentence.",
    "How many minutes are there in a day?",
    "Suggest a title for a book about two friends who sail around the world.",
    "Why do we have leap years?",
    "Tell me how to write a good email to a new colleague.",
    "What is 17 plus 25?",
    "Describe a rainy morning in a small town.",
)


def drawn(text: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Batches of a text's pieces, the same for every kind of expert."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        rows = torch.randint(len(text), (BATCH,), generator=generator)
        batches.append(text[rows])
    return batches


def mean_loss(model: Any, ids: Tensor) -> float:
    """Nats per token that is predicted of the pieces ``ids [N, T]``."""
    return round(float(token_losses(model, labelled_batches(ids)).mean()), 5)


def adapters(base: Any, places: Mapping[str, Path]) -> Any:
    """One model with several adapters, by name."""
    (first, folder), *others = places.items()
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder), adapter_name=first)
    for name, place in others:
        model.load_adapter(str(place), adapter_name=name)
    return model.eval()
