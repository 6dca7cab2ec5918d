"""Pure PyTorch kernels: always available, on every device and dtype, and the baseline for other backends."""

import torch

from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.eager.kernels import linear_backward, linear_forward
from mpoe_kernels.linear.gpu import grouped
from mpoe_kernels.linear.gpu.budget import counting_reasons
from mpoe_kernels.registry import Backend, Candidate
from mpoe_kernels.routing import eager as routing


def candidates(plan: Contraction) -> list[Candidate]:
    """Expert by expert; on a GPU also with grouped GEMMs, which need not wait for the offsets."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    found = [Candidate("eager", plan.strategy, plan.strategy, run, waits=True)]
    if plan.device_type == "cuda" and plan.dtype == torch.bfloat16 and not counting_reasons(plan):
        run = grouped.forward if plan.phase == "forward" else grouped.backward
        found.append(Candidate("eager", f"{plan.strategy} by grouped GEMMs", plan.strategy, run))
    return found


EAGER = Backend(
    name="eager",
    kernels={
        "route": routing.route,
        "dispatch": routing.dispatch,
        "dispatch_backward": routing.dispatch_backward,
        "combine": routing.combine,
        "combine_backward": routing.combine_backward,
    },
    candidates=candidates,
)
