"""Trials in search of what makes MPO experts earn their keep; each is an arm that changes one thing.

The base of most is `identity`: wide separable blocks that start as identities around the dense weight itself.
"""

from __future__ import annotations

from typing import Any

from mpoe_bench.quality.arms import DENSE_EXPERTS, Arm, mpoe

RAW_GATE = {"is_scale_prob": True}


def trial(key: str, name: str, shape: Any = "wide", gauge: str = "identity", **options: Any) -> Arm:
    """A variation of the base arm."""
    return mpoe(key, f"MPOE 8 {name}", shape, gauge=gauge, **options)


TRIALS = (
    Arm("switch8_raw", "Switch 8, gate p", DENSE_EXPERTS, router=RAW_GATE),
    trial("identity", "wide, identity gauge"),
    trial("orthogonal", "wide, orthogonal gauge", gauge="orthogonal"),
    trial("identity_raw", "wide, identity, gate p", router=RAW_GATE),
    trial("identity_slow", "wide, identity, auxiliary rate x .3", scales=(1.0, 0.03)),
    trial("identity_fast", "wide, identity, auxiliary rate x 3", scales=(1.0, 0.3)),
    trial("identity_decay", "wide, identity, decay towards it", decay_to_start=1.0),
    trial("identity_biases", "wide, identity, own biases", own_biases=True),
    trial("auxiliary_warmup", "wide, identity, auxiliary warm-up .3", auxiliary_warmup=0.3),
    trial("router_warmup", "wide, identity, router warm-up .3", router_warmup=0.3),
    trial("wide_up", "wide up only, identity", "wide_up"),
    trial("wide_down", "wide down only, identity", "wide_down"),
    trial("identity_paper", "paper, identity gauge", "paper"),
    trial("independent", "wide, independent experts", independent=True),
    trial("upcycled", "wide, identity, after half the steps dense", upcycled=0.5),
    Arm("switch8_upcycled", "Switch 8 after half the steps dense", DENSE_EXPERTS, upcycled=0.5),
)
