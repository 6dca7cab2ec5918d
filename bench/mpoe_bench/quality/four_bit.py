"""`python -m mpoe_bench.quality.four_bit`: eight experts around a 4-bit centre, in less memory than the dense model.

SmolLM2-135M in bfloat16 becomes a mixture of hidden-side experts, two per token. Its projections stay frozen, either
unchanged or in 4 bits by torchao. Experts and routers train on novels in float32, the same way in all arms (same start,
data and order); then the experts are rounded to bfloat16, and all arms are tested. Needs ``pip install torchao`` and
`mpoe_bench.quality.smollm`'s packages. The packaged weights are already rounded to 4 bits in groups of 32, so rounding
them again in the same groups loses almost nothing; in groups of 64 it does lose.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe.models.hidden import hidden_modules
from mpoe_bench.machine import describe
from mpoe_bench.quality.files import write_json
from mpoe_bench.quality.novels import NovelsField
from mpoe_bench.quality.smollm import loss_of

EXPERTS = 8
CLIP = 1.0


class _Frozen(torch.autograd.Function):
    """``x W^T`` for a weight that does not train: kernels for 4-bit weights have no backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        columns = ctx.weight.shape[1]
        # The kernel itself rebuilds the weight: its product with the identity matrix.
        weight = F.linear(torch.eye(columns, dtype=grad.dtype, device=grad.device), ctx.weight)
        return grad @ weight.T, None


class FrozenLinear(nn.Linear):
    """A linear layer whose quantised weight lets gradients through to its input."""

    def forward(self, input: Tensor) -> Tensor:
        y = _Frozen.apply(input, self.weight)
        return y if self.bias is None else y + self.bias


def centre(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The projections that the experts of each layer share, by name."""
    for name, layer in hidden_modules(model).items():
        for kind, module in layer.projections().items():
            assert isinstance(module, nn.Linear)
            yield f"{name}.{kind}", module


def quantise_centre(model: nn.Module, group: int) -> None:
    """Put the centre into 4 bits by torchao's CPU kernels, with one scale and zero per ``group`` numbers of a row.

    Raises:
        FileNotFoundError: torchao, or its 4-bit weights for CPUs, are not installed.
        ValueError: a ``group`` that torchao does not accept for one of the projections.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_
    except ImportError as error:
        raise FileNotFoundError(f"4-bit weights need torchao 0.18 or newer: pip install torchao ({error})") from error
    targets = {id(module): name for name, module in centre(model)}
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=group), filter_fn=lambda m, _: id(m) in targets)
    for name, module in centre(model):
        if type(module.weight) is nn.Parameter:
            raise ValueError(f"group must divide the columns of {name}, {module.in_features}; got {group}")
        module.__class__ = FrozenLinear


def bytes_of(model: nn.Module) -> int:
    """Memory of all parameters and buffers; for quantised ones, of the tensors that they consist of."""
    found: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        found |= {part.data_ptr(): part for part in parts}
    return sum(part.numel() * part.element_size() for part in found.values())


def mixture(dense: Any, arguments: argparse.Namespace, seed: int) -> Any:
    """Experts around the projections of ``dense``; only they and their routers train, in float32."""
    torch.manual_seed(seed)
    config = MPOEConfig(
        num_experts=EXPERTS, shape="hidden", block_size=arguments.block_size, block_per_group=not arguments.shared
    )
    model = convert_to_mpoe(dense, config)
    model.requires_grad_(False)
    for layer in hidden_modules(model).values():
        assert layer.router is not None
        for part in (layer.experts, layer.router):
            part.float().requires_grad_(True)
    return model


def train(model: Any, blocks: Tensor, arguments: argparse.Namespace, seed: int) -> float:
    """Train by AdamW with warm-up and cosine decay; returns seconds of CPU time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate, weight_decay=0.0)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    begun, warm = time.process_time(), max(1, arguments.steps // 10)
    for step in range(arguments.steps):
        share = (step - warm) / max(1, arguments.steps - warm)
        factor = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = arguments.rate * factor
        ids = blocks[order[step * arguments.batch : (step + 1) * arguments.batch]]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - begun


def run_arm(dense: Any, field: NovelsField, group: int | None, arguments: argparse.Namespace, seed: int) -> dict:
    """One arm: memory, and test losses before and after training; at the end the experts are rounded to bfloat16."""
    model = mixture(dense, arguments, seed)
    if group is not None:
        quantise_centre(model, group)
    test = field.blocks["test"]["novels"]
    before = loss_of(model.eval(), test)
    seconds = train(model, field.blocks["train"]["novels"], arguments, seed)
    for layer in hidden_modules(model).values():
        layer.experts.to(torch.bfloat16)
    return {
        "centre": "bfloat16" if group is None else f"4 bits, groups of {group}",
        "seed": seed,
        "bytes": bytes_of(model),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_before": before,
        "loss": loss_of(model.eval(), test),
        "cpu_seconds": seconds,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.quality.four_bit", description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="holds austen/train.*, validation.*, test.*")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--block_size", type=int, default=32, help="size of the experts' blocks")
    parser.add_argument("--shared", action="store_true", help="an expert's groups of hidden units share its blocks")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64], help="numbers of a row per scale")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="blocks of 128 tokens")
    parser.add_argument("--held_out", type=int, default=16, help="blocks to test on")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, given: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Every arm with every seed; saved after each, so that nothing is lost. ``given``: model and tokenizer."""
    if importlib.util.find_spec("torchao") is None:
        raise FileNotFoundError("4-bit weights need torchao 0.18 or newer: pip install torchao")
    torch.set_num_threads(arguments.threads)
    field = NovelsField(arguments.data_dir, batch=arguments.batch, held_out=arguments.held_out, given=given)
    dense = field.source[0].to(torch.bfloat16).eval()
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data_dir", "out")}
    results: dict[str, Any] = {
        "settings": settings,
        "torchao": version("torchao"),
        "machine": describe("cpu", arguments.threads, "cpu"),
        "tested_tokens": field.blocks["test"]["novels"].numel(),
        "dense": {"bytes": bytes_of(dense), "loss": loss_of(dense, field.blocks["test"]["novels"])},
        "arms": [],
    }
    megabytes = results["dense"]["bytes"] / 1e6
    print(f"dense, bfloat16: {megabytes:.1f} MB, {results['dense']['loss']:.4f} nats per token", flush=True)
    for seed in arguments.seeds:
        wide = None
        for group in (None, *arguments.groups):
            arm = run_arm(dense, field, group, arguments, seed)
            wide = arm if wide is None else wide
            arm["x_dense"] = arm["bytes"] / results["dense"]["bytes"]
            arm["beside_bfloat16"] = arm["loss"] - wide["loss"]
            results["arms"].append(arm)
            write_json(arguments.out, results)
            print(
                f"{EXPERTS} experts, centre in {arm['centre']}, seed {seed}: {arm['bytes'] / 1e6:.1f} MB "
                f"({arm['x_dense']:.2f} x dense), {arm['loss_before']:.4f} nats per token before, {arm['loss']:.4f} "
                f"after training ({arm['beside_bfloat16']:+.4f})",
                flush=True,
            )
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    dense = results["dense"]
    rows = [
        "| centre | memory, MB | x dense, bfloat16 | loss before training | after | beside the bfloat16 centre |",
        "|---|---|---|---|---|---|",
        f"| dense model, bfloat16 | {dense['bytes'] / 1e6:.1f} | 1.00 | {dense['loss']:.4f} | | |",
    ]
    for arm in results["arms"]:
        beside = f"{arm['beside_bfloat16']:+.4f} " if arm["beside_bfloat16"] else ""
        rows.append(
            f"| {arm['centre']} | {arm['bytes'] / 1e6:.1f} | {arm['x_dense']:.2f} | {arm['loss_before']:.4f} "
            f"| {arm['loss']:.4f} | {beside}|"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    print(table(run(parse(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
