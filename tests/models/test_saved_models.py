"""Models that earlier versions saved are what they were.

`fixtures/saved` holds a tiny GPT-2 or T5 of every shape, two files a model, beside their inputs and the logits that the
version which wrote them gave: the MPO shapes are of the first one, hidden and neurons of the ones that brought them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpoe import load_mpoe
from mpoe.models.checkpoint import read_mpoe_config

SAVED = Path(__file__).parents[1] / "fixtures" / "saved"
MODELS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())


def inputs_and_logits(name: str) -> tuple[dict[str, Tensor], Tensor]:
    family, _, shape = name.partition("_")
    tensors = load_file(SAVED / f"{family}.safetensors")
    return {key: value for key, value in tensors.items() if not key.startswith("logits")}, tensors[f"logits_{shape}"]


@pytest.mark.parametrize("name", MODELS)
def test_they_give_their_logits_and_keep_their_configuration(name: str, tmp_path: Path) -> None:
    inputs, expected = inputs_and_logits(name)
    model = load_mpoe(SAVED / name)
    model.save_pretrained(tmp_path)
    earlier, cls = read_mpoe_config(SAVED / name)
    today, same = read_mpoe_config(tmp_path)
    assert cls is same
    assert _known(today["mpoe"], earlier["mpoe"]) == earlier["mpoe"]
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():  # the test can fail: other weights, other logits
            parameter.mul_(1.05)
        assert (model(**inputs).logits - logits).abs().max() > 1e-4


def _known(today: Any, earlier: Any) -> Any:
    """The fields of ``today`` that there were earlier, also of the router."""
    if not isinstance(earlier, dict):
        return today
    return {name: _known(today[name], value) for name, value in earlier.items()}


def test_a_configuration_that_names_no_shape_is_of_separable_experts(tmp_path: Path) -> None:
    """As one written before there was a choice: neither shape nor number of experts per token."""
    folder = tmp_path / "model"
    shutil.copytree(SAVED / "t5_separable", folder)
    values = json.loads((folder / "config.json").read_text())
    for name in ("shape", "gauge", "light_p", "max_bond"):
        del values["mpoe"][name]
    del values["mpoe"]["router"]["top_k"]
    (folder / "config.json").write_text(json.dumps(values))
    inputs, expected = inputs_and_logits("t5_separable")
    model = load_mpoe(folder)
    assert (model.mpoe_config.shape, model.mpoe_config.top_k) == ("separable", 1)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
