"""Parameter-efficient mixtures of experts for Hugging Face models: experts are matrix product
operators.

``import mpoe`` registers the MPOE model classes with Transformers' Auto classes. It is cheap: torch
and transformers are imported by the first name that needs them.
"""

from typing import TYPE_CHECKING

from mpoe.lazy import loader_of
from mpoe.registration import register as _register

# Module -> the public names that are loaded from it on first use.
_HOMES = {
    "mpoe.config": "MPOEConfig RouterConfig",
    "mpoe.layers": "MPOEFeedForward MPOEmbedding MPOLinear TopKRouter global_batch",
    "mpoe.models": "collect_statistics compose compose_experts convert_to_mpoe import_original "
    "load_expert load_mpoe merge_expert merge_experts merge_latent save_expert save_mpoe_only "
    "start_expert",
    "mpoe.models.lora": "lora_on_cores",
    "mpoe.training": "MPOETrainer MPOETrainingArguments freeze_all_but_experts "
    "load_sharded_optimizer save_sharded save_sharded_checkpoint shard_model",
    "mpoe.training.callbacks": "DivergenceError",
    "mpoe_kernels.version": "__version__",
}
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

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig, RouterConfig
    from mpoe.layers import MPOEFeedForward, MPOEmbedding, MPOLinear, TopKRouter, global_batch
    from mpoe.models.checkpoint import load_mpoe, save_mpoe_only
    from mpoe.models.composition import collect_statistics, compose
    from mpoe.models.convert import convert_to_mpoe, merge_experts, merge_latent
    from mpoe.models.expert_files import load_expert, merge_expert, save_expert, start_expert
    from mpoe.models.expert_mixture import compose_experts
    from mpoe.models.lora import lora_on_cores
    from mpoe.models.original import import_original
    from mpoe.training.arguments import MPOETrainingArguments
    from mpoe.training.callbacks import DivergenceError
    from mpoe.training.freezing import freeze_all_but_experts
    from mpoe.training.sharding import (
        load_sharded_optimizer,
        save_sharded,
        save_sharded_checkpoint,
        shard_model,
    )
    from mpoe.training.trainer import MPOETrainer
    from mpoe_kernels.version import __version__

_register()


__getattr__ = loader_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
