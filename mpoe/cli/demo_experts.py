"""Experts of three domains, trained apart beside one small model, made quiet, and composed: what
`mpoe demo` does, and what it measures."""

import time
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from statistics import fmean, mode
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers.utils import logging

from mpoe.cli.outputs import check_model_output, model_folder
from mpoe.data.documentation import load_documentation
from mpoe.data.domains import DOMAINS, domain_text
from mpoe.data.predict import token_losses
from mpoe.data.stand_in_models import load_stand_in
from mpoe.inspection import route_text
from mpoe.models import collect_statistics, compose_experts, save_expert, start_expert
from mpoe.models.background import (
    AT_ONCE,
    labelled_batches,
    own_texts,
    pieces,
    pooled_background,
    save_background,
    token_batches,
)
from mpoe.models.expert_mixture import BACKGROUND_FILE, EXPERTS_FOLDER, keep_experts

MODEL_FOLDER = "model"
FOREIGN = "documentation"  # held out; the base knows it, no expert and no background has seen it
STEPS = 60
PIECE_TOKENS = 128
NEURONS = 64
LEARNING_RATE = 0.01
TRAINED_PIECES = 2000  # of a domain's text, at most
STATISTICS_PIECES = 256  # of these
TESTED_PIECES = 24  # of each held-out text
PICTURE_TOKENS = 48
PROMPT_TOKENS = 16
NEW_TOKENS = 24


@dataclass
class DomainLosses:
    """Losses on held-out text in nats per token: of the domain, and what `FOREIGN` loses."""

    base: float
    always_on: float
    quiet: float
    foreign_lost_always_on: float
    foreign_lost_quiet: float
    composed: float = nan

    def kept(self, loss: float) -> float:
        """The share of the expert's gain that is left at this loss; NaN if it gained nothing."""
        gain = self.base - self.always_on
        return (self.base - loss) / gain if gain > 0 else nan


@dataclass
class DemoResults:
    """What ``results.json`` holds.

    Attributes:
        domains: losses by domain.
        foreign_base, foreign_composed: losses on `FOREIGN`, of the base and the mixture of all.
        experts: names of the mixture's experts, *none* among them.
        picture: tokens of each held-out text, each with the number of its expert.
        continued: of each, ``prompt``, and how the model goes on ``before`` and ``after``.
    """

    steps: int
    seed: int
    domains: dict[str, DomainLosses] = field(default_factory=dict)
    foreign_base: float = 0.0
    foreign_composed: float = 0.0
    experts: list[str] = field(default_factory=list)
    picture: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    continued: dict[str, dict[str, str]] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def conclusions(self) -> list[str]:
        """What the numbers say, and what they do not."""
        domains = self.domains.values()
        quiet = share_text(fmean(domain.kept(domain.quiet) for domain in domains))
        composed = share_text(fmean(domain.kept(domain.composed) for domain in domains))
        lost_quiet = fmean(domain.foreign_lost_quiet for domain in domains)
        lost_always_on = fmean(domain.foreign_lost_always_on for domain in domains)
        return [
            f"A quiet expert keeps {quiet} of its gain and costs {FOREIGN} {lost_quiet:.3f} nats; "
            f"always on it costs {lost_always_on:.3f} (means of the three).",
            f"The three in one model keep {composed} and cost {FOREIGN} "
            f"{self.foreign_composed - self.foreign_base:.3f}.",
            "The model has a million numbers; of one of 135 million docs/evidence.md tells. This "
            "shows neither longer training nor domains that are nearer to each other.",
        ]


def share_text(share: float) -> str:
    """``95%``; a dash if there was no gain to keep."""
    return "-" if isnan(share) else f"{share:.0%}"


def train_experts(output_dir: Path, steps: int, seed: int) -> DemoResults:
    """Train experts of three domains apart, make each quiet, and compose them; files are written to
    ``output_dir``, and losses taken."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # GPT-2 asks for the mask that `generate` gave it
    start = time.perf_counter()
    base, tokenizer = load_stand_in("gpt2")
    tokenizer.model_max_length = 10**9  # texts are cut into pieces
    held_out = _held_out_batches(tokenizer)

    def loss(model: nn.Module, text: str) -> float:
        return float(token_losses(model, held_out[text]).mean())

    results = DemoResults(steps, seed, foreign_base=loss(base, FOREIGN))
    folder = output_dir / EXPERTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Without the general text of the default background, which is a domain here.
    background = pooled_background(base, [token_batches(own_texts(base, tokenizer))])
    save_background(background, base, folder / BACKGROUND_FILE)
    files = []
    after: dict[str, nn.Module] = {}
    for number, name in enumerate(DOMAINS):
        started = time.perf_counter()
        domain_pieces = pieces(domain_text(name, False), tokenizer, PIECE_TOKENS, TRAINED_PIECES)
        always_on = _train(base, domain_pieces, steps, seed + number)
        file = folder / f"{name}.expert"
        # of all of its files
        drawn = torch.randperm(len(domain_pieces))[:STATISTICS_PIECES]
        statistics = collect_statistics(always_on, labelled_batches(domain_pieces[drawn]))
        save_expert(
            always_on, file, statistics=statistics, tokenizer=tokenizer, training={"steps": steps}
        )
        quiet = compose_experts(base, [file], background=background)
        results.domains[name] = DomainLosses(
            base=loss(base, name),
            always_on=loss(always_on, name),
            quiet=loss(quiet, name),
            foreign_lost_always_on=loss(always_on, FOREIGN) - results.foreign_base,
            foreign_lost_quiet=loss(quiet, FOREIGN) - results.foreign_base,
        )
        results.megabytes[file.name] = file.stat().st_size / 1e6
        files.append(file)
        after[name] = quiet
        seconds = time.perf_counter() - started
        print(f"trained {file} on {domain_pieces.numel():,} tokens in {seconds:.0f} s")
    mixture = compose_experts(base, files, background=background, tokenizer=tokenizer)
    after[FOREIGN] = mixture
    for name, domain in results.domains.items():
        domain.composed = loss(mixture, name)
    results.foreign_composed = loss(mixture, FOREIGN)
    results.experts = mixture.config.mpoe_experts
    output = check_model_output("model", output_dir / MODEL_FOLDER, True)
    with model_folder(output, mixture, tokenizer) as staging:
        keep_experts(mixture, staging)
    for text, text_batches in held_out.items():
        ids = text_batches[0]["input_ids"][0]
        results.picture[text] = _experts_of_tokens(mixture, tokenizer, ids[:PICTURE_TOKENS])
        results.continued[text] = _continued(base, after[text], tokenizer, ids[:PROMPT_TOKENS])
    results.seconds = time.perf_counter() - start
    return results


def _held_out_batches(tokenizer: Any) -> dict[str, list[dict[str, Tensor]]]:
    """Of the domains and of `FOREIGN`."""
    texts = {name: domain_text(name, True) for name in DOMAINS}
    texts[FOREIGN] = "\n\n".join(record.text for record in load_documentation("test")[::7])
    return {
        name: labelled_batches(pieces(text, tokenizer, PIECE_TOKENS, TESTED_PIECES))
        for name, text in texts.items()
    }


def _train(base: Any, domain_pieces: Tensor, steps: int, seed: int) -> Any:
    """An expert beside ``base``, trained on random pieces."""
    torch.manual_seed(seed)
    model = start_expert(base, NEURONS).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    # Of at least ten steps: the schedule divides by the steps of a warm-up.
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(steps, 10) + 1, pct_start=0.1)
    for _ in range(steps):
        ids = domain_pieces[torch.randint(len(domain_pieces), (AT_ONCE,))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _experts_of_tokens(mixture: Any, tokenizer: Any, ids: Tensor) -> list[tuple[str, int]]:
    """Each token of a text with the expert that most layers sent it to."""
    (route,) = route_text(mixture, tokenizer, tokenizer.decode(ids))
    best_by_layer = [[choices[0] for choices in layer] for layer in route.experts]
    experts = [mode(of_token) for of_token in zip(*best_by_layer, strict=True)]
    tokens = [token.replace("\\n", " ") for token in route.tokens]
    return list(zip(tokens, experts, strict=True))


def _continued(before: Any, after: Any, tokenizer: Any, ids: Tensor) -> dict[str, str]:
    """A prompt, and how both models go on."""
    prompt = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    texts = {"prompt": tokenizer.decode(ids)}
    for name, model in (("before", before), ("after", after)):
        written = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts[name] = tokenizer.decode(written[0, len(ids) :])
    return texts
