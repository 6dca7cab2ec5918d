"""`python -m mpoe_bench.decoding`: time per token of `generate`, of a T5 with experts relative to the dense T5.

A T5, by default of base width, with fewer layers and random weights; both models are called in turn in one process;
medians. Three columns, by which experts are cached: none (`model.cache_experts(0)`); those that `generate` keeps by
itself until it returns (at most as much memory as the dense feed-forward layers take); all. The first figure is of
whole calls, with the encoder's pass; the second, of the tokens after the first `--after`.
The memory is that of the experts' cores and what is cached of them, next to that of dense experts.
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
from transformers import StoppingCriteria, StoppingCriteriaList, T5Config, T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.layers import MPOExperts
from mpoe.models import convert_to_mpoe
from mpoe.models.decoding import kept_while_generating
from mpoe_bench.machine import describe, title_of

EXPERTS = 8
SHAPES = {"separable": {}, "light": {"light_p": 64}, "paper": {}}
CHOICES = {"nothing kept": 0, "by itself": None, "room for all": 2**34}


def dense_model(layers: int, width: int, dtype: torch.dtype) -> T5ForConditionalGeneration:
    """A T5 with ``d_model = width`` and base's proportions."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=width,
        d_ff=4 * width,
        d_kv=64,
        num_heads=width // 64,
        num_layers=layers,
        vocab_size=4096,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(dtype).eval()


class Clock(StoppingCriteria):
    """The time after each new token; stops nothing."""

    def __init__(self) -> None:
        self.times = [time.process_time()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.process_time())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def seconds_per_token(model: Any, ids: torch.Tensor, tokens: int, after: int) -> tuple[float, float]:
    """Of a whole call, and of the tokens after the first ``after``."""
    clock = Clock()
    criteria = StoppingCriteriaList([clock])
    model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, stopping_criteria=criteria)
    start, end = clock.times[0], clock.times[-1]
    return (end - start) / tokens, (end - clock.times[after]) / (tokens - after)


def measure(shape: str, batch: int, dtype: torch.dtype, chosen: argparse.Namespace) -> dict[str, Any]:
    """Time ratios of one shape at one batch size, and MB."""
    tokens, after = chosen.tokens, chosen.after
    dense = dense_model(chosen.layers, chosen.width, dtype)
    options = {"shape": shape, **SHAPES[shape]}
    model = convert_to_mpoe(
        dense_model(chosen.layers, chosen.width, dtype), MPOEConfig(num_experts=EXPERTS, **options)
    ).eval()
    ids = torch.randint(2, 4096, (batch, 16))
    row: dict[str, Any] = {
        "shape": shape,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "x": {},
        "x_after": {},
        "MB": {},
    }
    networks = [m.weight.nbytes for n, m in dense.named_modules() if n.endswith((".wi", ".wo"))]
    row["MB"]["dense layers"] = sum(networks) / 1e6
    experts = [m for m in model.modules() if isinstance(m, MPOExperts)]
    with kept_while_generating(model, None) as own:
        # Folded blocks of separable experts are views of their cores.
        keeps_weights = own is not None and any(layer.full_weights_may_pay() for layer in experts)
        row["MB"]["by itself"] = own.max_bytes / 1e6 if keeps_weights else 0.0
    row["MB"]["cores"] = sum(c.nbytes for e in experts for p in e.projections().values() for c in p.cores()) / 1e6
    row["MB"]["dense experts"] = EXPERTS * row["MB"]["dense layers"]
    row["MB"]["room for all"] = row["MB"]["dense experts"] if keeps_weights else 0.0
    for name, bound in CHOICES.items():
        model.cache_experts(bound)
        for each in (dense, model):
            seconds_per_token(each, ids, tokens, after)
        pairs = [
            (seconds_per_token(model, ids, tokens, after), seconds_per_token(dense, ids, tokens, after))
            for _ in range(chosen.rounds)
        ]
        for number, key in enumerate(("x", "x_after")):
            row[key][name] = median(ours[number] / theirs[number] for ours, theirs in pairs)
    return row


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.decoding", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by commas")
    parser.add_argument("--batches", default="1,8,64", help="separated by commas")
    parser.add_argument("--layers", type=int, default=2, help="in the encoder and in the decoder")
    parser.add_argument("--width", type=int, default=768, help="d_model, a multiple of 64")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per call")
    parser.add_argument("--after", type=int, default=16, help="tokens that the second figure leaves out")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    if not 0 <= chosen.after < chosen.tokens:
        parser.error(f"--after must be between 0 and {chosen.tokens - 1}, one less than --tokens; got {chosen.after}")
    torch.set_num_threads(1)
    dtype = getattr(torch, chosen.dtype)
    machine, rows = describe("cpu", 1, "cpu"), []
    print(
        f"{title_of(machine)}, {chosen.dtype}, width {chosen.width}, {chosen.layers} layers a side, "
        f"{chosen.tokens} tokens"
    )
    print(
        f"{'shape':<10}{'batch':>6}"
        + "".join(f"{name:>16}" for name in CHOICES)
        + "   MB of cores, with what is kept by itself, with all; of dense experts"
    )
    for shape in chosen.shapes.split(","):
        for batch in map(int, chosen.batches.split(",")):
            row = measure(shape, batch, dtype, chosen)
            rows.append(row)
            cells = [f"{row['x'][name]:.2f} / {row['x_after'][name]:.2f}" for name in CHOICES]
            held = row["MB"]
            memory = [held["cores"], held["cores"] + held["by itself"], held["cores"] + held["room for all"]]
            print(
                f"{shape:<10}{batch:>6}"
                + "".join(f"{cell:>16}" for cell in cells)
                + "   "
                + ", ".join(f"{megabytes:.0f}" for megabytes in memory)
                + f"; {held['dense experts']:.0f}",
                flush=True,
            )
            if chosen.out is not None:
                sizes = {name: getattr(chosen, name) for name in ("width", "layers", "tokens", "after", "rounds")}
                found = {"machine": machine, **sizes, "rows": rows}
                chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
