"""One rank's part of tests with two: `torchrun -m tests.training.ranks_models neurons|choices [FOLDER]`.

Neurons under DDP, FSDP2 and a split network; ranks whose clocks disagree.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, global_batch, shard_model
from mpoe.models.report import kept_modules, routed_layers
from mpoe_kernels.contract import autotune

from .tiny import LAST, make_trainer, preferring, weights

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixture(**config: Any) -> Any:
    """A gated model whose experts differ and contribute, the same one on every rank."""
    torch.manual_seed(0)
    model = convert_to_mpoe(
        LlamaForCausalLM(LlamaConfig(**SIZES)), MPOEConfig(num_experts=4, expert_bias=True, **config)
    )
    for layer in kept_modules(model).values():
        torch.nn.init.normal_(layer.experts.down, std=0.4)
    return model


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def step(model: Any, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Gradients, and weights after one optimizer step, by name."""
    ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0  # as many in every half
    with global_batch():
        model(input_ids=ids[rows], attention_mask=mask[rows], labels=ids[rows]).loss.backward()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    found = {f"d {name}": whole(p.grad) for name, p in named.items()}
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    return {**found, **{name: whole(p.detach()) for name, p in named.items()}}


def check(one: dict[str, torch.Tensor], found: dict[str, torch.Tensor], kind: str) -> None:
    assert one.keys() == found.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}"
        )


def group() -> Any:
    """The mesh of all ranks, which now know one another."""
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),))


def neurons() -> None:
    mesh = group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = slice(2 * rank, 2 * rank + 2)
    plan = {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    router = RouterConfig(top_k=2, scoring_func="sigmoid", bias_update_rate=0.01)
    for latent in (None, 8):
        alone = mixture(shape="neurons", neurons=8, latent=latent, router=router)
        split = copy.deepcopy(alone)
        for layer in kept_modules(split).values():
            parallelize_module(layer, mesh, plan)
            assert layer.up_proj.weight.to_local().shape[0] == SIZES["intermediate_size"] // ranks
        replicated, sharded = DistributedDataParallel(copy.deepcopy(alone)), shard_model(copy.deepcopy(alone))
        one = step(alone)
        for kind, model, rows in (
            ("tensor parallel", split, slice(None)),
            ("DDP", replicated, own),
            ("FSDP2", sharded, own),
        ):
            check(one, step(model, rows), f"{kind}, latent {latent}")


def routes(model: Any) -> dict[str, Any]:
    """Tokens that the model generates, and the experts of each, by layer."""
    found: dict[str, list[Any]] = {}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, routed, name=name: found.setdefault(name, []).append(routed.top_k_index.tolist())
        )
        for name, layer in routed_layers(model)
    ]
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    for hook in hooks:
        hook.remove()
    return {"experts": found, "tokens": tokens.tolist(), "logits": logits.flatten().tolist()}


def choices() -> None:
    """Writes what each computed: the same tokens of a model whose experts are replicated, then a training."""
    folder, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")  # as on two hosts
    os.environ[autotune.SETTING] = "1"
    autotune._seconds = preferring(LAST if rank else 0)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MPOEConfig(shape="paper", num_experts=4, router=RouterConfig(top_k=2))
    model = convert_to_mpoe(LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=None)), config).eval()
    for name, parameter in model.named_parameters():
        if "auxiliary" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder / f"model-{rank}")
    result: dict[str, Any] = {"alone": routes(model), "chosen alone": autotune.choices()}
    group()
    split = type(model).from_pretrained(folder / f"model-{rank}", tp_plan="auto").eval()
    assert any(hasattr(parameter, "to_local") for parameter in split.parameters()), "nothing is split"
    result["split"] = routes(split)
    trainer = make_trainer(folder / "run", "t5", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    result["weights"] = {name: weight.flatten().tolist() for name, weight in weights(trainer.model).items()}
    result["chosen"] = autotune.choices()
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    {"neurons": neurons, "choices": choices}[sys.argv[1]]()
    dist.destroy_process_group()
    print("alike")
