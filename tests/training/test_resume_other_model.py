"""A checkpoint made by a different config is refused by name, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

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
