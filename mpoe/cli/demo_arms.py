"""The arms that the demo compares, and their training: same items, same order, same steps, same seeds."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.scoring import encode_task

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig

NUM_EXPERTS = 8


@dataclass(frozen=True)
class DemoArm:
    """One model of the comparison.

    ``experts``: fields of its `MPOEConfig`, or None for a dense model; ``learning_rate``: see `Settings.rates`;
    ``training``: further training arguments; ``large``: fields that differ in the layer of T5-base or GPT-2, whose cost
    is shown; ``as_large_as``: key of the arm whose feed-forward weights a wider dense model has.
    """

    key: str
    name: str
    experts: dict[str, Any] | None
    learning_rate: float
    training: dict[str, Any] = field(default_factory=dict)
    large: dict[str, Any] = field(default_factory=dict)
    as_large_as: str | None = None

    def config(self, large: bool = False) -> MPOEConfig:
        """Configuration of a mixture, here or in the large layer."""
        from mpoe.config import MPOEConfig

        return MPOEConfig(num_experts=NUM_EXPERTS, **{**(self.experts or {}), **(self.large if large else {})})

    @property
    def experts_per_token(self) -> int | None:
        return None if self.experts is None else self.config().router.top_k


@dataclass(frozen=True)
class Settings:
    """Settings of the demo for one kind of model. ``batch``: items per step; ``steps``: per arm; ``n_val``,
    ``n_test``: random subsets of those splits (None: all of them); ``rates``: how the arms' learning rates were chosen;
    ``large``: the well-known model that the stand-in represents.
    """

    tasks: tuple[str, ...]
    causal: bool
    steps: int
    batch: int
    arms: tuple[DemoArm, ...]
    large: str
    n_val: int | None = None
    n_test: int | None = None
    main_arm: str = "hidden"
    rates: str = ""

    def arm(self, key: str) -> DemoArm:
        return next(arm for arm in self.arms if arm.key == key)


def _arms(rate: float, mixtures: float) -> tuple[DemoArm, ...]:
    """The arms, with one rate for dense models and dense experts and one for MPO experts."""
    hidden = {"shape": "hidden", "block_size": 16, "router": {"top_k": 2}}
    return (
        DemoArm("dense", "dense", None, rate),
        DemoArm("wider", "wider dense", None, rate, as_large_as="hidden"),
        DemoArm("switch", "Switch", {"expert_type": "dense"}, rate),
        DemoArm(
            "hidden",
            "MPOE",
            hidden,
            mixtures,
            {"regime": "scratch", "auxiliary_lr_scale": 1.0},  # cores at the rate of the rest
            {"block_size": 64},
        ),
        DemoArm("separable", "MPOE separable", {"shape": "separable"}, mixtures),
    )


SETTINGS = {
    "t5": Settings(
        ("doc_module", "doc_kind"),
        causal=False,
        steps=120,
        batch=32,
        arms=_arms(1e-3, 1.5e-3),
        large="t5-base",
        rates="each but the wider one's, which is dense's, from 0.001, 0.0015 and 0.002, with 200 steps of two seeds",
    ),
    "gpt2": Settings(
        ("doc_lm",),
        causal=True,
        steps=60,
        batch=16,
        arms=_arms(3e-4, 3e-4),
        large="gpt2",
        n_val=400,
        n_test=600,
        rates="one for all; in dense, Switch and MPOE separable better than 0.001",
    ),
}


def demo_tasks(settings: Settings) -> list[Any]:
    """The tasks, reduced to the settings' subsets (always with seed 0, so held-out items do not depend on the run's
    seed)."""
    from mpoe.data.splits import with_subsets
    from mpoe.data.tasks import get_task

    tasks = [get_task(name) for name in settings.tasks]
    if settings.n_val is None and settings.n_test is None:
        return tasks
    return [with_subsets(task, None, settings.n_val, settings.n_test) for task in tasks]


def training_items(settings: Settings, tasks: Sequence[Any], tokenizer: Any, steps: int, seed: int) -> list[dict]:
    """The items of all steps in the order that every arm sees: one task per step, tasks in proportion to size, shuffled
    passes."""
    rng = random.Random(seed)
    pools = [encode_task(task, "train", tokenizer) for task in tasks]
    queues: list[list[dict]] = [[] for _ in pools]
    ordered: list[dict] = []
    for _ in range(steps):
        index = rng.choices(range(len(pools)), [len(pool) for pool in pools])[0]
        while len(queues[index]) < settings.batch:
            again = list(pools[index])
            rng.shuffle(again)
            queues[index] += again
        ordered += queues[index][: settings.batch]
        del queues[index][: settings.batch]
    return ordered


def train_arm(
    model: Any,
    arm: DemoArm,
    items: list[dict],
    settings: Settings,
    pad_token_id: int,
    folder: Path,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Train ``model`` in place on ``items`` in their order.

    Returns:
        ``seconds``, ``loss``: [(step, training loss of the task)], ``learning_rate``.
    """
    from transformers import PrinterCallback, TrainerCallback

    from mpoe.data.collate import PaddingCollator
    from mpoe.training import MPOETrainer, MPOETrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress(1)

    steps = len(items) // settings.batch
    arguments = MPOETrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        train_sampling_strategy="sequential",
        learning_rate=arm.learning_rate,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arm.training,
    )
    trainer = MPOETrainer(
        model=model, args=arguments, train_dataset=items, data_collator=PaddingCollator(pad_token_id), callbacks=[Ticks]
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    history = [(int(r["step"]), float(r.get("task_loss", r["loss"]))) for r in trainer.state.log_history if "loss" in r]
    return {"seconds": seconds, "loss": history, "learning_rate": arm.learning_rate}


def count_parameters(report: dict[str, int], dense: bool = False, grown: int = 0) -> dict[str, int]:
    """The comparison's parameter counts, from a converted model's `parameter_report`.

    Args:
        report: of any conversion of the same dense model.
        dense: count the dense model itself instead of the converted one.
        grown: additional weights of a wider dense model.

    Returns:
        ``total``, and ``experts``: the weights of the feed-forward layers (dense) or of their experts; of those
        ``central`` and ``auxiliary``. Routers and biases are only in ``total``, so that the counts are comparable.
    """
    if dense:
        experts = report["dense_total"] - report["rest"] + grown
        return {"total": report["dense_total"] + grown, "experts": experts, "central": 0, "auxiliary": 0}
    experts = report["central"] + report["auxiliary"] + report["expert"]
    return {
        "total": report["total"],
        "experts": experts,
        "central": report["central"],
        "auxiliary": report["auxiliary"],
    }


def with_steps(settings: Settings, steps: int | None) -> Settings:
    """The settings with another number of steps per arm (None: unchanged)."""
    return settings if steps is None else dataclasses.replace(settings, steps=steps)
