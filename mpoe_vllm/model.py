"""vLLM's own classes of dense models, with experts beside every feed-forward network.

A network's experts are *slots* of m neurons each, allocated at the start: ``gate_up [2, S, m, I]``
and ``down [S, m, I]``; with tensor parallelism a rank has a share of every expert's neurons. All
slots are computed for every token, two matrix products, and each token's gates multiply the hidden
neurons: an empty slot has gate 0. The router is ``[S + 1, I]`` in float32; its last row is *none*,
which adds nothing and has no neurons.
"""

import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from mpoe.models.composition import PARTS as STATISTICS  # in the folder's background.safetensors
from mpoe_vllm import FAMILIES
from mpoe_vllm.mixture import ServedMixture

EMPTY = -1e30  # logit of an empty slot: its probability is 0, with nothing but empty ones too
PARTS = ("up", "gate_proj", "down")


class ExpertsBeside(nn.Module):
    """Goes before the class of a feed-forward network of vLLM in the bases.

    Attributes:
        mpoe_router: float32 ``[S + 1, I]``.
        mpoe_offset: float32 ``[S + 1]``, added to the logits: 0, or `EMPTY`.
        mpoe_gate_up: ``[2, S, m, I]`` of this rank.
        mpoe_down: ``[S, m, I]``.
    """

    act_fn: Any
    down_proj: Any

    def allocate(self, mixture: ServedMixture, size: int) -> None:
        """Slots that are all empty, of networks of the model's size ``I``."""
        slots, neurons = mixture.slots, mixture.neurons
        ranks = get_tensor_model_parallel_world_size()
        if neurons % ranks:
            raise ValueError(
                f"neurons must be a multiple of the tensor-parallel size {ranks}; got {neurons}"
            )

        def new(*shape: int, **options: Any) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, **options), requires_grad=False)

        self.mpoe_router = new(slots + 1, size, dtype=torch.float32)
        self.mpoe_offset = new(slots + 1, dtype=torch.float32)
        self.mpoe_gate_up = new(2, slots, neurons // ranks, size)
        self.mpoe_down = new(slots, neurons // ranks, size)
        self.mpoe_offset.fill_(EMPTY)
        self.top_k = mixture.top_k
        self.ranks = ranks
        self.down_proj.reduce_results = False  # the experts' part joins the sum over ranks

    def forward(self, x: Tensor) -> Tensor:
        """``[T, I] -> [T, I]``."""
        y = super().forward(x)
        logits = F.linear(x.float(), self.mpoe_router, self.mpoe_offset)
        slots, neurons, size = self.mpoe_down.shape
        if self.top_k <= slots:
            chosen, index = logits.topk(self.top_k, dim=-1)
            gates = torch.zeros_like(logits).scatter(-1, index, chosen.softmax(-1))
        else:
            gates = logits.softmax(-1)
        hidden = self.act_fn(F.linear(x, self.mpoe_gate_up.view(-1, size)))
        hidden = hidden.view(-1, slots, neurons) * gates[:, :slots, None].to(x.dtype)
        y = torch.addmm(y, hidden.view(-1, slots * neurons), self.mpoe_down.view(-1, size))
        return tensor_model_parallel_all_reduce(y) if self.ranks > 1 else y

    def fill(self, slot: int, part: str, rows: Tensor) -> None:
        """Copy an expert's neurons ``[m, I]`` into a slot; what is left of the slot becomes 0."""
        place = self.mpoe_down if part == "down" else self.mpoe_gate_up[int(part == "up")]
        share = place.shape[1]
        rows = rows[get_tensor_model_parallel_rank() * share :][:share]
        place[slot].zero_()
        place[slot, : len(rows)].copy_(rows)


@functools.cache
def _beside(dense: Any) -> type[Any]:
    return type(f"ExpertsBeside{dense.__name__}", (ExpertsBeside, dense), {})


if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _Dense
else:
    _Dense = object


class MixtureMixin(_Dense):
    """Goes before a dense model's class of vLLM in the bases."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        config = vllm_config.model_config.hf_config
        self.mixture = ServedMixture.of(config.to_dict(), vllm_config.additional_config)
        for module in self.networks().values():
            dense: Any = type(module)
            module.__class__ = _beside(dense)
            module.allocate(self.mixture, config.hidden_size)

    def networks(self) -> dict[str, Any]:
        """The feed-forward networks of this process by name."""
        return {name: module for name, module in self.named_modules() if name.endswith(".mlp")}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read the dense model as vLLM does, and the experts of a composed folder."""
        networks = self.networks()
        mixture = self.mixture

        def dense() -> Iterator[tuple[str, Tensor]]:
            for name, value in weights:
                layer, _, part = name.rpartition(".mlp.")
                if not part.startswith(("experts.", "router.", *STATISTICS)):
                    yield name, value
                    continue
                network = networks.get(f"{layer}.mlp")
                if network is None or part in STATISTICS:  # of another pipeline stage
                    continue
                if part == "router.weight":
                    network.mpoe_router[mixture.rows()] = value.float()
                    network.mpoe_offset[mixture.rows()] = 0.0
                    continue
                for slot in range(len(mixture.experts)):
                    network.fill(slot, part.removeprefix("experts."), value[slot])

        loaded = super().load_weights(dense())
        ours = {name for name, _ in self.named_parameters() if ".mpoe_" in name}
        return loaded | ours

    def replace_experts(self, changes: bytes) -> None:
        """Copy what `mpoe_vllm.mixture` wrote: routers of all layers, and experts for slots."""
        tensors = safetensors.torch.load(changes)
        for name, network in self.networks().items():
            network.mpoe_router.copy_(tensors[f"{name}.router"])
            network.mpoe_offset.copy_(tensors["occupied"].logical_not() * EMPTY)
            for slot in map(int, tensors["slots"]):
                for part in PARTS:
                    network.fill(slot, part, tensors[f"{name}.{part}.{slot}"])


def __getattr__(name: str) -> Any:
    """The class of a mixture, made of vLLM's own of the dense family."""
    family = name.removeprefix("MPOE").removesuffix("ForCausalLM")
    if family not in FAMILIES:
        raise AttributeError(f"{__name__} has no {name}")
    dense = importlib.import_module(f"vllm.model_executor.models.{family.lower()}")
    bases = (MixtureMixin, getattr(dense, f"{family}ForCausalLM"))
    return globals().setdefault(name, type(name, bases, {"__module__": __name__}))
