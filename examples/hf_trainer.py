"""A converted model in the unmodified Hugging Face Trainer, with per-core rates and the gradient
mask as a callback.

usage: python examples/hf_trainer.py [FOLDER] [STEPS]
"""

import sys

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from mpoe import MPOEConfig, MPOETrainingArguments, convert_to_mpoe
from mpoe.data import load_stand_in
from mpoe.data.encode import encode_text_to_text
from mpoe.data.tasks import get_task
from mpoe.training import GradientMask, GradientMaskCallback, build_param_groups

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/hf_trainer"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 50
dense, tokenizer = load_stand_in("t5")
model = convert_to_mpoe(dense, MPOEConfig(num_experts=8))

task = get_task("doc_module")
train, validation = (
    encode_text_to_text(examples, tokenizer, max_source_length=64)
    for examples in (task.train(), task.examples("validation")[:64])
)

# The loss already includes the routers' balancing loss. The Trainer cannot know the cores' rates,
# so it gets a ready-made optimizer. (MPOETrainer does this and more by itself.)
rates = MPOETrainingArguments(output_dir=folder, learning_rate=1e-3)
optimizer = torch.optim.AdamW(build_param_groups(model, rates))

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=max(1, steps // 5),
        report_to="none",  # "tensorboard" plots the curves, if it is installed
    ),
    train_dataset=train,
    eval_dataset=validation,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    optimizers=(optimizer, None),
    callbacks=[GradientMaskCallback(GradientMask(model, probability=0.3, seed=0))],
)
trainer.train()
print(f"validation loss {trainer.evaluate()['eval_loss']:.3f}")
trainer.save_model(folder)  # load_mpoe(folder) reads it
