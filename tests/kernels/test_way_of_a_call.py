"""How far a reader of one call has to walk, and the page that describes the way."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor

import mpoe_kernels
from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
    Routing,
    combine,
    dispatch,
    grouped_mpo_linear,
    hidden_experts,
    mpo_embedding,
    neuron_experts,
    route,
    use_backend,
)

from .backend_cases import require

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mpoe_kernels.__file__).parent
MOST_FILES, MOST_RETURNS = 6, 2


class Walk:
    """Files in the order in which somebody reads them who follows a call and reads every function once.

    A file counts if one of its functions runs; `checks.py` does not, whose functions say in their names what they
    refuse. A *return* is a function not yet read in a file that was left.

    Attributes:
        steps: one entry each time that the walk enters a file from another one.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._read: set[Any] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        path, code = Path(frame.f_code.co_filename), frame.f_code
        is_part = code.co_name.startswith("<") and code.co_name != "<lambda>"  # a comprehension is read where it stands
        if event != "call" or is_part or code in self._read or not path.is_relative_to(PACKAGE):
            return
        self._read.add(code)
        name = str(path.relative_to(PACKAGE))
        if name == "checks.py":
            return
        if not self.steps or self.steps[-1] != name:
            self.steps.append(name)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self.steps))

    @property
    def returns(self) -> int:
        return len(self.steps) - len(self.files)


def walked(run: Callable[[], Any]) -> tuple[Walk, Any]:
    walk = Walk()
    sys.setprofile(walk)
    try:
        result = run()
    finally:
        sys.setprofile(None)
    return walk, result


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def blocks_of(shape: MPOShape, experts: int = 2) -> MPOBlocks:
    return random_blocks(shape, experts, torch.float32, requires_grad=True)


def routed(top_k: int = 1) -> Routing:
    return route(torch.arange(4 * top_k).view(4, top_k) % 2, 2)


def linear(strategy: str) -> Any:
    shape = MPOShape.separable(8, 12) if strategy == "separable" else MPOShape((2, 2, 2), (2, 3, 2))
    given = leaf(4, 8), blocks_of(shape), torch.tensor([0, 2, 4]).int()
    return partial(grouped_mpo_linear, *given, row_index=torch.arange(4), activation="relu", strategy=strategy)


CHOSEN = torch.rand(4, 1), torch.zeros(4, 1).long()
# Arguments are made where the call will run, as routings are.
CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    **{strategy: partial(linear, strategy) for strategy in ("separable", "rebuild", "half_left", "chain")},
    "hidden_experts": lambda: partial(
        hidden_experts, leaf(4, 6), *CHOSEN, leaf(2, 3, 3), leaf(2, 3, 3), activation="relu"
    ),
    "neuron_experts": lambda: partial(
        neuron_experts, leaf(4, 6), *CHOSEN, leaf(2, 3, 6), leaf(2, 3, 6), activation="relu"
    ),
    "mpo_embedding": lambda: partial(mpo_embedding, torch.arange(4), blocks_of(MPOShape((2, 2, 2), (2, 3, 2)), 1)),
    "route": lambda: partial(route, torch.zeros(4, 1).long(), 2),
    "dispatch": lambda: partial(dispatch, leaf(4, 3), routed()),
    "combine": lambda: partial(combine, leaf(8, 3), routed(2), torch.rand(4, 2)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_call_is_read_in_a_few_files_from_top_to_bottom(backend: str, name: str) -> None:
    """What is chosen, planned or built at the first call is not read again."""
    require(backend)
    with use_backend(backend):
        run = CALLS[name]()
        run()
        walk, _ = walked(run)
    assert len(walk.files) <= MOST_FILES, " > ".join(walk.steps)
    assert walk.returns <= MOST_RETURNS, " > ".join(walk.steps)


def test_the_page_names_files_that_a_call_passes() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## The way of a call")[1].split("## Measure")[0]
    named = set(re.findall(r"^\d\. `([^`]+)`", page, re.MULTILINE))
    run = linear("half_left")
    with use_backend("eager"):
        run()
        walk, _ = walked(run)
    assert named == set(walk.files)
