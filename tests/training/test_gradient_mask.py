"""The gradient mask in a plain PyTorch loop; it, frozen cores and rates under the Hugging Face
Trainer."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from mpoe.training import GradientMask, GradientMaskCallback
from mpoe.training.freezing import mask_draw
from tests.assertions import refuses
from tests.cases import either

from .tiny import (
    CHECKPOINTING,
    Rows,
    Toy,
    Watch,
    all_masked,
    arguments,
    make_trainer,
    mpoe_model,
    weights,
)


@pytest.mark.parametrize("shape", ["separable", "paper", "light"])
def test_gradient_is_not_computed(shape):
    model = Toy(shape)
    mask, x = GradientMask(model, 1.0), torch.randn(6, 32)
    with mask.step(0):
        up = model.layers[0].experts.up
        assert not up.cores()[up.shape.central].requires_grad  # nothing computes it
        masked = model(x)
        masked.backward()
        assert all(p.grad is None for p in model.centrals())
    others = [p.grad.clone() for p in model.others()]
    model.zero_grad()
    free = model(x)
    free.backward()
    assert torch.equal(masked, free)
    assert all(p.grad is not None for p in model.centrals())
    for expected, parameter in zip(others, model.others(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_stale_zero_gradients_do_not_defeat_the_mask():
    model = Toy()
    mask = GradientMask(model, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(torch.randn(6, 32)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [p.detach().clone() for p in model.centrals()]
    with mask.step(1):
        model(torch.randn(6, 32)).backward()
        optimizer.step()
    assert all(torch.equal(old, p) for old, p in zip(before, model.centrals(), strict=True))


def test_draws_are_a_pure_function_of_seed_and_step():
    draws = [mask_draw(7, step) for step in range(50)]
    torch.manual_seed(123)
    assert draws == [mask_draw(7, step) for step in range(50)]
    assert [mask_draw(7, step) for step in reversed(range(50))] == draws[::-1]
    assert draws != [mask_draw(8, step) for step in range(50)]
    assert len(set(draws)) == 50
    assert mask_draw(2**63 + 1, 0) != mask_draw(2**63, 0)
    assert 0 <= mask_draw(-1, 0) < 1
    # Pinned: a change of the stream would make resumed runs disagree with themselves.
    assert mask_draw(0, 0) == 0.06080617801273447
    assert mask_draw(1234567, 3) == mask_draw(2**64 + 1234567, 3) == 0.6831252126694477


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_frequency(probability):
    mask = GradientMask(None, probability, seed=11)
    rate = sum(mask.is_masked(step) for step in range(4000)) / 4000
    # Four standard deviations; exact at the ends.
    assert abs(rate - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_error_in_a_masked_step_releases_the_model():
    model = Toy()
    mask = GradientMask(model, 1.0)
    cores = model.layers[0].experts.up

    def fail():
        with mask.step(0):
            assert cores.central_masked
            assert mask.active
            raise RuntimeError("out of memory")

    refuses(RuntimeError, "out of memory", fail)
    assert not cores.central_masked
    assert not mask.active


def test_refusals():
    for probability in (-0.1, 1.5, float("nan")):
        refuses(
            ValueError,
            "gradient_mask_prob must be at least 0 and at most 1",
            GradientMask,
            Toy(),
            probability,
        )
    refuses(ValueError, "step must be at least 0", mask_draw, 0, -1)
    refuses(
        ValueError,
        "needs a model with MPO cores; Linear has none",
        GradientMask,
        nn.Linear(2, 2),
        0.5,
    )
    GradientMask(nn.Linear(2, 2), 0.0)  # off: nothing to refuse


@either("checkpointing")
def test_masked_steps_change_everything_but_the_centrals(tmp_path, checkpointing):
    """Also where the backward pass computes activations again."""
    watch = Watch()
    trainer = make_trainer(
        tmp_path,
        "gpt2" if checkpointing else "t5",
        **{CHECKPOINTING: checkpointing},
        gradient_mask_prob=0.5,
        gradient_mask_seed=4,
        max_steps=8,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=4,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        callbacks=[watch],
    )
    trainer.train()
    expected = [mask_draw(4, step) < 0.5 for step in range(8)]
    assert 2 < sum(expected) < 6
    assert expected.index(True) != 0, "some momentum must exist before the first masked step"
    names = {name for name, _ in trainer.model.named_parameters()}
    centrals = {name for name in names if name.endswith(".central")}
    assert watch.changed == [names - centrals if masked else names for masked in expected]
    # One draw holds for all three micro-batches of a step.
    assert watch.masked == [masked for masked in expected for _ in range(3)]
    assert not all_masked(trainer.model)


def test_mask_is_off_during_evaluation(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            seen.append(all_masked(model))

    trainer = make_trainer(
        tmp_path,
        gradient_mask_prob=1.0,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        callbacks=[Look()],
    )
    trainer.train()
    assert seen
    assert not any(seen)


def test_error_in_training_releases_the_model(tmp_path):
    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert all_masked(model)
            raise RuntimeError("stop here")

    trainer = make_trainer(tmp_path, gradient_mask_prob=1.0, callbacks=[Fail()])
    refuses(RuntimeError, "stop here", trainer.train)
    assert not all_masked(trainer.model)


def test_callback_alone_in_the_ordinary_trainer(tmp_path):
    model = mpoe_model("bert")
    before = weights(model)
    callback = GradientMaskCallback(GradientMask(None, 1.0, seed=0))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=Rows("bert"),
        callbacks=[callback],
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        if ".experts." in name and ("central" in name or "auxiliary" in name):
            assert torch.equal(parameter, before[name]) == name.endswith(".central"), name


def test_optimizer_uses_per_core_rates_under_the_scheduler(tmp_path):
    trainer = make_trainer(tmp_path, "t5", max_steps=4, mpo_lr=2e-3, warmup_steps=0)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append(
                {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            )

    trainer.add_callback(Look())
    trainer.train()
    up = trainer.model.encoder.block[0].layer[1].DenseReluDense.experts.up
    assert seen[0][id(up.central)] == pytest.approx(2e-3 * 0.35 * up.rate_ratios[up.shape.central])
    for step, rates in enumerate(seen):
        assert rates == pytest.approx(
            {each: rate * (1 - step / 4) for each, rate in seen[0].items()}
        )


def test_own_optimizer_is_left_alone(tmp_path):
    model = mpoe_model("t5")
    trainer = make_trainer(tmp_path, "t5", model=model, max_steps=1)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
