"""The README's example on the embedded stand-in: convert, train one step, save, load, generate.
Runs offline.

usage: python examples/drop_in.py [FOLDER]
"""

import sys

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.data import stand_in_path

path = stand_in_path("t5")  # any T5 folder or hub name works
tokenizer = AutoTokenizer.from_pretrained(path)
model = convert_to_mpoe(AutoModelForSeq2SeqLM.from_pretrained(path), MPOEConfig(num_experts=8))
model.print_trainable_parameters()

batch = tokenizer(["name of: Return the number of items in the queue."], return_tensors="pt")
labels = tokenizer(["get length"], return_tensors="pt").input_ids
loss = model.train()(
    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
).loss
loss.backward()  # includes the routers' balancing loss
torch.optim.AdamW(model.parameters(), lr=1e-4).step()

folder = sys.argv[1] if len(sys.argv) > 1 else "mpoe-t5"
model.save_pretrained(folder)
model = load_mpoe(folder)
answer = model.generate(
    input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8
)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
