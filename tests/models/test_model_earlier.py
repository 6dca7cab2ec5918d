"""Checkpoints that earlier versions and the original implementation saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpoe import import_original, load_mpoe
from mpoe.models import mpo_modules
from mpoe.models.checkpoint import read_mpoe_config
from mpoe_kernels import MPOShape, decompose, reconstruct

from .tiny_models import batch, dense_model

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


EXPERTS = 3
UP, DOWN = MPOShape.paper(24, 48, max_bond=6), MPOShape.paper(48, 24, max_bond=6)
TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
SQUARE, TABLE = MPOShape.paper(24, 24), MPOShape.paper(60, 24)


def theirs(cores):
    """Our cores ``[d, in, out, d']`` in the original's order ``[d, out, in, d']``."""
    return [core.transpose(1, 2).contiguous() for core in cores]


def randomised(cores):
    return [core if k == 2 else core + 0.1 * torch.randn_like(core) for k, core in enumerate(cores)]


def original_checkpoint(model, moe_type, components=("mlp",)):
    """A state dict as the original saves it, and the matrices ``[in, out]`` that it represents, by our names."""
    torch.manual_seed(3)
    state, matrices = {}, {}
    weights = model.state_dict()
    for name, weight in weights.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".DenseReluDense.")
        if kind in ("wi", "wo") and "mlp" in components:
            shape = UP if kind == "wi" else DOWN
            shared = decompose(weight.T, shape)
            experts = [randomised(shared) for _ in range(1 if moe_type == "none" else EXPERTS)]
            ours = f"{layer}.DenseReluDense.experts.{'up' if kind == 'wi' else 'down'}"
            matrices[ours] = torch.stack([reconstruct(cores, shape) for cores in experts])
            for k in range(5):
                cores = [theirs(expert)[k] for expert in experts]
                if moe_type == "moe":
                    key = f"{layer}.moe_layer.experts.{'w1' if kind == 'wi' else 'w2'}_mpo.{k}"
                    state[key] = cores[0] if k == 2 else torch.stack(cores)
                elif moe_type == "switch":
                    for e, core in enumerate(cores):
                        state[f"{layer}.sffn.experts.{e}.{kind}_mpo.tensor_set.{k}"] = core
                else:
                    state[f"{layer}.DenseReluDense.{kind}_mpo.tensor_set.{k}"] = cores[0]
            if kind == "wi" and moe_type == "switch":
                state[f"{layer}.sffn.switch.weight"] = torch.randn(EXPERTS, 24)
                state[f"{layer}.sffn.switch.bias"] = torch.zeros(EXPERTS)
            elif kind == "wi" and moe_type == "moe":
                state[f"{layer}.moe_layer.gate.w_gating"] = torch.randn(24, EXPERTS)
                state |= {f"{layer}.moe_layer.experts.b{n}": torch.zeros(48 if n == 1 else 24) for n in (1, 2)}
        elif name.endswith(tuple(f"Attention.{p}.weight" for p in "qkvo")) and "attention" in components:
            cores = randomised(decompose(weight.T, SQUARE))
            matrices[f"{name.removesuffix('.weight')}.cores"] = reconstruct(cores, SQUARE)[None]
            for k, core in enumerate(theirs(cores)):
                state[f"{name.removesuffix('.weight')}_mpo.tensor_set.{k}"] = core
        elif name in TABLES:
            if "word_embed" not in components:
                state[name] = weight
            elif name == "shared.weight":
                cores = randomised(decompose(weight, TABLE))
                matrices["shared.cores"] = reconstruct(cores, TABLE)[None]
                for k, core in enumerate(cores):
                    for owner in ("shared_mpo", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head_mpo"):
                        state[f"{owner}.tensor_set.{k}"] = core
        else:
            state[name] = torch.randn_like(weight)
    return state, matrices


@pytest.mark.parametrize("moe_type", ["switch", "moe", "none"])
@pytest.mark.parametrize("components", [("mlp",), ("mlp", "attention", "word_embed")])
@torch.no_grad()
def test_import_reproduces_the_matrices(moe_type, components, tmp_path):
    base = dense_model("t5")
    state, matrices = original_checkpoint(base, moe_type, components)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = import_original(tmp_path, base)
    assert model.mpoe_config.moe_type == moe_type
    assert model.mpoe_config.num_experts == (1 if moe_type == "none" else EXPERTS)
    found = dict(mpo_modules(model))
    assert found.keys() == matrices.keys()
    for name, matrix in matrices.items():
        torch.testing.assert_close(found[name].dense_weights(), matrix, rtol=1e-4, atol=1e-5)
    own = model.state_dict()
    norm = "encoder.block.0.layer.1.layer_norm.weight"
    assert torch.equal(own[norm], state[norm])
    router = "encoder.block.0.layer.1.DenseReluDense.router.weight"
    if moe_type == "switch":
        assert torch.equal(own[router], state["encoder.block.0.layer.1.sffn.switch.weight"])
    elif moe_type == "moe":
        assert torch.equal(own[router], state["encoder.block.0.layer.1.moe_layer.gate.w_gating"].T)
    model.save_pretrained(tmp_path / "ours")
    inputs = batch("t5")
    assert torch.equal(load_mpoe(tmp_path / "ours")(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("moe_type", ["switch", "moe"])
@torch.no_grad()
def test_baselines_with_dense_experts(moe_type):
    base = dense_model("t5")
    state, matrices = original_checkpoint(base, moe_type)
    state = {name: value for name, value in state.items() if "_mpo." not in name}
    for name, matrix in matrices.items():
        layer, _, kind = name.partition(".DenseReluDense.experts.")
        if moe_type == "moe":
            state[f"{layer}.moe_layer.experts.{'w1' if kind == 'up' else 'w2'}"] = matrix
        else:
            keys = [f"{layer}.sffn.experts.{e}.{'wi' if kind == 'up' else 'wo'}.weight" for e in range(EXPERTS)]
            state |= {key: weight.T for key, weight in zip(keys, matrix, strict=True)}
    model = import_original(state, base)
    assert (model.mpoe_config.expert_type, model.mpoe_config.moe_type) == ("dense", moe_type)
    own = model.state_dict()
    for name, matrix in matrices.items():
        assert torch.equal(own[f"{name}.weight"], matrix)
    assert torch.isfinite(model(**batch("t5")).logits).all()
    state.pop(next(name for name in state if ".wo.weight" in name or name.endswith("experts.w2")))
    with pytest.raises(ValueError, match=r"must be \[3, 48, 24\]|must hold every (router and every )?expert"):
        import_original(state, base)


def test_matrices_that_the_cores_came_from_are_ignored():
    base = dense_model("t5")
    state, matrices = original_checkpoint(base, "moe")
    name = next(iter(matrices))
    state[f"{name.partition('.DenseReluDense')[0]}.moe_layer.experts.w1"] = torch.zeros(EXPERTS, 24, 48)
    assert import_original(state, base).mpoe_config.expert_type == "mpo"


def broken(change):
    base = dense_model("t5")
    state, _ = original_checkpoint(base, "switch")
    change(state)
    return state, base


PREFIX = "encoder.block.0.layer.1.sffn"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(f"{PREFIX}.experts.0.wi_mpo.tensor_set.1"), "must hold every core of"),
        (
            lambda s: s.update({f"{PREFIX}.experts.1.wi_mpo.tensor_set.2": torch.zeros(1, 1, 1, 1)}),
            "must share their central",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if f"{PREFIX}.experts" in k and "wi_mpo.tensor_set.3" in k],
            "must hold every core of encoder.block.0.layer.1.DenseReluDense.experts.up; it has [0, 1, 2, 4]",
        ),
        (lambda s: s.pop(f"{PREFIX}.switch.weight"), "must hold every router"),
        (lambda s: s.update({"adapter.weight": torch.zeros(1)}), "'adapter.weight', which a T5"),
        (lambda s: s.update({"shared.weight": torch.zeros(61, 24)}), "shared.weight must be [60, 24]"),
        (lambda s: [s.pop(k) for k in list(s) if "block.0.layer.1.sffn.experts" in k], "must hold the cores of"),
        (lambda s: [s.pop(k) for k in list(s) if "_mpo." in k], "holds no MPO cores"),
    ],
)
def test_checkpoints_that_do_not_fit(change, words):
    state, base = broken(change)
    with pytest.raises(ValueError) as caught:
        import_original(state, base)
    assert words in str(caught.value)


def test_biases_that_are_left_out_are_named():
    state, base = broken(lambda s: s.update({f"{PREFIX}.switch.bias": torch.ones(EXPERTS)}))
    with pytest.warns(UserWarning, match=r"1 biases of the original are left out, e\.g\. encoder\.block\.0"):
        import_original(state, base)
    with pytest.raises(TypeError, match="base must be a T5ForConditionalGeneration"):
        import_original(state, dense_model("gpt2"))


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(TypeError, match="source must be a state dict or a path; got"):
        import_original(source, dense_model("t5"))
