"""Training a mixture of MPO experts: gradient mask, per-core rates, Trainer, several processes.

Names are loaded on first use: the Trainer takes seconds to import, and the gradient mask does not
need it.
"""

import importlib
from typing import Any

_HOMES = {
    "arguments": "MPOETrainingArguments",
    "callbacks": "DivergenceError GradientMaskCallback LogLineCallback",
    "checkpoints": "find_last_checkpoint",
    "correction_bias": "update_correction_bias",
    "freezing": "GradientMask freeze_all_but_experts freeze_cores",
    "loss": "rank_share",
    "output_dir": "prepare_output_dir read_metrics",
    "param_groups": "build_param_groups",
    "run_lock": "FolderInUseError",
    "sharding": "load_sharded_optimizer save_sharded save_sharded_checkpoint shard_model",
    "trainer": "MPOETrainer",
}
__all__ = sorted(" ".join(_HOMES.values()).split())


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
