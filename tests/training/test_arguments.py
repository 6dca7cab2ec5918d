"""MPOETrainingArguments: defaults, help texts, refusals; every argument of the original under its
name."""

import dataclasses
from functools import partial
from operator import attrgetter

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from mpoe.cli.command import make_parser, option_names, parse
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.tasks import DataOptions
from mpoe.cli.train import take_layers
from mpoe.models import convert_to_mpoe
from mpoe.training import MPOETrainingArguments
from tests.assertions import refuses

from .tiny import dense_model

made = partial(MPOETrainingArguments, output_dir="unused")
OWN = {f.name for f in dataclasses.fields(MPOETrainingArguments)} - {
    f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)
}


def test_defaults():
    args = made()
    assert args.lr_scales == (0.35, 0.5)
    assert args.scale_core_lr
    assert args.gradient_mask_prob == 0.0
    assert args.mask_seed == args.seed == 42
    assert args.core_lr == args.learning_rate
    assert args.report_to == []
    assert args.ddp_find_unused_parameters is None


def test_lists_of_configuration_files():
    args = made(report_to='["wandb"]', update_mpo_layer='["mlp"]', train_AT_index="[0, 1]")
    assert args.report_to == ["wandb"]
    assert (args.update_mpo_layer, args.train_AT_index) == ("mlp", "0,1")


def test_regime_and_overrides():
    assert made(regime="scratch").lr_scales == (1.0, 0.1)
    args = made(regime="scratch", auxiliary_lr_scale=0.2, seed=7)
    assert args.lr_scales == (1.0, 0.2)
    assert args.mask_seed == 7
    assert made(seed=7, gradient_mask_seed=0).mask_seed == 0
    assert made(scale_core_lr=False).lr_scales == (1.0, 1.0)


def test_mask_needs_ddp_to_expect_unused_parameters():
    assert made(gradient_mask_prob=0.5).ddp_find_unused_parameters is True
    refuses(
        ValueError,
        "ddp_find_unused_parameters must not be False",
        made,
        gradient_mask_prob=0.5,
        ddp_find_unused_parameters=False,
    )


def test_every_own_argument_has_help():
    for field in dataclasses.fields(MPOETrainingArguments):
        if field.name in OWN:
            assert len(field.metadata["help"]) > 20, field.name


def test_lists():
    config = {
        "output_dir": "unused",
        "train_AT_index": 2,
        "update_mpo_layer": ["mlp", "attention"],
    }
    (args,) = HfArgumentParser(MPOETrainingArguments).parse_dict(config)
    assert (args.train_AT_index, args.update_mpo_layer) == ("2", "mlp,attention")
    assert made(train_AT_index=args.train_AT_index).train_AT_index == "2"


REFUSED = {
    ValueError: {
        "regime must be one of 'finetune', 'scratch'; got 'pretrain'": {"regime": "pretrain"},
        "mpo_lr must be greater than 0; got 0.0": {"mpo_lr": 0.0},
        "central_lr_scale must be greater than 0; got -1": {"central_lr_scale": -1},
        "auxiliary_lr_scale must be greater than 0; got inf": {"auxiliary_lr_scale": float("inf")},
        "gradient_mask_prob must be at least 0 and at most 1; got 1.01": {
            "gradient_mask_prob": 1.01
        },
        r"got 'mpl' \(did you mean 'mlp'": {"update_mpo_layer": "mpl"},
        "update_mpo_layer must name at least one of": {"update_mpo_layer": ""},
        "train_AT_index must be comma-separated core indices": {"train_AT_index": "1;2"},
        "train_AT_index must be comma-separated .*; got '-1'": {"train_AT_index": "-1"},
    },
    TypeError: {
        "mpo_lr must be a number; got str 'fast'": {"mpo_lr": "fast"},
        "router_lr_scale must be a number; got NoneType None": {"router_lr_scale": None},
        "gradient_mask_prob must be a number": {"gradient_mask_prob": "often"},
        "gradient_mask_seed must be an integer; got float 0.5": {"gradient_mask_seed": 0.5},
        "tensor_learn must be True or False; got str 'yes'": {"tensor_learn": "yes"},
        "output_dir must be a path; got": {"output_dir": 3},
        "global_router_losses must be True or False; got int 1": {"global_router_losses": 1},
    },
}


@pytest.mark.parametrize(
    "error, message", [(error, message) for error, rows in REFUSED.items() for message in rows]
)
def test_refusals(error, message):
    refuses(error, message, made, **REFUSED[error][message])


# ------------------------------------------------------------------ the original's

GROUPS = [RunOptions, DataOptions, ExpertOptions, MPOETrainingArguments]
HERE = ("--output_dir", "unused", "--use_cpu")
# Flags of the original's README and code, and what the options, or the configuration that is built
# of them, then hold.
ORIGINAL = {
    DataOptions: {
        "--data_dir there": {"data_dir": "there"},
        "--tasks one,other third": {"tasks": ["one", "other", "third"]},
        "--temperature 2": {"temperature": 2.0},
        "--eval_tasks other": {"eval_tasks": ["other"]},
        "--split_validation_test": {"split_validation_test": True},
        "--n_train 3 --n_val 4 --n_test 5": {"n_train": 3, "n_val": 4, "n_test": 5},
        "--max_source_length 6 --max_target_length 7": {
            "max_source_length": 6,
            "max_target_length": 7,
        },
    },
    MPOETrainingArguments: {
        "--data_seed 7 --label_smoothing .3": {"data_seed": 7, "label_smoothing_factor": 0.3},
        "--mpo_lr 1e-3 --tensor_learn": {"mpo_lr": 1e-3, "tensor_learn": True},
        "--gradient_mask_prob .25": {"gradient_mask_prob": 0.25},
        "--train_AT_index 1,3": {"train_AT_index": "1,3"},
        "--update_mpo_layer attention": {"update_mpo_layer": "attention"},
    },
    ExpertOptions: {
        "--mpo_layers mlp": {"target_modules": "ffn", "shape": "separable"},
        "--mpo_layers word_embed,attention,mlp": {
            "target_modules": ["ffn", "embedding", "attention"]
        },
        "--mpo_layers mlp pooler": {"target_modules": ["ffn", "pooler"]},
        "--mpo_layers nompo": {"target_modules": "ffn", "expert_type": "dense"},
        "--mpo_layers nompo --moe_type none": None,
        "--emb_trunc 3 --linear_trunc 4": {"embedding_max_bond": 3, "max_bond": 4},
        "--attention_trunc 5 --pooler_trunc 6": {"attention_max_bond": 5, "pooler_max_bond": 6},
        "--moe_type switch --shape paper": {"moe_type": "switch", "router.top_k": 1},
        "--moe_type moe --num_experts 5": {"router.is_gshard": True, "num_experts": 5},
        "--capacity_factor .5 --is_scale_prob": {
            "router.capacity_factor": 0.5,
            "router.is_scale_prob": True,
        },
        "--switch_dropout .5": {"router.expert_dropout": 0.5},
    },
    RunOptions: {
        "--load_experiment somewhere": {"load_experiment": "somewhere", "load_layer": []},
        "--load_layer noload": {"load_layer": []},
        "--compute_time --compute_memory": {"compute_time": True, "compute_memory": True},
        "--print_num_parameters": {"print_num_parameters": True},
    },
}


@pytest.mark.parametrize(
    "kind, flags", [(kind, flags) for kind, named in ORIGINAL.items() for flags in named]
)
def test_arguments_of_the_original(kind, flags):
    """As the commands read them; what the fields do is tested where they are used."""
    held = ORIGINAL[kind][flags]
    assert {word[2:] for word in flags.split() if word.startswith("--")} <= set(
        option_names(make_parser(GROUPS))
    )
    given, before = (
        read(kind, *(HERE if kind is MPOETrainingArguments else ()), *words)
        for words in (flags.split(), ())
    )
    if kind is ExpertOptions:
        given, before = given.build(), before.build()
    assert (given is None) == (held is None)
    found, default = (
        {name: attrgetter(name)(each) for name in held or ()} for each in (given, before)
    )
    assert found == (held or {})
    assert found != default or flags in (
        "--load_layer noload",
        "--mpo_layers nompo --moe_type none",
    )


def read(kind, *flags):
    return parse([kind], [str(flag) for flag in flags])[0][0]


def test_load_layer(tmp_path):
    earlier = converted()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(1.0)
    earlier.save_pretrained(tmp_path)
    model = converted()
    take_layers(model, read(RunOptions, "--load_experiment", tmp_path, "--load_layer", "attention"))
    saved, before = dict(earlier.named_parameters()), dict(converted().named_parameters())
    for name, parameter in model.named_parameters():
        loaded = ".cores." in name  # attention's; everything else is converted again
        assert torch.equal(parameter, (saved if loaded else before)[name]), name
    take_layers(model, read(RunOptions, "--load_experiment", tmp_path, "--load_layer", "mlp"))
    router = "encoder.block.0.layer.1.DenseReluDense.router.weight"
    assert torch.equal(model.get_parameter(router), saved[router])


def converted():
    torch.manual_seed(0)
    flags = ("--num_experts", 2, "--shape", "paper", "--mpo_layers", "mlp,attention")
    return convert_to_mpoe(dense_model("t5"), read(ExpertOptions, *flags).build())
