"""Train one arm once: the same start, the same data in the same order for every arm of a seed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe_bench.study.language import BATCH, Blocks, batches
from mpoe_bench.study.models import convert, costs, dense_hidden, dense_model, steps_of
from mpoe_bench.study.plan import Run, Study
from mpoe_bench.study.routers import router_facts

WARMUP = 0.05  # share of the steps
CLIP = 1.0
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.98)


def schedule(step: int, steps: int) -> float:
    """Factor on every rate in step ``step``, counted from 0: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def optimiser(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW on the package's parameter groups; every weight at the same rate."""
    arguments = MPOETrainingArguments(
        output_dir="unused",
        regime="scratch",
        learning_rate=rate,
        central_lr_scale=1.0,
        auxiliary_lr_scale=1.0,
        weight_decay=WEIGHT_DECAY,
        use_cpu=True,
        report_to=[],
    )
    groups = build_param_groups(model, arguments)
    for group in groups:
        group["full"] = group["lr"]
    return torch.optim.AdamW(groups, betas=BETAS)


def train(study: Study, run: Run, data: dict[str, Blocks]) -> tuple[nn.Module, list[tuple[int, float]]]:
    """The trained model of a run and its training loss along the way.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    arm, size = study.arms[run.arm], run.corner.model
    steps = steps_of(study, run.arm, size, run.corner.steps)
    converts_at = round(arm.dense_until * steps) if arm.experts else None
    model: Any = dense_model(size, dense_hidden(study, run.arm, size), run.seed).train()
    adam = None if converts_at == 0 else optimiser(model, run.rate)
    history: list[tuple[int, float]] = []
    for step, ids in enumerate(batches(data["train"], run.seed, steps)):
        if step == converts_at:
            model = convert(model, arm, size, run.seed).train()
            adam = optimiser(model, run.rate)
        assert adam is not None  # converted in step 0 at the latest
        for group in adam.param_groups:
            group["lr"] = group["full"] * schedule(step, steps)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of {run.key} is {value} in step {step}")
        if step % max(1, steps // 20) == 0:
            history.append((step, round(value, 4)))
    return model.eval(), history


@torch.no_grad()
def evaluate(model: Any, blocks: Blocks, routed: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Loss per byte of every domain, and `router_facts` if ``routed``."""
    losses: dict[str, float] = {}
    logits, tokens, domains = [], [], []
    for number, (domain, ids) in enumerate(blocks.items()):
        total = 0.0
        for part in ids.split(BATCH):
            output = model(input_ids=part, labels=part)
            task = output.get("task_loss")
            total += float(output.loss if task is None else task) * len(part)
            if routed:
                logits.append(output.router_logits)
                tokens.append(part.reshape(-1))
                domains.append(torch.full((part.numel(),), number))
        losses[domain] = total / len(ids)
    if not routed:
        return losses, {}
    top_k = model.mpoe_config.top_k
    return losses, router_facts(logits, top_k, torch.cat(tokens), torch.cat(domains))


def run_once(study: Study, run: Run, data: dict[str, Blocks]) -> dict[str, Any]:
    """Train and evaluate; returns one JSON-able record.

    ``cpu_seconds`` is the process's CPU time for the training alone; losses are means over domains, in nats per byte.
    """
    start = time.process_time()
    try:
        model, history = train(study, run, data)
    except FloatingPointError as error:
        return {"diverged": str(error), "validation": math.inf, "test": math.inf}
    seconds = time.process_time() - start
    arm, size = study.arms[run.arm], run.corner.model
    validation, _ = evaluate(model, data["validation"], False)
    test, router = evaluate(model, data["test"], arm.experts is not None)
    hidden = dense_hidden(study, run.arm, size)
    found, dense = costs(arm, size, hidden), costs(study.arms[study.reference], size, 4 * size)
    return {
        "validation": round(sum(validation.values()) / len(validation), 5),
        "test": round(sum(test.values()) / len(test), 5),
        "parts": {domain: round(loss, 4) for domain, loss in test.items()},
        "hidden": hidden,
        "steps": steps_of(study, run.arm, size, run.corner.steps),
        "weights": round(found.weights / dense.weights, 3),
        "parameters": round(found.parameters / dense.parameters, 3),
        "flops": round(found.flops / dense.flops, 3),
        "whole_flops": round(found.whole / dense.whole, 3),
        "router": router,
        "cpu_seconds": round(seconds, 1),
        "loss": history,
    }
