"""Training a mixture of MPO experts: gradient mask, per-core rates, Trainer, several processes.

Names are loaded on first use: the Trainer takes seconds to import, and the gradient mask does not
need it.
"""

from mpoe.lazy import loader_of

_HOMES = {
    "mpoe.training.arguments": "MPOETrainingArguments",
    "mpoe.training.callbacks": "DivergenceError GradientMaskCallback LogLineCallback",
    "mpoe.training.checkpoints": "find_last_checkpoint",
    "mpoe.training.correction_bias": "update_correction_bias",
    "mpoe.training.freezing": "GradientMask freeze_all_but_experts freeze_cores",
    "mpoe.training.loss": "rank_share",
    "mpoe.training.output_dir": "prepare_output_dir read_metrics",
    "mpoe.training.param_groups": "build_param_groups",
    "mpoe.training.run_lock": "FolderInUseError",
    "mpoe.training.sharding": "load_sharded_optimizer save_sharded save_sharded_checkpoint "
    "shard_model",
    "mpoe.training.trainer": "MPOETrainer",
}
__all__ = sorted(" ".join(_HOMES.values()).split())


__getattr__ = loader_of(__name__, _HOMES)
