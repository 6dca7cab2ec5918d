"""Damaged and malicious checkpoints are refused in our words, without running anything or taking
memory."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoe import MPOEConfig, convert_to_mpoe, import_original, load_mpoe, save_mpoe_only
from mpoe.models import load_layers
from mpoe.training import checkpoints, find_last_checkpoint, prepare_output_dir
from tests.assertions import refuses, write_json
from tests.training.tiny import dense_model, make_trainer, mpoe_model, resume_options

from .processes import resident_bytes


class Evil:
    """What a pickle would run: it leaves a mark in the folder where it was unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def weights(folder):
    return folder / "model.safetensors"


def changed(change):
    """The weights' file holds other bytes."""
    return lambda folder: weights(folder).write_bytes(change(weights(folder).read_bytes()))


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


def flip_in_header(data):
    at = data.index(b'"shape"') + 9
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def integers_as_weights(data):
    """A header that says integers of the same size: their bits would become numbers around 1e9."""
    at = data.index(b'"F32"', data.index(b"experts.up.central"))
    return data[: at + 1] + b"I" + data[at + 2 :]


def claims(edge, end, is_there):
    """A header that asks for ``edge`` x ``edge`` numbers, perhaps in a file as long (holes take no
    space on a disk)."""
    entry = {"dtype": "F32", "shape": [edge, edge], "data_offsets": [0, end]}
    header = json.dumps({"lm_head.weight": entry}).encode()

    def spoil(folder):
        weights(folder).write_bytes(len(header).to_bytes(8, "little") + header)
        if is_there:
            os.truncate(weights(folder), 8 + len(header) + end)

    return spoil


def pickled_weights(folder):
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def swapped_shapes(folder):
    tensors = load_file(weights(folder))
    name = next(name for name in tensors if name.endswith("experts.up.central"))
    tensors[name] = tensors[name].transpose(0, 1).contiguous()[..., :-1].contiguous()
    save_file(tensors, weights(folder))


def in_shards(name, outside=False):
    """The weights are a shard; one tensor is said to be in the file ``name``, perhaps one that is
    there outside."""

    def spoil(folder):
        if outside:
            shutil.copy(weights(folder), folder.parent / "outside.safetensors")
        os.rename(weights(folder), folder / "a.safetensors")
        names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        values = {**names, next(iter(names)): name.format(folder.parent.resolve())}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": values})

    return spoil


def change_config(**changes):
    def spoil(folder):
        values = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            (values["mpoe"] if name in values["mpoe"] else values)[name] = value
        write_json(folder / "config.json", values)

    return spoil


def index_of_nothing(folder):
    weights(folder).unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": 3}}')


WHOLE, NUMBERS = "must be a whole safetensors file", "must be of the shape"
# What `load_mpoe` must say of each.
DAMAGES = {
    "weights cut short": (changed(lambda data: data[: len(data) // 2]), WHOLE),
    "weights empty": (changed(lambda data: b""), WHOLE),
    "bit flipped in the header": (changed(flip_in_header), WHOLE),
    "header that calls weights integers": (
        changed(integers_as_weights),
        "must hold floating-point numbers; the header",
    ),
    "header of 4 exabytes": (
        changed(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
        WHOLE,
    ),
    "tensor of 4 terabytes in a sparse file": (claims(1 << 20, 1 << 42, True), NUMBERS),
    "tensor of 16 exabytes": (claims(1 << 31, 1 << 62, False), WHOLE),
    "pickle beside the config": (pickled_weights, r"must hold model\.safetensors"),
    "pickle named safetensors": (changed(lambda data: pickle.dumps(Evil())), WHOLE),
    "weights of another model": (
        lambda folder: save_file({"some.weight": torch.ones(3)}, weights(folder)),
        r"weights in .* must match its config\.json",
    ),
    "a tensor of another shape": (swapped_shapes, "experts.up.central must be of the shape"),
    "shard in the parent folder": (
        in_shards("../outside.safetensors", True),
        "must name files of its own folder; got '../outside",
    ),
    "shard by absolute path": (
        in_shards("{}/outside.safetensors", True),
        "must name files of its own folder; got '/",
    ),
    "shard that is absent": (in_shards("b.safetensors"), r"names b\.safetensors"),
    "config of a trillion numbers": (change_config(d_model=1_000_000, d_ff=1_000_000), NUMBERS),
    "config of a billion layers": (
        change_config(num_layers=10**9),
        "num_layers in .* must fit the weights",
    ),
    "config of a billion experts": (change_config(num_experts=10**9), NUMBERS),
    "config of a bad field": (
        change_config(num_experts="many"),
        "valid field 'mpoe'; num_experts must be an integer",
    ),
    "config of another class": (
        change_config(architectures=["os.system"]),
        "architectures in .* must name an MPOE class of",
    ),
    "config that is a list": (
        replaced("config.json", "[1, 2]"),
        "expected a mapping of names to values; got list",
    ),
    "index that names no files": (
        index_of_nothing,
        "weight_map in .* must map names of parameters",
    ),
    "config of deep brackets": (
        replaced("config.json", '{"a":' + "[" * 100_000),
        "bad JSON: maximum recursion depth",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    mpoe_model("t5").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(saved, tmp_path, name, monkeypatch):
    folder, (spoil, message) = tmp_path / "model", DAMAGES[name]
    shutil.copytree(saved, folder)
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    before = resident_bytes()
    refuses(ValueError, message, load_mpoe, folder)
    assert resident_bytes() - before < 200 << 20
    assert not (tmp_path / "pwned").exists()


def test_shards_and_links_in_their_own_folder_load(saved, tmp_path):
    """The hub's cache holds links to its files: reading through one is as safe as reading a
    file."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    in_shards("a.safetensors")(folder)
    os.rename(folder / "a.safetensors", tmp_path / "blob")
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    assert load_mpoe(folder).num_parameters() == load_mpoe(saved).num_parameters()


def test_parts_of_a_damaged_checkpoint_are_not_taken(saved, tmp_path):
    model = mpoe_model("t5", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("weights cut short", "shard in the parent folder"):
        folder, (spoil, message) = tmp_path / name / "model", DAMAGES[name]
        shutil.copytree(saved, folder)
        spoil(folder)
        refuses(ValueError, message, load_layers, model, folder, ["mlp"])
    shutil.copytree(saved, tmp_path / "ratios")
    change_config(rate_ratios={})(tmp_path / "ratios")
    refuses(
        ValueError,
        r"rate_ratios in .* must have one number for every core",
        load_layers,
        model,
        tmp_path / "ratios",
        ["mlp"],
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_layers(model, saved, ["mlp"])


def test_pickles_of_the_original_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "pytorch_model.bin"
    monkeypatch.chdir(tmp_path)
    for content in (b"", b"half", pickle.dumps(Evil()), pickle.dumps([1, 2])):
        file.write_bytes(content)
        message = "source must hold tensors and nothing else"
        refuses(ValueError, message, import_original, tmp_path, dense_model("t5"))
        assert not (tmp_path / "pwned").exists(), content
    torch.save([torch.ones(1)], file)
    message = "source must map names to tensors; it holds something else"
    refuses(ValueError, message, import_original, tmp_path, dense_model("t5"))


@pytest.mark.parametrize("change", ["cut", "config", "record", "ratios"])
def test_damaged_mpoe_only_saves(tmp_path, change):
    base = dense_model("gpt2")
    save_mpoe_only(
        convert_to_mpoe(base, MPOEConfig(num_experts=2, shape="separable")), tmp_path, base
    )
    files = {"cut": "mpoe_only.safetensors", "record": "mpoe_base.json"}
    file = files.get(change, "config.json")
    text = (tmp_path / file).read_bytes()
    spoilt, message = {
        "cut": (text[:200], "whole safetensors file"),
        "config": (
            text.replace(b'"num_experts": 2', b'"num_experts": 99999999'),
            "must hold the parameters its config",
        ),
        "record": (b"{}", "SHA-256"),
        "ratios": (
            text.replace(b'"transformer.h.0.mlp', b'"h.0.mlp'),
            "must have one number for every core of",
        ),
    }[change]
    (tmp_path / file).write_bytes(spoilt)
    refuses(ValueError, message, load_mpoe, tmp_path, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    prepare_output_dir(folder, run_config={})
    make_trainer(folder, **resume_options("t5", 6)).train()
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
)
def test_flipped_bit_in_a_checkpoint(trained, tmp_path, name):
    """Sizes fit, sums do not: the run goes on from the checkpoint before."""
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/checkpoint-6" / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is passed over: {name} changed"):
        assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    trainer = make_trainer(tmp_path / "run", **resume_options("t5", 6))
    refuses(
        ValueError,
        f"checkpoint-6 is damaged: {name} changed",
        trainer.train,
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"files": []}',
        '{"files": {}, "crc32": 3}',
        '{"files": {"../../x": 0}}',
        '{"files": {"a": "b"}}',
    ],
)
def test_foreign_manifests_are_no_checkpoints(tmp_path, text):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / checkpoints.MANIFEST).write_text(text)
    assert find_last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["checkpoint-7", ".incomplete-checkpoints", ".deleting-checkpoint-3"]
)
def test_links_are_removed_and_not_followed(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "run")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work.txt").write_text("years of it")
    (tmp_path / "run" / name).symlink_to(precious)
    prepare_output_dir(tmp_path / "run", overwrite=True, run_config={})
    assert os.listdir(tmp_path / "run") == ["run.json"]
    assert (precious / "work.txt").read_text() == "years of it"


def test_pickled_optimizer_state_is_refused(trained, tmp_path, monkeypatch):
    """Someone else's checkpoint, with a manifest to match."""
    staged = checkpoints.staging_root(tmp_path) / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", staged)
    (staged / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    (staged / checkpoints.MANIFEST).unlink()
    checkpoint = checkpoints.publish(staged, tmp_path)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, **resume_options("t5", 6))
    refuses(
        ValueError,
        "cannot be read: Weights only load failed",
        trainer.train,
        resume_from_checkpoint=str(checkpoint),
    )
    assert not (tmp_path / "pwned").exists()
