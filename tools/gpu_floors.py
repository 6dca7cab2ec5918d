"""How fast the GPU kernels can be at best, from their machine code; needs no GPU. Bounds, nothing is measured.

A layer is called on tensors without memory, forward and with its backward; every launch is recorded as it would be made
(Triton's with grid and arguments, and PyTorch's own operations), and every kernel is compiled. Its floor is the largest
of three times: to *issue* its instructions (4 a cycle and multiprocessor; those of a warp count as often as the loops
around them run, `TRIPS`, with tokens spread evenly over the experts), to move each of its tensors once (*memory*), and
to multiply, padding included (*tensor*). ``x_dense``, which has the limits, divides the largest of a call's three sums
by the time for the dense network's FLOPs or bytes, the larger; ``x_launches`` the sum of its floors by the dense's.

bench/results/ahead-of-time/gpu.json keeps the figures. The tool fails where a kernel has more instructions, barriers or
bytes, or a call more launches or a larger ``x_dense`` than there, where a limit that was kept is exceeded, and where a
call is not there; ``--write`` keeps the new ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from cuda_check import compile_source, find, readable
from documents import write_between
from mpoe_bench.gpu_cases import PHASES, TOKENS, Case, Dense, cases
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton_binary import job_of, machine_code

from mpoe.layers import logits
from mpoe_kernels.backends import PREFERRED, Backend
from mpoe_kernels.linear import gradients, grouped
from mpoe_kernels.routing import gating
from mpoe_kernels.testing.launches import Launch, recorded
from mpoe_kernels.triton.start import cdiv

ROOT = Path(__file__).resolve().parents[1]
CSRC, FOLDER = ROOT / "csrc" / "cuda", ROOT / "bench" / "results" / "ahead-of-time"
TABLE, DOCUMENT = FOLDER / "gpu.json", FOLDER / "gpu.md"
MORE = 1.02  # a kernel may have this many times the table's figures


class Card(NamedTuple):
    """Multiprocessors, cycles a second, FLOP/s that good 16-bit products reach, and bytes a second."""

    units: int
    clock: float
    flops: float
    bandwidth: float


CARDS = {  # A100, H100 and B200, all with SXM
    "sm_80": Card(108, 1.41e9, 250e12, 1.8e12),
    "sm_90": Card(132, 1.755e9, 800e12, 3e12),
    "sm_100": Card(148, 1.85e9, 1800e12, 7e12),
}
CASES = {case.name: case for case in cases()}


class Library(NamedTuple):
    """An operation of PyTorch: name, FLOPs of products, bytes of its tensors."""

    name: str
    flops: float
    bytes: int


def bytes_of(values: Iterable[Any]) -> int:
    """Of all different tensors among the values; views of one tensor count as their largest."""
    found: dict[int, int] = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            used = min(value.numel() * value.element_size(), storage.nbytes())
            found[storage._cdata] = max(found.get(storage._cdata, 0), used)
    return sum(found.values())


class Recorder(TorchDispatchMode):
    """Appends PyTorch's operations to ``log``, as `recorded` does Triton's launches; ``seconds``: Python's in our ops.

    With ``timed``, operations in our ops are not recorded, which would take longer than they."""

    def __init__(self, log: list[Any], timed: bool = False) -> None:
        super().__init__()
        self.log, self.timed, self.seconds = log, timed, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mpoe":
            began = time.perf_counter()
            with nullcontext() if self.timed else self:
                result = OPDEFS[f"mpoe::{func._opname}"]._init_fn(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result
        with self:
            result = func.decompose(*args, **kwargs)  # what is several operations
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(result)
        given = {each.untyped_storage()._cdata for each in inputs if isinstance(each, Tensor)}
        new = any(isinstance(each, Tensor) and each.untyped_storage()._cdata not in given for each in outputs)
        if "empty" not in str(func) and (new or func._schema.is_mutable):
            flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=result)
            self.log.append(Library(func._schema.name.removeprefix("aten::"), flops, bytes_of([*inputs, *outputs])))
        return result


def launches(layer: nn.Module, model: int, training: bool, architecture: str, timed: bool = False) -> Recorder:
    """What a call of a layer without memory launches, in order."""
    x = torch.empty(TOKENS, model, dtype=torch.bfloat16, device="meta", requires_grad=training)
    with ExitStack() as as_on_gpu, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing balances the experts of a single layer
        for each in (
            patch.object(logits, "_logits", lambda x, weight, _: logits.logits_of_low_precision(x, weight)),
            patch.object(gating, "requested_backend", lambda _: "triton"),
            patch.object(gating, "is_plain_call", lambda _: True),
            *(patch.object(m, "float32_mm", partial(torch.mm, out_dtype=torch.float32)) for m in (gradients, grouped)),
            patch.object(torch, "is_autocast_enabled", lambda *_: False),
            patch.object(Backend, "unsupported_reasons", lambda *_: []),
            patch.dict(PREFERRED, meta=("triton",)),
            patch.dict(os.environ, MPOE_AUTOTUNE="0"),  # the first of the ranking
        ):
            as_on_gpu.enter_context(each)
        log = as_on_gpu.enter_context(recorded(architecture))
        with Recorder(log, timed) as recorder, torch.set_grad_enabled(training):
            y = layer.train(training)(x)
            if training:
                y.backward(torch.empty_like(y))
    return recorder


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BACK = re.compile(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)")
_BARRIER = re.compile(r"\bBAR\.(?:SYNC|RED)")
_MATRIX = re.compile(r"\b(?:HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8))")


def _flops(words: str) -> float:
    """Of an instruction, for one warp."""
    if not (matrix := _MATRIX.search(words)):
        return 0.0
    m, n, k = (int(size) for size in matrix.groups() if size)
    return 2 * m * n * k / (4 if "HGMMA" in words else 1)  # four warps share a warpgroup's


def code_of(text: str) -> list[tuple[int, str]]:
    """Address and words of every instruction."""
    return [(int(address, 16), words) for address, words in _INSTRUCTION.findall(text)]


def loops_of(code: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of every loop, the outer ones first; the endless one behind the end is none."""
    found: dict[int, int] = {}
    for address, text in code:
        back = _BACK.search(text)
        if back and int(back[1], 16) < address:
            found[int(back[1], 16)] = max(address, found.get(int(back[1], 16), 0))
    return sorted(found.items(), key=lambda loop: (loop[0], -loop[1]))


def executed(name: str, text: str, trips: Sequence[float]) -> tuple[float, float, float]:
    """Instructions, barriers and FLOPs of matrix instructions that a warp executes in a kernel's machine code.

    ``trips``: how often each loop runs for each run of the loop around it, in the order of `loops_of`. Loops that run
    once, and inner ones (the last), which the compiler unrolled, may be missing in the code. Raises ValueError if it
    has more.
    """
    code = code_of(text)
    loops = loops_of(code)
    given = list(trips) if len(trips) == len(loops) else [each for each in trips if each != 1][: len(loops)]
    if len(given) < len(loops):
        sizes = [sum(first <= address <= last for address, _ in code) for first, last in loops]
        raise ValueError(f"{name} has loops of {sizes} instructions; tools/gpu_floors.py says how often {trips} run")
    counts = []
    for address, words in code:
        times = math.prod(n for (first, last), n in zip(loops, given, strict=True) if first <= address <= last)
        counts.append((times, times * bool(_BARRIER.search(words)), times * _flops(words)))
    return tuple(map(sum, zip(*counts, strict=True)))


def _rows(a: dict[str, Any]) -> float:
    """Rows of an expert, of one choice where slots are sorted by choice."""
    return TOKENS * a.get("P", 1) / a["EXPERTS"]


def _steps(a: dict[str, Any], parts: int) -> float:
    """Tiles of a weight that a program sums over: digits of the central core, and of the side that is summed."""
    side, k, n = (0, "KL", "NL") if a["OF_RIGHT"] else (2, "KR", "NR")
    tiles = cdiv(a["K_SIZES"][side], a[k]) * cdiv(a["N_SIZES"][side], a[n])
    return a["K_SIZES"][1] * a["N_SIZES"][1] / parts * tiles


_WEIGHTS = ("NEED_UP", "NEED_DOWN", "NEED_GATE_UP", "NEED_BIAS")
# Kernel -> how often its loops run (see `executed`), of the launch's arguments and its grid.
TRIPS: dict[str, Callable[[dict[str, Any], tuple[int, ...]], Sequence[float]]] = {
    "prefix_kernel": lambda a, _: (a["blocks"] / a["CHUNK"],),
    "sort_kernel": lambda a, _: 2 * (cdiv(a["tokens"], a["BLOCK"]),),
    "weight_gradient_kernel": lambda a, _: (cdiv(a["F"], a["BN"]),),
    "grouped_rows_kernel": lambda a, _: (cdiv(a["K"], a["BK"]),),
    "grouped_blocks_kernel": lambda a, g: (TOKENS * a["P"] / g[2] / g[1] / a["BK"],),
    "fused_kernel": lambda a, _: (cdiv(a["K_SIZES"][2], a["KR"]), cdiv(a["K_SIZES"][0], a["KL"]) * a["K_SIZES"][1]),
    "gradient_kernel": lambda a, g: (_steps(a, g[1]), TOKENS / g[2] / a["BT"]),
    # Waits for earlier choices count once, loops for tokens without an expert not at all.
    "neurons_fused_kernel": lambda a, _: (1, 0, cdiv(a["width"], a["BK"]), 1, cdiv(a["columns"], a["BK"])),
    "neurons_hidden_kernel": lambda a, _: [cdiv(a[n], a["BK"]) for n in ("width", "out_width")[: 1 + a["BACKWARD"]]],
    "neurons_rows_kernel": lambda a, _: (1, cdiv(a["neurons"], a["BK"]), 1),
    # Loops over choices and slots for each of the gradients; a program runs one of the four, or none.
    "neurons_weights_kernel": lambda a, _: [
        each for name in _WEIGHTS if a[name] for each in (a["TOP_K"] / 4, cdiv(_rows(a), a["BK"]))
    ],
    "hidden_rows_kernel": lambda a, _: (1, 0, 0, a["share"]),
    "hidden_blocks_kernel": lambda a, _: (a["share"], a["TOP_K"], cdiv(_rows(a), a["BM"])),
}
# Kernels with a program for every tile of BM rows of an expert; the grid has more, which return at once.
TILED = ("neurons_fused_kernel", "neurons_hidden_kernel", "neurons_rows_kernel")
TILED += ("hidden_rows_kernel", "grouped_rows_kernel", "fused_kernel")


def busy_programs(launch: Launch) -> float:
    """Programs that do not return at once; `fused_kernel` has its tiles of columns in the first axis too."""
    programs, a = math.prod(launch.grid), launch.arguments
    if launch.name not in TILED:
        return programs
    columns = launch.grid[0] / (cdiv(TOKENS, a["BM"]) + a["EXPERTS"] + 1) if launch.name == "fused_kernel" else 1
    tiles = a.get("TOP_K", 1) * a["EXPERTS"] * math.ceil(_rows(a) / a["BM"])
    return programs / launch.grid[0] * columns * min(launch.grid[0], tiles)


class Cost(NamedTuple):
    """Of one launch: see the module; ``instructions``, ``barriers``: of a warp, 0 for PyTorch's operations."""

    kernel: str
    programs: float
    warps: int
    instructions: float
    barriers: float
    bytes: int
    times: tuple[float, float, float]  # to issue, to move and to multiply

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.times)


def cost_of(launch: Launch | Library, architecture: str) -> Cost:
    card = CARDS[architecture]
    if isinstance(launch, Library):
        tensor = launch.flops / card.flops
        return Cost(launch.name, 0, 0, 0, 0, launch.bytes, (0.0, launch.bytes / card.bandwidth, tensor))
    programs, warps = busy_programs(launch), launch.arguments.get("num_warps", 4)
    trips = TRIPS.get(launch.name, lambda *_: ())(launch.arguments, launch.grid)
    instructions, barriers, flops = executed(launch.name, machine_code(job_of(launch, architecture)), trips)
    bytes_, total = bytes_of(launch.arguments.values()), programs * warps
    times = total * instructions / (4 * card.units * card.clock), bytes_ / card.bandwidth, total * flops / card.flops
    return Cost(launch.name, programs, warps, round(instructions, 1), round(barriers, 1), bytes_, times)


def dense_floors(model: int, training: bool, architecture: str) -> tuple[float, float]:
    """Seconds of the dense network: of its launches, with the activation's; and of its FLOPs or bytes, the larger."""
    card, passes = CARDS[architecture], 3 if training else 1
    dense = Dense(model, "relu", device="meta", dtype=torch.bfloat16)
    costs = [cost_of(launch, architecture) for launch in launches(dense, model, training, architecture).log]
    flops, elements = 16 * TOKENS * model**2, 8 * model**2 + 10 * TOKENS * model
    return sum(cost.floor for cost in costs), passes * max(flops / card.flops, 2 * elements / card.bandwidth)


def cuda_kernels() -> dict[str, list[float]]:
    """The 16-bit kernels of csrc/cuda for sm_90, by readable name.

    Their launches are not recorded, so nothing says how often their loops run: instructions of the whole kernel; then,
    of the loop that multiplies most, instructions and barriers, and the time to issue it over that of its products.
    """
    compiler, card, found = os.environ.get("CUDACXX") or find("nvcc"), CARDS["sm_90"], {}
    for source in (each for each in sorted(CSRC.glob("*/*.cu")) if each.stem not in ("float", "float16", "tf32")):
        with tempfile.TemporaryDirectory() as folder:
            compile_source(str(compiler), source, ["90a"], Path(folder))
            built = Path(folder) / f"{source.stem}.o"
            text = subprocess.run([find("cuobjdump") or "", "-sass", built], capture_output=True, text=True, check=True)
        _, *functions = text.stdout.split("Function : ")
        names = readable([each.split()[0] for each in functions])
        for name, function in zip(names, functions, strict=True):
            code = code_of(function)
            inner = [[words for address, words in code if a <= address <= b] for a, b in loops_of(code)]
            products = [(sum(map(_flops, words)) / len(words), words) for words in inner]
            density, loop = max(products, default=(0.0, []))
            ratio = card.flops / (density * 4 * card.units * card.clock) if density else 0.0
            barriers = len(_BARRIER.findall("\n".join(loop)))
            found[name] = [len(code), len(loop) if density else 0, barriers, round(ratio, 2)]
    return dict(sorted(found.items()))


def figures(case: Case, training: bool, architecture: str) -> dict[str, Any]:
    """Of a call: floor in us and x dense, launches, Python's us in the ops, and Triton's kernels."""
    layer = case.layer("meta")
    run = partial(launches, layer, case.model, training, architecture)
    costs = [cost_of(launch, architecture) for launch in run().log]
    floor, (dense, least) = sum(cost.floor for cost in costs), dense_floors(case.model, training, architecture)
    sums = [sum(times) for times in zip(*(each.times for each in costs), strict=True)]
    kernels = [[*each[:6], *(round(1e6 * seconds, 2) for seconds in each.times)] for each in costs if each.programs]
    return {
        "x_dense": round(max(sums) / least, 3),
        "x_launches": round(floor / dense, 3),
        "floor_us": round(1e6 * floor, 1),
        "issue_memory_tensor_us": [round(1e6 * seconds, 1) for seconds in sums],
        "launches": len(costs),
        "triton_launches": len(kernels),
        "python_us": round(1e6 * min(run(timed=True).seconds for _ in range(3))),
        "kernels": kernels,
    }


def worse(name: str, found: dict[str, Any], kept: dict[str, Any], limit: float | None) -> list[str]:
    """In what a call is worse than the table says: one line each."""
    pairs = [("launches", found["launches"], kept["launches"]), ("us", found["floor_us"], MORE * kept["floor_us"])]
    for ours, theirs in zip(found["kernels"], kept["kernels"], strict=False):
        if ours[0] == theirs[0]:
            names = (f"{what} of {ours[0]}" for what in ("instructions", "barriers", "bytes"))
            pairs += zip(names, ours[3:6], (MORE * each for each in theirs[3:6]), strict=True)
    is_kept = limit is not None and kept["x_dense"] <= limit
    pairs.append(("x dense", found["x_dense"], limit if is_kept else MORE * kept["x_dense"]))
    return [f"{name}: {new} {what}; at most {most:g}" for what, new, most in pairs if new > most]


def document(table: dict[str, Any]) -> str:
    """Two Markdown tables: the calls on an H100, and the kernels of csrc/cuda."""
    columns = ("x_dense", "x_launches", "floor_us", "launches", "triton_launches", "python_us")
    lines = [f"| layer, forward / with backward | limit | {' | '.join(columns)} |", "|---|" + "---:|" * 7]
    for name, case in CASES.items():
        both = [table["calls"][f"{name} {phase} sm_90"] for phase in PHASES]
        missed = [most is not None and each["x_dense"] > most for most, each in zip(case.limits, both, strict=True)]
        limits = [f"{most or '-'}{' (missed)' * miss}" for most, miss in zip(case.limits, missed, strict=True)]
        pairs = [limits, *([each[key] for each in both] for key in columns)]
        lines.append(f"| {name} | {' | '.join(f'{first} / {second}' for first, second in pairs)} |")
    lines += [
        "",
        "| kernel in CUDA C++ | instructions | its loop's | barriers | issue / tensor |",
        "|---|" + "---:|" * 4,
    ]
    lines += [f"| `{name}` | {' | '.join(map(str, row))} |" for name, row in table["cuda"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Returns 1 if something is worse than the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help=f"of {', '.join(CARDS)}, separated by commas")
    parser.add_argument("--only", default="", help="only calls whose name contains this")
    parser.add_argument("--cuda", action="store_true", help="also the kernels of csrc/cuda, which nvcc compiles")
    parser.add_argument("--write", action="store_true", help="keep the figures instead of comparing them")
    chosen = parser.parse_args(words)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"calls": {}, "cuda": {}}
    lines: list[str] = []
    for architecture in chosen.arch.split(","):
        for (name, case), phase in product(CASES.items(), PHASES):
            call = f"{name} {phase} {architecture}"
            if chosen.only not in call:
                continue
            found = figures(case, phase == "training", architecture)
            print(call, *(f"{key} {value}" for key, value in found.items() if key != "kernels"), sep=", ", flush=True)
            limit = case.limits[PHASES.index(phase)] if architecture == "sm_90" else None
            if chosen.write:
                table["calls"][call] = found
            else:
                kept = table["calls"].get(call)
                lines += worse(call, found, kept, limit) if kept else [f"{call}: not in {TABLE.name}"]
    if chosen.cuda:
        found = cuda_kernels()
        for name, row in () if chosen.write else found.items():
            if any(new > MORE * old for new, old in zip(row, table["cuda"].get(name, [0]), strict=False)):
                lines.append(f"{name}: {row}; kept {table['cuda'].get(name)}")
        table["cuda"] = found
    if chosen.write:
        TABLE.write_text(json.dumps(table, indent=0).replace(",\n", ", ").replace(', "', ',\n"') + "\n")
        write_between(DOCUMENT, "floors", document(table))
    sys.stderr.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
