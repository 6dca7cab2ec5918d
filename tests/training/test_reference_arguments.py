"""Every argument of the original's table: accepted under its name, and changes what it says.

`CHECKS` holds one check per argument that reads flags exactly as the commands do, and compares what they build with
what the defaults build. Of arguments whose field is tested elsewhere, `READ` says what they set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpoe.cli.command import make_parser, option_names, parse
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.settle import order_items
from mpoe.cli.tasks import DataOptions, resolve
from mpoe.cli.train import measured, take_layers
from mpoe.layers import DenseExperts, MPOEFeedForward
from mpoe.models import convert_to_mpoe, mpo_modules
from mpoe.models.checkpoint import component_of
from mpoe.training import MPOETrainingArguments, freeze_cores

from ..cli.cli_data import write_sentiment
from .tiny import dense_model

GROUPS = [RunOptions, DataOptions, ExpertOptions, MPOETrainingArguments]
# The table of the original's README and code, in its order.
TABLE = (
    *("data_dir", "mpo_lr", "mpo_layers", "emb_trunc", "linear_trunc", "attention_trunc", "pooler_trunc"),
    *("load_layer", "update_mpo_layer", "load_experiment", "moe_type", "num_experts", "capacity_factor"),
    *("switch_dropout", "is_scale_prob", "tensor_learn", "train_AT_index", "gradient_mask_prob"),
    *("tasks", "eval_tasks", "temperature", "split_validation_test", "n_train", "n_val", "n_test", "data_seed"),
    *("max_source_length", "max_target_length", "label_smoothing"),
    *("compute_time", "compute_memory", "print_num_parameters"),
)
Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def argument(*names: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


READ: dict[str, tuple[type, object]] = {
    "capacity_factor": (ExpertOptions, 0.5),
    "is_scale_prob": (ExpertOptions, True),
    "mpo_lr": (MPOETrainingArguments, 2e-3),
    "gradient_mask_prob": (MPOETrainingArguments, 0.25),
    "label_smoothing_factor": (MPOETrainingArguments, 0.3),
    "data_dir": (DataOptions, "there"),
    "split_validation_test": (DataOptions, True),
    **dict.fromkeys(("n_train", "n_val", "n_test", "max_source_length", "max_target_length"), (DataOptions, 3)),
    "data_seed": (MPOETrainingArguments, 7),
}


@pytest.mark.parametrize("name", TABLE)
def test_argument(name: str, tmp_path: Path) -> None:
    assert name in option_names(make_parser(GROUPS))
    if name in CHECKS:
        CHECKS[name](tmp_path)
        return
    field = {"label_smoothing": "label_smoothing_factor"}.get(name, name)
    kind, value = READ[field]
    own = ["--output_dir", tmp_path, "--use_cpu"] if kind is MPOETrainingArguments else []
    assert getattr(read(kind, *own), field) != value
    assert getattr(read(kind, *own, f"--{name}", *([] if value is True else [value])), field) == value


# ------------------------------------------------------------ what the flags build


def read(kind: type, *flags: object) -> Any:
    return parse([kind], [str(flag) for flag in flags])[0][0]


def converted(*flags: object, family: str = "t5") -> Any:
    torch.manual_seed(0)
    config = read(ExpertOptions, "--num_experts", 2, "--shape", "paper", *flags).build()
    return dense_model(family) if config is None else convert_to_mpoe(dense_model(family), config)


def training(folder: Path, *flags: object) -> MPOETrainingArguments:
    return read(MPOETrainingArguments, "--output_dir", folder, "--use_cpu", *flags)


def components(model: Any) -> set[str]:
    return {component_of(name) for name, _ in mpo_modules(model)}


def bonds(model: Any) -> dict[str, int]:
    """Largest bond of every component."""
    largest: dict[str, int] = {}
    for name, cores in mpo_modules(model):
        component = component_of(name)
        largest[component] = max(largest.get(component, 0), *cores.shape.bond_dims)
    return largest


def layers(model: Any) -> list[MPOEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MPOEFeedForward)]


def tasks(*flags: object, field: str = "tasks") -> list[Any]:
    options = read(DataOptions, *flags)
    return resolve(getattr(options, field), options, "seq2seq")


# ------------------------------------------------------------------- the model


@argument("mpo_layers")
def _mpo_layers(folder: Path) -> None:
    assert components(converted("--mpo_layers", "mlp")) == {"mlp"}
    assert components(converted("--mpo_layers", "word_embed,mlp,attention")) == {"word_embed", "mlp", "attention"}
    assert "pooler" in components(converted("--mpo_layers", "mlp", "pooler", family="bert"))
    without = converted("--mpo_layers", "nompo")
    assert components(without) == set()
    assert all(isinstance(layer.experts, DenseExperts) for layer in layers(without))


@argument("emb_trunc", "linear_trunc", "attention_trunc", "pooler_trunc")
def _trunc(folder: Path) -> None:
    every = ("--mpo_layers", "word_embed,mlp,attention,pooler")
    full = bonds(converted(*every, family="bert"))
    flags = {"word_embed": "emb_trunc", "mlp": "linear_trunc", "attention": "attention_trunc", "pooler": "pooler_trunc"}
    for component, flag in flags.items():
        capped = bonds(converted(*every, f"--{flag}", 3, family="bert"))
        assert capped == {**full, component: 3}


@argument("moe_type")
def _moe_type(folder: Path) -> None:
    assert {layer.router.top_k for layer in layers(converted("--moe_type", "switch"))} == {1}
    assert all(layer.router.config.is_gshard for layer in layers(converted("--moe_type", "moe")))
    plain = converted("--moe_type", "none")
    assert {layer.router for layer in layers(plain)} == {None}
    assert components(plain) == {"mlp"}
    assert not layers(converted("--moe_type", "none", "--mpo_layers", "nompo"))


@argument("num_experts")
def _num_experts(folder: Path) -> None:
    assert {layer.num_experts for layer in layers(converted("--num_experts", 5))} == {5}


@argument("switch_dropout")
def _switch_dropout(folder: Path) -> None:
    assert {layer.expert_dropout for layer in layers(converted())} == {0.0}
    layer = layers(converted("--switch_dropout", 0.5))[0].train()
    x = torch.randn(9, 32)
    assert not torch.equal(layer(x), layer(x))


@argument("load_layer")
def _load_layer(folder: Path) -> None:
    flags = ("--mpo_layers", "mlp,attention")
    earlier = converted(*flags)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(1.0)
    earlier.save_pretrained(folder)
    model = converted(*flags)
    take_layers(model, read(RunOptions, "--load_experiment", folder, "--load_layer", "attention"))
    saved, before = dict(earlier.named_parameters()), dict(converted(*flags).named_parameters())
    for name, parameter in model.named_parameters():
        loaded = ".cores." in name  # attention's; everything else is converted again
        assert torch.equal(parameter, (saved if loaded else before)[name]), name
    take_layers(model, read(RunOptions, "--load_experiment", folder, "--load_layer", "mlp"))
    router = "encoder.block.0.layer.1.DenseReluDense.router.weight"
    assert torch.equal(model.get_parameter(router), saved[router])


# -------------------------------------------------------------------- training


def trained(folder: Path, *flags: object) -> dict[str, bool]:
    """Core -> whether it trains, after the flags froze what they say."""
    model, args = converted("--mpo_layers", "mlp,attention"), training(folder, *flags)
    freeze_cores(
        model,
        update_mpo_layer=args.update_mpo_layer,
        tensor_learn=args.tensor_learn,
        train_AT_index=args.train_AT_index,
    )
    parts = (".central", ".auxiliary.")
    return {name: p.requires_grad for name, p in model.named_parameters() if any(part in name for part in parts)}


@argument("update_mpo_layer")
def _update_mpo_layer(folder: Path) -> None:
    assert all(trained(folder).values())
    for name, trains in trained(folder, "--update_mpo_layer", "attention").items():
        assert trains == (component_of(name) == "attention"), name


@argument("tensor_learn")
def _tensor_learn(folder: Path) -> None:
    for name, trains in trained(folder, "--tensor_learn").items():
        assert trains == ("central" not in name), name


@argument("train_AT_index")
def _train_at_index(folder: Path) -> None:
    for name, trains in trained(folder, "--train_AT_index", "1,2,3").items():
        assert trains == name.endswith(("auxiliary.0", "auxiliary.3")), name


# ------------------------------------------------------------------------ data


@argument("tasks", "eval_tasks")
def _tasks(folder: Path) -> None:
    for name in ("one", "other", "third"):
        write_sentiment(folder / name)
    flags = ("--data_dir", folder, "--tasks", "one", "third", "--eval_tasks", "other")
    assert [task.name for task in tasks(*flags)] == ["one", "third"]
    assert [task.name for task in tasks(*flags, field="eval_tasks")] == ["other"]
    assert [task.name for task in tasks("--tasks", "doc_kind,doc_name")] == ["doc_kind", "doc_name"]


@argument("temperature")
def _temperature(folder: Path) -> None:
    def share_of_small(temperature: float) -> float:
        args = training(folder, "--max_steps", 2000, "--per_device_train_batch_size", 1)
        pools = {"small": ["small"] * 10, "large": ["large"] * 90}
        options = read(DataOptions, "--temperature", temperature)
        items, _ = order_items(pools, args, options.temperature, seed=0)
        return sum(items[i] == "small" for i in range(len(items))) / len(items)

    assert share_of_small(1.0) == pytest.approx(0.1, abs=0.03)
    assert share_of_small(1000.0) == pytest.approx(0.5, abs=0.05)


# ---------------------------------------------------------------------- report


@argument("compute_time", "compute_memory", "print_num_parameters")
def _reports(folder: Path) -> None:
    assert measured(read(RunOptions), 2.0, 4, 8) == {}
    time = measured(read(RunOptions, "--compute_time"), 2.0, 4, 8)["time"]
    assert time == {"train_seconds": 2.0, "seconds_per_step": 0.5, "items_per_second": 16.0}
    memory = measured(read(RunOptions, "--compute_memory"), 2.0, 4, 8)["memory"]
    assert memory["peak_bytes"] > 2**20
    assert read(RunOptions, "--print_num_parameters").print_num_parameters


@argument("load_experiment")
def _load_experiment(folder: Path) -> None:
    options = RunOptions(load_experiment="somewhere")
    assert (options.load_experiment, options.load_layer) == ("somewhere", [])
    assert read(RunOptions, "--load_layer", "noload").load_layer == []
    with pytest.raises(ValueError, match="load_layer needs load_experiment"):
        RunOptions(load_layer=["mlp"])
