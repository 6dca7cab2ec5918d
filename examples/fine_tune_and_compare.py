# %% [markdown]
# # Fine-tune and compare
#
# Three models start from the same embedded T5: dense, eight dense experts (as in Switch), and eight
# MPO experts. Each gets the same items in the same order and the same number of steps. The task is
# to say which of twelve families of modules a sentence of Python's documentation is about. Runs
# offline in less than a minute; with so few steps it shows how to make a comparison, not which
# model wins. The notebook of the same name shows the output.

# %%
import random
import sys

import matplotlib.pyplot as plt
import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback

from mpoe import MPOEConfig, MPOETrainer, MPOETrainingArguments, convert_to_mpoe
from mpoe.data import evaluate_task, get_task, load_stand_in
from mpoe.data.encode import encode_text_to_text
from mpoe.data.task import with_subsets

# usage: python examples/fine_tune_and_compare.py [STEPS] [FOLDER]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
folder = sys.argv[2] if len(sys.argv) > 2 else "runs/compare"
dense, tokenizer = load_stand_in("t5")
task = with_subsets(get_task("doc_module"), n_val=200)
items = encode_text_to_text(task.train(), tokenizer, max_source_length=48)
random.Random(0).shuffle(items)

# %% [markdown]
# The arms. The MPO experts have the default shape, with blocks that suit a model this narrow; each
# token goes to two of them. Each arm has its own learning rate, as it should in a fair comparison:
# the rate of the dense experts is lowered, because each of them sees few tokens.

# %%
arms = {
    "dense": (None, {"learning_rate": 1e-3}),
    "8 dense experts": (
        MPOEConfig(expert_type="dense"),
        {"learning_rate": 1e-3, "dense_expert_lr_scale": 0.3},
    ),
    "8 MPO experts": (
        MPOEConfig(block_size=16),
        {"learning_rate": 1e-3, "gradient_mask_prob": 0.3},
    ),
}

# %% [markdown]
# Train each arm and score it on held-out items.

# %%
rows = []
for name, (config, rates) in arms.items():
    torch.manual_seed(0)
    model = load_stand_in("t5")[0] if config is None else convert_to_mpoe(dense, config)
    trainer = MPOETrainer(
        model=model,
        args=MPOETrainingArguments(
            f"{folder}/{name.replace(' ', '_')}",
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **rates,
        ),
        train_dataset=items,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)  # the table below is easier to read than its lines
    trainer.train()
    scores = evaluate_task(model.eval(), tokenizer, task, "validation").scores
    losses = [record["task_loss"] for record in trainer.state.log_history if "task_loss" in record]
    rows.append((name, sum(p.numel() for p in model.parameters()), losses, scores))

# %% [markdown]
# The table. The last column counts parameters, the point of the comparison.

# %%
metric = next(iter(rows[0][3]))
print(f"{'model':16s} {'first loss':>10s} {'last loss':>10s} {metric:>10s} {'parameters':>12s}")
for name, parameters, losses, scores in rows:
    print(
        f"{name:16s} {losses[0]:10.3f} {losses[-1]:10.3f} {100 * scores[metric]:9.1f}% "
        f"{parameters / 1e6:10.2f} M"
    )

# %% [markdown]
# Loss against steps, and score against size.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for (name, parameters, losses, scores), colour in zip(
    rows, ("#999999", "#E69F00", "#0072B2"), strict=True
):
    left.plot(
        [(i + 1) * max(1, steps // 4) for i in range(len(losses))],
        losses,
        "o-",
        color=colour,
        label=name,
    )
    right.plot(parameters / 1e6, 100 * scores[metric], "o", color=colour, markersize=9)
    right.annotate(
        name,
        (parameters / 1e6, 100 * scores[metric]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
    )
left.set(xlabel="step", ylabel="training loss")
left.legend()
right.set(xlabel="parameters, millions", ylabel=f"{metric}, per cent")
right.margins(0.3)
plt.show()

# %% [markdown]
# Did the mixture use all its experts? Every log line contains the load of each layer, and
# `metrics.jsonl` stores it; an entropy of 1 means an even load. `mpoe inspect` plots it.

# %%
last = [record for record in trainer.state.log_history if "expert_entropy" in record][-1]
print(
    f"entropy of the expert load {last['expert_entropy']:.2f}, largest share "
    f"{100 * last['expert_max_share']:.0f}%"
)
