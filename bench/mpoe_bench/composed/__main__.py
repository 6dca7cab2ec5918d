"""`python -m mpoe_bench.composed STUDY.toml`: make the runs that are missing, one after another; write the table."""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe_bench.composed import measures
from mpoe_bench.composed.measures import Bench, Plan, own_key
from mpoe_bench.composed.table import composed_table
from mpoe_bench.composed.texts import read_texts
from mpoe_bench.study.__main__ import records_in, store, write_text

Made = Callable[[Bench, Mapping[str, Any]], dict[str, Any]]
KINDS = ("neurons", "lora")


def runs(plan: Plan, records: Mapping[str, Any]) -> Iterator[tuple[str, Made]]:
    """Every run whose rate is known, in its order."""

    def own(kind: str, domain: str, steps: int, rate: float, seed: int) -> tuple[str, Made]:
        return own_key(kind, domain, steps, rate, seed), lambda bench, _: bench.own(kind, domain, steps, rate, seed)

    yield "base", lambda bench, _: bench.tests(bench.base)
    for kind in KINDS:
        for rate in plan.rates:
            yield from (own(kind, domain, plan.steps, rate, plan.seeds[0]) for domain in plan.domains)
    rates = {kind: plan.rate(kind, records) for kind in KINDS}
    if any(rate is None for rate in rates.values()):
        return
    yield f"composed {plan.seeds[0]}", partial(measures.composed_of_seed, seed=plan.seeds[0])
    for name in ("merges", "variants", "request_router"):
        yield name, getattr(measures, name)
    for seed in plan.seeds[1:]:
        for kind in KINDS:
            yield from (own(kind, domain, plan.steps, rates[kind], seed) for domain in plan.domains)
        yield f"composed {seed}", partial(measures.composed_of_seed, seed=seed)
    for kind in KINDS:
        yield from (own(kind, plan.forgetting, steps, rates[kind], plan.seeds[0]) for steps in plan.lengths)
    yield "one_adapter", measures.one_adapter
    yield from (own("neurons", tenant, plan.steps, rates["neurons"], plan.seeds[0]) for tenant in plan.tenants)
    yield from (("tenants", measures.tenants), ("answers", measures.answers))


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m mpoe_bench.composed", description=__doc__)
    p.add_argument("study", type=Path, help="its file; results stand beside it as .json, the table as .md")
    p.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    p.add_argument("--data_dir", type=Path, required=True, help="folder with austen, sms_spam, movie_sentiment, ...")
    p.add_argument("--work_dir", type=Path, required=True, help="folder that keeps the experts' files between runs")
    p.add_argument("--table", action="store_true", help="run nothing; write the table and name what is missing")
    arguments = p.parse_args(argv)
    torch.set_num_threads(1)
    file: Path = arguments.study
    plan, results = Plan(**tomllib.loads(file.read_text(encoding="utf-8"))), file.with_suffix(".json")
    if arguments.table:
        records = records_in(results)
        write_text(file.with_suffix(".md"), composed_table(plan, records))
        print("\n".join(key for key, _ in runs(plan, records) if key not in records))
        return 0
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    base.generation_config.pad_token_id = tokenizer.eos_token_id
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    texts = read_texts(tokenizer, arguments.data_dir, plan.domains, plan.probes)
    bench = Bench(plan, base, tokenizer, texts, arguments.work_dir)
    while True:
        records = records_in(results)
        key, made = next(((key, made) for key, made in runs(plan, records) if key not in records), (None, None))
        if key is None or made is None:
            return 0
        begin = time.process_time()
        record = made(bench, records) | {"cpu_seconds": round(time.process_time() - begin)}
        store(file, key, record, partial(composed_table, plan))
        shown = {name: value for name, value in record.items() if isinstance(value, float | int)}
        print(f"{key}: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
