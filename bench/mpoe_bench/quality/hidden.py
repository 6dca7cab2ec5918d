"""The study of experts that own only blocks on the hidden side: its arms, and which differences are tested.

Every mixture but those of a pretrained model is converted after a quarter of the steps, at the same rate, with a
restarted optimiser; `dense_restart` restarts it too. The hidden arms are compared with Switch of as many weights, of
the usual 8 experts, and with two experts per token; and with dense models of as many weights and of as many FLOPs.
FLOPs are those of this width: a hidden arm costs 1 + k b / I of the dense layer's.
"""

from __future__ import annotations

from typing import Any

from mpoe_bench.quality.arms import Arm

QUARTER: dict[str, Any] = {"upcycled": 0.25, "rate_of": "dense"}
TWO = {"top_k": 2, "is_scale_prob": False}


def switch(experts: int, two: bool = False) -> Arm:
    """Switch, converted from the dense model after a quarter of the steps."""
    return Arm(
        f"switch{experts}_quarter{'_two' if two else ''}",
        f"Switch {experts}, after a quarter{', two experts per token' if two else ''}",
        {"num_experts": experts, "expert_type": "dense"},
        router=TWO if two else {},
        **QUARTER,
    )


def hidden(
    key: str,
    experts: int,
    block: int,
    per_group: bool,
    top_k: int = 2,
    *,
    change: str = "",
    own_biases: bool = False,
    router: dict[str, Any] | None = None,
    **options: Any,
) -> Arm:
    """Experts of hidden-side blocks, converted after a quarter of the steps; their cores train at the common rate.

    ``change`` ends the name; ``router`` and the other options are fields of `Arm`; ``own_biases`` are the layer's.
    """
    sizes = {"num_experts": experts, "shape": "hidden", "block_size": block, "block_per_group": per_group}
    name = f"hidden {experts}, blocks of {block} {'per group' if per_group else 'shared'}, {top_k} per token"
    return Arm(
        key,
        f"{name}, {change}" if change else name,
        {**sizes, "expert_bias": True} if own_biases else sizes,
        router={"top_k": top_k, **(router or {})},
        **{"scales": (1.0, 1.0), **QUARTER, **options},
    )


def wide(key: str, name: str, width: float) -> Arm:
    return Arm(key, f"dense, {name} ({width:.2f}x)", width=width, rate_of="dense")


GROUP, SHARED = "hidden_group", "hidden_shared"
HIDDEN = (
    Arm("dense", "dense"),
    switch(8),
    hidden(GROUP, 32, 8, True),
    hidden(SHARED, 64, 16, False),
    switch(6),
    switch(3),
    switch(8, two=True),
    Arm("dense_restart", "dense, optimiser restarted after a quarter", **QUARTER),
    wide("flops_group", "as many FLOPs as per group", 4 / 3),
    wide("flops_shared", "as many FLOPs as shared", 5 / 3),
    wide("large_shared", "as large as shared", 25 / 9),
    wide("large_group", "as large as per group", 19 / 3),
)
# (arm, the arm that it should beat); gains over dense are always tested.
COMPARISONS = (
    (GROUP, "switch8_quarter"),
    (GROUP, "switch6_quarter"),
    (GROUP, "switch8_quarter_two"),
    (GROUP, "dense_restart"),
    (GROUP, "flops_group"),
    (GROUP, "large_group"),
    (SHARED, "switch8_quarter"),
    (SHARED, "switch3_quarter"),
    (SHARED, "dense_restart"),
    (SHARED, "flops_shared"),
    (SHARED, "large_shared"),
)

# What the search (hidden_search) found: only more experts help; compared with as many weights in other forms.
BEST = (
    hidden("best_group", 64, 8, True),
    hidden("best_shared", 128, 16, False),
    switch(12),
    switch(5),
    wide("large_best_group", "as large as 64 experts per group", 35 / 3),
    wide("large_best_shared", "as large as 128 shared experts", 41 / 9),
)
BEST_PLAN = ("dense", GROUP, SHARED, *(arm.key for arm in BEST))
BEST_COMPARISONS = (
    ("best_group", GROUP),
    ("best_group", "switch12_quarter"),
    ("best_group", "large_best_group"),
    ("best_shared", SHARED),
    ("best_shared", "switch5_quarter"),
    ("best_shared", "large_best_shared"),
)

# Twice the width and four times the steps, for the arms that decide; blocks grow with the model.
LARGER = (
    hidden("larger_group", 32, 16, True),
    hidden("larger_shared", 64, 32, False),
)
LARGER_PLAN = ("dense", "switch8_quarter", "larger_group", "larger_shared", "large_shared")
LARGER_COMPARISONS = (
    ("larger_group", "switch8_quarter"),
    ("larger_shared", "switch8_quarter"),
    ("larger_shared", "large_shared"),
)

# Experts of a pretrained model, converted before training: adapters, whose shared weights stay frozen and which train
# about as many numbers as a LoRA of rank 16, and, for the gradient mask, models in which everything trains.
ADAPTER_OPTIONS: dict[str, Any] = {"upcycled": 0.0, "rate_of": None, "scales": None}
HIDDEN_ADAPTERS = (
    hidden("adapter_hidden", 32, 32, False, change="shared weights frozen", adapter=True, **ADAPTER_OPTIONS),
    hidden("full_hidden", 8, 32, False, **ADAPTER_OPTIONS),
    hidden("full_hidden_mask", 8, 32, False, change="p_b .5", mask=0.5, **ADAPTER_OPTIONS),
)
ADAPTER_COMPARISONS = (("adapter_hidden", "lora16"), ("adapter_hidden", "lora48"), ("adapter_hidden", "mixlora8"))
MASK_COMPARISONS = (("full_hidden", "dense"), ("full_hidden_mask", "dense"), ("full_hidden_mask", "full_hidden"))
SPANS_COMPARISONS = ((GROUP, "switch8_quarter"), (SHARED, "switch8_quarter"))
