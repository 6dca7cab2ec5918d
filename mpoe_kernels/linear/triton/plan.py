"""Launch plans: what an op starts for one problem, recorded once and started again and again from then on.

The kernel itself is the recorder: it computes once with tensors that have no memory, while launches are noted instead
of made. A problem is everything that what is launched depends on: sizes, strides, dtypes, which arguments are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.linear.gpu.plan import Memory
from mpoe_kernels.planner import may_round_to_tf32
from mpoe_kernels.triton import tuning
from mpoe_kernels.triton.start import Step, recorded_for, recording, start_steps

MOST_PLANS = 2048  # of a few tens of kilobytes each


class _Layout(NamedTuple):
    """Of a tensor, what a plan depends on. Triton compiles for addresses that are multiples of 16 apart."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    beyond_16: int  # what remains of the address divided by 16

    def stand_in(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class LaunchPlan:
    """What is launched.

    Attributes:
        steps: the launches; they name the call's tensors, then the results, then the scratch memory.
        scratch: bytes of the temporaries.
        results: shape and dtype of the tensors that a call gets.
    """

    steps: tuple[Step, ...]
    scratch: int
    results: tuple[tuple[torch.Size, torch.dtype], ...]

    def run(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Compute with these tensors."""
        device = tensors[0].device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]
        found = [*tensors, *results]
        if self.scratch:
            found.append(torch.empty(self.scratch, dtype=torch.uint8, device=device))
        start_steps(self.steps, found)
        return tuple(results)


class _OnlyLaunches(TorchDispatchMode):
    """Refuses what a plan would not repeat: all operations but views and new memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            raise RuntimeError(f"a launch plan holds launches only; its recording met {func}")
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=MOST_PLANS)
def launch_plan(
    kernel: Callable[..., tuple[Tensor, ...]],
    signature: Any,
    problem: tuple[Any, ...],
    device: torch.device,
    conditions: tuple[Any, ...],
) -> LaunchPlan:
    """What a kernel launches.

    Args:
        kernel: computes, with nothing but launches between views and new memory.
        signature: dataclass of its first argument.
        problem: fields of that and the further arguments; tensors by their layouts.
        device: where tensors are.
        conditions: whatever else the launches depend on.
    """
    arguments = [value.stand_in() if isinstance(value, _Layout) else value for value in problem]
    memory = Memory()
    for value in arguments:
        if isinstance(value, Tensor):
            memory.give(value)
    count = len(signature.__dataclass_fields__)
    with recorded_for(device) as launches, _OnlyLaunches():
        results = kernel(signature(*arguments[:count]), *arguments[count:])
    for result in results:
        memory.give(result)
    tensors = [{name: v for name, v in launch.arguments.items() if isinstance(v, Tensor)} for launch in launches]
    pieces = [{name: memory.use(v, step) for name, v in named.items()} for step, named in enumerate(tensors)]
    scratch = memory.lay_out()
    steps = []
    for launch, named, where in zip(launches, tensors, pieces, strict=True):
        places = {
            name: (where[name].number, where[name].place + int(tensor.storage_offset()) * tensor.itemsize, tensor.dtype)
            for name, tensor in named.items()
        }
        steps.append(Step(launch.kernel, launch.grid, {**launch.arguments, **dict.fromkeys(places)}, places))
    return LaunchPlan(tuple(steps), scratch, tuple((result.shape, result.dtype) for result in results))


def planned(kernel: Callable[..., Any], call: Any, *more: Any) -> Any:
    """``kernel(call, *more)`` by its launch plan.

    Tensors among the arguments are read as they lie; other arguments belong to the problem. Launches that are recorded
    for a tool, or that must be measured first (see `tuning`), are made by the kernel itself.
    """
    if recording.get() is not None:
        return kernel(call, *more)
    tensors: list[Tensor] = []
    problem: list[Any] = []
    for value in (*(getattr(call, name) for name in call.__dataclass_fields__), *more):
        if isinstance(value, Tensor):
            tensors.append(value)
            problem.append(_Layout(value.shape, value.stride(), value.dtype, value.data_ptr() % 16))
        else:
            problem.append(tuple(value) if isinstance(value, list) else value)
    signature: Any = type(call)
    conditions = call.x.dtype == torch.float32 and may_round_to_tf32(call.x.dtype), tuning.active
    try:
        plan = launch_plan(kernel, signature, tuple(problem), call.x.device, conditions)
    except tuning.UnmeasuredError:
        return kernel(call, *more)
    return plan.run(tensors)
