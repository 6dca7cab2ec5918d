"""Files of experts and folders of mixtures that somebody else wrote: whole, with valid checksums,
and wrong."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mpoe import compose_experts, load_expert, load_mpoe, start_expert
from mpoe.cli.info import facts_of
from mpoe.models import push_expert
from mpoe.models.expert_files import _checksum, write_expert
from mpoe.models.expert_mixture import experts_in, keep_experts, mixture_config
from mpoe.models.table import known_type
from mpoe.models.weight_files import check_links
from tests.assertions import read_json, refuses, write_json

from .tiny_models import M, mixture_of


@pytest.fixture(scope="module")
def whole(domains):
    """What a good file holds: its facts as text, and its tensors."""
    with safe_open(domains.files[0], framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return SimpleNamespace(text=opened.metadata()["expert"], tensors=tensors)


def signed(file, text, tensors):
    """A file with a valid checksum."""
    save_file(tensors, file, metadata={"expert": text, "sha256": _checksum(text, tensors)})
    return file


def test_damaged_files_are_refused(domains, tmp_path):
    file, good = tmp_path / "a.expert", domains.files[0].read_bytes()
    file.write_bytes(good[:-7])
    refuses(ValueError, "whole safetensors file", load_expert, file)
    file.write_bytes(good[:-7] + bytes([good[-7] ^ 1]) + good[-6:])
    refuses(ValueError, "damaged", load_expert, file)
    file.write_bytes(good.replace(b"LlamaForCausalLM", b"LlamaForCausalLN"))
    refuses(ValueError, "damaged", load_expert, file)
    save_file({"x": torch.ones(2)}, file)
    refuses(ValueError, "another safetensors file", load_expert, file)
    refuses(ValueError, "is no file", load_expert, tmp_path)
    refuses(TypeError, "path must be an expert's file", load_expert, 3)


TEXTS = {
    "another format": ('{"format": 2}', 'must be of format 1; got {"format": 2'),
    "no mapping": ("[1]", "must be of format 1"),
    "malformed": ("{", "must hold facts as JSON"),
    "nested deeply": (
        "[" * 100_000,
        "must hold facts as JSON of at most 1048576 letters in 64 levels",
    ),
    "nested": ("[" * 65 + "]" * 65, "is nested deeper"),
    "large": (f'"{"a" * (1 << 20)}"', "it has 1048578 letters"),
    "a long number": ("9" * 10_000, "must hold facts as JSON"),
    "not finite": ("[NaN]", "must hold facts as JSON"),
    "too large a number": ("[1e999]", "must hold facts as JSON"),
    "no text": ('["\\ud800"]', "must hold facts as JSON"),
}
FACTS = {
    "base": [None, 3, "x", "A" * 64],
    "base_name": [None, {}, "a b", "a|b", "a" * 201],
    "model": [None, "\u001b[31m"],
    "tokenizer": [[1], "x"],
    "neurons": [None, "8", 0, -1, True, 32.0, 10**12],
    "training": [[1], 3],
    "gated": [1],
    "version": [{}],
    "activation": ["a b"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_facts(whole, tmp_path, name):
    text, message = TEXTS[name]
    file = signed(tmp_path / "a.expert", text, whole.tensors)
    refuses(ValueError, re.escape(message), load_expert, file)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in FACTS.items() for value in values]
)
def test_facts_that_are_refused(whole, tmp_path, name, value):
    text = json.dumps({**json.loads(whole.text), name: value})
    file = signed(tmp_path / "a.expert", text, whole.tensors)
    refuses(ValueError, f"expert 'a' must hold {name} as", load_expert, file)


def test_facts_are_of_one_schema(whole, tmp_path):
    facts = json.loads(whole.text)
    older = {name: facts[name] for name in "format base base_name model tokenizer neurons".split()}
    assert load_expert(signed(tmp_path / "a.expert", json.dumps(older), whole.tensors)).neurons == M
    expert = load_expert(tmp_path / "a.expert")
    for training in ({"x": "a" * (1 << 20)}, {"x": json.loads("[" * 65 + "]" * 65)}):
        expert.facts["training"] = training
        refuses(
            ValueError,
            "must hold facts as JSON of at most",
            write_expert,
            expert,
            tmp_path / "b.expert",
        )
    assert not (tmp_path / "b.expert").exists()


TENSORS = {
    "integers": (
        ".down",
        lambda value: value.to(torch.int32),
        "floating-point numbers of 32 neurons",
    ),
    "fewer neurons": (
        ".up",
        lambda value: value[1:].clone(),
        "floating-point numbers of 32 neurons",
    ),
    "no axis": (".up", lambda value: torch.tensor(1.0), "floating-point numbers of 32 neurons"),
    "NaN": (".gate_proj", lambda value: value * float("nan"), "finite weights of at most 1e+06"),
    "Inf in half precision": (
        ".up",
        lambda value: (value + float("inf")).half(),
        "finite weights of at most 1e+06",
    ),
    "3e38": (".down", lambda value: value * 0 - 3e38, "finite weights of at most 1e+06"),
    "negative values": (".values", lambda value: value - 1e4, "from 0 to 1e+12 as"),
    "negative rest": (".rest", lambda value: value - 1e4, "from 0 to 1e+12 as"),
    "values of 3e38": (".values", lambda value: value * 0 + 3e38, "from 0 to 1e+12 as"),
    "means of -3e38": (".mean", lambda value: value * 0 - 3e38, "from -1e+12 to 1e+12 as"),
    "means of NaN": (".mean", lambda value: value * float("nan"), "from -1e+12 to 1e+12 as"),
    "vectors of Inf in half precision": (
        ".vectors",
        lambda value: (value + float("inf")).half(),
        "finite numbers",
    ),
    "vectors without axes": (".vectors", lambda value: torch.tensor(1.0), "finite numbers"),
    "values without axes": (
        ".values",
        lambda value: torch.tensor(1.0),
        "finite numbers [1, 32] from -1e+12",
    ),
    "integer rest": (".rest", lambda value: value.to(torch.int64), "torch.int64"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_kinds(whole, tmp_path, name):
    end, change, message = TENSORS[name]
    odd = next(key for key in whole.tensors if key.endswith(end))
    tensors = {**whole.tensors, odd: change(whole.tensors[odd])}
    file = signed(tmp_path / "a.expert", whole.text, tensors)
    refuses(ValueError, re.escape(message), load_expert, file)


def test_tensors_are_of_the_kinds_that_are_written(domains, whole, tmp_path):
    file = signed(tmp_path / "a.expert", whole.text, {**whole.tensors, "other": torch.ones(1)})
    refuses(ValueError, "must hold weights and statistics; got 'other'", load_expert, file)
    for name in ("a:b", "a\nb", ".a", "a\\b", "\udcff"):
        shutil.copy(domains.files[0], tmp_path / f"{name}.expert")
        refuses(
            ValueError, "must have the name of a file", load_expert, tmp_path / f"{name}.expert"
        )
    expert = load_expert(domains.files[0])
    expert.weights[next(iter(expert.weights))] = torch.ones(3)
    refuses(
        ValueError,
        r"must have .* \(32, 32\); it has \(3,\)",
        start_expert,
        domains.base,
        expert=expert,
    )
    expert = load_expert(domains.files[0])
    del expert.weights["model.layers.1.mlp.up"]
    refuses(
        ValueError,
        r"layers.1.mlp.up \(32, 32\); it has None",
        start_expert,
        domains.base,
        expert=expert,
    )
    expert = load_expert(domains.files[0])
    expert.statistics[next(name for name in expert.statistics if name.endswith("mean"))] = (
        torch.ones(3)
    )
    refuses(
        ValueError,
        "the statistics of expert 'domain0' must hold finite numbers",
        compose_experts,
        domains.base,
        [expert],
        background=domains.background,
    )


# ------------------------------------------------------------------ folders


@pytest.fixture
def mixture(domains, tmp_path):
    """The folder of a composed mixture."""
    model = mixture_of(domains)
    model.save_pretrained(tmp_path / "mix")
    keep_experts(model, tmp_path / "mix")
    shutil.copy(domains.files[0], tmp_path / "secret.expert")
    return tmp_path / "mix"


NAMES = (
    ["../../secret", "none"],
    ["{}/secret", "domain0", "none"],
    ["..", "domain0", "none"],
    ["a/b", "c", "none"],
    ["domain0", "domain0", "none"],
    ["none", "domain0", "domain1"],
    ["none"],
    [],
    [3, None, "none"],
    [["a"]],
)


def test_a_mixtures_config_is_of_one_schema(mixture):
    file = mixture / "config.json"
    values = read_json(file)
    assert [expert.name for expert in experts_in(mixture)[0]] == ["domain0", "domain1"]
    for names in NAMES:
        names = [name.format(mixture.parent) if isinstance(name, str) else name for name in names]
        write_json(file, {**values, "mpoe_experts": names})
        refuses(ValueError, re.escape("mpoe_experts in "), experts_in, mixture)
    for names in ("domain0", None, {}):
        write_json(file, {**values, "mpoe_experts": names})
        refuses(
            ValueError, "must hold a mixture that was composed of experts", mixture_config, mixture
        )
    for mpoe in (None, 3, {}, {"top_k": 2}, {**values["mpoe"], "num_experts": 2, "router": None}):
        write_json(file, {**values, "mpoe": mpoe})
        with pytest.raises(ValueError) as error:
            mixture_config(mixture)
        assert "must hold a valid field 'mpoe'" in str(error.value) or "must describe 3" in str(
            error.value
        ), mpoe
    del values["mpoe"]
    write_json(file, values)
    refuses(ValueError, "must hold a valid field 'mpoe'", mixture_config, mixture)


def test_a_mixture_without_a_number_of_experts_per_token_has_the_default(mixture):
    file = mixture / "config.json"
    values = read_json(file)
    assert next(facts_of(mixture))["experts_per_token"] == 3
    del values["mpoe"]["router"]["top_k"]
    write_json(file, values)
    default = load_mpoe(mixture).mpoe_config.top_k
    assert next(facts_of(mixture))["experts_per_token"] == default == 1


LETTERS = "a" * 5000
LONG = (
    ("model_type", LETTERS),
    ("architectures", [LETTERS]),
    ("num_hidden_layers", 10**2000),
    ("hidden_act", LETTERS),
    ("mpoe", {LETTERS: 1}),
    ("mpoe", {"num_experts": LETTERS}),
    ("mpoe", {"shape": LETTERS}),
    ("mpoe", {"rate_ratios": {LETTERS: LETTERS}}),
    ("mpoe_experts", [LETTERS, ""]),
    ("mpoe_routing", {LETTERS: LETTERS}),
)


def test_messages_quote_little_of_a_long_value(mixture):
    file = mixture / "config.json"
    values = read_json(file)
    for name, value in LONG:
        write_json(file, {**values, name: value})
        with pytest.raises((ValueError, TypeError)) as error:
            (mixture_config if name.startswith("mpoe_") else load_mpoe)(mixture)
        assert len(str(error.value)) < 1500, (name, value)
    message = f"of the family '{'a' * 49}...{'a' * 49}', which"
    refuses(ValueError, message, known_type, "x", {"model_type": LETTERS})


@pytest.mark.parametrize(
    "name", ["experts", "experts/domain0.expert", "background.safetensors", "config.json"]
)
def test_links_that_lead_out_are_not_followed(mixture, name):
    shutil.move(mixture / name, mixture.parent / "elsewhere")
    (mixture / name).symlink_to(mixture.parent / "elsewhere")
    refuses(
        ValueError, f"{name} must not be a link that leads out of its folder", experts_in, mixture
    )


def test_links_of_the_hubs_cache_are_followed(mixture):
    snapshot = mixture.parent / "models--me--mix/snapshots" / "abc"
    (snapshot / "experts").mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(path for path in mixture.rglob("*") if path.is_file()):
        file.rename(blobs / str(number))
        (snapshot / file.relative_to(mixture)).symlink_to(blobs / str(number))
    assert [expert.name for expert in experts_in(snapshot)[0]] == ["domain0", "domain1"]
    (snapshot / "other").symlink_to(mixture.parent)
    refuses(ValueError, "other must not be a link", check_links, snapshot)
    (snapshot / "other").unlink()
    (snapshot / "loop").symlink_to("loop")
    check_links(snapshot)  # it leads nowhere, and cannot be read


def test_a_background_of_other_layers(mixture):
    save_file({"x": torch.ones(1)}, mixture / "background.safetensors")
    refuses(ValueError, "background.safetensors must hold mean, rest", experts_in, mixture)
    (mixture / "background.safetensors").unlink()
    refuses(ValueError, "background.safetensors must be a whole", experts_in, mixture)


# ------------------------------------------------------------------ the hub


def test_nothing_behind_a_link_is_sent(domains, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/law.expert").symlink_to(domains.files[0])
    refuses(
        ValueError, "must not be a link that leads out", push_expert, tmp_path / "shared", "me/e"
    )


def test_repositories_that_cannot_be(domains, monkeypatch):
    for name in ("", "a b/c", "../x", "a/b/c"):
        refuses(
            OSError,
            f"repository '{name}' could not be written: Repo id",
            push_expert,
            domains.files[0],
            name,
        )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuses(
        OSError,
        "repository 'me/e' could not be written: .*offline",
        push_expert,
        domains.files[0],
        "me/e",
    )
