"""A plain PyTorch loop that does what the Trainer does for a mixture: per-core rates and the
gradient mask.

usage: python examples/plain_loop.py [STEPS]
"""

import random
import sys

import torch
from transformers import DataCollatorForSeq2Seq

from mpoe import MPOEConfig, MPOETrainingArguments, convert_to_mpoe
from mpoe.data import load_stand_in
from mpoe.data.encode import encode_text_to_text
from mpoe.data.tasks import get_task
from mpoe.training import GradientMask, build_param_groups

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
torch.manual_seed(0)
dense, tokenizer = load_stand_in("t5")
model = convert_to_mpoe(dense, MPOEConfig(num_experts=8)).train()

items = encode_text_to_text(get_task("doc_module").train(), tokenizer, max_source_length=64)
collate = DataCollatorForSeq2Seq(tokenizer)
order = random.Random(0)

# Every core gets its own rate, base x RMS(core) / RMS(weight) x a scale: with one raw rate for all,
# training collapses.
arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1e-3, use_cpu=True)
optimizer = torch.optim.AdamW(build_param_groups(model, arguments))

# In half of the steps only the auxiliary cores learn; the central cores' gradients are then not
# even computed.
mask = GradientMask(model, probability=0.5, seed=0)
for step in range(steps):
    with mask.step(step) as masked:
        out = model(**collate(order.sample(items, 16)))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if step % 10 == 0 or step == steps - 1:
        load = out.expert_load.sum(0).tolist()  # [layers, E] -> tokens per expert
        print(
            f"step {step}: loss {out.task_loss:.3f} + {out.aux_loss:.3f}, masked {masked}, tokens "
            f"per expert {load}"
        )
