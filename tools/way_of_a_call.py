"""Records which files a call passes through: a measure of how far a reader has to walk.

    python tools/way_of_a_call.py [--backend eager] [--strategy separable] [--cold] [--steps]

The call is `mpoe_kernels.grouped_mpo_linear`, forward and backward, on its second run (``--cold``: on its first, which
includes the planning that is then cached). A file counts once; a *return* is a call into a file that was left before.
Triton runs in its interpreter (``TRITON_INTERPRET=1``), and the walk ends where a kernel starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mpoe_kernels
from mpoe_kernels import grouped_mpo_linear
from mpoe_kernels.contract import STRATEGIES
from mpoe_kernels.testing.cases import random_blocks, workload_shape

PACKAGE = Path(mpoe_kernels.__file__).parent
# Functions that launch a kernel: what happens inside no longer counts.
ENDS = {("triton/start.py", "start"), ("triton/start.py", "start_steps")}


class Walk:
    """Files in the order in which they were entered.

    Attributes:
        steps: one entry each time that the walk enters a file from another one.
    """

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._inside: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self._inside is not None:
            if event == "return" and frame is self._inside:
                self._inside = None
            return
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(PACKAGE):
            return
        name = str(path.relative_to(PACKAGE))
        if not self.steps or self.steps[-1] != name:
            self.steps.append(name)
        if (name, frame.f_code.co_name) in ENDS:
            self._inside = frame

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self.steps))

    @property
    def returns(self) -> int:
        return len(self.steps) - len(self.files)


@contextmanager
def recorded() -> Iterator[Walk]:
    walk = Walk()
    sys.setprofile(walk)
    try:
        yield walk
    finally:
        sys.setprofile(None)


def walks(backend: str, strategy: str | None, cold: bool) -> dict[str, Walk]:
    """The walks of a forward and of its backward, which on a CPU runs in this thread."""
    shape = workload_shape("separable" if strategy in (None, "separable") else "light_16", 96, 128)
    blocks = random_blocks(shape, 2, torch.float32, requires_grad=True)
    x = torch.randn(4, 96, requires_grad=True)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)

    def forward() -> torch.Tensor:
        return grouped_mpo_linear(x, blocks, offsets, backend=backend, strategy=strategy, activation="relu")

    def recorded_run(run: Callable[[], Any]) -> tuple[Walk, Any]:
        with recorded() as walk:
            result = run()
        return walk, result

    for _ in range(1 if cold else 2):
        first, y = recorded_run(forward)
        second, _ = recorded_run(lambda: y.backward(torch.ones_like(y)))  # noqa: B023
    return {"forward": first, "backward": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--strategy", choices=STRATEGIES)
    parser.add_argument("--cold", action="store_true", help="record the first call instead of the second")
    parser.add_argument("--steps", action="store_true", help="list every file entered, in order")
    options = parser.parse_args()
    for phase, walk in walks(options.backend, options.strategy, options.cold).items():
        print(
            f"{options.backend} {options.strategy or 'auto'} {phase}: {len(walk.files)} files, {walk.returns} returns"
        )
        print("    " + " > ".join(walk.steps if options.steps else walk.files))


if __name__ == "__main__":
    main()
