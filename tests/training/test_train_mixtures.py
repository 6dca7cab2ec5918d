"""Mixtures of every type and models with an MPO embedding train, and resume to the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import pairwise

from .tiny import make_trainer, mpoe_model, weights

# The older name of activation checkpointing, which every Transformers 5 knows.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
CONFIGS: dict[str, dict[str, Any]] = {
    "moe": {"moe_type": "moe", "router": {"jitter": 0.1}},
    "moe_dense": {"moe_type": "moe", "expert_type": "dense", "router": None},
    "none": {"moe_type": "none", "router": None},
    "embedding": {"target_modules": ["ffn", "attention", "embedding"]},
    # The bias of the routers is saved with the weights.
    "neurons": {
        "shape": "neurons",
        "neurons": 8,
        "router": {"top_k": 2, "scoring_func": "sigmoid", "bias_update_rate": 0.01, "balance_loss_weight": 0.0},
    },
}


def run(folder: Path, family: str, config: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_checkpointing": True}
    model = mpoe_model(family, dropout=0.1, **config)
    if any(name.endswith(".central") for name, _ in model.named_parameters()):
        saving["gradient_mask_prob"] = 0.5
    return make_trainer(folder, family, model, **saving, **options)


@pytest.mark.parametrize(("name", "family"), pairwise(list(CONFIGS), ["t5", "gpt2"]))
def test_training_resumes_to_the_same_weights(tmp_path: Path, family: str, name: str) -> None:
    start = weights(run(tmp_path / "start", family, CONFIGS[name]).model)
    whole = run(tmp_path / "run", family, CONFIGS[name])
    whole.train()
    expected = weights(whole.model)
    assert all(torch.isfinite(value).all() for value in expected.values())
    still = [key for key, value in expected.items() if torch.equal(value, start[key])]
    assert not [key for key in still if not key.endswith(".central")]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = run(tmp_path / "run", family, CONFIGS[name])
    resumed.train(resume_from_checkpoint=True)
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[key]), key
