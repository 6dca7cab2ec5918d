"""A plain loop over several devices, sharded (FSDP2): every device holds part of the parameters and
optimizer state.

usage: torchrun --nproc_per_node 2 examples/sharded_loop.py OUTPUT_DIR [STEPS]

After an interruption, the same command continues from the last checkpoint, on the same or another
number of devices.
"""

import random
import sys

import torch
import torch.distributed as dist
from transformers import DataCollatorForSeq2Seq

from mpoe import (
    MPOEConfig,
    MPOETrainingArguments,
    convert_to_mpoe,
    global_batch,
    load_mpoe,
    load_sharded_optimizer,
    save_sharded,
    save_sharded_checkpoint,
    shard_model,
)
from mpoe.data import load_stand_in
from mpoe.data.encode import encode_text_to_text
from mpoe.data.tasks import get_task
from mpoe.training import GradientMask, build_param_groups, find_last_checkpoint, rank_share

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50
dist.init_process_group()  # gloo on CPUs, NCCL on NVIDIA GPUs
rank, ranks = dist.get_rank(), dist.get_world_size()

dense, tokenizer = load_stand_in("t5")
torch.manual_seed(0)  # routers start random
checkpoint = find_last_checkpoint(folder)
model = load_mpoe(checkpoint) if checkpoint else convert_to_mpoe(dense, MPOEConfig(num_experts=8))
model.train()
if torch.accelerator.is_available():
    torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    model.to(torch.accelerator.current_accelerator())
shard_model(model)  # all ranks continue with the first rank's weights

# After sharding, because groups and mask refer to the sharded parameters.
arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1e-3, use_cpu=True)
optimizer = torch.optim.AdamW(build_param_groups(model, arguments))
start = load_sharded_optimizer(model, optimizer, checkpoint) if checkpoint else 0
mask = GradientMask(model, probability=0.5, seed=0)  # the same steps on every rank

items = encode_text_to_text(get_task("doc_module").train(), tokenizer, max_source_length=64)
collate = DataCollatorForSeq2Seq(tokenizer)
for step in range(start, steps):
    # All randomness depends only on the step, so a resumed run draws the same. Every rank takes its
    # part of one batch.
    torch.manual_seed(step * ranks + rank)  # dropout
    batch = collate(random.Random(step).sample(items, 16)[rank::ranks])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with mask.step(step), global_batch():
        loss = rank_share(model(**batch), batch["labels"], model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    if rank == 0 and (step % 10 == 0 or step == steps - 1):
        print(f"step {step}: loss {total / ranks:.4f}")
    if (step + 1) % 20 == 0:
        save_sharded_checkpoint(model, optimizer, folder, step + 1, limit=2)

save_sharded(model, folder)  # load_mpoe(folder) reads it
dist.destroy_process_group()
