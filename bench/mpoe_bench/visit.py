"""`python -m mpoe_bench.visit WHAT`: what `bench/gpu.sh` measures itself; every line is printed at once.

- ``smoke``: every layer of `mpoe_bench.gpu_cases` in the smaller size, forward and backward, against plain PyTorch with
  the same weights, with us and x dense. A result that differs is a line that begins with WRONG, and status 3.
- ``targets``: us and x dense of both sizes, as CUDA graphs too, beside the limits.
- ``profile``: four layers once, for ncu.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from mpoe_bench.cases import relative_error
from mpoe_bench.gpu_cases import PHASES, TOKENS, Case, Dense, cases
from mpoe_bench.graphs import graphed
from mpoe_kernels.backends import BackendError

WRONG = 3
# Of the same formula in bfloat16, summed in another order: the result, and the worst gradient.
ALLOWED = {"y": 2e-2, "gradient": 4e-2}
SIZES = {"cuda": (768, 4096), "cpu": (32,)}
say = partial(print, flush=True)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def microseconds(function: Callable[[], object], device: str, calls: int = 20) -> float:
    """Median over five groups of calls, of one call on a CPU; nothing waits within a group."""
    groups, calls = (5, calls) if device == "cuda" else (1, 1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    function()
    for _ in range(groups):
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        found.append((time.perf_counter() - began) / calls)
    return 1e6 * median(found)


def phases(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """A call by phase."""
    grad = torch.randn_like(x)
    leaves = [p for p in layer.parameters() if p.requires_grad]

    def training() -> object:
        return torch.autograd.grad(layer(x), leaves, grad, allow_unused=True)

    return dict(zip(PHASES, (torch.no_grad()(lambda: layer(x)), training), strict=True))


def results(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """y, and the gradients of x and of every parameter by name."""
    leaves = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    y = layer(x)
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)
    return y.detach(), {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def difference(case: Case, backend: str, x: Tensor) -> dict[str, float]:
    """Relative error of the result and of the worst gradient, against eager with the same weights and experts."""
    torch.manual_seed(0)
    ours = case.layer(x.device.type, backend, "gelu").eval()
    plain = case.layer(x.device.type, "eager", "gelu").eval()
    plain.load_state_dict(ours.state_dict())
    (y, grads), (truth, wanted) = results(ours, x), results(plain, x)
    worst = max(relative_error(grad, wanted[name]) for name, grad in grads.items())
    return {"y": relative_error(y, truth), "gradient": worst}


def smoke(device: str, backend: str) -> int:
    """Check and time. Returns `WRONG` if a result differs, 1 if a layer failed or none ran; the last line counts."""
    count = {"right": 0, "wrong": 0, "failed": 0, "without kernels": 0}
    for case, x, dense in _sized(device, SIZES[device][:1]):
        try:
            found = difference(case, backend, x)
            layer = case.layer(device, backend)
            times = {phase: microseconds(call, device) for phase, call in phases(layer, x).items()}
        except Exception as error:  # the other layers are checked
            kind = "without kernels" if isinstance(error, BackendError) else "failed"
            count[kind] += 1
            say(f"{kind}: {backend} {case.name}: {_text(error)}")
            continue
        same = all(found[name] <= most for name, most in ALLOWED.items())  # False for NaN
        count["right" if same else "wrong"] += 1
        line = ", ".join(f"{phase} {us:.0f} us {us / dense[phase]:.2f} x dense" for phase, us in times.items())
        errors = ", ".join(f"{name} off by {value:.1e}" for name, value in found.items())
        say(f"{'' if same else 'WRONG '}{backend} {case.name}: {errors}; {line}")
    say(", ".join(f"{number} {what}" for what, number in count.items()))
    return WRONG if count["wrong"] else int(count["failed"] > 0 or count["right"] == 0)


def targets(device: str, _: str) -> int:
    """What users get (``auto``), called plainly and, on a GPU, replayed as a CUDA graph."""
    for case, x, dense in _sized(device, SIZES[device]):
        words = []
        for (phase, call), limit in zip(phases(case.layer(device), x).items(), case.limits, strict=True):
            us = microseconds(call, device)
            words.append(f"{phase} {us:.0f} us {us / dense[phase]:.2f} x dense, limit {limit}")
            if device == "cuda" and phase == "forward":
                words.append(f"as a graph {microseconds(graphed(call), device):.0f} us")
        say(f"{case.name}: {'; '.join(words)}")
    return 0


def _sized(device: str, sizes: Sequence[int]) -> Iterator[tuple[Case, Tensor, dict[str, float]]]:
    """Every case with its tokens, and the dense network's times by phase."""
    for model in sizes:
        x = torch.randn(TOKENS if device == "cuda" else 64, model, device=device, dtype=torch.bfloat16)
        x.requires_grad_()
        dense = phases(Dense(model, "relu", device=device, dtype=torch.bfloat16), x)
        times = {phase: microseconds(call, device) for phase, call in dense.items()}
        for case in cases((model,)):
            yield case, x, times


def profile(device: str, _: str) -> int:
    """Neurons, hidden, separable, the fused chain: forward and backward."""
    for case, x, _times in _sized(device, SIZES[device][:1]):
        if case.experts == 8 and not case.masked:
            phases(case.layer(device), x)["training"]()
            say(case.name)
    return 0


PARTS = {each.__name__: each for each in (smoke, targets, profile)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.visit", description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--backend", default="triton", help="of the smoke test")
    chosen = parser.parse_args(words)
    return PARTS[chosen.part](chosen.device, chosen.backend if chosen.device == "cuda" else "eager")


if __name__ == "__main__":
    sys.exit(main())
