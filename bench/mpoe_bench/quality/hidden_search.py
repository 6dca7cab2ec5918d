"""Trials in search of the best recipe for hidden-side experts: each changes one thing in an arm of `hidden`.

They are judged on the validation split, with seeds that the final runs do not use.
"""

from __future__ import annotations

from typing import Any

from mpoe_bench.quality.arms import Arm
from mpoe_bench.quality.hidden import hidden

ALMOST_NONE = 1e-9


def group(key: str, change: str = "", experts: int = 32, block: int = 8, top_k: int = 2, **options: Any) -> Arm:
    """32 experts, a block of 8 for every group, two per token, converted after a quarter; but for one change."""
    return hidden(f"group_{key}", experts, block, True, top_k, change=change, **options)


def shared(key: str, change: str = "", experts: int = 64, block: int = 16, top_k: int = 2, **options: Any) -> Arm:
    """64 experts, blocks of 16 that all groups share, two per token, converted after a quarter; but for one change."""
    return hidden(f"shared_{key}", experts, block, False, top_k, change=change, **options)


SEARCH = (
    group("base"),
    shared("base"),
    # Block size against number of experts, with equal parameters.
    group("b4", experts=64, block=4),
    group("b16", experts=16, block=16),
    shared("b8", experts=256, block=8),
    shared("b32", experts=16, block=32),
    # Experts per token.
    group("k1", top_k=1),
    group("k4", top_k=4),
    shared("k1", top_k=1),
    shared("k4", top_k=4),
    # Number of experts.
    group("e8", experts=8),
    group("e64", experts=64),
    shared("e16", experts=16),
    shared("e128", experts=128),
    shared("e256", experts=256),
    # When to convert.
    group("start", "from the start", upcycled=0.0),
    group("eighth", "after an eighth", upcycled=0.125),
    group("half", "after a half", upcycled=0.5),
    # What trains, and how fast.
    group("rate3", "blocks' rate x 3", scales=(1.0, 3.0)),
    group("rate03", "blocks' rate x .3", scales=(1.0, 0.3)),
    group("identity", "decay towards the identity", decay_to_start=1.0),
    group("no_decay", "no decay of the blocks", decay_to_start=ALMOST_NONE),
    group("biases", "own biases", own_biases=True),
    group("right", "left blocks frozen", frozen=("left",)),
    group("left", "right blocks frozen", frozen=("right",)),
    group("warm", "blocks' warm-up a third of the steps", auxiliary_warmup=1 / 3),
    # Router.
    group("raw", "gates p", router={"is_scale_prob": True}),
    group("sharp", "router's start x 10", router={"init_scale": 10.0}),
    group("flat", "router starts at 0", router={"init_scale": 0.0}),
    group("balance01", "balancing loss x .1", router={"balance_loss_weight": 1e-3}),
    group("balance0", "no balancing loss", router={"balance_loss_weight": 0.0}),
    group("jitter", "router jitter .1", router={"jitter": 0.1}),
    group("all_gates", "gradients of all gates", all_gates=True),
    # Symmetry.
    group("noise", "noise .1", noise=0.1),
    group("noise03", "noise .3", noise=0.3),
    group("restart", "a quarter of the outputs restarted", restart=0.25),
)
