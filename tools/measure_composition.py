"""Fine-tunes a language model on several texts, composes the fine-tunes, and compares losses on held-out text.

    python tools/measure_composition.py --texts austen.txt reviews.txt messages.txt --output_dir DIR
    python tools/measure_composition.py --base SMOLLM2 --length 256 --batch 4 --steps 60 --rate 2e-4 --bfloat16 ...

Prints, and writes to ``DIR/ffn.json`` and ``DIR/all.json`` (named after what was trained), the loss of every domain
(nats per token) under the base, its own fine-tune, the mean of all fine-tunes, and mixtures made by `mpoe compose`.
Fine-tunes that are already in DIR are reused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from mpoe.cli.compose import ComposeOptions, run
from mpoe.cli.pretrained import find, load_model, load_tokenizer
from mpoe.models.domains import routed_layers


@dataclasses.dataclass
class Trial:
    """What is trained and measured, and how."""

    base: str
    texts: list[Path]
    output_dir: Path
    length: int = 64
    batch: int = 16
    steps: int = 200
    rate: float = 1e-3
    bfloat16: bool = False
    max_texts: int = 300
    held_out: int = 150

    def rows(self, tokenizer: Any, text: str) -> torch.Tensor:
        """A text as token ids in pieces, ``[N, length]``."""
        ids = tokenizer(text)["input_ids"]
        return torch.tensor(ids[: len(ids) // self.length * self.length]).view(-1, self.length)

    def autocast(self) -> Any:
        """Autocast to bfloat16, if asked for."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    @torch.no_grad()
    def loss_of(self, model: Any, rows: torch.Tensor) -> float:
        """Mean loss per token; routers' auxiliary losses are not counted."""
        total = 0.0
        for part in rows.split(self.batch):
            with self.autocast():
                out = model.eval()(input_ids=part, labels=part)
            total += float(getattr(out, "task_loss", None) or out.loss) * len(part)
        return total / len(rows)

    def fine_tune(self, base: Any, rows: torch.Tensor, what: str) -> Any:
        """A copy of ``base`` trained on ``rows``: only its feed-forward networks (``ffn``), or all of it (``all``)."""
        torch.manual_seed(0)
        model = copy.deepcopy(base).train()
        for name, p in model.named_parameters():
            p.requires_grad_(what == "all" or ".mlp." in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.1)
        for step in range(self.steps):
            part = rows[torch.randint(len(rows), (self.batch,))]
            with self.autocast():
                loss = model(input_ids=part, labels=part).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 9:
                print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)
        return model.requires_grad_(True).eval()

    def halves(self, text: Path) -> tuple[str, str]:
        """The part to train on (also written to the output folder, for the routers) and the held-out part."""
        whole = text.read_text(encoding="utf-8")
        cut = int(len(whole) * 0.9)
        (self.output_dir / text.name).write_text(whole[:cut], encoding="utf-8")
        return whole[:cut], whole[cut:]

    def tuned(self, base: Any, tokenizer: Any, text: Path, what: str) -> Any:
        """The fine-tune on a text, loaded from its folder if it already exists."""
        own = self.output_dir / what / text.stem
        if not (own / "config.json").is_file():
            model = self.fine_tune(base, self.rows(tokenizer, self.halves(text)[0]), what)
            model.save_pretrained(own)
            tokenizer.save_pretrained(own)
        return load_model(find(str(own)))


def _mean(models: list[Any]) -> Any:
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, p in mean.named_parameters():
            p.copy_(torch.stack([dict(m.named_parameters())[name] for m in models]).mean(0))
    return mean


# Mixtures that `mpoe compose` makes, and the numbers of experts per token with which they are measured.
MIXTURES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "dense, ridge": ({}, (1, 2, 3)),
    "dense, trained router": ({"router": "train", "steps": 50}, (1, 2, 3)),
    "hidden blocks of 128, ridge": ({"experts": "hidden", "block_size": 128}, (1,)),
    "separable MPO, ridge": ({"experts": "mpo"}, (1,)),
}


def measure(
    trial: Trial, what: str, mixtures: dict[str, tuple[dict[str, Any], tuple[int, ...]]], top_k: list[int]
) -> dict[str, Any]:
    """Losses by model and domain; mixtures use those of their numbers of experts per token that are in ``top_k``."""
    base, tokenizer = load_model(find(trial.base)), load_tokenizer(find(trial.base))
    names = [text.stem for text in trial.texts]
    held = {text.stem: trial.rows(tokenizer, trial.halves(text)[1])[: trial.held_out] for text in trial.texts}
    tunes = [trial.tuned(base, tokenizer, text, what) for text in trial.texts]
    found = {
        "base": {name: trial.loss_of(base, held[name]) for name in names},
        "own fine-tune": {name: trial.loss_of(model, held[name]) for name, model in zip(names, tunes, strict=True)},
    }
    mean = _mean(tunes)
    found["mean of the fine-tunes"] = {name: trial.loss_of(mean, held[name]) for name in names}
    print(found, flush=True)
    del base, tunes, mean
    for title, (settings, possible) in mixtures.items():
        numbers = [number for number in possible if number in top_k]
        if not numbers:
            continue
        options = ComposeOptions(
            output_dir=str(trial.output_dir / "mixture"),
            texts=[str(trial.output_dir / text.name) for text in trial.texts],
            max_length=trial.length,
            max_texts=trial.max_texts,
            top_k=max(numbers),
            overwrite=True,
            **settings,
        )
        start = time.perf_counter()
        mixture = run(find(trial.base).path, [str(trial.output_dir / what / n) for n in names], options)
        took = time.perf_counter() - start
        for number in numbers:
            for layer in routed_layers(mixture).values():
                layer.router.top_k = number
            key = f"{title}, top-{number}"
            found[key] = {name: trial.loss_of(mixture, held[name]) for name in names}
            (trial.output_dir / f"{what}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            worst = max(found[key][n] / found["own fine-tune"][n] - 1 for n in names)
            print(f"{what}: {key}: {found[key]}, worst {worst:+.2%} of the own fine-tune, {took:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base", default="gpt2", help="a causal language model; default: this package's tiny GPT-2")
    for field in dataclasses.fields(Trial)[3:]:
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--trained", nargs="+", choices=["ffn", "all"], default=["ffn", "all"])
    parser.add_argument("--mixtures", nargs="+", choices=list(MIXTURES), default=list(MIXTURES))
    parser.add_argument("--top_k", nargs="+", type=int, choices=[1, 2, 3], default=[1, 2, 3])
    options = vars(parser.parse_args())
    trained, mixtures, top_k = (options.pop(name) for name in ("trained", "mixtures", "top_k"))
    trial = Trial(**options)
    trial.output_dir.mkdir(parents=True, exist_ok=True)
    for what in trained:
        measure(trial, what, {title: MIXTURES[title] for title in mixtures}, top_k)


if __name__ == "__main__":
    main()
