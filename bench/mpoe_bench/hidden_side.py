"""`python -m mpoe_bench.hidden_side`: hidden-side experts, router included, against the dense feed-forward network.

Times, and the memory of a training step with AdamW. Median ratios of interleaved calls in one process, one thread. The
clock is the thread's CPU time, so that other processes on the machine disturb less. A row is checked against the dense
network (identity blocks) before it is timed. Few tokens go through one layer, whose weights stay in the processor's
caches, and through twelve, as in a model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import ACTIVATIONS, HiddenFeedForward
from mpoe_bench.memory import peak_memory

LAYERS = 12  # of a model of this width; tokens pass through them one after another


class Dense(nn.Module):
    """``down(act(up x))``."""

    def __init__(self, model: int, hidden: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(model, hidden, dtype=dtype), nn.Linear(hidden, model, dtype=dtype)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def mixture(dense: Dense, config: MPOEConfig, activation: str) -> HiddenFeedForward:
    """The same network with experts between its projections."""
    features, model = dense.up.weight.shape
    names, dtype = {"up": "up", "down": "down"}, dense.up.weight.dtype
    layer = HiddenFeedForward(model, features, config, names=names, activation=activation, dtype=dtype)
    layer.adopt({"up": dense.up, "down": dense.down})
    return layer


def seconds(modules: list[Any], x: Tensor, training: bool) -> float:
    """Mean seconds per module, run one after another on the same tokens."""
    start = time.thread_time()
    with torch.set_grad_enabled(training):
        for module in modules:
            y = module(x)
            if training:
                y.sum().backward()
    return (time.thread_time() - start) / len(modules)


def step_bytes(network: nn.Module, x: Tensor) -> int:
    """Memory of a training step: weights, AdamW's two moments of them, and the peak with gradients and activations.

    The least of three steps: sometimes the C library returns free memory late.
    """

    def step() -> None:
        network.zero_grad()
        network(x).sum().backward()

    peaks = []
    for _ in range(3):
        step()
        network.zero_grad()
        own, _ = peak_memory(step, resident=True)
        peaks.append(max(own.peak, own.resident or 0))
    return min(peaks) + 3 * sum(w.numel() * w.element_size() for w in network.parameters())


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One row: ratios forward and forward + backward; with many tokens, of the memory of a training step too.

    ``memory`` divides by the dense network's, with the experts' blocks, their gradients and moments added to it.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    networks = [Dense(case["model"], case["hidden"], case["activation"], dtype) for _ in range(case["layers"])]
    config = MPOEConfig(
        shape="hidden",
        num_experts=case["experts"],
        block_size=case["block"],
        block_per_group=case["per_group"],
        router=RouterConfig(top_k=case["top_k"], init_scale=1.0),
        backend=case["backend"],
    )
    mixtures = [mixture(dense, config, case["activation"]) for dense in networks]
    x = torch.randn(case["tokens"], case["model"]).to(dtype).requires_grad_()
    with torch.no_grad():
        want, got = networks[0](x).double(), mixtures[0](x).double()
    error = float((got - want).abs().max() / want.abs().max())
    if error > (1e-5 if dtype == torch.float32 else 3e-2):
        raise ValueError(f"{case}: the result is off by {error:.1e} of its largest value")
    row = {**case, "error": error, "flops": 1 + case["top_k"] * case["block"] / case["model"]}
    for name, training in (("forward", False), ("training", True)):
        times: dict[str, list[float]] = {"dense": [], "hidden": []}
        repeats = max(1, 256 // case["tokens"] // case["layers"])
        for _ in range(rounds):
            times["dense"].append(sum(seconds(networks, x, training) for _ in range(repeats)))
            times["hidden"].append(sum(seconds(mixtures, x, training) for _ in range(repeats)))
        row[name] = median(h / d for d, h in zip(times["dense"], times["hidden"], strict=True))
        row[f"{name}_dense_ms"] = 1e3 * median(times["dense"]) / repeats
    if case["tokens"] >= 2048:
        blocks = sum(w.numel() * w.element_size() for w in mixtures[0].experts.parameters())
        row["memory"] = step_bytes(mixtures[0], x) / (step_bytes(networks[0], x) + 4 * blocks)
    return row


def cases(backend: str | None, quick: bool) -> list[dict[str, Any]]:
    base = {"model": 768, "hidden": 3072, "block": 64, "activation": "relu", "backend": backend, "layers": 1}
    rows = []
    for dtype in ("float32", "bfloat16"):
        for experts, per_group in ((8, True), (64, False), (64, True)):
            own = {"dtype": dtype, "experts": experts, "per_group": per_group}
            rows += [{**base, **own, "tokens": 2048, "top_k": k} for k in ((2,) if quick else (1, 2, 4))]
            few = [{"tokens": tokens, "layers": layers} for tokens in (64, 1) for layers in (1, LAYERS)]
            rows += [] if quick else [{**base, **own, **each, "top_k": 2} for each in few]
        gelu = {"experts": 8, "per_group": True, "tokens": 2048, "top_k": 2, "activation": "gelu"}
        rows.append({**base, "dtype": dtype, **gelu})
        if not quick:
            large = {"model": 2048, "hidden": 8192, "dtype": dtype, "experts": 8, "per_group": True}
            rows.append({**base, **large, "tokens": 2048, "top_k": 4})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.hidden_side", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--backend", help="default: the package's choice")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two experts per token, 2,048 tokens")
    parser.add_argument("--few", action="store_true", help="only 1 and 64 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in cases(arguments.backend, arguments.quick):
        if arguments.few and case["tokens"] > 64:
            continue
        row = measure(case, arguments.rounds)
        print(
            f"{row['dtype']:9} {row['model']}/{row['hidden']} E={row['experts']:2} "
            f"{'own' if row['per_group'] else 'shared':6} k={row['top_k']} T={row['tokens']:4} {row['activation']} "
            f"{row['layers']:2} layers: "
            f"forward {row['forward']:.2f}, training {row['training']:.2f} x dense (FLOPs {row['flops']:.2f}; "
            f"dense {row['forward_dense_ms']:.2f} / {row['training_dense_ms']:.2f} ms)"
            + (f", memory {row['memory']:.2f}" if "memory" in row else ""),
            flush=True,
        )
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
