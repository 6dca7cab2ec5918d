# %% [markdown]
# # Choose a shape
#
# A shape decides three things: how much an expert costs in parameters, how much it costs in time,
# and whether a pretrained weight survives. This script shows all three for one weight of the
# embedded GPT-2, and the first two, which need no weights, for the sizes of T5-base. Runs offline
# in seconds.

# %%
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.data import load_stand_in
from mpoe_kernels import MPOShape, decompose_with_errors, plan_contraction

torch.manual_seed(0)
experts, tokens = 8, 2048


def row(name: str, shape: MPOShape, error: float | None = None) -> None:
    """Parameters, work and strategy of one shape."""
    weight = shape.in_features * shape.out_features
    plan = plan_contraction(shape, experts, tokens, training=True)
    flops = sum(phase.flops for phase in plan.phases) / plan.dense_flops
    lost = "" if error is None else f"{100 * error:5.1f}% lost"
    print(
        f"{name:22s} an expert owns {100 * shape.auxiliary_parameters / weight:5.2f}% of a weight, "
        f"{flops:5.2f}x the dense FLOPs ({plan.strategy:11s}) {lost}"
    )


# %% [markdown]
# ## The weight of a real model
#
# Truncation drops the smallest singular values at each bond. A trained weight has few small ones:
# watch the loss.

# %%
model, tokenizer = load_stand_in("gpt2")
weight = model.transformer.h[0].mlp.c_fc.weight.detach()  # GPT-2 keeps [in, out]
rows, columns = weight.shape
for cap in (None, 64, 32, 8):
    for name, build in (
        ("separable", MPOShape.separable),
        ("light", MPOShape.light),
        ("paper", MPOShape.paper),
    ):
        shape = build(rows, columns, max_bond=cap)
        error = decompose_with_errors(weight, shape).relative_error_bound
        row(f"{name}, bond {cap or 'full'}", shape, error)

# %% [markdown]
# What truncation does to the model: the loss on a sentence as fewer and fewer directions are kept.
# Nothing is trained in between; training recovers some of the loss, and a model trained from
# scratch is not affected.

# %%
batch = tokenizer(
    ["Return a list of the names in the directory given by path."], return_tensors="pt"
)
ids = batch.input_ids
with torch.inference_mode():
    print(f"dense          loss {model(ids, labels=ids).loss:.3f}")
    for cap in (None, 64, 32, 8):
        converted = convert_to_mpoe(
            model, MPOEConfig(num_experts=experts, shape="paper", max_bond=cap)
        )
        print(f"bond {cap or 'full'!s:9s} loss {converted(ids, labels=ids).task_loss:.3f}")

# %% [markdown]
# ## The sizes of T5-base
#
# At full bonds all named shapes are lossless, so the choice depends only on cost. Separable shapes
# never rebuild a weight: they cost about the same for any number of experts. Light experts own the
# fewest parameters. The paper's shape costs most.

# %%
for name, shape in (
    ("separable", MPOShape.separable(768, 3072)),
    ("separable 128 / 32", MPOShape.separable(768, 3072, left=128, right=32)),
    ("light", MPOShape.light(768, 3072)),
    ("paper", MPOShape.paper(768, 3072)),
    ("paper, bond 64", MPOShape.paper(768, 3072, max_bond=64)),
):
    row(name, shape)

# %% [markdown]
# The planner ranks the contraction orders by their FLOPs.

# %%
print(plan_contraction(MPOShape.paper(768, 3072, max_bond=64), experts, tokens))

# %% [markdown]
# Shapes can differ by layer. `shape_pattern` takes regular expressions, as `rank_pattern` does in
# PEFT.

# %%
config = MPOEConfig(num_experts=4, shape_pattern={r"h\.0\.mlp": "light", r"h\.[23]\.mlp": 16})
convert_to_mpoe(model, config).mpoe_summary()
