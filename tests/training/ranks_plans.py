"""One rank of two that trains: `torchrun -m tests.training.ranks_plans FOLDER` writes what each planned with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

import mpoe_kernels.contract.autotune as choice
from mpoe_kernels.contract import machine

from .tiny import make_trainer

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
os.environ[machine.SETTING] = "1"
os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")  # as on two hosts
mine = machine.Pair(1e10 * (rank + 1), 2e10)
choice._measurer = lambda: lambda: machine.Constants(mine, *(machine.Pair(1.0, 1.0),) * 3)


class Seen(TrainerCallback):
    def on_step_end(self, *_: object, **__: object) -> None:
        (folder / f"rank-{rank}.json").write_text(json.dumps(machine.record()["constants"]))


trainer = make_trainer(folder / "run", "t5", max_steps=1)
trainer.add_callback(Seen())
trainer.train()
dist.destroy_process_group()
