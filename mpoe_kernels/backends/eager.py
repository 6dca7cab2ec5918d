"""Pure PyTorch kernels: always there, on every device and dtype, and what other backends are measured against."""

from mpoe_kernels.embedding.eager import embedding_backward, embedding_forward
from mpoe_kernels.linear.eager.cost import predicted_seconds
from mpoe_kernels.linear.eager.kernels import linear_backward, linear_forward
from mpoe_kernels.planner import Contraction
from mpoe_kernels.registry import Backend, Candidate
from mpoe_kernels.routing.eager import (
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
    route_forward,
)


def candidates(plan: Contraction) -> list[Candidate]:
    """One way for every strategy."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    return [Candidate("eager", plan.strategy, plan.strategy, predicted_seconds(plan), run)]


EAGER = Backend(
    name="eager",
    kernels={
        "route": route_forward,
        "dispatch": dispatch_forward,
        "dispatch_backward": dispatch_backward,
        "combine": combine_forward,
        "combine_backward": combine_backward,
        "mpo_embedding": embedding_forward,
        "mpo_embedding_backward": embedding_backward,
    },
    candidates=candidates,
)
