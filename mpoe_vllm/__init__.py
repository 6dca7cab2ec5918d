"""A plugin of vLLM: it opens mixtures that `mpoe compose` wrote, and adds and removes their experts
while it serves (docs/vllm.md).

vLLM calls `register` in each of its processes, and makes an `mpoe_vllm.endpoints.Experts` where
``VLLM_PLUGINS`` names ``mpoe``. Nothing else of mpoe imports vLLM.
"""

from typing import Any

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose networks hold vLLM's gated SiLU


def register() -> None:
    """Tell vLLM the classes of mixtures, and its workers how their experts are replaced."""
    from vllm import ModelRegistry
    from vllm.v1.worker.worker_base import WorkerBase

    import mpoe  # noqa: F401  (Transformers then knows the configurations)

    for family in FAMILIES:
        name = f"MPOE{family}ForCausalLM"
        ModelRegistry.register_model(name, f"mpoe_vllm.model:{name}")
    workers: Any = WorkerBase
    workers.mpoe_replace_experts = _replace_experts


def _replace_experts(worker: Any, changes: bytes) -> None:
    """Of a worker, called between two steps."""
    worker.get_model().replace_experts(changes)
