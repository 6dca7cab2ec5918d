"""A killed or stopped run continues to the very weights of an uninterrupted one, and computes
products as that did."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from mpoe.training import checkpoints, find_last_checkpoint, read_metrics
from mpoe.training.checkpoints import MANIFEST, go_on_with_choices
from mpoe_kernels.contract import autotune
from tests.assertions import differing, read_json, refuses

from .ranks import torchrun
from .tiny import (
    LAST,
    Rows,
    dense_model,
    make_trainer,
    mpoe_model,
    preferring,
    resume_options,
    weights,
)

# The older name of activation checkpointing, which every Transformers 5 knows.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)
MIXTURES = {
    "switch": {},
    "moe": {"moe_type": "moe", "router": {"jitter": 0.1}},
    "moe_dense": {"moe_type": "moe", "expert_type": "dense", "router": None},
    "none": {"moe_type": "none", "router": None},
    "embedding": {"target_modules": ["ffn", "attention", "embedding"]},
    # The bias of the routers is saved with the weights.
    "neurons": {
        "shape": "neurons",
        "neurons": 8,
        "router": {
            "top_k": 2,
            "scoring_func": "sigmoid",
            "bias_update_rate": 0.01,
            "balance_loss_weight": 0.0,
        },
    },
}


@pytest.mark.parametrize(
    "name, family, steps",
    [("switch", "t5", (1, 2, 3)), ("switch", "gpt2", (1,)), ("switch", "bert", (1,))]
    + [
        (name, family, (1,))
        for name, family in zip(list(MIXTURES)[1:], ["t5", "gpt2"] * 3, strict=False)
    ],
)
def test_resume_is_bit_identical(tmp_path, name, family, steps):
    """Epochs have two steps: checkpoint 1 lies inside the first, 2 at its end, 3 inside the
    second."""
    last = steps[-1] + 2

    def made(folder):
        model = mpoe_model(family, dropout=0.1, jitter=0.1, **MIXTURES[name])
        options = resume_options(family, last) | {
            "model": model,
            "gradient_checkpointing": name != "switch",
        }
        options |= {"save_steps": 1, "train_dataset": Rows(family, rows=16)}
        if not any(each.endswith(".central") for each, _ in model.named_parameters()):
            options["gradient_mask_prob"] = 0.0
        return make_trainer(folder, **options)

    straight = made(tmp_path / "straight")
    start = weights(straight.model)
    straight.train()
    expected = straight.model.state_dict()
    assert [name for name, value in expected.items() if not torch.isfinite(value).all()] == []
    still = start.keys() - differing(start, weights(straight.model))
    assert not [name for name in still if not name.endswith(".central")]
    for step in steps:
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "straight" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.manual_seed(step)  # whatever state the new process is in
        resumed = made(folder)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == last
        assert not differing(expected, resumed.model)
        logged = [record["loss"] for record in straight.state.log_history if "loss" in record][
            step:
        ]
        assert [record["loss"] for record in read_metrics(folder) if "loss" in record] == logged


def test_crash_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    straight = make_trainer(tmp_path / "straight", **resume_options("t5", 6))
    straight.train()
    trainer = make_trainer(tmp_path / "run", **resume_options("t5", 6))
    original = type(trainer)._save_rng_state

    def fail(self, output_dir):
        if self.state.global_step == 6:
            raise OSError("disk full")
        original(self, output_dir)

    monkeypatch.setattr(type(trainer), "_save_rng_state", fail)
    refuses(OSError, "disk full", trainer.train)
    monkeypatch.undo()
    assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    resumed = make_trainer(tmp_path / "run", **resume_options("t5", 6))
    resumed.train(resume_from_checkpoint=True)
    assert not differing(straight.model, resumed.model)
    assert set(os.listdir(tmp_path / "run")) == {"checkpoint-3", "checkpoint-6", "metrics.jsonl"}


def test_run_that_died_before_its_first_checkpoint_starts_again(tmp_path):
    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, **resume_options("t5", 3), callbacks=[Die()]).train()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    make_trainer(tmp_path, **resume_options("t5", 3)).train()
    assert [record["step"] for record in read_metrics(tmp_path) if "loss" in record] == [1, 2, 3]


def test_incomplete_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path, **resume_options("t5", 3)).train()
    (tmp_path / "checkpoint-3/optimizer.pt").write_bytes(b"half")
    trainer = make_trainer(tmp_path, **resume_options("t5", 3))
    refuses(
        ValueError,
        "checkpoint-3 is incomplete",
        trainer.train,
        resume_from_checkpoint=str(tmp_path / "checkpoint-3"),
    )
    refuses(ValueError, "nothing to resume", trainer.train, resume_from_checkpoint=True)
    make_trainer(tmp_path, **resume_options("t5", 3), save_only_model=True).train()
    for asked in (True, str(tmp_path / "checkpoint-3")):
        message = r"checkpoint-3 holds no optimizer's state \(--save_only_model\)"
        refuses(ValueError, message, trainer.train, resume_from_checkpoint=asked)


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    losses = iter([2.0, 1.0, 3.0, 4.0])

    class Score(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = next(losses)

    options = resume_options("t5", 4) | {
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": False,
        "callbacks": [Score()],
    }
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert trainer.state.best_model_checkpoint == str(best)
    for folder in ("checkpoint-2", "checkpoint-4"):
        state = read_json(tmp_path / folder / "trainer_state.json")
        assert state["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_experts": 3}, r"mpoe\.num_experts was 4, the model has 3"),
        ({"shape": "paper"}, r"mpoe\.shape was 'separable', the model has 'paper'"),
        (None, "model_type was 'mpoe_gpt2', the model has 'gpt2'"),
    ],
)
def test_resuming_from_another_model_is_refused(tmp_path, other, message):
    config = {"num_experts": 4, "shape": "separable"}
    first = make_trainer(
        tmp_path,
        "gpt2",
        mpoe_model("gpt2", **config),
        max_steps=1,
        save_steps=1,
        save_strategy="steps",
    )
    first.train()
    model = dense_model("gpt2") if other is None else mpoe_model("gpt2", **(config | other))
    refuses(
        ValueError,
        message,
        make_trainer(tmp_path, "gpt2", model, max_steps=2).train,
        resume_from_checkpoint=True,
    )


def test_a_tied_weight_is_not_missing_and_an_absent_one_is_refused(tmp_path, monkeypatch):
    options = {"save_steps": 1, "save_strategy": "steps"}
    make_trainer(tmp_path, "t5", mpoe_model("t5"), max_steps=1, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    weights = load_file(checkpoint / "model.safetensors")
    assert not {"lm_head.weight", "encoder.embed_tokens.weight"} & set(
        weights
    )  # names of shared.weight
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *_: said.append(text))
    resumed = make_trainer(tmp_path, "t5", mpoe_model("t5", seed=5), max_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [text for text in said if "keys" in text] == []
    assert resumed.model.lm_head.weight is resumed.model.shared.weight

    (checkpoint / MANIFEST).unlink()  # as if somebody else had written it
    for changed, message in (
        (
            {name: value for name, value in weights.items() if name != "shared.weight"},
            "lacks .*lm_head.weight, shared",
        ),
        (
            {"shared.weight": weights["shared.weight"]},
            r"lacks weights of this model: (\S+, ){4}[^ ,]+$",
        ),
        (
            weights | {"more": weights["shared.weight"].clone()},
            "has too many weights of this model: more",
        ),
    ):
        save_file(changed, checkpoint / "model.safetensors", metadata={"format": "pt"})
        refuses(
            ValueError,
            message,
            make_trainer(tmp_path, "t5", mpoe_model("t5"), max_steps=2).train,
            resume_from_checkpoint=str(checkpoint),
        )


# ------------------------------------------------------------------ how products are computed


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A new process on a new machine, on which the n-th candidate of those that are timed is the
    fastest."""
    monkeypatch.setenv(autotune.SETTING, "1")

    def move(place):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{place}"))
        monkeypatch.setattr(autotune, "_seconds", preferring(place))
        autotune.forget()

    yield move
    monkeypatch.undo()
    autotune.forget()


def train(folder, steps, resume=False):
    trainer = make_trainer(folder, **resume_options("t5", steps) | {"save_steps": 1})
    trainer.train(resume_from_checkpoint=resume or None)
    return weights(trainer.model)


def test_a_resumed_run_goes_on_with_its_choices_bit_for_bit(machine, tmp_path):
    machine(0)
    whole, chosen = train(tmp_path / "run", 4), autotune.choices()
    assert chosen
    for step in (3, 4):
        assert checkpoints.choices_of(tmp_path / "run" / f"checkpoint-{step}") == chosen
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    machine(LAST)
    assert not differing(train(tmp_path / "run", 4, resume=True), whole)
    assert checkpoints.choices_of(tmp_path / "run/checkpoint-4") == chosen
    machine(LAST)
    # A new run chooses for the machine it is on.
    assert differing(train(tmp_path / "new", 4), whole)
    assert not set(autotune.choices().items()) & set(chosen.items())


@pytest.mark.parametrize(
    "entries", [{}, {"choices": None}, {"choices": {"some": 3, "other": "eager x"}}]
)
def test_checkpoints_without_choices_choose_anew(machine, tmp_path, entries):
    """Those that recorded none, and what no run wrote: a choice of nothing that is asked for."""
    machine(LAST)
    manifest = tmp_path / checkpoints.MANIFEST
    manifest.write_text(json.dumps({"files": {}, **entries}))
    go_on_with_choices(str(tmp_path), SimpleNamespace(world_size=1))
    assert autotune.choices() == {
        name: how for name, how in (entries.get("choices") or {}).items() if name == "other"
    }


@pytest.mark.slow
def test_ranks_whose_clocks_disagree_compute_the_same(tmp_path):
    """Tensor parallelism: the same tokens, the same experts, the same bits. Data parallelism: one
    set of choices."""
    answer = torchrun("ranks", tmp_path, "choices")
    assert answer.returncode == 0, answer.stdout
    first, second = (read_json(tmp_path / f"rank-{rank}.json") for rank in range(2))
    assert first["chosen alone"].keys() == second["chosen alone"].keys()
    assert not set(first["chosen alone"].items()) & set(second["chosen alone"].items())
    assert first["alone"]["logits"] != second["alone"]["logits"], "the test can fail"
    for name in ("split", "weights", "chosen"):
        assert first[name] == second[name], name
    recorded = checkpoints.choices_of(tmp_path / "run/checkpoint-2")
    assert recorded == first["chosen"]
    assert first["chosen alone"].items() <= recorded.items()
