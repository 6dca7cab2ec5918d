"""Trials in search of what makes MPO experts worthwhile; each is an arm that changes one thing.

They vary the arm `wide8` of the field "language": wide separable blocks that start as identities around the dense
weight itself, with the gate p / sg(p).
"""

from __future__ import annotations

from typing import Any

from mpoe_bench.quality.arms import DENSE_EXPERTS, LOSSLESS, Arm, mpoe

SHARED: dict[str, Any] = {"shared_weight": True, "router": LOSSLESS}
RAW = {"is_scale_prob": True}
TWO = {"top_k": 2, "is_scale_prob": False}
AS_RAW: dict[str, Any] = {"rate_of": "upcycled_paper_raw"}


def trial(key: str, name: str, shape: Any = "wide", **options: Any) -> Arm:
    """A variation of the base arm."""
    return mpoe(key, f"MPOE 8 {name}", shape, **options)


def paper_after(how_long: str, part: float, rate: int, key: str, **options: Any) -> Arm:
    """The paper's shape, after a ``part`` of the steps as a dense model; auxiliary rate ``rate`` x the base arm's."""
    router = options.get("router", {})
    name = f"paper, after {how_long} dense, auxiliary rate x {rate}"
    gate = ", gate p" if router.get("is_scale_prob") else ""
    name += gate + " x E" * bool(options.get("even_gate")) + ", two experts per token" * ("top_k" in router)
    name += ", balancing loss x .1" * ("balance_loss_weight" in router)
    return trial(key, name, "paper", upcycled=part, scales=(1.0, rate / 10), **options)


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
    # Trained densely for the first half of the steps. The optimiser then restarts, which is itself a change.
    Arm("dense_anew", "dense, optimiser restarted at half the steps", upcycled=0.5, rate_of="dense"),
    Arm("biases8_upcycled", "control: own biases, after half dense", DENSE_EXPERTS, **SHARED, upcycled=0.5),
    trial("upcycled", "wide, after half dense", upcycled=0.5),
    trial("upcycled_fast", "wide, after half dense, auxiliary rate x 3", upcycled=0.5, scales=(1.0, 0.3)),
    trial("upcycled_faster", "wide, after half dense, auxiliary rate x 10", upcycled=0.5, scales=(1.0, 1.0)),
    paper_after("half", 0.5, rate=10, key="upcycled_paper"),
    trial("upcycled_fastest", "wide, after half dense, auxiliary rate x 30", upcycled=0.5, scales=(1.0, 3.0)),
    paper_after("half", 0.5, rate=30, key="upcycled_paper_fastest"),
    paper_after("half", 0.5, rate=10, key="upcycled_paper_raw", router=RAW),
    paper_after("half", 0.5, rate=10, key="upcycled_paper_balance", router=RAW | {"balance_loss_weight": 1e-3}),
    paper_after("a quarter", 0.25, rate=10, key="upcycled_paper_quarter"),
    paper_after("half", 0.5, rate=10, key="upcycled_paper_two", router=TWO, **AS_RAW),
    paper_after("half", 0.5, rate=10, key="upcycled_paper_even", router=RAW, even_gate=True, **AS_RAW),
    trial(
        "upcycled_separable_two",
        "separable, after half dense, auxiliary rate x 10, two experts per token",
        "separable",
        upcycled=0.5,
        scales=(1.0, 1.0),
        router=TWO,
        **AS_RAW,
    ),
    Arm(
        "biases8_upcycled_two",
        "control: own biases, after half dense, two experts per token",
        DENSE_EXPERTS,
        upcycled=0.5,
        shared_weight=True,
        router=TWO,
        **AS_RAW,
    ),
    trial("paper_two", "paper, two experts per token", "paper", router=TWO),
    Arm("switch8_two", "Switch 8, two experts per token", DENSE_EXPERTS, router=TWO, rate_of="switch8"),
    Arm("switch8_upcycled", "Switch 8 after half dense", DENSE_EXPERTS, upcycled=0.5),
)
