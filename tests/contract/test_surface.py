"""Nothing that a user could name at commit e1aa197 is gone or has another default; more may be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .surface import missing, names, options

EARLIER: dict[str, Any] = json.loads(Path(__file__).with_name("surface_e1aa197.json").read_text())
# Changed on purpose: what `missing` says of it -> why.
_SHAPE = "a new configuration that names no shape is hidden; what other shapes have alone still selects separable"
_TOP_K = "two experts per token of hidden, one elsewhere; the number is settled and saved"
_LINEAR = "one signature for sizes, as nn.Linear's, and for a shape; after a shape, all goes by name"
_LONG = "the same for other data; instruction data has longer ones"
_NAME, _KEY = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
DELIBERATE = {
    **{
        f"{module}.{name} was {was!r}, is '{_NAME} None'": why
        for module in ("mpoe", "mpoe.config")
        for name, was, why in (
            ("MPOEConfig: parameters: shape", f"{_NAME} 'separable'", _SHAPE),
            ("RouterConfig: parameters: top_k", f"{_NAME} 1", _TOP_K),
        )
    },
    **{
        f"{module}.MPOLinear: parameters: {what}": _LINEAR
        for module in ("mpoe", "mpoe.layers")
        for what in (
            f"init_std was '{_NAME} 0.02', is '{_NAME} None'",
            f"shape was '{_NAME} required', is '{_KEY} None'",
            "other arguments by position",
        )
    },
    **{
        f"mpoe.data.load_task_from_folder: parameters: {name} was '{_KEY} {was}', is '{_KEY} None'": _LONG
        for name, was in (("max_source_length", 128), ("max_target_length", 16))
    },
    **{
        f"{command}: --{option}: default was {was!r}, is None": why
        for command, option, was, why in (
            *((command, "shape", "separable", _SHAPE) for command in ("train", "convert", "plan")),
            *((command, "gauge", "symmetric", _SHAPE) for command in ("train", "convert")),
            *((each, name, 64, _SHAPE) for each in ("train", "convert", "plan") for name in ("light_p", "light-p")),
            *(("plan", name, 1, _TOP_K) for name in ("top_k", "top-k")),
        )
    },
    **{
        f"plan: --{each} is gone": why
        for names, why in (
            ("device calibrate explain", "FLOPs and memory are the same on every device; runs time themselves"),
            ("per_layer", "--json lists every layer"),
            (
                "nodes gpus_per_node link_gbps node_link_gbps",
                "predicted times of clusters; docs/scale.md has the bytes",
            ),
            ("suggest max_parameters max_flops max_time rank_by", "plan the shapes of docs/shapes.md one by one"),
        )
        for name in names.split()
        for each in (name, name.replace("_", "-"))
    },
}


_EXACT = (
    "a plan ranks by FLOPs; it holds exact numbers, the same on every device, and is made by plan_contraction alone"
)
_KEPT = "full weights are kept inside `generate` alone: model.cache_experts(max_bytes=...) sets the limit"
_METRICS = EARLIER["names"]["mpoe.data.METRICS"]["keys"]
DELIBERATE |= {
    "mpoe.data.LocalTask is gone": "a task of files is a Task; nothing needed its folder",
    f"mpoe.data.METRICS: keys was {_METRICS!r}, is {[name for name in _METRICS if name != 'roc_auc']!r}": (
        "no kind of task could use roc_auc; sklearn.metrics.roc_auc_score"
    ),
    **{
        f"mpoe.layers.{what} is gone": _KEPT
        for what in ("ExpertCache", "ExpertCacheReport", "MPOExperts: members: cache_experts")
    },
    **{
        f"mpoe_kernels.ContractionPlan: members: {each} is gone": _EXACT
        for each in ("bytes", "intensity", "memory_bytes", "seconds")
    },
    **{
        f"mpoe_kernels.ContractionPlan: parameters: {each} is gone": _EXACT
        for each in ("backward", "dense_flops", "forward", "hardware", "losses")
    },
    "mpoe_kernels.plan_contraction: parameters: device is gone": _EXACT,
    **{
        f"mpoe_kernels.{name}: parameters: other arguments by position": _EXACT
        for name in ("ContractionPlan", "plan_contraction")
    },
}


@pytest.mark.parametrize(("kind", "today"), [("names", names), ("options", options)])
def test_nothing_is_gone(kind: str, today: Any) -> None:
    found = missing(EARLIER[kind], today())
    assert sorted(set(found) - set(DELIBERATE)) == []
