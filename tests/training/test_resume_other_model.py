"""A checkpoint made by a different config is refused by name, before anything is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mpoe.training.checkpoints import MANIFEST

from .tiny import dense_model, make_trainer, mpoe_model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_experts": 3}, r"mpoe\.num_experts was 4, the model has 3"),
        ({"shape": "paper"}, r"mpoe\.shape was 'separable', the model has 'paper'"),
        ({"expert_type": "dense"}, r"mpoe\.expert_type was 'mpo', the model has 'dense'"),
        (None, "model_type was 'mpoe_gpt2', the model has 'gpt2'"),
    ],
)
def test_resuming_from_another_model_is_refused(tmp_path: Path, other: dict | None, message: str) -> None:
    config = {"num_experts": 4, "shape": "separable"}
    first = make_trainer(
        tmp_path, "gpt2", mpoe_model("gpt2", **config), max_steps=1, save_steps=1, save_strategy="steps"
    )
    first.train()
    model = dense_model("gpt2") if other is None else mpoe_model("gpt2", **(config | other))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, "gpt2", model, max_steps=2).train(resume_from_checkpoint=True)


def test_a_tied_weight_is_not_missing_and_an_absent_one_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_steps": 1, "save_strategy": "steps"}
    make_trainer(tmp_path, "t5", mpoe_model("t5"), max_steps=1, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    weights = load_file(checkpoint / "model.safetensors")
    assert not {"lm_head.weight", "encoder.embed_tokens.weight"} & set(weights)  # names of shared.weight
    with caplog.at_level(logging.WARNING):
        resumed = make_trainer(tmp_path, "t5", mpoe_model("t5", seed=5), max_steps=2, **options)
        resumed.train(resume_from_checkpoint=True)
    assert [record.message for record in caplog.records if "keys" in record.message] == []
    assert resumed.model.lm_head.weight is resumed.model.shared.weight

    (checkpoint / MANIFEST).unlink()  # as if somebody else had written it
    for changed, message in (
        ({name: value for name, value in weights.items() if name != "shared.weight"}, "lacks .*lm_head.weight, shared"),
        (weights | {"more": weights["shared.weight"].clone()}, "has too many weights of this model: more"),
    ):
        save_file(changed, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, "t5", mpoe_model("t5"), max_steps=2).train(resume_from_checkpoint=str(checkpoint))
