"""Time every candidate of every contraction: candidates.jsonl, and measured.json for the registry.

Until this has run, the registry chooses by predicted times. `mpoe_kernels.measured` reads ``measured.json``: once it is
copied to ``mpoe_kernels/measured.json``, `auto` goes by its times on that card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mpoe_kernels.measured as measured
from mpoe_bench.section import failure_text
from mpoe_bench.timing import Budget, cpu_measure, cuda_measure, interleave
from mpoe_bench.visit.lines import Deadline, Lines, finish, parse
from mpoe_kernels import MPOShape
from mpoe_kernels.choice import candidates_for
from mpoe_kernels.linear.call import BackwardCall, ForwardCall, LinearCall
from mpoe_kernels.planner import ALL_GRADIENTS, Contraction, contractions
from mpoe_kernels.planner.orders import BlockDims
from mpoe_kernels.planner.program import Need
from mpoe_kernels.registry import BACKENDS, CONTRACTIONS, Candidate, Request
from mpoe_kernels.testing.assertions import relative_error
from mpoe_kernels.testing.cases import expert_choice, random_blocks, workload_shape

OPS = {phase: op for op, phase in CONTRACTIONS.items()}
BUDGET = Budget(seconds_each=0.04, sample_seconds=0.002, min_rounds=5, max_rounds=11)
MASKED: Need = (True, True, False, True)
# A candidate predicted to take more than this many times as long as the fastest is not worth compiling.
SLOWEST = 30.0
LARGEST_ERROR = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 2e-3}


@dataclass(frozen=True)
class Case:
    """One matrix with a number of experts and of rows.

    Attributes:
        shape: see `mpoe_kernels.testing.cases.workload_shape`, and `shape_of`.
        rows_in, rows_out: I and F.
        experts, slots: E and N.
        need: gradients that the backward pass computes.
    """

    shape: str
    rows_in: int
    rows_out: int
    experts: int
    slots: int
    need: Need = ALL_GRADIENTS
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        mask = "" if self.need == ALL_GRADIENTS else " masked"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} {self.rows_in}x{self.rows_out} E{self.experts} N{self.slots} {dtype}{mask}"


def cases(tiny: bool) -> Iterator[Case]:
    """The most useful cases first: those of a training batch and of decoding, then the rest."""
    sizes, experts = ((48, 96),) if tiny else ((768, 3072), (4096, 16384)), (4,) if tiny else (8, 64)
    shapes = ("separable", "paper_6") if tiny else ("separable", "paper_64", "paper_full", "paper_16", "light_64")
    slots = (8, 64) if tiny else (4096, 64, 1, 32768, 512, 8)
    for model, hidden in sizes:
        for count in slots:
            for many in experts:
                for shape in shapes:
                    for pair in ((model, hidden), (hidden, model)):
                        for need in (ALL_GRADIENTS, MASKED):
                            # Nobody trains the larger matrix at full bonds.
                            if not (shape == "paper_full" and model > 1024) and (need == ALL_GRADIENTS or count > 512):
                                yield Case(shape, *pair, many, count, need)


def shape_of(case: Case) -> MPOShape:
    """The matrix's shape; a separable shape that narrows mirrors one that widens, as in a layer."""
    shape = workload_shape(case.shape, case.rows_in, case.rows_out)
    if shape.is_separable and case.rows_in > case.rows_out:
        return workload_shape(case.shape, case.rows_out, case.rows_in).mirrored()
    return shape


@dataclass
class Operands:
    """Random tensors of a case on a device."""

    case: Case
    device: str

    def __post_init__(self) -> None:
        case = self.case
        torch.manual_seed(0)
        blocks = random_blocks(shape_of(case), case.experts, case.dtype)
        self.blocks = [t.detach().to(self.device) for t in (blocks.left, blocks.central, blocks.right)]
        self.dims = BlockDims.of_blocks(*self.blocks, case.rows_in, case.rows_out)
        index = expert_choice("uniform", case.slots, case.experts)[:, 0]
        offsets = torch.zeros(case.experts + 1, dtype=torch.int32)
        offsets[1:] = index.bincount(minlength=case.experts).cumsum(0)
        self.offsets = offsets.to(self.device)
        self.x = torch.randn(case.slots, case.rows_in).to(self.device, case.dtype)
        self.grad = torch.randn(case.slots, case.rows_out).to(self.device, case.dtype)

    def call(self, phase: str, strategy: str) -> LinearCall:
        """The arguments of a candidate."""
        case, none = self.case, self.x.new_empty(0)
        tensors = (self.x, *self.blocks, self.offsets, None, None)
        common = (*tensors, case.rows_in, case.rows_out, "none", strategy, "auto")
        if phase == "forward":
            return ForwardCall(*common, save=False)
        kept = none
        if strategy == "separable":
            _, kept, _ = _eager(self, "forward", strategy).run(ForwardCall(*common, save=True))
        return BackwardCall(*common, grad=self.grad, h=kept, saved=none, need=[*case.need, False])


def plans(operands: Operands, phase: str) -> tuple[Contraction, ...]:
    """The contractions of a case in one phase."""
    case = operands.case
    need = case.need if phase == "backward" else ALL_GRADIENTS
    sizes = (operands.dims, case.experts, case.slots, case.dtype, phase, need, False, operands.device, False)
    return tuple(contractions(*sizes))


def _eager(operands: Operands, phase: str, strategy: str | None = None) -> Candidate:
    """The first plain PyTorch candidate, for one strategy or for any."""
    able = [plan for plan in plans(operands, phase) if strategy in (None, plan.strategy)]
    return next(candidate for plan in able for candidate in BACKENDS["eager"].candidates(plan))


def offered(operands: Operands, phase: str) -> list[tuple[Contraction, Candidate]]:
    """What this machine's backends offer, the fastest by prediction first."""
    request = Request(OPS[phase], operands.device, operands.case.dtype)
    able = [backend for backend in BACKENDS.values() if not backend.unsupported_reasons(request)]
    found = [
        (plan, candidate)
        for plan in plans(operands, phase)
        for backend in able
        for candidate in candidates_for(backend, plan, {})[0]
    ]
    found.sort(key=lambda pair: pair[1].seconds)
    return [pair for pair in found if pair[1].seconds <= SLOWEST * found[0][1].seconds]


def _function(operands: Operands, phase: str, candidate: Candidate) -> Callable[[], list[Tensor]]:
    """Computes the results that a caller wants: y, or the gradients."""
    call = operands.call(phase, candidate.strategy)
    wanted = 1 if phase == "forward" else 4
    return lambda: list(candidate.run(call)[:wanted])


def _error(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = [(got, want) for got, want in zip(results, wanted, strict=True) if want.numel()]
    return max(relative_error(got.float(), want.float()) for got, want in pairs)


def measure(case: Case, device: str, phase: str) -> dict[str, Any]:
    """Seconds of every candidate of a case in one phase, by name; ``wrong`` says which were not timed, and why."""
    operands = Operands(case, device)
    found = {
        f"{candidate.backend}: {candidate.name}": (plan, candidate) for plan, candidate in offered(operands, phase)
    }
    predicted = {name: candidate.seconds for name, (_, candidate) in found.items()}
    row: dict[str, Any] = {"slots": case.slots, "predicted": predicted, "keys": {}, "wrong": []}
    functions = {}
    wanted = _function(operands, phase, _eager(operands, phase))()
    for name, (plan, candidate) in found.items():
        function = _function(operands, phase, candidate)
        try:
            error = _error(function(), wanted)
        except Exception as failure:  # any failure: the others are measured, and the report states the reason
            row["wrong"].append(f"{case.name} {phase} {name}: {failure_text(failure)}")
            continue
        if not error <= LARGEST_ERROR[case.dtype]:  # true for NaN
            row["wrong"].append(f"{case.name} {phase} {name}: off by {error:.1e}")
            continue
        functions[name], row["keys"][name] = function, measured.key(candidate.backend, candidate.name, plan)
    timings = interleave(functions, None, BUDGET, cuda_measure() if device == "cuda" else cpu_measure())
    return {**row, "seconds": {name: timing.seconds for name, timing in timings.items()}}


def table(lines: Lines) -> dict[str, list[list[float]]]:
    """The rows in the form that `mpoe_kernels.measured` reads."""
    found: dict[str, list[list[float]]] = {}
    for row in lines.rows.values():
        for name, key in row["keys"].items():
            found.setdefault(key, []).append([row["slots"], row["seconds"][name]])
    return {key: sorted(pairs) for key, pairs in sorted(found.items())}


def write_table(lines: Lines, device: str, path: Path) -> None:
    """Write this visit's ``measured.json``, under the card's name."""
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path.write_text(json.dumps({card: table(lines)}, indent=1) + "\n", encoding="utf-8")
    measured.read(path)  # fails at once if the registry could not read the file


def said(name: str, row: dict[str, Any]) -> str:
    """One line: the fastest candidate, and the one that was predicted to be fastest."""
    seconds, predicted = row["seconds"], row["predicted"]
    best, first = (min(times, key=times.__getitem__, default="") for times in (seconds, predicted))
    return f"{name}: {best} {seconds[best] * 1e6:.1f} us (predicted: {first})" if best else f"{name}: none"


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing; see the module."""
    chosen = parse("candidates", __doc__ or "", words)
    lines, deadline = Lines(chosen.out / "candidates.jsonl"), Deadline.of_minutes(chosen.minutes)
    kept, done = len(lines.rows), 0
    todo = [
        (f"{case.name} {phase}", case, phase)
        for case in cases(chosen.device == "cpu")
        for phase in ("forward", "backward")
        if phase == "backward" or case.need == ALL_GRADIENTS
    ]
    todo = [each for each in todo if each[0] not in lines.rows]
    for name, case, phase in todo:
        if deadline.passed:
            break
        lines.add(name, measure(case, chosen.device, phase))
        done += 1
        print(said(name, lines.rows[name]), flush=True)
        write_table(lines, chosen.device, chosen.out / "measured.json")
    wrong = [line for row in lines.rows.values() for line in row["wrong"]]
    return finish("candidates", done, kept, todo[done:], wrong)


if __name__ == "__main__":
    sys.exit(main())
