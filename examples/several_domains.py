# %% [markdown]
# # From three text files to one served mixture
#
# Three parties have texts of their own domain and one base model. Each trains an expert, a small
# file; the files become one mixture, without any of the texts; the mixture is served as a stock
# class of Transformers, which vLLM and llama.cpp know too. That is a base folder, three text files
# and five commands. Here the base is a tiny Llama with random weights, so that it runs offline in
# about a minute: give your own model's folder instead. The notebook of the same name shows the
# output; the script runs as a whole, or cell by cell in an editor that supports such cells.

# %%
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpoe import load_mpoe
from mpoe.cli.main import run
from mpoe.data import load_stand_in
from mpoe.data.domains import DOMAINS, domain_text

# usage: python examples/several_domains.py [FOLDER [BASE]]
folder = Path(sys.argv[1] if len(sys.argv) > 1 else "several_domains")
base = Path(sys.argv[2] if len(sys.argv) > 2 else folder / "base")
for name in DOMAINS:
    (folder / name).mkdir(parents=True, exist_ok=True)
    text = domain_text(name, held_out=True)[:40_000]
    (folder / name / "train.txt").write_text(text[:-8_000], encoding="utf-8")
    (folder / name / "validation.txt").write_text(text[-8_000:], encoding="utf-8")
if not base.exists():
    torch.manual_seed(0)
    _, tokenizer = load_stand_in("gpt2")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)


def command(line):
    """Run `mpoe LINE` in this process, as a shell would in another; say how long it took."""
    print(f"$ mpoe {line}")
    start = time.perf_counter()
    run(line.split())
    print(f"[{time.perf_counter() - start:.0f} s]")


# %% [markdown]
# ## Three experts, trained apart
#
# Only the expert's neurons train; the base stays as it is, bit for bit. Each run writes its expert
# as a file, with the statistics that a router will need. A real run takes some hundred steps or
# more.

# %%
options = (
    f"--model {base} --neurons 16 --max_steps 20 --max_source_length 64 "
    "--per_device_train_batch_size 8"
)
options += " --learning_rate 1e-2 --disable_tqdm true --overwrite"
for name in DOMAINS:
    command(
        f"train --expert {name} --data_dir {folder / name} --output_dir {folder / 'runs' / name} "
        f"{options}"
    )
files = [folder / "runs" / name / f"{name}.expert" for name in DOMAINS]
for file in files:
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# ## One mixture of the files
#
# The routers are solved in closed form from the files' statistics: no texts, no training. The
# fourth expert, *none*, adds nothing; text of no domain goes there.

# %%
mixture = folder / "mixture"
command(f"compose {base} {' '.join(map(str, files))} --output_dir {mixture} --overwrite")

# %% [markdown]
# Which expert takes which text? `mpoe inspect` shows it by token and layer, and what removing an
# expert would cost; here are the shares of the routers' choices on each validation text.

# %%
tokenizer, composed = AutoTokenizer.from_pretrained(mixture), load_mpoe(mixture).eval()
shares = []
for name in DOMAINS:
    text = (folder / name / "validation.txt").read_text(encoding="utf-8")[:600]
    with torch.inference_mode():
        load = composed(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        ).expert_load.sum(0)
    shares.append((load / load.sum()).tolist())
figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
axes.set_xticks(range(4), composed.config.mpoe_experts)
axes.set_yticks(range(3), [f"text: {name}" for name in DOMAINS])
for row, values in enumerate(shares):
    for column, share in enumerate(values):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center")
plt.show()

# %% [markdown]
# ## A stock class, to be served anywhere
#
# Neurons beside a Llama's network are, tensor for tensor, a GraniteMoeShared. The command opens
# what it wrote with the stock class and compares the logits.

# %%
served = folder / "served"
command(f"export {mixture} {served} --to granitemoeshared --overwrite")

# %% [markdown]
# This is what a server does. Nothing of this package is needed any more.

# %%
model, tokenizer = (
    AutoModelForCausalLM.from_pretrained(served),
    AutoTokenizer.from_pretrained(served),
)
prompt = tokenizer("The Licensee shall", return_tensors="pt")
answer = model.generate(input_ids=prompt["input_ids"], max_new_tokens=12, do_sample=False)
print(type(model).__name__, repr(tokenizer.decode(answer[0])))
megabytes = {
    place.name: sum(f.stat().st_size for f in place.glob("model*")) / 1e6
    for place in (base, mixture, served)
}
print(", ".join(f"{name} {size:.2f} MB" for name, size in megabytes.items()))
