"""Neurons and LoRA beside one base: trained alike, kept as files, merged, and LoRA under a mixture's router."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mpoe.models import collect_statistics, save_expert, start_expert
from mpoe_bench.study.training import BETAS, train_steps

BATCH = 4
SAMPLED = 256  # pieces for an expert's statistics
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def with_lora(base: Any, rank: int) -> Any:
    """``base``'s copy with a new adapter on the projections of its feed-forward networks."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config)


def train(model: Any, batches: Sequence[Tensor], rate: float) -> None:
    """AdamW on what is trainable.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    adam.param_groups[0]["full"] = rate
    train_steps(model.train(), adam, len(batches), enumerate(batches), autocast)
    model.eval()


def drawn(train_pieces: Sequence[Tensor], steps: int, seed: int) -> list[Tensor]:
    """Batches of each text in turn, the same for every kind of expert."""
    generator = torch.Generator().manual_seed(seed)
    texts = [train_pieces[step % len(train_pieces)] for step in range(steps)]
    return [text[torch.randint(len(text), (BATCH,), generator=generator)] for text in texts]


def trained(kind: str, base: Any, size: int, batches: Sequence[Tensor], rate: float, seed: int) -> Any:
    """An expert (``kind`` "neurons") or a LoRA adapter beside ``base``."""
    torch.manual_seed(seed)
    model = start_expert(base, size) if kind == "neurons" else with_lora(base, size)
    train(model, batches, rate)
    return model


def keep(model: Any, place: Path, text: Tensor) -> None:
    """Write an expert's file with its statistics from some of its text, or an adapter's folder."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(place))
        return
    statistics = collect_statistics(model, [{"input_ids": part} for part in text[:SAMPLED].split(8)])
    save_expert(model, place, statistics=statistics)


@torch.inference_mode()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Of every token that is predicted, float32 ``[N, LENGTH - 1]``."""
    found = []
    for part in ids.split(8):
        with autocast():
            logits = model(input_ids=part).logits
        own = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(own.view(len(part), -1))
    return torch.cat(found)


def adapters(base: Any, places: Mapping[str, Path]) -> Any:
    """One model with several adapters, by name."""
    names = iter(places.items())
    first, place = next(names)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(place), adapter_name=first)
    for name, place in names:
        model.load_adapter(str(place), adapter_name=name)
    return model.eval()


def merged_adapter(model: Any, names: Sequence[str], how: str, weight: float, density: float | None = None) -> Any:
    """``model`` with the merged adapter active: "cat" (a weighted sum), "ties_svd" or "dare_ties_svd"."""
    torch.manual_seed(0)  # DARE drops at random
    rank = None if how == "cat" else sum(model.peft_config[name].r for name in names)  # as large as all together
    weights = [weight] * len(names)
    model.add_weighted_adapter(list(names), weights, "merged", combination_type=how, density=density, svd_rank=rank)
    model.set_adapter("merged")
    return model


class RoutedAdapters(nn.Module):
    """A feed-forward network whose LoRA adapters are mixed by a router, token by token; the last expert is none."""

    def __init__(self, network: nn.Module, names: Sequence[str], weight: Tensor, top_k: int) -> None:
        super().__init__()
        self.network, self.names, self.top_k = network, list(names), top_k
        self.register_buffer("weight", weight.float())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            chosen = (x.float() @ self.weight.mT).topk(self.top_k)
            gates = torch.zeros(*x.shape[:-1], len(self.weight)).scatter(-1, chosen.indices, chosen.values.softmax(-1))
        layers = [layer for layer in self.network.modules() if isinstance(layer, LoraLayer)]
        y = torch.zeros_like(x)
        for number, name in enumerate([*self.names, None]):
            for layer in layers:
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter([name])
            y = y + gates[..., number : number + 1] * self.network(x)
        return y


def routed_adapters(model: Any, names: Sequence[str], mixture: Any) -> Any:
    """``model``'s adapters under the routers of a composed mixture, in place."""
    for own, other in zip(model.get_base_model().model.layers, mixture.model.layers, strict=True):
        own.mlp = RoutedAdapters(own.mlp, names, other.mlp.router.weight, mixture.mpoe_config.top_k)
    return model
