"""What training and serving cost beside other ways: speed and memory of one thread."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.contender import peak_memory

PROMPT_TOKENS = 32
ANSWER_TOKENS = 48
ROUNDS = 7  # of calls whose time is taken
Models = Mapping[str, Any]


def costs(learning: Models, serving: Models, ids: Tensor) -> dict:
    """Of training steps, of reading and of answering, by model; see `measured`.

    Args:
        learning, serving: by name; of those that learn, what requires a gradient is trained.
        ids: token ids ``[N, T]``, of which answering takes the start of the first row.
    """

    def learn(model: Any) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    @torch.inference_mode()
    def read(model: Any) -> None:
        model(input_ids=ids)

    def answer(model: Any) -> None:
        options = {"min_new_tokens": ANSWER_TOKENS, "max_new_tokens": ANSWER_TOKENS}
        model.generate(ids[:1, :PROMPT_TOKENS], do_sample=False, **options)

    return {
        "training": measured(learning, learn, ids.numel()),
        "reading": measured(serving, read, ids.numel()),
        "answering": measured(serving, answer, ANSWER_TOKENS),
    }


def measured(models: Models, call: Callable[[Any], None], tokens: int) -> dict[str, list[float]]:
    """By model: tokens of a call per second of processor time, the median of interleaved calls, and
    megabytes: weights, Adam's state of those that learn, and the most that a call holds."""
    seconds = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            begin = time.process_time()
            call(model)
            seconds[name].append(time.process_time() - begin)
    results = {}
    for name, model in models.items():
        memory, _ = peak_memory(partial(call, model))
        held = memory["peak"]
        for parameter in model.parameters():
            is_trained = parameter.requires_grad and model.training
            held += parameter.nbytes * (3 if is_trained else 1)
        speed = tokens / median(seconds[name])
        results[name] = [round(speed, 1), round(held / 1e6)]
    return results
