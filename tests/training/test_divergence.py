"""A run that diverges ends with an error; the rates that a run starts from, and the search for
one."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from mpoe import MPOEConfig
from mpoe.models import load_mpoe
from mpoe.models.walk import routed_layers
from mpoe.training import DivergenceError, read_metrics
from mpoe.training.callbacks import check_weights
from mpoe.training.rates import TRIED, _search, find_rate, kind_of, recommended_rate
from mpoe.training.run_log import one_sided
from tests.assertions import differing, refuses
from tests.cases import ROOT

from .tiny import Rows, make_trainer, mpoe_model, weights


def all_finite(model):
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class At(TrainerCallback):
    """Does something to the model after the optimizer step with this number."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)


def spoil(model):
    next(iter(model.parameters())).data[0, 0] = math.inf


def test_a_rate_far_too_high(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=1e30, save_strategy="steps", save_steps=1, max_steps=20
    )
    with pytest.raises(
        DivergenceError, match=r"training diverged at step \d+: the .* is (nan|inf); the last good"
    ) as e:
        trainer.train()
    step = e.value.step
    assert 1 < step < 6
    assert e.value.checkpoint == tmp_path / f"checkpoint-{step - 1}"
    assert str(e.value.checkpoint) in str(e.value)
    assert all_finite(load_mpoe(e.value.checkpoint))
    assert all_finite(trainer.model)  # the optimizer has not used what is not finite
    last = read_metrics(tmp_path)[-1]
    assert (last["event"], last["step"]) == ("diverged", step)
    assert all(
        record["loss"] for record in read_metrics(tmp_path) if "loss" in record
    )  # none that stands for nan


def test_gradients_that_are_not_finite_do_not_reach_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0.0)
    parameter = next(p for p in trainer.model.parameters() if p.ndim > 1)
    calls = []

    def poison(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) == 3 else gradient

    parameter.register_hook(poison)
    refuses(
        DivergenceError,
        r"step 3: the norm of the gradients is nan; no checkpoint was written",
        trainer.train,
    )
    assert all_finite(trainer.model)


@pytest.mark.parametrize("step, saving", [(2, True), (6, False)])
def test_weights_are_looked_at_before_a_checkpoint_and_at_the_end(tmp_path, step, saving):
    options = {"save_strategy": "steps", "save_steps": 1} if saving else {}
    trainer = make_trainer(tmp_path, callbacks=[At(step, spoil)], **options)
    with pytest.raises(
        DivergenceError, match=rf"step {step}: the weights are not finite \(.+\)"
    ) as e:
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] * saving
    assert e.value.checkpoint == (tmp_path / "checkpoint-1" if saving else None)


def test_parameters_that_cannot_diverge_are_passed_over(tmp_path):
    model = torch.nn.Module()
    model.whole = torch.nn.Parameter(torch.tensor([3]), requires_grad=False)
    model.empty = torch.nn.Parameter(torch.zeros(0, 2))
    model.short = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    check_weights(model, 1, tmp_path)
    model.short.data[1] = math.nan
    refuses(DivergenceError, r"\(short\)", check_weights, model, 1, tmp_path)


def test_allowed(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e30, allow_non_finite=True)
    trainer.train()
    assert trainer.state.global_step == 6
    losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
    assert losses[0] > 0
    assert losses[-1] is None  # as JSON says nan; the Trainer would have logged 0
    refuses(
        TypeError,
        "allow_non_finite must be True or False; got str 'yes'",
        make_trainer,
        tmp_path,
        allow_non_finite="yes",
    )


def scaled(tmp_path, scale, **options):
    """A trainer with a loss scaler, as float16 has on a GPU."""
    trainer = make_trainer(tmp_path, **options)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    # As Accelerate does before it takes the norm, where it trains in float16.
    accelerator.unscale_gradients = lambda optimizer=None: accelerator.scaler.unscale_(
        accelerator._optimizers[0].optimizer
    )
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_that_loss_scaling_skips_is_no_divergence(tmp_path, optimizer):
    trainer = scaled(tmp_path, 2.0**20, max_steps=12, optim=optimizer)
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())  # infinite beyond 65504
    before = weights(trainer.model)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**20
    assert differing(before, weights(trainer.model))
    assert all_finite(trainer.model)


def test_overflows_that_do_not_end_are_a_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr("mpoe.training.callbacks.MOST_SKIPPED", 5)
    trainer = scaled(tmp_path, 2.0**16, max_steps=50)
    next(p for p in trainer.model.parameters() if p.ndim > 1).register_hook(
        lambda gradient: gradient * math.nan
    )
    refuses(
        DivergenceError,
        "step 5: the gradients of 5 steps in a row",
        trainer.train,
    )
    assert all_finite(trainer.model)


def test_overflows_with_steps_between_them_are_no_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr("mpoe.training.callbacks.MOST_SKIPPED", 5)
    trainer = scaled(tmp_path, 2.0**16, max_steps=10)
    factors = itertools.cycle([math.nan, 1.0])
    next(p for p in trainer.model.parameters() if p.ndim > 1).register_hook(
        lambda gradient: gradient * next(factors)
    )
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**16 / 2**5


def test_a_loss_that_is_not_finite_under_scaling_is_one(tmp_path):
    trainer = scaled(tmp_path, 2.0**4)
    original = trainer.compute_loss
    # The gradient of an added constant is nothing: the optimizer would step on.
    trainer.compute_loss = lambda *a, **k: (
        original(*a, **k) + (math.inf if trainer.state.global_step == 2 else 0.0)
    )
    refuses(DivergenceError, "step 3: the loss is inf", trainer.train)


# ------------------------------------------------------------------ rates


DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    "asked, rate",
    [
        (("t5", 128, "finetune", "separable"), 1.5e-3),
        (("mpoe_t5", 64, "finetune", "separable"), 1.5e-3),  # never above what was tried
        (("mt5", 768, "finetune", "separable"), 2.5e-4),
        (("t5", 128, "finetune", "paper"), 1e-3),
        (("bert", 384, "finetune", "switch"), 3e-4),
        (("llama", 96, "scratch", "switch"), 4e-3),
        (("llama", 576, "finetune", "expert"), 1e-2),
        (("qwen2", 1152, "scratch", "expert"), 5e-3),
    ],
)
def test_family_regime_kind_and_width(asked, rate):
    assert recommended_rate(*asked)[0] == pytest.approx(rate)


def test_an_unknown_family_gets_the_lower_rate_and_is_told():
    rate, why = recommended_rate("qwen3", 768, "finetune", "separable")
    assert rate == pytest.approx(3e-4 * 384 / 768)
    assert "none is known of qwen3" in why
    assert rate <= min(tried.rate for tried in TRIED.values())
    assert (
        "none is known of qwen3, so that of llama"
        in recommended_rate("qwen3", 768, "finetune", "expert")[1]
    )


def test_kinds():
    assert (
        kind_of(None)
        == kind_of(MPOEConfig(target_modules=["attention"], moe_type="none"))
        == "dense"
    )
    assert kind_of(MPOEConfig(expert_type="dense", shape="separable")) == "switch"
    assert kind_of(MPOEConfig(shape="paper")) == "paper"


def test_the_documentation_shows_this_table():
    words = {
        "t5": "T5",
        "gpt2": "GPT-2",
        "bert": "BERT",
        "expert": "one expert beside a frozen decoder (`mpoe train --expert`)",
        "scratch": 'from scratch (`regime="scratch"`)',
    }
    page = (DOCS / "fine_tuning.md").read_text()
    for name, tried in TRIED.items():
        rates = [f"{tried.rate:g}", *(f"{rate:g} {kind}" for kind, rate in tried.other.items())]
        assert f"| {words[name]} | {', '.join(rates)} | {tried.width} | {tried.where} |\n" in page


def test_the_trainer_warns(tmp_path):
    model = mpoe_model("gpt2", router={"balance_loss_weight": 0.0})
    for _, layer in routed_layers(model):
        torch.nn.init.zeros_(layer.router.weight).requires_grad_(
            False
        )  # all tokens go to the first expert
    trainer = make_trainer(tmp_path, "gpt2", model, max_steps=16, logging_steps=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in caught]
    assert (
        sum(text.startswith("expert 0 of mixture layer 0 took 100% of its tokens") for text in said)
        == 1
    )


def test_loads_that_are_no_reason_to_warn():
    assert one_sided(torch.tensor([[100, 100, 100, 100], [280, 40, 40, 40]]), 1) is not None
    for fine in ([[700, 300]], [[300, 40, 40, 0], [0, 0, 0, 0]], [[10_000]], [[100, 99, 101, 100]]):
        assert (
            one_sided(torch.tensor(fine), 1) is None
        )  # of two 70% is not most; too few to tell; one has no choice
    assert "took 98% of its tokens" in str(
        one_sided(torch.tensor([[490, 170, 170, 170]]), 2)
    )  # half is every token
    for fine in ([[370, 210, 210, 210]], [[500, 500]]):
        assert one_sided(torch.tensor(fine), 2) is None


def test_finds_the_same_rate_twice_and_leaves_everything_as_it_was(tmp_path):
    model = mpoe_model("gpt2", dropout=0.1, jitter=0.1)
    items = [Rows("gpt2", rows=1)[0]] * 12
    trainer = make_trainer(
        tmp_path, "gpt2", model, per_device_train_batch_size=4, learning_rate=7e-4
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers, mode = torch.get_rng_state(), model.training
    found = find_rate(trainer, items, 1e-5, steps=3)
    assert found == find_rate(trainer, items, 1e-5, steps=3)
    rate, losses = found
    assert rate == min(losses, key=lambda tried: losses[tried])
    assert rate > 1e-5  # which hardly learns in three steps, so the search went upwards
    assert len(losses) == 5
    assert not differing(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(numbers, torch.get_rng_state())
    assert (model.training, trainer.args.learning_rate) == (mode, 7e-4)


def test_it_goes_on_while_the_best_is_at_an_end():
    assert list(_search(lambda rate: abs(rate - 1e-3), 1e-3)) == [3e-4, 1e-3, 3e-3]
    assert list(_search(lambda rate: -rate, 1e-3)) == [3e-4, 1e-3, 3e-3, 9e-3, 3e-2]
    assert list(_search(lambda rate: rate, 1e-3)) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


@pytest.mark.parametrize(
    "ranks, items, message", [(2, 5, "one process; got 2"), (1, 1, "two training items")]
)
def test_refusals(ranks, items, message):
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=ranks), model=None)
    refuses(ValueError, message, find_rate, trainer, [{}] * items, 1e-3)
