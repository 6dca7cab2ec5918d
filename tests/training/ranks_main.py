"""One rank of two: `torchrun -m tests.training.ranks_main FOLDER NAME ...` does these runs of `ranks.py`.

Writes what came out into FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.ranks import by_trainer, diverged, run

folder, names = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
results = {name: run(name, folder / "two", 2) for name in names}
if (folder / "resume").is_dir():  # with a checkpoint of one process
    results["resumed"] = by_trainer(folder / "resume", 2, "t5", {}, resume=True)
    results["own router losses"] = by_trainer(folder / "own", 2, "t5", {}, global_router_losses=False)
    results["diverged"] = diverged(folder / "diverged")
torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
