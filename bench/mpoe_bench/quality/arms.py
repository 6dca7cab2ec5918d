"""The arms that are compared: each is a model and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpoe_kernels import MPOShape

DENSE_EXPERTS = {"num_experts": 8, "expert_type": "dense"}
LOSSLESS = {"is_scale_prob": False}


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison.

    Attributes:
        key: short name, used on the command line and in file names.
        name: for tables.
        experts: fields of its `MPOEConfig`; ``"wide_up"`` and the like in ``shape`` are resolved by `resolved_shape`.
            ``None`` = the dense model.
        width: hidden size of the dense model, relative to the field's.
        as_large_as: key of an arm; the dense model's hidden layer is widened to as many feed-forward parameters.
        rate_of: key of the arm whose tuned rate this arm uses, if the two differ little; ``None`` = its own.
        scales: (central, auxiliary) factors on the cores' rates; ``None`` = the regime's defaults.
        mask: p_b, the share of steps that do not change the central cores.
        own_biases: every expert has its own biases instead of shared ones.
        shared_weight: a control: the experts share one dense weight and own only their biases.
        independent: experts start from their own random values instead of equal copies.
        noise: Gaussian noise on the experts' blocks after conversion, relative to their RMS.
        restart: share of every block's outputs that restart from random numbers, independently in every expert.
        frozen: names of the experts' blocks that keep their initial values (``right``, ``left``).
        all_gates: a token's gates of all experts get a gradient, though only those of the chosen experts are not 0.
        decay_to_start: decoupled decay of the auxiliary cores towards their initial values, times the rate;
            0 = the field's decay towards 0. A very small value means no decay at all.
        auxiliary_warmup, router_warmup: shares of all steps over which that group's rate rises from 0.
        upcycled: share of all steps that train the dense model before it is converted.
        router: fields of its `RouterConfig` that differ from the field's.
        even_gate: gates are multiplied by the number of experts, so that an undecided router changes nothing.
        adapter: only the experts' own cores and the routers train.
        lora: rank of LoRA on the dense feed-forward layers; nothing else trains. 0 = none.
        lora_experts: number of such adapters per layer, mixed by a router, two per token; 0 = one for all tokens.
    """

    key: str
    name: str
    experts: dict[str, Any] | None = None
    width: float = 1.0
    as_large_as: str | None = None
    rate_of: str | None = None
    scales: tuple[float, float] | None = None
    mask: float = 0.0
    own_biases: bool = False
    shared_weight: bool = False
    independent: bool = False
    noise: float = 0.0
    restart: float = 0.0
    frozen: tuple[str, ...] = ()
    all_gates: bool = False
    decay_to_start: float = 0.0
    auxiliary_warmup: float = 0.0
    router_warmup: float = 0.0
    upcycled: float = 0.0
    router: dict[str, Any] = field(default_factory=dict)
    even_gate: bool = False
    adapter: bool = False
    lora: int = 0
    lora_experts: int = 0


def separable_shapes(model: int, hidden: int, up: tuple[int, int], down: tuple[int, int]) -> dict[str, MPOShape]:
    """Separable shapes of both projections; ``up``, ``down``: outer blocks on the (model's, hidden layer's) side."""
    return {
        "up": MPOShape.separable(model, hidden, up[0], up[1]),
        "down": MPOShape.separable(model, hidden, down[0], down[1]).mirrored(),
    }


def resolved_shape(name: Any, model: int, hidden: int, narrow: int = 8) -> Any:
    """The shapes behind the comparison's own names, which `MPOEConfig` does not have.

    ``wide``: the block on the model's side spans the whole model; ``wide_up``, ``wide_down`` and ``narrow``: only in
    one projection or in none, with narrow blocks otherwise. Everything else is returned unchanged.
    """
    wide, small = (model, narrow), (narrow, narrow)
    pairs = {"wide": (wide, wide), "wide_up": (wide, small), "wide_down": (small, wide), "narrow": (small, small)}
    return separable_shapes(model, hidden, *pairs[name]) if name in pairs else name


def mpoe(key: str, name: str, shape: Any, num_experts: int = 8, gauge: str | None = None, **options: Any) -> Arm:
    """An arm with MPO experts; ``gauge`` if it differs from the field's."""
    experts = {"num_experts": num_experts, "shape": shape}
    return Arm(key, name, experts if gauge is None else {**experts, "gauge": gauge}, **options)


ARMS = (
    Arm("dense", "dense"),
    Arm("switch8", "Switch 8", DENSE_EXPERTS),
    mpoe("paper8", "MPOE 8 paper, full bonds", "paper"),
    mpoe("light8", "MPOE 8 light", "light"),
    mpoe("separable8", "MPOE 8 separable", "separable"),
    mpoe("wide8", "MPOE 8 wide separable", "wide"),
    mpoe("separable16", "MPOE 16 separable", "separable", 16),
    mpoe("mask25", "MPOE 8 paper, p_b .25", "paper", mask=0.25, rate_of="paper8"),
    mpoe("mask50", "MPOE 8 paper, p_b .5", "paper", mask=0.5, rate_of="paper8"),
    mpoe("mask75", "MPOE 8 paper, p_b .75", "paper", mask=0.75, rate_of="paper8"),
    Arm(
        "biases8", "control: shared weight, own biases", {"num_experts": 8, "expert_type": "dense"}, shared_weight=True
    ),
    Arm("larger", "dense, as large as MPOE 8 separable", as_large_as="separable8"),
    Arm("larger_paper", "dense, as large as MPOE 8 paper", as_large_as="paper8"),
    Arm("larger_wide", "dense, as large as MPOE 8 wide", as_large_as="wide8"),
)

MIXTURE_OF_LORA = Arm("mixlora8", "mixture of 8 LoRAs, rank 2, two per token", lora=2, lora_experts=8)

# Fine-tuning a model as large as SmolLM2: only a small part of it trains.
ADAPTERS = (
    Arm("lora16", "LoRA, rank 16", lora=16),
    Arm("lora48", "LoRA, rank 48", lora=48),  # the FLOPs of two hidden-side blocks of 32
    Arm("lora128", "LoRA, rank 128", lora=128),
    mpoe("adapter8", "MPOE 8 separable, shared weights frozen", "separable", adapter=True),
)
