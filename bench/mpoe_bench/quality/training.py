"""Train one arm with one seed: the same start, the same data in the same order, the same number of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.training import GradientMask, MPOETrainingArguments, build_param_groups
from mpoe_bench.memory import resident_peak
from mpoe_bench.quality.arms import ARMS, Arm, resolved_shape
from mpoe_bench.quality.evaluation import expert_distance
from mpoe_bench.quality.mixture_of_lora import with_mixture_of_lora
from mpoe_bench.quality.variants import apply_variant, feed_forward_parameters, with_lora

WARMUP = 0.05
CLIP = 1.0


@dataclass(frozen=True)
class Budget:
    """How long every arm trains, and at what rate: ``steps``, ``rate`` (base learning rate), ``seed``."""

    steps: int
    rate: float
    seed: int


def expert_config(field: Any, arm: Arm) -> MPOEConfig:
    """The `MPOEConfig` of an arm: the field's settings for all mixtures, changed by the arm's own."""
    fields = {"gauge": field.gauge, "light_p": field.light_p, **(arm.experts or {})}
    fields["shape"] = resolved_shape(fields.get("shape", "separable"), field.model, field.hidden)
    router = {**field.routers.get(fields.get("expert_type", "mpo"), {}), **arm.router}
    return MPOEConfig(**fields, router=router or None)


def hidden_as_large_as(field: Any, key: str) -> int:
    """Hidden size, a multiple of 8, at which a dense model has as many feed-forward parameters as the arm ``key``."""
    arm = next(arm for arm in ARMS if arm.key == key)
    config = expert_config(field, arm)
    per_layer = sum(
        config.shape_for(kind, *sizes).parameters(config.num_experts)
        for kind, sizes in (("up", (field.model, field.hidden)), ("down", (field.hidden, field.model)))
    )
    return round(per_layer / (2 * field.model) / 8) * 8


def hidden_size(field: Any, arm: Arm) -> int | None:
    """Hidden size of an arm's dense model, rounded to a multiple of 8; ``None`` = the field's own."""
    if arm.as_large_as:
        return hidden_as_large_as(field, arm.as_large_as)
    return None if arm.width == 1.0 else round(arm.width * field.hidden / 8) * 8


def schedule(step: int, steps: int) -> float:
    """Factor on every rate in step ``step``, counted from 0: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimiser:
    """AdamW on the groups of `build_param_groups`, with the arm's changes."""

    def __init__(self, model: nn.Module, arm: Arm, field: Any, budget: Budget, steps: int) -> None:
        scales = dict(zip(("central_lr_scale", "auxiliary_lr_scale"), arm.scales or (None, None), strict=True))
        arguments = MPOETrainingArguments(
            output_dir="unused",
            regime=field.regime,
            learning_rate=budget.rate,
            weight_decay=field.weight_decay,
            use_cpu=True,
            report_to=[],
            **scales,  # type: ignore[arg-type]
        )
        self.arm, self.steps = arm, steps
        self.groups = build_param_groups(model, arguments)
        self.decay: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self.groups:
            group["full"] = group["lr"]
            if arm.decay_to_start and group["kind"] == "auxiliary":
                group["weight_decay"] = 0.0
                self.decay += [(p, p.detach().clone(), group) for p in group["params"]]
        self.adam = torch.optim.AdamW(self.groups, betas=(0.9, 0.98))
        self.groups = self.adam.param_groups

    def step(self, step: int) -> None:
        """One update; ``step`` counts from the beginning of the whole run."""
        factor = schedule(step, self.steps)
        for group in self.groups:
            warmup = {"auxiliary": self.arm.auxiliary_warmup, "router": self.arm.router_warmup}.get(group["kind"], 0.0)
            slow = min(1.0, (step + 1) / (warmup * self.steps)) if warmup else 1.0
            group["lr"] = group["full"] * factor * slow
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            for parameter, start, group in self.decay:
                parameter.lerp_(start, min(1.0, group["lr"] * self.arm.decay_to_start))


def prepare(field: Any, arm: Arm, seed: int) -> nn.Module:
    """The dense model of an arm, before any conversion."""
    return field.dense_model(seed, hidden_size(field, arm))


def convert(field: Any, arm: Arm, model: nn.Module, seed: int) -> nn.Module:
    """``model`` as the mixture that ``arm`` describes; unchanged if the arm is dense."""
    torch.manual_seed(20_000 + seed)
    if arm.lora_experts:
        return with_mixture_of_lora(model, arm.lora_experts, arm.lora, 2)
    if arm.lora:
        return with_lora(model, arm.lora, field.lora_targets)
    if arm.experts is None:
        return model
    model = field.convert(model, expert_config(field, arm))
    apply_variant(model, arm)
    return model


def run_arm(field: Any, arm: Arm, budget: Budget, tuning: bool = False) -> dict[str, Any]:
    """Train and evaluate, with ``tuning`` only on the validation split (no ``test``); returns one JSON-able record.

    ``cpu_seconds`` is the process's CPU time for the training alone; ``peak_memory`` is how far its resident memory
    grew, in bytes (``None`` where the system does not report it).
    """
    trained: list[Any] = []
    start = time.process_time()
    memory = resident_peak(lambda: trained.append(_train(field, arm, budget)))
    seconds = time.process_time() - start
    model, history = trained.pop()
    model.eval()
    validation = field.evaluate(model, "validation")
    found = validation if tuning else field.evaluate(model, "test")
    head = {"field": field.name, "arm": arm.key, "name": arm.name, "budget": asdict(budget), "loss": history}
    weights = feed_forward_parameters(model)
    if arm.experts is None:
        weights = {"shared": field.feed_forward_weights(hidden_size(field, arm)), "own": 0}
    if arm.lora:
        weights["own"] = trainable(model)
    experts = (arm.experts or {}).get("num_experts", 8)
    return {
        **head,
        "validation": validation.score,
        **({} if tuning else {"test": found.score}),
        "before": getattr(field, "before", None),
        "parts": found.parts,
        "router": found.router,
        "distance": expert_distance(model),
        "weights": weights,
        "of_switch": sum(weights.values()) / (experts * field.feed_forward_weights()),
        "of_dense": sum(weights.values()) / field.feed_forward_weights(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": trainable(model),
        "cpu_seconds": round(seconds, 1),
        "peak_memory": memory,
    }


def trainable(model: nn.Module) -> int:
    """Parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _train(field: Any, arm: Arm, budget: Budget) -> tuple[nn.Module, list[tuple[int, float]]]:
    model = prepare(field, arm, budget.seed).train()
    batches: Iterator[Any] = field.batches(budget.seed, budget.steps)
    converts_at = round(arm.upcycled * budget.steps)
    history: list[tuple[int, float]] = []
    optimiser: Optimiser | None = None
    mask = GradientMask(None, 0.0)
    for step, batch in enumerate(batches):
        if step == converts_at:
            model = convert(field, arm, model, budget.seed).train()
            mask = GradientMask(model, arm.mask, budget.seed)
            optimiser = None
        if optimiser is None:
            torch.manual_seed(30_000 + budget.seed + step)
            optimiser = Optimiser(model, arm, field, budget, budget.steps)
        with mask.step(step):
            loss = field.loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step(step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of arm {arm.key} is {value} in step {step}")
        if step % max(1, budget.steps // 20) == 0:
            history.append((step, round(value, 4)))
    return model, history
