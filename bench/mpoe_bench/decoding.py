"""`python -m mpoe_bench.decoding`: time per token of `generate`, of a T5 with experts relative to the dense T5.

A T5 of base width with fewer layers and random weights; both models are called in turn in one process; medians. Three
columns, by which experts are cached: none (`model.cache_experts(0)`); those that `generate` keeps by itself until it
returns (at most as much memory as the dense feed-forward layers take); all, also between calls.
One thread, measured in CPU time, so that other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.layers import MPOExperts
from mpoe.models import convert_to_mpoe
from mpoe.models.decoding import decoding_bytes

SHAPES = {"separable": {}, "light": {"light_p": 64}, "paper": {}}
CHOICES = {"nothing kept": 0, "by itself": None, "room for all": 2**34}


def dense_model(layers: int, dtype: torch.dtype) -> T5ForConditionalGeneration:
    """A T5 of base width."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=layers, vocab_size=4096, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).to(dtype).eval()


def seconds_per_token(model: Any, ids: torch.Tensor, tokens: int) -> float:
    start = time.process_time()
    model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    return (time.process_time() - start) / tokens


def measure(shape: str, batch: int, layers: int, dtype: torch.dtype, rounds: int, tokens: int) -> dict[str, Any]:
    """Time ratios of one shape at one batch size, and the MB that the cache held."""
    dense = dense_model(layers, dtype)
    options = {"shape": shape, **SHAPES[shape]}
    model = convert_to_mpoe(dense_model(layers, dtype), MPOEConfig(num_experts=8, **options)).eval()
    ids = torch.randint(2, 4096, (batch, 16))
    row: dict[str, Any] = {
        "shape": shape,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "x": {},
        "MB": {},
    }
    networks = [m.weight.nbytes for n, m in dense.named_modules() if n.endswith((".wi", ".wo"))]
    row["MB"]["dense layers"] = sum(networks) / 1e6
    row["MB"]["by itself"] = decoding_bytes([m for m in model.modules() if isinstance(m, MPOExperts)]) / 1e6
    for name, bound in CHOICES.items():
        cache = model.cache_experts(bound)
        for each in (dense, model):
            seconds_per_token(each, ids, tokens)
        pairs = [(seconds_per_token(model, ids, tokens), seconds_per_token(dense, ids, tokens)) for _ in range(rounds)]
        row["x"][name] = median(ours / theirs for ours, theirs in pairs)
        if cache is not None:
            row["MB"][name] = cache.report().bytes / 1e6
    return row


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.decoding", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by commas")
    parser.add_argument("--batches", default="1,8,64", help="separated by commas")
    parser.add_argument("--layers", type=int, default=2, help="in the encoder and in the decoder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per call")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'shape':<10}{'batch':>6}"
        + "".join(f"{name:>14}" for name in CHOICES)
        + "   MB by itself (bound), for all, of dense layers"
    )
    for shape in chosen.shapes.split(","):
        for batch in map(int, chosen.batches.split(",")):
            dtype = getattr(torch, chosen.dtype)
            rows.append(row := measure(shape, batch, chosen.layers, dtype, chosen.rounds, chosen.tokens))
            memory = ", ".join(f"{row['MB'][name]:.0f}" for name in ("by itself", "room for all", "dense layers"))
            print(
                f"{shape:<10}{batch:>6}" + "".join(f"{row['x'][name]:>14.2f}" for name in CHOICES) + f"   {memory}",
                flush=True,
            )
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
