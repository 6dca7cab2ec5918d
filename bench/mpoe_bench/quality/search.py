"""Trials in search of what makes MPO experts earn their keep; each is an arm that changes one thing.

They vary the arm `wide8` of the field "language": wide separable blocks that start as identities around the dense
weight itself, with the gate p / sg(p).
"""

from __future__ import annotations

from typing import Any

from mpoe_bench.quality.arms import DENSE_EXPERTS, LOSSLESS, Arm, mpoe

SHARED: dict[str, Any] = {"shared_weight": True, "router": LOSSLESS}
RAW = {"is_scale_prob": True}


def trial(key: str, name: str, shape: Any = "wide", **options: Any) -> Arm:
    """A variation of the base arm."""
    return mpoe(key, f"MPOE 8 {name}", shape, **options)


TRIALS = (
    Arm("switch8_lossless", "Switch 8, gate p / sg(p)", DENSE_EXPERTS, router=LOSSLESS),
    trial("raw", "wide, gate p", router=RAW),
    trial("symmetric", "wide, symmetric gauge", gauge="symmetric"),
    trial("orthogonal", "wide, orthogonal gauge", gauge="orthogonal"),
    trial("slow", "wide, auxiliary rate x .3", scales=(1.0, 0.03)),
    trial("fast", "wide, auxiliary rate x 3", scales=(1.0, 0.3)),
    trial("faster", "wide, auxiliary rate x 10", scales=(1.0, 1.0)),
    trial("decay", "wide, decay towards the identity", decay_to_start=1.0),
    trial("biases", "wide, own biases", own_biases=True),
    trial("balance", "wide, balancing loss x .1", router={"balance_loss_weight": 1e-3}),
    trial("auxiliary_warmup", "wide, auxiliary warm-up .3", auxiliary_warmup=0.3),
    trial("router_warmup", "wide, router warm-up .3", router_warmup=0.3),
    trial("wide_up", "wide up only", "wide_up"),
    trial("wide_down", "wide down only", "wide_down"),
    trial("independent", "wide, independent experts", independent=True),
    # Trained densely for the first half of the steps. The optimiser then starts anew, which is a change of its own.
    Arm("dense_anew", "dense, optimiser anew at half the steps", upcycled=0.5),
    Arm("biases8_upcycled", "control: own biases, after half dense", DENSE_EXPERTS, **SHARED, upcycled=0.5),
    trial("upcycled", "wide, after half dense", upcycled=0.5),
    trial("upcycled_fast", "wide, after half dense, auxiliary rate x 3", upcycled=0.5, scales=(1.0, 0.3)),
    trial("upcycled_faster", "wide, after half dense, auxiliary rate x 10", upcycled=0.5, scales=(1.0, 1.0)),
    trial("upcycled_paper", "paper, after half dense, auxiliary rate x 10", "paper", upcycled=0.5, scales=(1.0, 1.0)),
    Arm("switch8_upcycled", "Switch 8 after half dense", DENSE_EXPERTS, upcycled=0.5),
)
