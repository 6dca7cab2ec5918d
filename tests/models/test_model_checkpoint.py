"""Round trips of saved models; checkpoints that earlier versions and the original implementation
saved."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from mpoe import MPOEConfig, convert_to_mpoe, import_original, load_mpoe, save_mpoe_only
from mpoe.config.mixture import OBSOLETE
from mpoe.models import load_layers, mpo_modules
from mpoe.models.checkpoint import read_mpoe_config
from mpoe.models.weight_files import check_shapes
from mpoe_kernels import MPOShape, decompose, reconstruct
from tests.assertions import differing, read_json, refuses, run_python, write_json
from tests.cases import in_half_precision, pairwise

from .tiny_models import batch, dense_model, result, stirred

KEYS = ["experts.up.central", "experts.down.auxiliary.0", "router.weight"]
COMPONENTS = [("mlp",), ("mlp", "attention", "word_embed")]


@in_half_precision
def test_half_precision_round_trip(dtype, converted, tmp_path):
    model = converted("t5").to(dtype)
    for module in model.modules():
        if hasattr(module, "router"):
            module.router.float()
    model.save_pretrained(tmp_path)
    assert not differing(model, load_mpoe(tmp_path))


def test_a_network_in_two_modules_is_loaded_whole(tmp_path):
    """BERT's, with what its router has learnt; of experts alone, without the dense projections."""
    dense, config = (
        dense_model("bert"),
        MPOEConfig(num_experts=4, router={"bias_update_rate": 0.01}),
    )
    model, experts, whole = (convert_to_mpoe(dense, config) for _ in range(3))
    for name, value in whole.state_dict().items():
        value.add_(1)
        experts.state_dict()[name].add_(2 * ("router" in name or "experts" in name))
    save_mpoe_only(experts, tmp_path / "experts", dense)
    whole.save_pretrained(tmp_path / "whole")
    load_layers(model, tmp_path / "experts", ["mlp"])
    assert not differing(model, experts)
    load_layers(model, tmp_path / "whole", ["mlp"])
    assert whole.state_dict().keys() - differing(whole, model) == {
        n for n in whole.state_dict() if ".intermediate." in n or re.search(r"\d\.output\.dense", n)
    }


@pytest.mark.parametrize("family, key", pairwise(["t5", "gpt2", "bert"], KEYS))
def test_a_dropped_key_never_leaves_garbage(family, key, converted, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith(key))
    shape = tensors.pop(dropped).shape
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    value = again.get_parameter(dropped)
    assert value.shape == shape
    assert torch.isfinite(value).all()
    assert 0 < value.abs().max() < 10
    assert not differing(tensors, again)
    refuses(ValueError, f"missing: {dropped}", load_mpoe, tmp_path)


def test_from_config_initialises_everything(converted):
    config = converted("t5_gated").config
    model = AutoModelForSeq2SeqLM.from_config(config)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 20, name
    up = model.encoder.block[0].layer[1].DenseReluDense.experts.up
    assert float(up.dense_weights().detach().std()) == pytest.approx(24**-0.5, rel=0.2)


def test_load_mpoe_refusals(converted, tmp_path):
    refuses(ValueError, "must be a folder", load_mpoe, tmp_path / "absent")
    refuses(ValueError, r"must hold config\.json", load_mpoe, tmp_path)
    dense_model("gpt2").save_pretrained(tmp_path / "dense")
    refuses(
        ValueError,
        r"config\.json is a dense gpt2: load it with transformers",
        load_mpoe,
        tmp_path / "dense",
    )
    model = converted("gpt2")
    model.save_pretrained(tmp_path / "model")
    refuses(
        ValueError,
        "base is for MPOE-only saves",
        load_mpoe,
        tmp_path / "model",
        base=dense_model("gpt2"),
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "model/config.json").rename(tmp_path / "only/config.json")
    (tmp_path / "only/mpoe_only.safetensors").touch()
    message = "config is what load_mpoe sets itself: leave it out"
    refuses(ValueError, message, load_mpoe, tmp_path / "only", config=model.config)


def test_configs_bases_and_disks_that_do_not_fit(converted, tmp_path, monkeypatch):
    model = converted("gpt2")
    refuses(
        ValueError,
        "base must be a dense model or its folder; 'absent' is not a folder",
        save_mpoe_only,
        model,
        tmp_path / "parts",
        "absent",
    )
    refuses(
        ValueError,
        "base must be a GPT2LMHeadModel or its folder; got T5For",
        save_mpoe_only,
        model,
        tmp_path / "parts",
        dense_model("t5"),
    )
    refuses(
        TypeError,
        "path must be a folder's path; got int",
        save_mpoe_only,
        model,
        7,
        dense_model("gpt2"),
    )
    refuses(
        ValueError,
        "model must hold weights; it is on the device meta",
        save_mpoe_only,
        copy.deepcopy(model).to("meta"),
        tmp_path,
        dense_model("gpt2"),
    )
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    write_json(path, {**read_json(path), "n_embd": "wide"})
    refuses(
        ValueError,
        r"JSON files in .*model do not describe a MPOEGPT2LMHeadModel that can be .*n_",
        load_mpoe,
        tmp_path / "model",
    )
    refuses(
        ValueError,
        r"must match its config\.json; it describes 2,001,000 numbers, they hold 0$",
        check_shapes,
        torch.nn.Linear(2000, 1000, device="meta"),
        {},
        tmp_path,
    )

    def full(*_, **__):
        raise SafetensorError("no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    refuses(
        OSError,
        r"weights could not be written to .*out: no space left",
        model.save_pretrained,
        tmp_path / "out",
    )


@pytest.mark.parametrize(
    "family, more", [("t5", ["embedding"]), ("gpt2", []), ("bert", []), ("bert_mlm", ["embedding"])]
)
def test_mpoe_only_save(family, more, converted, tmp_path):
    model, base = stirred(converted(family, target_modules=["ffn", *more])), dense_model(family)
    save_mpoe_only(model, tmp_path, base)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_mpoe(tmp_path, base=base)
    assert not differing(model, again)
    inputs = batch(family)
    assert torch.equal(result(again(**inputs)), result(model(**inputs)))
    base.save_pretrained(tmp_path / "base")
    assert not differing(model, load_mpoe(tmp_path, base=tmp_path / "base"))
    refuses(ValueError, "MPOE parameters only", load_mpoe, tmp_path)
    with torch.no_grad():
        next(p for n, p in base.named_parameters() if "norm" in n.lower() or "ln_" in n)[0] += 1
    refuses(ValueError, "SHA-256", load_mpoe, tmp_path, base=base)
    refuses(
        ValueError,
        "outside the MPOE modules differ",
        save_mpoe_only,
        model,
        tmp_path / "other",
        base,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    ["import mpoe, transformers", "import transformers.models.auto.configuration_auto, mpoe"],
)
def test_import_mpoe_registers_in_either_order(order, converted, tmp_path):
    converted("gpt2").save_pretrained(tmp_path)
    program = (
        f"{order}; import sys; from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    assert run_python("-c", program).splitlines()[-1] == "MPOEGPT2LMHeadModel"


def test_one_kind_of_save_replaces_or_refuses_the_other(converted, tmp_path):
    dense, model = dense_model("gpt2"), converted("gpt2")
    save_mpoe_only(model, tmp_path, dense)
    assert load_mpoe(tmp_path, dense, dtype=torch.bfloat16).dtype == torch.bfloat16
    (tmp_path / "mpoe_base.json").rename(tmp_path / "away")
    refuses(ValueError, r"must hold mpoe_base\.json", load_mpoe, tmp_path, dense)
    (tmp_path / "away").rename(tmp_path / "mpoe_base.json")
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 5))
    assert torch.equal(load_mpoe(tmp_path)(ids).logits, model(ids).logits)
    refuses(
        ValueError,
        r"must not hold a whole model; .* has model\.safetensors",
        save_mpoe_only,
        model,
        tmp_path,
        dense,
    )
    assert not list(tmp_path.glob(".incomplete-*"))


def test_saves_of_parameters_alone_refuse_what_is_no_folder(converted, tmp_path):
    dense, model = dense_model("gpt2"), converted("gpt2")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling", "no\0path"):
        refuses(
            NotADirectoryError,
            r"path must be a folder; .* is none",
            save_mpoe_only,
            model,
            tmp_path / name,
            dense,
        )
    refuses(
        ValueError,
        "base must be a GPT2LMHeadModel or its folder; ",
        save_mpoe_only,
        model,
        tmp_path / "out",
        tmp_path,
    )


# ------------------------------------------------------------------ earlier versions


SAVED = Path(__file__).parents[1] / "fixtures/saved"
MODELS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())


def inputs_and_logits(name):
    family, _, shape = name.partition("_")
    tensors = load_file(SAVED / f"{family}.safetensors")
    return {key: value for key, value in tensors.items() if not key.startswith("logits")}, tensors[
        f"logits_{shape}"
    ]


@pytest.mark.parametrize("name", MODELS)
def test_they_give_their_logits_and_keep_their_configuration(name, tmp_path):
    inputs, expected = inputs_and_logits(name)
    model = load_mpoe(SAVED / name)
    model.save_pretrained(tmp_path)
    earlier, cls = read_mpoe_config(SAVED / name)
    today, same = read_mpoe_config(tmp_path)
    assert cls is same
    wanted = {name: value for name, value in earlier["mpoe"].items() if name not in OBSOLETE}
    assert _known(today["mpoe"], wanted) == wanted
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():  # the test can fail: other weights, other logits
            parameter.mul_(1.05)
        assert (model(**inputs).logits - logits).abs().max() > 1e-4


def test_a_mixture_of_transformers_converted_by_an_earlier_version_is_refused(tmp_path):
    shutil.copytree(SAVED / "gpt2_hidden", tmp_path / "saved")
    file = tmp_path / "saved/config.json"
    file.write_text(
        file.read_text().replace('"existing_experts": "keep"', '"existing_experts": "mpo"')
    )
    refuses(
        ValueError,
        r"field 'mpoe'; existing_experts must be 'keep': .*; got 'mpo'",
        load_mpoe,
        tmp_path / "saved",
    )


def _known(today, earlier):
    """The fields of ``today`` that there were earlier, also of the router."""
    if not isinstance(earlier, dict):
        return today
    return {name: _known(today[name], value) for name, value in earlier.items()}


EXPERTS = 3
UP, DOWN = MPOShape.paper(24, 48, max_bond=6), MPOShape.paper(48, 24, max_bond=6)
TABLES = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)
SQUARE, TABLE = MPOShape.paper(24, 24), MPOShape.paper(60, 24)


def theirs(cores):
    """Our cores ``[d, in, out, d']`` in the original's order ``[d, out, in, d']``."""
    return [core.transpose(1, 2).contiguous() for core in cores]


def randomised(cores):
    return [core if k == 2 else core + 0.1 * torch.randn_like(core) for k, core in enumerate(cores)]


def original_checkpoint(model, moe_type, components=("mlp",)):
    """A state dict as the original saves it, and the matrices ``[in, out]`` that it represents, by
    our names."""
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
                state |= {
                    f"{layer}.moe_layer.experts.b{n}": torch.zeros(48 if n == 1 else 24)
                    for n in (1, 2)
                }
        elif (
            name.endswith(tuple(f"Attention.{p}.weight" for p in "qkvo"))
            and "attention" in components
        ):
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
                    for owner in (
                        "shared_mpo",
                        "encoder.embed_tokens",
                        "decoder.embed_tokens",
                        "lm_head_mpo",
                    ):
                        state[f"{owner}.tensor_set.{k}"] = core
        else:
            state[name] = torch.randn_like(weight)
    return state, matrices


@pytest.mark.parametrize("moe_type, components", pairwise(["switch", "moe", "none"], COMPONENTS))
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


def test_matrices_that_the_cores_came_from_are_ignored():
    base = dense_model("t5")
    state, matrices = original_checkpoint(base, "moe")
    experts = f"{next(iter(matrices)).partition('.DenseReluDense')[0]}.moe_layer.experts"
    state[f"{experts}.w1"] = torch.zeros(EXPERTS, 24, 48)
    assert import_original(state, base).mpoe_config.expert_type == "mpo"
    state[f"{experts}.w1_mpo.0"] = torch.ones(1, 4, 3, 6)
    words = r"w1_mpo\.0 must be a core \[E, d, out, in, d'\]; got \[1, 4, 3, 6\]"
    refuses(ValueError, words, import_original, state, base)


def broken(change):
    base = dense_model("t5")
    state, _ = original_checkpoint(base, "switch")
    change(state)
    return state, base


PREFIX = "encoder.block.0.layer.1.sffn"
MOE = "encoder.block.1.layer.1.moe_layer.experts"
ABSENT = "encoder.block.9.layer.1"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(f"{PREFIX}.experts.0.wi_mpo.tensor_set.1"), "must hold every core of"),
        (
            lambda s: s.update(
                {f"{PREFIX}.experts.1.wi_mpo.tensor_set.2": torch.zeros(1, 1, 1, 1)}
            ),
            "must share their central",
        ),
        (lambda s: s.pop(f"{PREFIX}.switch.weight"), "must hold every router"),
        (
            lambda s: s.update({f"{PREFIX}.experts.0.wi_mpo.0": torch.ones(1)}),
            f"{PREFIX}.experts.0.wi_mpo.0 must be a core [d, out, in, d']; got [1]",
        ),
        (
            lambda s: s.update(
                {
                    f"{ABSENT}.sffn.experts.{e}.wi_mpo.0": torch.ones(1, 1, 1, 1)
                    for e in range(EXPERTS)
                }
            ),
            f"cores of '{ABSENT}.DenseReluDense.experts.up', which base does not have",
        ),
        (
            lambda s: s.update({f"{PREFIX}.switch.weight": torch.zeros(2, 24)}),
            "model of the sizes of base",
        ),
        (lambda s: s.update({"adapter.weight": torch.zeros(1)}), "'adapter.weight', which a T5"),
        (
            lambda s: s.update({"shared.weight": torch.zeros(61, 24)}),
            "size mismatch for shared.weight",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if "block.0.layer.1.sffn.experts" in k],
            "must hold every core of encoder.block.0",
        ),
        (lambda s: [s.pop(k) for k in list(s) if "_mpo." in k], "holds no MPO cores"),
        (
            lambda s: [s.pop(k) for k in list(s) if "experts" in k and "tensor_set.4" in k],
            "it has [0, 1, 2, 3]",
        ),
        (
            lambda s: s.update({f"{MOE}.w1_mpo.0": torch.ones(1, 1, 1, 1)}),
            "one moe_type; it holds experts of 'switch' and of 'moe'",
        ),
        (lambda s: s.update({0: torch.ones(1)}), "must map names to tensors"),
    ],
)
def test_checkpoints_that_do_not_fit(change, words):
    state, base = broken(change)
    refuses(ValueError, re.escape(words), import_original, state, base)


def test_biases_that_are_left_out_are_named():
    state, base = broken(lambda s: s.update({f"{PREFIX}.switch.bias": torch.ones(EXPERTS)}))
    with pytest.warns(
        UserWarning, match=r"1 biases of the original are left out, e\.g\. encoder\.block\.0"
    ) as warned:
        import_original(state, base)
    assert warned[0].filename == __file__
    refuses(
        TypeError,
        "base must be a T5ForConditionalGeneration",
        import_original,
        state,
        dense_model("gpt2"),
    )
    for source in (None, 3, ["a"]):
        refuses(
            TypeError, "source must be a state dict or a path; got", import_original, source, base
        )
