"""Which files hold a model's weights, and what its configuration may claim of them."""

import torch
from safetensors import safe_open
from torch import nn

from mpoe.models.checkpoint import read_mpoe_config
from mpoe.models.weight_files import (
    check_repeats,
    check_shapes,
    read_with_metadata,
    weight_files,
    write_tensors,
)
from tests.assertions import refuses, write_json


def test_shards_are_those_of_the_index_in_its_folder(tmp_path):
    refuses(ValueError, "has neither", weight_files, tmp_path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {"a": names[1], "b": names[0], "c": names[1]}
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": weight_map})
    (tmp_path / names[0]).touch()
    refuses(ValueError, f"names {names[1]}", weight_files, tmp_path)
    (tmp_path / names[1]).touch()
    assert weight_files(tmp_path) == [tmp_path / name for name in names]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Its tensors and what it says of them are of one state."""
    file = tmp_path / "some.safetensors"
    states = iter(range(10))

    def opened(path, **how):
        state = next(states)
        write_tensors(file, {"state": torch.tensor(state)}, {"state": str(state)})
        return safe_open(path, **how)

    monkeypatch.setattr("mpoe.models.weight_files.safe_open", opened)
    tensors, metadata = read_with_metadata(file)
    assert str(tensors["state"].item()) == metadata["state"]


def test_a_model_may_be_larger_than_its_weights_but_not_far_larger(tmp_path):
    """Up to 2^20 numbers are left to the report of missing parameters, which names them."""
    with torch.device("meta"):
        small = nn.Linear(1000, 1000)
        large = nn.Linear(1000, 1100)
    check_shapes(small, {"bias": (1000,)}, tmp_path)
    refuses(
        ValueError,
        "describes 1,101,100 numbers, they hold 1,100",
        check_shapes,
        large,
        {"bias": (1100,)},
        tmp_path,
    )
    check_shapes(large, {"bias": (1100,), "weight": (1100, 1000)}, tmp_path)


def test_as_many_layers_as_tensors_are_possible(tmp_path):
    check_repeats({"n_layer": 3, "num_layers": "many"}, 3, tmp_path)
    refuses(ValueError, "n_layer in .*3 tensors; got 4", check_repeats, {"n_layer": 4}, 3, tmp_path)


def test_architectures_are_of_the_model_type(tmp_path):
    config = tmp_path / "config.json"
    for name in ("MPOET5ForConditionalGeneration", "MPOEGPT2LMHeadModel"):
        write_json(config, {"model_type": "mpoe_gpt2", "architectures": [name]})
        if name.startswith("MPOET5"):
            refuses(
                ValueError, "must name an MPOE class of 'mpoe_gpt2'", read_mpoe_config, tmp_path
            )
    assert read_mpoe_config(tmp_path)[1].__name__ == "MPOEGPT2LMHeadModel"
