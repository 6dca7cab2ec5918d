"""Every argument of the original's table: accepted under its name, and changes what it says.

`CHECKS` holds one check per argument. A check reads flags exactly as the commands do, and compares what they build with
what the defaults build.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoe.cli.finish import measured
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.parsing import make_parser, option_names, parse
from mpoe.cli.scoring import encode_task
from mpoe.cli.settle import order_items
from mpoe.cli.tasks import DataOptions, resolve
from mpoe.cli.train import take_layers
from mpoe.layers import DenseExperts, MPOEFeedForward
from mpoe.models import convert_to_mpoe, mpo_modules
from mpoe.models.components import component_of
from mpoe.training import MPOETrainingArguments, build_param_groups, freeze_cores

from .small_data import write_task
from .tiny import dense_model, make_trainer, mpoe_model

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


@pytest.mark.parametrize("name", TABLE)
def test_argument(name: str, tmp_path: Path) -> None:
    known = option_names(make_parser(GROUPS))
    assert name in known
    CHECKS[name](tmp_path)


def test_every_argument_has_its_check() -> None:
    assert set(CHECKS) == set(TABLE)


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


def tasks(*flags: object, seed: int = 0, field: str = "tasks") -> list[Any]:
    options = read(DataOptions, *flags)
    return resolve(getattr(options, field), options, "seq2seq", seed)


class Tokens:
    """A tokenizer of words, as far as encoding needs one."""

    eos_token, eos_token_id, pad_token_id = "</s>", 1, 0

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2] * min(len(text.split()), max_length - 1) + [1] for text in texts]}


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


@argument("capacity_factor")
def _capacity_factor(folder: Path) -> None:
    def most_used(*flags: object) -> int:
        layer = layers(converted(*flags))[0].train()
        torch.nn.init.zeros_(layer.router.weight)  # every token wants the same expert
        x = torch.randn(40, 32)
        return int(layer.router.route(layer.router(x)).expert_load.max())

    assert most_used() == 40
    assert most_used("--capacity_factor", 0.5) == 10


@argument("switch_dropout")
def _switch_dropout(folder: Path) -> None:
    assert {layer.expert_dropout for layer in layers(converted())} == {0.0}
    layer = layers(converted("--switch_dropout", 0.5))[0].train()
    x = torch.randn(9, 32)
    assert not torch.equal(layer(x), layer(x))


@argument("is_scale_prob")
def _is_scale_prob(folder: Path) -> None:
    x = torch.randn(9, 32)
    assert torch.equal(layers(converted())[0].router(x).top_k_weights, torch.ones(9, 1))
    router = layers(converted("--is_scale_prob"))[0].router
    torch.testing.assert_close(router(x).top_k_weights, torch.softmax(x @ router.weight.T, -1).max(-1, True).values)


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


@argument("mpo_lr")
def _mpo_lr(folder: Path) -> None:
    def rates(*flags: object) -> dict[str, list[float]]:
        groups = build_param_groups(model, training(folder, "--learning_rate", 1e-3, *flags))
        found: dict[str, list[float]] = {}
        for group in groups:
            found.setdefault(group["kind"], []).append(group["lr"])
        return found

    model = converted()
    base, doubled = rates(), rates("--mpo_lr", 2e-3)
    for kind, values in base.items():
        factor = 2 if kind in ("central", "auxiliary") else 1
        assert doubled[kind] == pytest.approx([factor * value for value in values])


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


def run_trainer(folder: Path, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after two steps, and their losses."""
    torch.manual_seed(0)
    trainer = make_trainer(folder, model=mpoe_model("t5"), max_steps=2, **options)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, losses


@argument("gradient_mask_prob")
def _gradient_mask_prob(folder: Path) -> None:
    start = dict(mpoe_model("t5").named_parameters())
    for probability, moves in ((0.0, True), (1.0, False)):
        args = training(folder, "--gradient_mask_prob", probability)
        after, _ = run_trainer(folder / str(probability), gradient_mask_prob=args.gradient_mask_prob)
        for name, value in after.items():
            if name.endswith(".central"):
                assert torch.equal(value, start[name]) != moves, name


@argument("label_smoothing")
def _label_smoothing(folder: Path) -> None:
    args = training(folder, "--label_smoothing", 0.3)
    assert args.label_smoothing_factor == 0.3
    _, plain = run_trainer(folder / "plain")
    _, smooth = run_trainer(folder / "smooth", label_smoothing_factor=args.label_smoothing_factor)
    assert abs(plain[0] - smooth[0]) > 1e-3


# ------------------------------------------------------------------------ data


@argument("data_dir")
def _data_dir(folder: Path) -> None:
    one, other = write_task(folder / "one", word="book"), write_task(folder / "other", word="song")
    for data_dir, word in ((one, "book"), (other, "song")):
        (task,) = tasks("--data_dir", data_dir)
        assert all(f"the {word} of train" in example.source for example in task.examples("train"))


@argument("tasks", "eval_tasks")
def _tasks(folder: Path) -> None:
    for name in ("one", "other", "third"):
        write_task(folder / name)
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


@argument("split_validation_test")
def _split_validation_test(folder: Path) -> None:
    data = write_task(folder / "task")
    (plain,), (split,) = tasks("--data_dir", data), tasks("--data_dir", data, "--split_validation_test")
    validation = {example.source for example in plain.examples("validation")}
    parts = [{example.source for example in split.examples(name)} for name in ("validation", "test")]
    assert parts[0] | parts[1] == validation
    assert not parts[0] & parts[1]
    assert {example.source for example in plain.examples("test")}.isdisjoint(parts[1])


@argument("n_train", "n_val", "n_test")
def _subsets(folder: Path) -> None:
    data = write_task(folder / "task")
    splits = {"n_train": "train", "n_val": "validation", "n_test": "test"}
    for flag in splits:
        (task,) = tasks("--data_dir", data, f"--{flag}", 3)
        sizes = {name: len(task.examples(split)) for name, split in splits.items()}
        assert sizes == {"n_train": 40, "n_val": 16, "n_test": 8, flag: 3}


@argument("data_seed")
def _data_seed(folder: Path) -> None:
    data = write_task(folder / "task")
    seeds = [training(folder, "--data_seed", seed).data_seed for seed in (1, 2, 1)]
    drawn = [tasks("--data_dir", data, "--n_train", 5, seed=seed)[0].examples("train") for seed in seeds]
    assert drawn[0] == drawn[2] != drawn[1]


@argument("max_source_length", "max_target_length")
def _lengths(folder: Path) -> None:
    data = write_task(folder / "task")
    (task,) = tasks("--data_dir", data, "--max_source_length", 4, "--max_target_length", 2)
    items = encode_task(task, "train", Tokens())
    assert {len(item["input_ids"]) for item in items} == {4}
    assert {len(item["labels"]) for item in items} == {2}
    (task,) = tasks("--data_dir", data)
    assert min(len(item["input_ids"]) for item in encode_task(task, "train", Tokens())) > 4


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
