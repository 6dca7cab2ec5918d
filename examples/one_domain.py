# %% [markdown]
# # One domain more, nothing else changed
#
# An expert of a domain is trained beside a frozen model and composed with *none*, an expert that
# adds nothing and gets what is like the model's own words. Two commands do it. Here the model is
# the tiny GPT-2 that comes with the package and the domain C++ headers, so that it runs offline in
# a minute or two: give your own folders instead.
#
# usage: python examples/one_domain.py [FOLDER [BASE [DATA_DIR]]]
# It writes into FOLDER, default: one_domain

# %%
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe import load_mpoe
from mpoe.cli.main import run
from mpoe.data import stand_in_path
from mpoe.data.documentation import load_documentation
from mpoe.data.domains import domain_text

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "one_domain")
base = Path(sys.argv[2]) if len(sys.argv) > 2 else stand_in_path("gpt2")
data = Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "code"
if not data.exists():
    data.mkdir(parents=True)
    for split, held_out in (("train", False), ("validation", True)):
        text = domain_text("code", held_out)[:300_000]
        (data / f"{split}.txt").write_text(text, encoding="utf-8")


def command(line):
    """Run `mpoe LINE` in this process, as a shell would in another; say how long it took."""
    print(f"$ mpoe {line}")
    start = time.perf_counter()
    run(line.split())
    print(f"[{time.perf_counter() - start:.0f} s]")


# %% [markdown]
# ## The expert
#
# Training ends with a table: the base, the expert always on, and the quiet expert, on the domain's
# held-out text and on what the base says by itself.

# %%
options = (
    "--neurons 64 --max_steps 60 --max_source_length 128 --per_device_train_batch_size 8 "
    "--learning_rate 1e-2"
)
options += " --lr_scheduler_type cosine --disable_tqdm true --overwrite"
command(
    f"train --expert code --model {base} --data_dir {data} --output_dir {folder / 'expert'} "
    f"{options}"
)

# %% [markdown]
# ## The model with the expert
#
# `--preference` is the dial: more is quieter, less keeps more of the domain.

# %%
command(
    f"compose {base} {folder / 'expert' / 'code.expert'} --output_dir {folder / 'model'} "
    "--overwrite"
)

# %% [markdown]
# ## Before and after
#
# The loss on the domain, and on documentation of Python, which nobody trained on.

# %%
tokenizer = AutoTokenizer.from_pretrained(base)
before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
after = load_mpoe(folder / "model").eval()
documentation = "\n\n".join(record.text for record in load_documentation("test")[::40])
texts = {
    "domain": (data / "validation.txt").read_text(encoding="utf-8"),
    "documentation": documentation,
}
for name, text in texts.items():
    ids = tokenizer(text[:20_000], return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    with torch.inference_mode():
        losses = [float(model(input_ids=rows, labels=rows).loss) for model in (before, after)]
    print(f"{name}: {losses[0]:.3f} -> {losses[1]:.3f} nats per token")
