"""A sharded loop that keeps checkpoints: one rank's part of the test.

`torchrun -m tests.training.ranks_sharded FOLDER [kill]`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mpoe import MPOETrainingArguments, global_batch, load_mpoe, shard_model
from mpoe.training import (
    GradientMask,
    build_param_groups,
    find_last_checkpoint,
    load_sharded_optimizer,
    rank_share,
    save_sharded_checkpoint,
)
from tests.training.tiny import Rows, mpoe_model

STEPS, BATCH, SAVED = 6, 8, 2
# Masks the first two steps: in the checkpoint after them the central cores have no optimizer state yet.
MASK = {"probability": 0.5, "seed": 0}


def loop(folder: Path, kill_after: int | None = None) -> list[float]:
    """Losses of the steps from the last checkpoint in the folder on, or from the first."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    checkpoint = find_last_checkpoint(folder)
    model = shard_model(load_mpoe(checkpoint).train() if checkpoint else mpoe_model("t5"))
    arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    optimizer = torch.optim.AdamW(build_param_groups(model, arguments))
    start = load_sharded_optimizer(model, optimizer, checkpoint) if checkpoint else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step, last_epoch=start - 1)
    mask, rows, losses = GradientMask(model, **MASK), Rows("t5", rows=STEPS * BATCH), []
    for step in range(start, STEPS):
        batch = [rows[step * BATCH + i] for i in range(rank, BATCH, ranks)]
        inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        with mask.step(step), global_batch():
            loss = rank_share(model(**inputs), inputs["labels"], model)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
        if step + 1 == SAVED:
            save_sharded_checkpoint(model, optimizer, folder, step + 1)
        if step + 1 == kill_after and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return losses


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if "kill" in sys.argv:
        loop(folder / "killed", kill_after=SAVED + 1)
    results = {name: loop(folder / name) for name in ("straight", "killed", "from one")}
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
