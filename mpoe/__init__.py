"""Parameter-efficient mixtures of experts for Hugging Face models: experts are matrix product
operators.

``import mpoe`` registers the MPOE model classes with Transformers' Auto classes. It is cheap: torch
and transformers are imported by the first name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpoe.registration import register as _register

# Public name -> the module that defines it; loaded on first use.
_NAMES = {
    name: module
    for module, names in {
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
    }.items()
    for name in names.split()
}
__all__ = list(_NAMES)

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig as MPOEConfig
    from mpoe.config import RouterConfig as RouterConfig
    from mpoe.layers import MPOEFeedForward as MPOEFeedForward
    from mpoe.layers import MPOEmbedding as MPOEmbedding
    from mpoe.layers import MPOLinear as MPOLinear
    from mpoe.layers import TopKRouter as TopKRouter
    from mpoe.layers import global_batch as global_batch
    from mpoe.models.checkpoint import load_mpoe as load_mpoe
    from mpoe.models.checkpoint import save_mpoe_only as save_mpoe_only
    from mpoe.models.composition import collect_statistics as collect_statistics
    from mpoe.models.composition import compose as compose
    from mpoe.models.convert import convert_to_mpoe as convert_to_mpoe
    from mpoe.models.convert import merge_experts as merge_experts
    from mpoe.models.convert import merge_latent as merge_latent
    from mpoe.models.expert_files import load_expert as load_expert
    from mpoe.models.expert_files import merge_expert as merge_expert
    from mpoe.models.expert_files import save_expert as save_expert
    from mpoe.models.expert_files import start_expert as start_expert
    from mpoe.models.expert_mixture import compose_experts as compose_experts
    from mpoe.models.lora import lora_on_cores as lora_on_cores
    from mpoe.models.original import import_original as import_original
    from mpoe.training.arguments import MPOETrainingArguments as MPOETrainingArguments
    from mpoe.training.callbacks import DivergenceError as DivergenceError
    from mpoe.training.freezing import freeze_all_but_experts as freeze_all_but_experts
    from mpoe.training.sharding import load_sharded_optimizer as load_sharded_optimizer
    from mpoe.training.sharding import save_sharded as save_sharded
    from mpoe.training.sharding import save_sharded_checkpoint as save_sharded_checkpoint
    from mpoe.training.sharding import shard_model as shard_model
    from mpoe.training.trainer import MPOETrainer as MPOETrainer
    from mpoe_kernels.version import __version__ as __version__

_register()


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(
            f"module 'mpoe' has no attribute {name!r}; it offers {', '.join(sorted(_NAMES))}"
        )
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
