"""Which backends are measured, and what the registry chooses to run on a case."""

from __future__ import annotations

import torch

from mpoe_kernels import BackendError, MPOShape, available_backends, backend_reasons
from mpoe_kernels.choice import Problem, resolve_contraction
from mpoe_kernels.planner import Contraction, contraction, plan_contraction
from mpoe_kernels.registry import AUTO, CONTRACTIONS, Candidate, Request, select

ALL = "all"
EAGER = "eager"
DEFAULT_BACKENDS = (AUTO, EAGER)
OPS = {phase: op for op, phase in CONTRACTIONS.items()}


def runs_on(backend: str, device: str) -> bool:
    """Whether a backend has kernels for a type of device."""
    try:
        select(Request("dispatch", device, torch.float32), backend)
    except BackendError:
        return False
    return True


def backends_to_measure(names: str | None, suite: str = "full", device: str = "cpu") -> tuple[str, ...]:
    """The backends that a run measures.

    Args:
        names: ``None`` (auto, which users get, and eager, which every installation has), ``"all"`` (auto and every
            backend that runs here), or names separated by commas. ``auto`` is the registry's own choice.
        suite: the suite to run; by default, quick measures only auto, and gpu all.
        device: what the backends of ``"all"`` must run on; named backends are checked only when they compute.

    Returns:
        Names, each once. Where eager is the only backend, auto means the same and eager is named instead.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    here = tuple(name for name in available_backends() if runs_on(name, device))
    if names is None and suite == "gpu":
        names = ALL
    if names is None or names == ALL:
        if here == (EAGER,):
            return here
        return (AUTO, *here) if names == ALL else (AUTO,) if suite == "quick" else DEFAULT_BACKENDS
    reasons = backend_reasons()
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name != AUTO and name not in reasons:
            raise ValueError(f"backend must be among {', '.join((ALL, AUTO, *reasons))}; got {name!r}")
        if name != AUTO and reasons[name]:
            raise ValueError(f"backend {name!r} cannot run here: {'; '.join(reasons[name])}")
    return chosen


def chosen_contractions(
    shape: MPOShape,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    training: bool,
    device: str = "cpu",
    backend: str = AUTO,
    mask_central: bool = False,
) -> dict[str, tuple[Contraction, Candidate]]:
    """What an unforced call runs: by phase, the contraction and the candidate that computes it.

    With ``mask_central`` no backward computes the central gradient.

    Raises:
        BackendError: no backend can run it.
    """
    plan = plan_contraction(shape, experts, tokens, dtype, device, training=training, mask_central=mask_central)
    need = (True, True, not mask_central, True)
    found = {}
    for phase in plan.phases:
        op = OPS[phase.phase]
        sizes = (phase.dims, experts, tokens, dtype)
        # In training, the separable forward keeps what its backward reads.
        keeps = training and shape.is_separable and phase.phase == "forward"
        strategy = "separable" if keeps else AUTO
        choice = resolve_contraction(Problem(op, *sizes, device, need, keeps, backend, strategy))
        found[phase.phase] = (contraction(choice.strategy, *sizes, phase.phase, need, device=device), choice)
    return found


def describe_choice(chosen: dict[str, tuple[Contraction, Candidate]]) -> dict[str, str]:
    """``{"forward": "half_left [eager]", ...}``: candidates as the registry names them."""
    return {phase: f"{candidate.name} [{candidate.backend}]" for phase, (_, candidate) in chosen.items()}
