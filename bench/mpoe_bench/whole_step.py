"""`python -m mpoe_bench.whole_step`: an AdamW step of a whole T5 with experts against the dense T5, and its memory.

T5s with random weights, by default of base size, in bfloat16: dense, with MPO experts of each shape, and with dense
experts. Their steps are called in turn in one process; median ratios. One thread, measured in CPU time, so that other
processes disturb less. The state is weights, gradients and AdamW's two moments, counted; the activations are what a
forward pass leaves for the backward pass, measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.models import convert_to_mpoe
from mpoe_bench.machine import describe, title_of
from mpoe_bench.memory import peak_memory
from mpoe_bench.suites.train_step import Step

DENSE, DENSE_EXPERTS = "dense", "dense experts"
COPIES = 4  # weights, gradients, two moments


def dense_model(chosen: argparse.Namespace) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        d_model=chosen.width,
        d_ff=4 * chosen.width,
        d_kv=64,
        num_heads=chosen.width // 64,
        num_layers=chosen.layers,
        vocab_size=chosen.vocabulary,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(getattr(torch, chosen.dtype))


def expert_config(name: str, experts: int) -> MPOEConfig:
    """Of a column that is not the dense model's."""
    if name == DENSE_EXPERTS:
        return MPOEConfig(num_experts=experts, expert_type="dense")
    return MPOEConfig(num_experts=experts, shape=name)


def seconds(step: Step) -> float:
    start = time.process_time()
    step.step()
    return time.process_time() - start


def measure(name: str, dense: Step, ids: torch.Tensor, chosen: argparse.Namespace) -> dict[str, Any]:
    """One row; the model exists only here."""
    if name == DENSE:
        own = dense
    else:
        own = Step(convert_to_mpoe(dense_model(chosen), expert_config(name, chosen.experts)), ids)
    weights = sum(p.numel() * p.element_size() for p in own.model.parameters())
    row: dict[str, Any] = {
        "name": name,
        "parameters": sum(p.numel() for p in own.model.parameters()),
        "state_bytes": COPIES * weights,
        "activation_bytes": peak_memory(lambda: own.model(input_ids=ids, labels=ids).loss)[0].kept,
    }
    if name != DENSE:
        for step in (dense, own):
            step.step()
        pairs = [(seconds(own), seconds(dense)) for _ in range(chosen.rounds)]
        row["x"] = [ours / theirs for ours, theirs in pairs]
    return row


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.whole_step", description=__doc__)
    parser.add_argument("--shapes", default="separable", help="separated by commas")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", default="8,256", help="batch and sequence length")
    parser.add_argument("--layers", type=int, default=12, help="in the encoder and in the decoder")
    parser.add_argument("--width", type=int, default=768, help="d_model, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=32128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    batch, length = map(int, chosen.tokens.split(","))
    machine = describe("cpu", 1, "cpu")
    print(
        f"{title_of(machine)}, {chosen.dtype}, width {chosen.width}, {chosen.layers} layers a side, {batch} x {length} "
        f"tokens, {chosen.experts} experts"
    )
    print(
        f"{'model':<16}{'x dense':>9}{'(min to max)':>16}{'M parameters':>14}{'state, MB':>11}{'activations, MB':>17}"
    )
    ids = torch.randint(2, chosen.vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
    dense, rows = Step(dense_model(chosen), ids), []
    for name in (DENSE, *chosen.shapes.split(","), DENSE_EXPERTS):
        rows.append(row := measure(name, dense, ids, chosen))
        gc.collect()
        x = row.get("x", [1.0])
        print(
            f"{name:<16}{median(x):>9.2f}{f'{min(x):.2f} to {max(x):.2f}':>16}{row['parameters'] / 1e6:>14.1f}"
            f"{row['state_bytes'] / 1e6:>11,.0f}{row['activation_bytes'] / 1e6:>17,.0f}",
            flush=True,
        )
    if chosen.out is not None:
        options = {key: value for key, value in vars(chosen).items() if key != "out"}
        chosen.out.write_text(
            json.dumps({"machine": machine, **options, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
