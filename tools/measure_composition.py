"""Fine-tunes a small model on several texts, composes the fine-tunes, and compares losses on texts that were held out.

    python tools/measure_composition.py --texts austen.txt reviews.txt messages.txt --output_dir DIR

Prints, and writes to ``DIR/ffn.json`` and ``DIR/all.json`` (what was trained), the loss of every domain (nats per
token) under the base, its own fine-tune, the mean of all fine-tunes, and mixtures made by `mpoe compose`. Fine-tunes
that lie in DIR are taken from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from mpoe.cli.compose import ComposeOptions, run
from mpoe.data.embedded import load_stand_in, stand_in_path

LENGTH, BATCH = 64, 16


def _rows(tokenizer: Any, text: str) -> torch.Tensor:
    ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    """Mean loss per token of rows ``[N, 64]``; routers' auxiliary losses are not counted."""
    total = 0.0
    for part in rows.split(BATCH):
        out = model.eval()(input_ids=part, labels=part)
        total += float(getattr(out, "task_loss", None) or out.loss) * len(part)
    return total / len(rows)


def fine_tune(base: Any, rows: torch.Tensor, steps: int, what: str) -> Any:
    """A copy of ``base`` trained on rows: its feed-forward networks alone (``ffn``), or all of it (``all``)."""
    torch.manual_seed(0)
    model = copy.deepcopy(base).train()
    for name, p in model.named_parameters():
        p.requires_grad_(what == "all" or ".mlp." in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        part = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(True).eval()


def _mean(models: list[Any]) -> Any:
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, p in mean.named_parameters():
            p.copy_(torch.stack([dict(m.named_parameters())[name] for m in models]).mean(0))
    return mean


MIXTURES = {
    "dense, ridge, top-3": {"top_k": 3},
    "dense, trained router, top-3": {"router": "train", "steps": 50, "top_k": 3},
    "dense, ridge, top-1": {},
    "dense, ridge, top-2": {"top_k": 2},
    "hidden blocks of 128, ridge, top-1": {"experts": "hidden", "block_size": 128},
    "separable MPO, ridge, top-1": {"experts": "mpo"},
    "dense, trained router, top-1": {"router": "train", "steps": 50},
    "dense, trained router, top-2": {"router": "train", "steps": 50, "top_k": 2},
}


def measure(texts: list[Path], out: Path, steps: int, what: str, mixtures: dict[str, Any]) -> dict[str, Any]:
    """Losses by model and domain."""
    base, tokenizer = load_stand_in("gpt2")
    names, held, tunes = [text.stem for text in texts], {}, []
    for text in texts:
        whole = text.read_text(encoding="utf-8")
        cut = int(len(whole) * 0.9)
        (out / f"{text.stem}.txt").write_text(whole[:cut], encoding="utf-8")
        held[text.stem] = _rows(tokenizer, whole[cut:])[:150]
        own = out / what / text.stem
        if (own / "config.json").is_file():
            tunes.append(GPT2LMHeadModel.from_pretrained(own).eval())
            continue
        tunes.append(fine_tune(base, _rows(tokenizer, whole[:cut]), steps, what))
        tunes[-1].save_pretrained(own)
        tokenizer.save_pretrained(own)
    found = {
        "base": {name: loss_of(base, held[name]) for name in names},
        "own fine-tune": {name: loss_of(model, held[name]) for name, model in zip(names, tunes, strict=True)},
        "mean of the fine-tunes": {name: loss_of(_mean(tunes), held[name]) for name in names},
    }
    print(found, flush=True)
    for title, settings in mixtures.items():
        options = ComposeOptions(
            output_dir=str(out / "mixture"),
            texts=[str(out / f"{n}.txt") for n in names],
            max_length=LENGTH,
            overwrite=True,
            **settings,
        )
        start = time.perf_counter()
        mixture = run(str(stand_in_path("gpt2")), [str(out / what / n) for n in names], options)
        took = time.perf_counter() - start
        found[title] = {name: loss_of(mixture, held[name]) for name in names}
        (out / f"{what}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        worst = max(found[title][n] / found["own fine-tune"][n] - 1 for n in names)
        print(f"{what}: {title}: {found[title]}, worst {worst:+.2%} of the own fine-tune, {took:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trained", nargs="+", choices=["ffn", "all"], default=["ffn", "all"])
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for what in options.trained:
        measure(options.texts, options.output_dir, options.steps, what, MIXTURES)


if __name__ == "__main__":
    main()
