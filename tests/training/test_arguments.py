"""MPOETrainingArguments: defaults, help texts, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from mpoe.training import MPOETrainingArguments

OWN = {f.name for f in dataclasses.fields(MPOETrainingArguments)} - {
    f.name for f in dataclasses.fields(Seq2SeqTrainingArguments)
}


def test_defaults(tmp_path: Path) -> None:
    args = MPOETrainingArguments(output_dir=str(tmp_path))
    assert args.lr_scales == (0.35, 0.5)
    assert args.scale_core_lr
    assert args.gradient_mask_prob == 0.0
    assert args.mask_seed == args.seed == 42
    assert args.core_lr == args.learning_rate
    assert args.report_to == []
    assert args.ddp_find_unused_parameters is None


def test_regime_and_overrides(tmp_path: Path) -> None:
    assert MPOETrainingArguments(output_dir=str(tmp_path), regime="scratch").lr_scales == (1.0, 0.1)
    args = MPOETrainingArguments(output_dir=str(tmp_path), regime="scratch", auxiliary_lr_scale=0.2, seed=7)
    assert args.lr_scales == (1.0, 0.2)
    assert args.mask_seed == 7
    assert MPOETrainingArguments(output_dir=str(tmp_path), seed=7, gradient_mask_seed=0).mask_seed == 0
    assert MPOETrainingArguments(output_dir=str(tmp_path), scale_core_lr=False).lr_scales == (1.0, 1.0)


def test_mask_needs_ddp_to_expect_unused_parameters(tmp_path: Path) -> None:
    args = MPOETrainingArguments(output_dir=str(tmp_path), gradient_mask_prob=0.5)
    assert args.ddp_find_unused_parameters is True
    with pytest.raises(ValueError, match="ddp_find_unused_parameters must not be False"):
        MPOETrainingArguments(output_dir=str(tmp_path), gradient_mask_prob=0.5, ddp_find_unused_parameters=False)


def test_every_own_argument_has_help() -> None:
    for field in dataclasses.fields(MPOETrainingArguments):
        if field.name in OWN:
            assert len(field.metadata["help"]) > 20, field.name


def test_command_line_and_lists(tmp_path: Path) -> None:
    parser = HfArgumentParser(MPOETrainingArguments)
    line = f"--output_dir {tmp_path} --mpo_lr 1e-3 --gradient_mask_prob .25 --tensor_learn --train_AT_index 1,3"
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert (args.mpo_lr, args.gradient_mask_prob, args.tensor_learn, args.train_AT_index) == (1e-3, 0.25, True, "1,3")
    config = {"output_dir": str(tmp_path), "train_AT_index": 2, "update_mpo_layer": ["mlp", "attention"]}
    (args,) = parser.parse_dict(config)
    assert (args.train_AT_index, args.update_mpo_layer) == ("2", "mlp,attention")
    again = MPOETrainingArguments(output_dir=str(tmp_path), train_AT_index=args.train_AT_index)
    assert again.train_AT_index == "2"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regime": "pretrain"}, ValueError, "regime must be one of 'finetune', 'scratch'; got 'pretrain'"),
        ({"mpo_lr": 0.0}, ValueError, "mpo_lr must be greater than 0; got 0.0"),
        ({"mpo_lr": "fast"}, TypeError, "mpo_lr must be a number; got str 'fast'"),
        ({"central_lr_scale": -1}, ValueError, "central_lr_scale must be greater than 0; got -1"),
        ({"auxiliary_lr_scale": float("inf")}, ValueError, "auxiliary_lr_scale must be greater than 0; got inf"),
        ({"router_lr_scale": None}, TypeError, "router_lr_scale must be a number; got NoneType None"),
        ({"gradient_mask_prob": 1.01}, ValueError, "gradient_mask_prob must be at least 0 and at most 1; got 1.01"),
        ({"gradient_mask_prob": "often"}, TypeError, "gradient_mask_prob must be a number"),
        ({"gradient_mask_seed": 0.5}, TypeError, "gradient_mask_seed must be an integer; got 0.5"),
        ({"update_mpo_layer": "mpl"}, ValueError, r"got 'mpl' \(did you mean 'mlp'"),
        ({"update_mpo_layer": ""}, ValueError, "update_mpo_layer must name at least one of"),
        ({"train_AT_index": "1;2"}, ValueError, "train_AT_index must be comma-separated core indices"),
        ({"train_AT_index": "-1"}, ValueError, "train_AT_index must be comma-separated core indices"),
        ({"tensor_learn": "yes"}, TypeError, "tensor_learn must be True or False; got str 'yes'"),
        ({"global_router_losses": 1}, TypeError, "global_router_losses must be True or False; got int 1"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MPOETrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("folder", [3, 1.5, ["runs"], {}])
def test_a_folder_that_is_no_path(folder: object) -> None:
    with pytest.raises(TypeError, match="output_dir must be a path; got"):
        MPOETrainingArguments(output_dir=folder, use_cpu=True)  # type: ignore[arg-type]
