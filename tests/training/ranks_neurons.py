"""Neurons over two ranks: DDP, FSDP2, tensor parallelism of the dense network; one rank's part of the test.

`torchrun -m tests.training.ranks_neurons`
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, global_batch, shard_model
from mpoe.models.kept import neuron_modules

from .ranks_tensor import SIZES, whole


def mixture(latent: int | None) -> Any:
    """A gated model whose experts contribute, the same one on every rank."""
    torch.manual_seed(0)
    router = RouterConfig(top_k=2, scoring_func="sigmoid", bias_update_rate=0.01)
    config = MPOEConfig(shape="neurons", neurons=8, latent=latent, num_experts=4, expert_bias=True, router=router)
    model = convert_to_mpoe(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    for layer in neuron_modules(model).values():
        torch.nn.init.normal_(layer.experts.down, std=0.4)
    return model


def step(model: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Gradients, and weights after one optimizer step, by name."""
    ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(1))[rows]
    with global_batch():
        model(input_ids=ids, labels=ids).loss.backward()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    found = {f"d {name}": whole(p.grad).clone() for name, p in named.items()}
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    return {**found, **{name: whole(p.detach()) for name, p in named.items()}}


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    every, own = slice(None), slice(2 * rank, 2 * rank + 2)
    plan = {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for latent in (None, 8):
        alone = mixture(latent)
        split = copy.deepcopy(alone)
        for layer in neuron_modules(split).values():
            parallelize_module(layer, mesh, plan)
            assert layer.up_proj.weight.to_local().shape[0] == SIZES["intermediate_size"] // ranks
        replicated = DistributedDataParallel(copy.deepcopy(alone))
        sharded = shard_model(copy.deepcopy(alone))
        one = step(alone, every)
        for name, found in {
            "tensor parallel": step(split, every),
            "DDP": step(replicated, own),
            "FSDP2": step(sharded, own),
        }.items():
            assert one.keys() == found.keys()
            for key, value in one.items():
                torch.testing.assert_close(
                    found[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=f"{name} {latent} {key}": f"{n}: {m}"
                )
    dist.destroy_process_group()
    print("alike")


if __name__ == "__main__":
    main()
