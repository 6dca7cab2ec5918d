"""What an expert changes beside its base: the background kept beside experts, and the tables of
`mpoe train --expert` and `mpoe compose`."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.cli.report import Table
from mpoe.data.predict import Batch
from mpoe.models.background import (
    collect_background,
    load_background,
    may_write_background,
    save_background,
    start_token,
)
from mpoe.models.composition import Statistics
from mpoe.models.expert_files import WAYS, Expert, kept
from mpoe.models.expert_mixture import BACKGROUND_FILE, compose_experts
from mpoe.models.quiet import Change, measure_change, sample_own_words
from mpoe.models.weight_files import Tensors, check_link

HEADER = ("", "the domain", "the base's own texts", "KL on its own answers", "first choice equal")
WORDS = (
    "Loss in nats per token on held-out texts of the domain and on texts that the base writes by "
    "itself; on the base's own answers the KL divergence from it in nats per token, and how often "
    "the most probable token is the base's."
)


def speaks(base: Any, tokenizer: Any) -> bool:
    """Whether a model can say something by itself, of which a background can be made."""
    is_causal = base.can_generate() and not base.config.is_encoder_decoder
    return is_causal and start_token(tokenizer) is not None


def background_beside(base: Any, folders: Iterable[Path]) -> Tensors | None:
    """The background that one of the folders keeps for this base; ``None`` if none does."""
    for folder in folders:
        file = folder / BACKGROUND_FILE
        if not file.is_file():
            continue
        try:
            check_link(file, folder)
            return load_background(file, base)
        except ValueError as error:
            print(f"not used: {error}")
    return None


def made_background(base: Any, tokenizer: Any, folder: Path) -> Tensors:
    """The background that a folder keeps for this base, made now if it does not."""
    known = background_beside(base, [folder])
    if known is not None:
        return known
    print(
        "background: sampling what the base itself says, once for all experts of this base ...",
        flush=True,
    )
    begun = time.perf_counter()
    background = collect_background(base, tokenizer)
    seconds = time.perf_counter() - begun
    file = folder / BACKGROUND_FILE
    if may_write_background(file):
        save_background(background, base, file)
        print(f"background: {file}, in {seconds:.0f} s")
    else:
        print(f"background: in {seconds:.0f} s; not kept, as mpoe did not write {file}")
    return background


def changes_of_expert(
    base: Any,
    tokenizer: Any,
    always_on: Any,
    expert: Expert,
    held_out: Sequence[Batch],
    background: Statistics,
) -> dict[str, Change]:
    """What an expert changes: the base, the expert always on, and composed with *none*."""
    mixture = compose_experts(base, [expert], background=background)
    compared = dict(zip(WAYS[1:], (always_on, mixture), strict=True))
    return measure_change(base, compared, sample_own_words(base, tokenizer), held_out)


def facts_of_changes(changes: Mapping[str, Change]) -> dict[str, dict[str, float | None]]:
    """What an expert's file keeps of its changes, by model: losses on the domain's held-out texts,
    and what happens to the base's own answers. No texts."""
    return {
        "held_out": {name: change.domain for name, change in changes.items()},
        "answers": {name: change.answers for name, change in changes.items()},
        "same": {name: change.same for name, change in changes.items()},
    }


def table_of_changes(title: str, changes: Mapping[str, Change]) -> Table:
    """A row for each model."""
    rows = []
    for name, change in changes.items():
        domain = "" if change.domain is None else f"{change.domain:.3f}"
        own_texts = f"{change.own_texts:.3f}"
        answers = f"{change.answers:.4f}"
        rows.append([name, domain, own_texts, answers, f"{change.same:.1%}"])
    return Table(HEADER, rows, title, WORDS)


def show_composition(base: Any, tokenizer: Any, mixture: Any, experts: Sequence[Expert]) -> None:
    """Print what the files of the experts say of their gains, and what the mixture changes of the
    base's own words."""
    for expert in experts:
        losses = expert.facts["training"].get("held_out")
        share = kept(losses) if isinstance(losses, dict) else None
        if share is not None:
            print(
                f"{expert.name}: held-out loss {losses['base']:.3f} of the base, "
                f"{losses['expert, always on']:.3f} of the expert; composed with 'none' alone it "
                f"kept {share:.0%} of the difference"
            )
    if speaks(base, tokenizer):
        changes = measure_change(base, {"mixture": mixture}, sample_own_words(base, tokenizer))
        table_of_changes("What the base itself says", changes).show()
