"""Parameter-efficient mixtures of experts for Hugging Face models: experts are matrix product operators.

``import mpoe`` registers the MPOE model classes with Transformers' Auto classes. It is cheap: torch and transformers
are imported by the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpoe.registration import register as _register

# Public name -> the module that defines it; loaded on first use.
_NAMES = {
    "DivergenceError": "mpoe.training.divergence",
    "MPOEConfig": "mpoe.config",
    "RouterConfig": "mpoe.config",
    "MPOEFeedForward": "mpoe.layers",
    "MPOEmbedding": "mpoe.layers",
    "MPOLinear": "mpoe.layers",
    "TopKRouter": "mpoe.layers",
    "add_expert": "mpoe.models",
    "compose": "mpoe.models",
    "freeze_all_but_experts": "mpoe.training",
    "global_batch": "mpoe.layers",
    "collect_statistics": "mpoe.models",
    "compose_experts": "mpoe.models",
    "load_expert": "mpoe.models",
    "merge_expert": "mpoe.models",
    "save_expert": "mpoe.models",
    "start_expert": "mpoe.models",
    "convert_to_mpoe": "mpoe.models",
    "import_original": "mpoe.models",
    "lora_on_cores": "mpoe.models.lora",
    "load_mpoe": "mpoe.models",
    "merge_experts": "mpoe.models",
    "merge_latent": "mpoe.models",
    "save_mpoe_only": "mpoe.models",
    "MPOETrainer": "mpoe.training",
    "MPOETrainingArguments": "mpoe.training",
    "load_sharded_optimizer": "mpoe.training",
    "save_sharded": "mpoe.training",
    "save_sharded_checkpoint": "mpoe.training",
    "shard_model": "mpoe.training",
    "__version__": "mpoe_kernels.version",
}

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig, RouterConfig
    from mpoe.layers import MPOEFeedForward, MPOEmbedding, MPOLinear, TopKRouter, global_batch
    from mpoe.models import (
        add_expert,
        collect_statistics,
        compose,
        compose_experts,
        convert_to_mpoe,
        import_original,
        load_expert,
        load_mpoe,
        merge_expert,
        merge_experts,
        merge_latent,
        save_expert,
        save_mpoe_only,
        start_expert,
    )
    from mpoe.models.lora import lora_on_cores
    from mpoe.training import (
        MPOETrainer,
        MPOETrainingArguments,
        freeze_all_but_experts,
        load_sharded_optimizer,
        save_sharded,
        save_sharded_checkpoint,
        shard_model,
    )
    from mpoe.training.divergence import DivergenceError
    from mpoe_kernels.version import __version__

__all__ = [
    "DivergenceError",
    "MPOEConfig",
    "MPOEFeedForward",
    "MPOETrainer",
    "MPOETrainingArguments",
    "MPOEmbedding",
    "MPOLinear",
    "RouterConfig",
    "TopKRouter",
    "__version__",
    "add_expert",
    "collect_statistics",
    "compose",
    "compose_experts",
    "convert_to_mpoe",
    "freeze_all_but_experts",
    "global_batch",
    "import_original",
    "load_expert",
    "load_mpoe",
    "load_sharded_optimizer",
    "lora_on_cores",
    "merge_expert",
    "merge_experts",
    "merge_latent",
    "save_expert",
    "save_mpoe_only",
    "save_sharded",
    "save_sharded_checkpoint",
    "shard_model",
    "start_expert",
]

_register()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mpoe' has no attribute {name!r}; it offers {', '.join(sorted(_NAMES))}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
