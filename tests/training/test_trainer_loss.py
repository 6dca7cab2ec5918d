"""One optimizer step is the same however its batch is cut; what is logged and evaluated."""

import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from mpoe.training import MPOETrainer, read_metrics
from mpoe.training.loss import count_targets, shifts_labels, split_loss
from tests.assertions import refuses

from .tiny import PAD, Rows, dense_model, make_trainer, mpoe_model

every_family = pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])


class Gradients(TrainerCallback):
    """Keeps a copy of all gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def one_step(tmp_path, family, rows, size, pieces, **options):
    gradients = Gradients()
    model = options.pop("model", None) or mpoe_model(family)
    defaults = {"max_steps": 1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(
        tmp_path,
        family,
        model=model,
        train_dataset=rows,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=pieces,
        callbacks=[gradients],
        **{**defaults, **options},
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.steps[-1]


def assert_same_step(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - other[1][name]).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7, name


def repeated(family):
    """16 rows: the same four, four times; every micro-batch of four then has the same auxiliary
    loss."""
    rows = Rows(family, rows=4)
    rows.rows = rows.rows * 4
    return rows


@every_family
def test_16x1_equals_4x4_with_auxiliary_loss(tmp_path, family):
    rows = repeated(family)
    whole = one_step(tmp_path / "a", family, rows, 16, 1)
    cut = one_step(tmp_path / "b", family, rows, 4, 4)
    assert_same_step(whole, cut)
    # The auxiliary loss takes part: without it loss and router gradients differ.
    without = one_step(tmp_path / "c", family, rows, 16, 1, model=without_auxiliary(family))
    assert whole[0] - without[0] > 0.05
    router = next(name for name in whole[1] if "router" in name)
    assert (whole[1][router] - without[1][router]).norm() > 1e-3 * whole[1][router].norm()


def without_auxiliary(family):
    model = mpoe_model(family)
    model.config.mpoe["router"] |= {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}
    return model


@pytest.mark.parametrize(
    "family, kind",
    [("t5", "mpoe"), ("gpt2", "mpoe"), ("bert", "mpoe"), ("t5", "dense")]
    + [pytest.param(family, "dense", marks=pytest.mark.exhaustive) for family in ("gpt2", "bert")],
)
def test_targets_weigh_alike_whatever_their_micro_batch(tmp_path, family, kind):
    """Rows have different numbers of targets, so that a mean of micro-batch means would be
    wrong."""

    def model():
        torch.manual_seed(0)
        return dense_model(family) if kind == "dense" else without_auxiliary(family)

    rows = Rows(family, rows=16)
    whole = one_step(tmp_path / "a", family, rows, 16, 1, model=model())
    assert_same_step(whole, one_step(tmp_path / "b", family, rows, 2, 8, model=model()))


def test_last_step_with_fewer_micro_batches(tmp_path):
    rows = Rows("t5", rows=12)  # steps of 2 x 4 rows: the second has one micro-batch only
    frozen = {"learning_rate": 0.0, "weight_decay": 0.0}
    cut = one_step(tmp_path / "a", "t5", rows, 4, 2, max_steps=2, **frozen)
    rows.rows = rows.rows[8:]
    last = one_step(tmp_path / "b", "t5", rows, 4, 1, **frozen)
    for name, gradient in last[1].items():
        torch.testing.assert_close(cut[1][name], gradient)


def test_label_smoothing_keeps_the_auxiliary_loss_and_the_scaling(tmp_path):
    smooth = {"label_smoothing_factor": 0.2}
    whole = one_step(tmp_path / "a", "t5", repeated("t5"), 16, 1, **smooth)
    assert_same_step(whole, one_step(tmp_path / "b", "t5", repeated("t5"), 4, 4, **smooth))
    plain = one_step(tmp_path / "c", "t5", repeated("t5"), 16, 1)
    assert whole[0] != pytest.approx(plain[0], rel=1e-4)
    assert any("router" in name and gradient.abs().max() > 0 for name, gradient in whole[1].items())


def test_a_row_without_targets_is_harmless(tmp_path):
    rows = Rows("t5", rows=8)
    for row in rows.rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    loss, gradients = one_step(tmp_path / "a", "t5", rows, 4, 2, model=without_auxiliary("t5"))
    assert math.isfinite(loss)
    rows.rows = rows.rows[4:]
    expected = one_step(tmp_path / "b", "t5", rows, 4, 1, model=without_auxiliary("t5"))
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_counting_targets():
    labels = torch.tensor([[5, 6, -100], [-100, 7, 8]])
    assert int(count_targets(labels, shifted=False)) == 4
    assert int(count_targets(labels, shifted=True)) == 3
    assert int(count_targets(torch.tensor([0, 1]), shifted=True)) == 2
    assert [shifts_labels(dense_model(family)) for family in ("t5", "gpt2", "bert")] == [
        False,
        True,
        False,
    ]
    assert shifts_labels(mpoe_model("gpt2"))
    refuses(ValueError, "the model returned no loss", split_loss, {"logits": 1})


def mean_of_batches(model, rows, size):
    """The loss per target of a model in eval mode: batches summed in float64."""
    total, targets = 0.0, 0
    for start in range(0, len(rows), size):
        chosen = rows.rows[start : start + size]
        batch = {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}
        count = int(count_targets(batch["labels"], shifts_labels(model)))
        with torch.no_grad():
            total += float(model.eval()(**batch).task_loss) * count
        targets += count
    return total / targets


@every_family
def test_evaluation_loss_is_per_target_and_without_auxiliary_loss(tmp_path, family):
    model = mpoe_model(family)
    rows = Rows(family, rows=11, seed=5)
    losses = []
    for size in (3, 11):  # per-batch averages would differ
        trainer = make_trainer(
            tmp_path, family, model=model, eval_dataset=rows, per_device_eval_batch_size=size
        )
        losses.append(trainer.evaluate())
    assert losses[0]["eval_loss"] == pytest.approx(mean_of_batches(model, rows, 3), rel=1e-12)
    batch = {key: torch.stack([row[key] for row in rows.rows]) for key in rows.rows[0]}
    with torch.no_grad():
        outputs = model.eval()(**batch)
    assert outputs.loss > outputs.task_loss + 0.05
    for metrics in losses:
        assert metrics["eval_loss"] == pytest.approx(float(outputs.task_loss), rel=1e-5)
        if family == "gpt2":
            assert metrics["eval_perplexity"] == pytest.approx(
                float(outputs.task_loss.exp()), rel=1e-5
            )
        else:
            assert "eval_perplexity" not in metrics


def test_t5_is_evaluated_on_generated_text(tmp_path):
    seen = []

    def metric(prediction):
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    trainer = make_trainer(
        tmp_path, "t5", compute_metrics=metric, predict_with_generate=True, generation_max_length=7
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 20
    # Generated to length 7 and padded by the Trainer to the model's own maximum.
    assert len(seen[0].predictions) == 20
    assert (seen[0].predictions[:, 7:] == PAD).all()
    assert (seen[0].predictions[:, 1:7] != PAD).any()
    assert seen[0].predictions.dtype.kind == "i"
    plain = make_trainer(tmp_path, "t5", model=trainer.model).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)


@every_family
def test_predictions_are_the_logits_alone(tmp_path, family):
    trainer = make_trainer(tmp_path, family, compute_metrics=lambda prediction: {})
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape == {"t5": (20, 6, 40), "gpt2": (20, 12, 40), "bert": (20, 2)}[family]


def test_logs(tmp_path):
    trainer = make_trainer(
        tmp_path, "t5", logging_steps=2, gradient_accumulation_steps=2, max_steps=4
    )
    trainer.train()
    trainer.evaluate()
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [2, 4, 4, 4]
    for record in records[:2]:
        assert record["loss"] == pytest.approx(record["task_loss"] + record["aux_loss"], rel=1e-5)
        assert record["learning_rate"] <= 1e-2
        encoder, decoder = record["expert_load"]["share"]
        assert record["expert_max_share"] == pytest.approx(max(encoder + decoder), abs=1e-6)
        assert record["expert_min_share"] == pytest.approx(min(encoder + decoder), abs=1e-6)
    assert "train_runtime" in records[2]
    assert "eval_loss" in records[3]
    assert trainer.state.log_history[0]["task_loss"] == records[0]["task_loss"]


def test_refusals(tmp_path):
    refuses(
        TypeError,
        "args must be MPOETrainingArguments; got TrainingArguments",
        MPOETrainer,
        model=mpoe_model("t5"),
        args=TrainingArguments(output_dir=str(tmp_path)),
    )
    refuses(
        ValueError,
        "predict_with_generate needs an encoder-decoder",
        make_trainer,
        tmp_path,
        "gpt2",
        predict_with_generate=True,
    )
    refuses(
        ValueError,
        r"gradient_mask_prob=0\.5 needs a model with MPO cores",
        make_trainer,
        tmp_path,
        "gpt2",
        model=dense_model("gpt2"),
        gradient_mask_prob=0.5,
    )
