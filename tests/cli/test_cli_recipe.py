"""`mpoe compose RECIPE.yaml`, and `mpoe export --to hub --local`: a folder ready to upload."""

import os
from pathlib import Path

import pytest
import torch

from mpoe import load_mpoe
from mpoe.data.stand_in_models import stand_in_path
from mpoe.models.expert_files import expert_repository, kept

from .cli_data import make_expert, run

BASE = str(stand_in_path("gpt2"))
FACTS = {
    "held_out": {"base": 5.0, "expert, always on": 4.0, "quiet expert": 4.1},
    "answers": {"base": 0.0, "quiet expert": 0.0125},
    "same": {"base": 1.0, "quiet expert": 0.985},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with two experts of the tiny GPT-2; one file says what it changes."""
    folder = tmp_path_factory.mktemp("experts")
    for name, facts in (("law", FACTS), ("med", {})):
        make_expert(folder / f"{name}.expert", training=facts)
    return folder


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_a_recipe_is_the_same_as_words(experts, tmp_path):
    names = [str(experts / "law.expert"), str(experts / "med.expert")]
    lines = f"base: {BASE}\nexperts: {names}\npreference: 1.5\noutput_dir: {tmp_path / 'a'}\n"
    recipe = write(tmp_path, f"{lines}top_k: 2\n")
    run("compose", recipe)
    words = f"--preference 1.5 --top_k 2 --output_dir {tmp_path}/b"
    run("compose", BASE, *names, words)
    by_recipe = load_mpoe(tmp_path / "a")
    by_words = load_mpoe(tmp_path / "b")
    assert by_recipe.config.mpoe_experts == ["law", "med", "none"]
    assert by_recipe.config.mpoe_routing["preference"] == 1.5
    for name, value in by_words.state_dict().items():
        assert torch.equal(by_recipe.state_dict()[name], value), name
    # A flag wins over the recipe.
    run(f"compose {recipe} --top_k 1 --output_dir {tmp_path}/c")
    assert load_mpoe(tmp_path / "c").mpoe_config.top_k == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: b\nprefernce: 1\n", "unknown key 'prefernce'; did you mean 'preference'?"),
        ("experts: [a.expert]\n", "base must name the model of the experts; it is missing"),
        ("base: b\nexperts: a.expert\n", "experts must be a list of texts; got 'a.expert'"),
        ("base: b\nbackground: []\n", "background must be a list of texts; got []"),
        ("base: [b]\n", "base must be a text or a number; got ['b']"),
        ("base: b\npreference: loud\n", "--preference: invalid float value: 'loud'"),
        ("- base\n", "recipe"),
        ("base: yes\n", "base must be a text or a number; got True"),
        ("base: b\nmerge: 1\n", "merge must be true or false; got 1"),
        ("base: b\ntop_k: 1\ntop_k: 2\n", "top_k must be there once; got it 2 times"),
        ("base: --overwrite\n", "names must not begin with '-'; got '--overwrite'"),
        ("base: b\nbackground: [x.txt, --merge]\n", "names must not begin with '-'"),
    ],
)
def test_a_wrong_recipe_names_the_key(refused, tmp_path, text, message):
    assert message in refused("compose", write(tmp_path, text))
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_folder_that_is_ready_to_upload(refused, experts, tmp_path):
    law = str(experts / "law.expert")
    out = tmp_path / "out"
    run(f"export {law} {out} --to hub --local")
    assert sorted(os.listdir(out)) == ["README.md", "law.expert"]
    assert (out / "law.expert").read_bytes() == Path(law).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mpoe\n")
    assert "| law.expert | 5.000 | 4.000 | 4.100 | 90% | 0.0125 | 98.5% |" in card
    assert sorted(os.listdir(tmp_path)) == ["out"]
    said = refused(f"export {law} {out} --to hub --local")
    assert f"OUT must be new, or an empty folder; {out} is there" in said
    said = refused(f"export {law} {out} --to hub --local --overwrite")
    assert "overwrite is for models; --local writes a new folder" in said
    said = refused("export", law, tmp_path / "new", "--to", "hub", "--local", "--private")
    assert "private is for a repository of the hub; --local writes a folder" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    run(f"export {law} {tmp_path}/empty --to hub --local")
    assert len(list((tmp_path / "empty").iterdir())) == 2
    assert "local is of --to hub; got --to mixtral" in refused(f"export {law} {out} --local")
    # A file that says nothing of its changes has dashes.
    assert b"| med.expert | - | - | - | - | - | - |" in expert_repository(experts)["README.md"]


def test_after_a_recipe_come_options(refused, tmp_path):
    said = refused("compose", write(tmp_path, "base: b\n"), "b.expert")
    assert "after a recipe come options alone; got 'b.expert'" in said


def test_a_preference_is_finite(refused, experts, tmp_path):
    law = experts / "law.expert"
    said = refused(f"compose {BASE} {law} --preference nan --output_dir {tmp_path}/out")
    assert "preference must be a finite number; got nan" in said
    assert not (tmp_path / "out/config.json").exists()


def test_what_is_kept_of_no_gain_is_not_told():
    losses = FACTS["held_out"]
    assert kept(losses) == pytest.approx(0.9)
    assert kept({**losses, "base": 9.0}) == pytest.approx(0.98)
    assert kept({**losses, "expert, always on": 5.5}) is None
    assert kept({"base": 5.0}) is None
