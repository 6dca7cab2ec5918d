# %% [markdown]
# # Convert a model and look inside
#
# The embedded T5 becomes a mixture of eight experts in the shape `separable`, which turns every
# weight into a chain of cores that we can look at. (The default shape, `hidden`, keeps the weights
# unchanged and puts blocks between them.) We check that the outputs did not change, see what every
# weight is made of, follow a sentence through the routers, and compare sizes. Runs offline in
# seconds. The notebook of the same name shows the output; the script runs as a whole, or cell by
# cell in an editor that supports such cells.

# %%
import sys

import matplotlib.pyplot as plt
import torch

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.data import load_stand_in
from mpoe.inspection import bond_spectra, route_text
from mpoe.models import mpo_modules

torch.manual_seed(0)
dense, tokenizer = load_stand_in("t5")
model = convert_to_mpoe(dense, MPOEConfig(num_experts=8, shape="separable"))

# %% [markdown]
# At full bonds, the default, the conversion is exact: the logits differ only by rounding. The
# routers are random, but all experts are still equal, so it does not matter where a token goes.

# %%
batch = tokenizer(
    ["kind: return the number of items in the list."],
    return_tensors="pt",
    return_token_type_ids=False,
)
start = torch.zeros(1, 1, dtype=torch.long)
with torch.inference_mode():
    before = dense(**batch, decoder_input_ids=start).logits
    after = model(**batch, decoder_input_ids=start).logits
print(f"largest difference of a logit: {float((after - before).abs().max()):.1e}")
assert torch.allclose(before, after, atol=1e-3)

# %% [markdown]
# One row per weight: its factors, its bonds, what the experts share (central) and what each one
# owns (auxiliary), the conversion error, and how a pass over 2,048 tokens would be computed.

# %%
model.mpoe_summary()

# %% [markdown]
# Which expert takes which token? There is one route per stream: the encoder reads the sentence, the
# decoder writes an answer.

# %%
for route in route_text(
    model, tokenizer, "kind: return the number of items in the list.", max_new_tokens=6
):
    print(f"\n{route.stream}: {'|'.join(route.tokens)}")
    for layer, experts in zip(route.layers, route.experts, strict=True):
        print(f"  {layer}: {' '.join(str(best[0]) for best in experts)}")

# %% [markdown]
# The encoder's route as a picture: one row per layer, one colour per expert.

# %%
route = route_text(
    model, tokenizer, "kind: return the number of items in the list.", max_new_tokens=6
)[0]
figure, axes = plt.subplots(figsize=(7, 1.6), layout="constrained")
axes.imshow(
    [[best[0] for best in layer] for layer in route.experts],
    cmap="tab10",
    vmin=0,
    vmax=9,
    aspect="auto",
)
for row, layer in enumerate(route.experts):
    for column, best in enumerate(layer):
        axes.text(column, row, best[0], ha="center", va="center", color="white")
axes.set_xticks(range(len(route.tokens)), route.tokens, rotation=45, ha="right")
axes.set_yticks(range(len(route.layers)), [name.split(".layer")[0] for name in route.layers])
plt.show()

# %% [markdown]
# How full is each bond? The effective rank counts the directions that matter. If it is close to the
# bond's dimension, there is nothing to truncate; pretrained weights usually look like that.

# %%
for name, cores in mpo_modules(model):
    ranks = [
        f"{float(bond.effective_rank.mean()):.1f} of {bond.dimension}"
        for bond in bond_spectra(cores)
    ]
    print(f"{name}: {', '.join(ranks)}")

# %% [markdown]
# Dense experts multiply the number of parameters; MPO experts hardly add any.

# %%
numbers, ours, switch = (1, 4, 16, 64), [], []
for experts in numbers:
    counted = convert_to_mpoe(
        dense, MPOEConfig(num_experts=experts, shape="separable")
    ).parameter_report()
    ours.append(counted["total"] / 1e6)
    switch.append(counted["switch_total"] / 1e6)
    print(f"{experts:3d} experts: MPO {ours[-1]:6.2f} M, dense {switch[-1]:6.2f} M")
assert ours[-1] < switch[-1] / 10

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(numbers, switch, "o-", color="#999999", label="dense experts (Switch)")
axes.plot(numbers, ours, "o-", color="#0072B2", label="MPO experts")
axes.set(xlabel="experts per layer", ylabel="parameters, millions", ylim=(0, None))
axes.set_xscale("log", base=2)
axes.set_xticks(numbers, numbers)
axes.legend()
plt.show()

# %% [markdown]
# Save, load, and turn the experts into full matrices for software that needs them.

# %%
folder = sys.argv[1] if len(sys.argv) > 1 else "mpoe-t5"
model.save_pretrained(folder)
with torch.inference_mode():
    again = load_mpoe(folder)(**batch, decoder_input_ids=start).logits
    merged = merge_experts(model)(**batch, decoder_input_ids=start).logits
assert torch.allclose(again, after, atol=1e-3)
assert torch.allclose(merged, after, atol=1e-3)
print(f"saved to {folder}; `mpoe inspect {folder}` draws all this")
