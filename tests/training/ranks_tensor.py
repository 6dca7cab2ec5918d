"""Hidden-side experts split over two ranks (tensor parallelism): one rank's part of the test.

`torchrun -m tests.training.ranks_tensor`
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.models.kept import hidden_modules
from mpoe.training import split_hidden_experts

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixture(per_group: bool) -> Any:
    """A gated model whose experts differ, the same one on every rank."""
    torch.manual_seed(0)
    config = MPOEConfig(
        shape="hidden",
        block_size=8,
        num_experts=4,
        block_per_group=per_group,
        expert_bias=True,
        router=RouterConfig(top_k=2),
    )
    model = convert_to_mpoe(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    for layer in hidden_modules(model).values():
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model: Any) -> dict[str, torch.Tensor]:
    """Loss, gradients and weights after one optimizer step, by name."""
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    found = {f"d {name}": whole(p.grad) for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    return {"loss": loss.detach(), **found, **{name: whole(p.detach()) for name, p in model.named_parameters()}}


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for per_group in (True, False):
        alone = mixture(per_group)
        split = split_hidden_experts(copy.deepcopy(alone), mesh)
        layer = next(iter(hidden_modules(split).values()))
        local = layer.experts.auxiliary["right"].to_local()
        assert local.shape[1] == (2 if per_group else 1)
        one, two = step(alone), step(split)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    dist.destroy_process_group()
    print("alike")


if __name__ == "__main__":
    main()
