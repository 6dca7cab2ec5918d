"""Training a mixture of MPO experts: gradient mask, per-core rates, Trainer, several processes.

Names are loaded on first use: the Trainer takes seconds to import, and the gradient mask does not need it.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DivergenceError": "callbacks",
    "FolderInUseError": "run_lock",
    "GradientMask": "freezing",
    "GradientMaskCallback": "callbacks",
    "LogLineCallback": "callbacks",
    "MPOETrainer": "trainer",
    "MPOETrainingArguments": "arguments",
    "build_param_groups": "rates",
    "describe_param_groups": "rates",
    "find_last_checkpoint": "checkpoints",
    "freeze_all_but_experts": "freezing",
    "freeze_cores": "freezing",
    "prepare_output_dir": "output_dir",
    "load_sharded_optimizer": "sharding",
    "rank_share": "statistics",
    "read_metrics": "output_dir",
    "save_sharded": "sharding",
    "save_sharded_checkpoint": "sharding",
    "shard_model": "sharding",
    "split_hidden_experts": "sharding",
    "update_correction_bias": "statistics",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
