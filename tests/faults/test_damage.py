"""Damaged and malicious checkpoints are refused in our words, without running anything or taking memory."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mpoe import import_original, load_mpoe, save_mpoe_only
from mpoe.models import load_layers
from mpoe.training import checkpoints, find_last_checkpoint, prepare_output_dir
from tests.training.tiny import dense_model, make_trainer, mpoe_model, resume_options

from .damage import DAMAGES, Damage, Evil, change_config, cut_weights, index_of, shard_outside
from .processes import resident_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    mpoe_model("t5").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name.replace(" ", "_"))
def test_damage_is_refused(saved: Path, tmp_path: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    load_mpoe(folder)
    damage.spoil(folder)
    monkeypatch.chdir(tmp_path)
    before = resident_bytes()
    with pytest.raises(ValueError, match=damage.message):
        load_mpoe(folder)
    assert resident_bytes() - before < 200 << 20
    assert not (tmp_path / "pwned").exists()


def test_shards_and_links_in_their_own_folder_load(saved: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to its files: reading through one is as safe as reading a file."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    index_of(folder, "a.safetensors")
    os.rename(folder / "a.safetensors", tmp_path / "blob")
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    assert load_mpoe(folder).num_parameters() == load_mpoe(saved).num_parameters()


def test_parts_of_a_damaged_checkpoint_are_not_taken(saved: Path, tmp_path: Path) -> None:
    model = mpoe_model("t5", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for spoil, message in ((cut_weights, "whole safetensors file"), (shard_outside, "its own folder")):
        folder = tmp_path / spoil.__name__ / "model"
        shutil.copytree(saved, folder)
        spoil(folder)
        with pytest.raises(ValueError, match=message):
            load_layers(model, folder, ["mlp"])
    shutil.copytree(saved, tmp_path / "ratios")
    change_config(rate_ratios={})(tmp_path / "ratios")
    with pytest.raises(ValueError, match=r"rate_ratios in .* must have one number for every core"):
        load_layers(model, tmp_path / "ratios", ["mlp"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_layers(model, saved, ["mlp"])


@pytest.mark.parametrize("content", [b"", b"half", pickle.dumps(Evil()), pickle.dumps([1, 2])])
def test_pickles_of_the_original_are_refused(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"source must (hold tensors and nothing else|map names to tensors)"):
        import_original(tmp_path, dense_model("t5"))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("change", ["cut", "config", "record", "ratios"])
def test_damaged_mpoe_only_saves(tmp_path: Path, change: str) -> None:
    base = dense_model("gpt2")
    from mpoe import MPOEConfig, convert_to_mpoe

    save_mpoe_only(convert_to_mpoe(base, MPOEConfig(num_experts=2, shape="separable")), tmp_path, base)
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
        "ratios": (text.replace(b'"transformer.h.0.mlp', b'"h.0.mlp'), "must have one number for every core of"),
    }[change]
    (tmp_path / file).write_bytes(spoilt)
    with pytest.raises(ValueError, match=message):
        load_mpoe(tmp_path, base)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    prepare_output_dir(folder, run_config={})
    make_trainer(folder, **resume_options("t5", 6)).train()
    return folder


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_flipped_bit_in_a_checkpoint(trained: Path, tmp_path: Path, name: str) -> None:
    """Sizes fit, sums do not: the run goes on from the checkpoint before."""
    shutil.copytree(trained, tmp_path / "run")
    flip_last_byte(tmp_path / "run" / "checkpoint-6" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-6 is passed over: {name} changed"):
        assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    trainer = make_trainer(tmp_path / "run", **resume_options("t5", 6))
    with pytest.raises(ValueError, match=f"checkpoint-6 is damaged: {name} changed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"files": []}', '{"files": {}, "crc32": 3}', '{"files": {"../../x": 0}}', '{"files": {"a": "b"}}'],
)
def test_foreign_manifests_are_no_checkpoints(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / checkpoints.MANIFEST).write_text(text)
    assert find_last_checkpoint(tmp_path) is None


def test_manifests_without_sums_are_taken(trained: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(trained, tmp_path / "run")
    manifest = tmp_path / "run" / "checkpoint-6" / checkpoints.MANIFEST
    record = json.loads(manifest.read_text())
    del record["crc32"]
    manifest.write_text(json.dumps(record))
    assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"


@pytest.mark.parametrize("name", ["checkpoint-7", ".incomplete-checkpoints", ".deleting-checkpoint-3"])
def test_links_are_removed_and_not_followed(trained: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(trained, tmp_path / "run")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work.txt").write_text("years of it")
    (tmp_path / "run" / name).symlink_to(precious)
    prepare_output_dir(tmp_path / "run", overwrite=True, run_config={})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert (precious / "work.txt").read_text() == "years of it"


def test_pickled_optimizer_state_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else's checkpoint, with a manifest to match."""
    staged = checkpoints.staging_root(tmp_path) / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", staged)
    (staged / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    (staged / checkpoints.MANIFEST).unlink()
    checkpoint = checkpoints.publish(staged, tmp_path)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, **resume_options("t5", 6))
    with pytest.raises(ValueError, match="cannot be read: Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "pwned").exists()
