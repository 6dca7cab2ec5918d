"""A study with arms: the same start, the same data in the same order for every arm of a seed."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe_bench.study.language import BATCH, Blocks, batches, read_blocks
from mpoe_bench.study.models import convert, costs, dense_hidden, dense_model, steps_of
from mpoe_bench.study.plan import Run, Study, read_study
from mpoe_bench.study.routers import router_facts
from mpoe_bench.study.table import Records, runs_of, study_table

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
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def train_steps(
    model: nn.Module,
    adam: torch.optim.Optimizer,
    steps: int,
    numbered: Iterable[tuple[int, Tensor]],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[tuple[int, float]]:
    """Train in some of the ``steps`` of a run; returns losses along the way.

    A group's ``full`` is its highest rate. ``precision``: what the forward pass runs in.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = list(model.parameters())
    history: list[tuple[int, float]] = []
    for step, ids in numbered:
        for group in adam.param_groups:
            group["lr"] = group["full"] * schedule(step, steps)
        with precision():
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        adam.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"is {value} in step {step}")
        if step % max(1, steps // 20) == 0:
            history.append((step, round(value, 4)))
    return history


class Trained(NamedTuple):
    """A run's model, its training loss along the way, and the CPU time of its training."""

    model: Any
    history: list[tuple[int, float]]
    seconds: float


def train(study: Study, run: Run, data: dict[str, Blocks], starts: dict[tuple[Any, ...], Trained]) -> Trained:
    """Train a run's model. ``starts``: mixtures of one seed and rate start from the same dense model, trained once.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    arm, size = study.arms[run.arm], run.corner.model
    steps, hidden = steps_of(study, run.arm, size, run.corner.steps), dense_hidden(study, run.arm, size)
    numbered = enumerate(batches(data["train"], run.seed, steps))

    def trained(model: Any, some: Iterable[tuple[int, Tensor]]) -> Trained:
        begin = time.process_time()
        history = train_steps(model.train(), optimiser(model, run.rate), steps, some)
        return Trained(model, history, time.process_time() - begin)

    dense = dense_model(size, hidden, run.seed)
    if arm.experts is None:
        return trained(dense, numbered)
    until = round(arm.dense_until * steps)
    first = list(itertools.islice(numbered, until))
    key = size, hidden, run.seed, run.rate, steps, until
    if key not in starts:
        starts[key] = trained(dense, first)
    start = starts[key]
    end = trained(convert(copy.deepcopy(start.model), arm, size, run.seed), numbered)
    return Trained(end.model, start.history + end.history, start.seconds + end.seconds)


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


def run_once(study: Study, run: Run, data: dict[str, Blocks], starts: dict[tuple[Any, ...], Trained]) -> dict[str, Any]:
    """Train and evaluate; returns one JSON-able record. ``starts``: see `train`.

    ``cpu_seconds`` is the process's CPU time for the training alone; losses are means over domains, in nats per byte.
    """
    try:
        model, history, seconds = train(study, run, data, starts)
    except FloatingPointError as error:
        return {"diverged": f"the loss of {run.key} {error}", "validation": math.inf, "test": math.inf}
    model.eval()
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


class ArmsStudy:
    """Makes the runs of a study with arms."""

    def __init__(self, file: Path) -> None:
        self.study = read_study(file)
        self.starts: dict[tuple[Any, ...], Trained] = {}

    def waiting(self, records: Records) -> list[str]:
        """Keys of runs that are missing and whose rate is known, in order: of a stage first those that choose rates."""
        study, found = self.study, []
        for stage in study.stages:
            for arm in stage.arms:
                found += [run.key for run in study.candidates(stage.model, arm)]
            for seed in study.seeds:
                for arm in stage.arms:
                    runs = runs_of(study, stage.corner, arm, records)
                    found += [run.key for run in runs if run.seed == seed]
        return [key for key in dict.fromkeys(found) if key not in records]

    def prepare(self, arguments: argparse.Namespace) -> None:
        """Read what the runs need.

        Raises:
            FileNotFoundError, ValueError: an option is missing, or what it names.
        """
        if arguments.data_dir is None:
            raise ValueError("data_dir must name the folder of the texts; got none")
        self.data = read_blocks(arguments.data_dir)

    def make(self, key: str, records: Records) -> dict[str, Any]:
        """Make a run that waits; its record, JSON-able."""
        return run_once(self.study, Run.of(key), self.data, self.starts)

    def table(self, records: Records) -> str:
        return study_table(self.study, records)
