"""One rank of two whose clocks disagree: `torchrun -m tests.training.ranks_choices FOLDER` writes what each computed.

Both hold the same tokens of a tensor-parallel model, whose experts are replicated; then both train.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.models.report import routed_layers
from mpoe_kernels.contract import autotune

from .ranks_tensor import SIZES
from .tiny import make_trainer, weights
from .unlike_clocks import LAST, preferring

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")  # as on two hosts
os.environ[autotune.SETTING] = "1"
autotune._seconds = preferring(LAST if rank else 0)
torch.set_num_threads(1)


def routes(model: Any, **options: Any) -> dict[str, Any]:
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


torch.manual_seed(0)
config = MPOEConfig(shape="paper", num_experts=4, router=RouterConfig(top_k=2))
model = convert_to_mpoe(LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=None)), config).eval()
for name, parameter in model.named_parameters():
    if "auxiliary" in name or "router" in name:
        torch.nn.init.normal_(parameter, std=0.4)
model.save_pretrained(folder / f"model-{rank}")
result: dict[str, Any] = {"alone": routes(model), "chosen alone": autotune.choices()}
dist.init_process_group("gloo")
split = type(model).from_pretrained(folder / f"model-{rank}", tp_plan="auto").eval()
assert any(hasattr(parameter, "to_local") for parameter in split.parameters()), "nothing is split"
result["split"] = routes(split)
trainer = make_trainer(folder / "run", "t5", max_steps=2, save_strategy="steps", save_steps=2)
trainer.train()
result["weights"] = {name: weight.flatten().tolist() for name, weight in weights(trainer.model).items()}
result["chosen"] = autotune.choices()
(folder / f"rank-{rank}.json").write_text(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
