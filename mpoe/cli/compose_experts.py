"""`mpoe compose BASE NAME.expert ... --output_dir OUT`: experts that were trained apart become one mixture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError

if TYPE_CHECKING:
    from mpoe.cli.compose import ComposeOptions

OF_FINE_TUNES = ("texts", "router", "steps")
TOP_K = 2


def is_meant(names: Sequence[str], options: ComposeOptions) -> bool:
    """Whether a command is about experts' files: it names some, or a mixture of them."""
    if any(name.endswith(".expert") for name in names[1:]):
        return True
    from mpoe.models.expert_mixture import EXPERTS_FOLDER

    return options.add is not None and (Path(options.add) / EXPERTS_FOLDER).is_dir()


def _check(names: Sequence[str], options: ComposeOptions) -> None:
    given = [name for name in OF_FINE_TUNES if getattr(options, name) != getattr(type(options)(), name)]
    if given:
        raise CommandError(f"{given[0]} is for fine-tunes; experts' files need no texts and are not fitted")
    missing = [name for name in names[1:] if not Path(name).is_file()]
    if missing:
        raise CommandError(f"compose takes either fine-tunes or experts' files; {missing[0]} is no file")
    if options.remove and options.add is None:
        raise CommandError("remove needs --add MIXTURE, whose experts it leaves out")


def run(names: Sequence[str], options: ComposeOptions) -> Any:
    """Compose the experts' files ``names[1:]`` of the model ``names[0]`` and save the mixture; returns it."""
    from mpoe.cli.compose import check_common, pieces
    from mpoe.cli.files import model_folder
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.models.expert_files import load_expert
    from mpoe.models.expert_mixture import NONE, compose_experts, keep_experts, kept_experts

    _check(names, options)
    out, source = check_common(options), find(names[0])
    if source.is_mpoe:
        raise CommandError(
            f"compose needs the dense model that the experts were trained beside; {names[0]} is a mixture"
        )
    experts: list[Any] = []
    background: Any = None
    top_k, none = options.top_k or TOP_K, True
    if options.add is not None:
        experts, background = kept_experts(Path(options.add))
        none = background is not None
        kept = json.loads((Path(options.add) / "config.json").read_text(encoding="utf-8"))
        top_k = options.top_k or kept["mpoe"]["router"]["top_k"]
    unknown = sorted(set(options.remove) - {expert.name for expert in experts})
    if unknown:
        known = ", ".join(expert.name for expert in experts)
        raise CommandError(f"remove must name experts of the mixture, {known}; got {unknown[0]}")
    experts = [expert for expert in experts if expert.name not in options.remove]
    experts += [load_expert(name) for name in names[1:]]
    tokenizer, base = load_tokenizer(source), load_model(source)
    if options.background is not None:
        if not Path(options.background).is_file():
            raise CommandError(f"background: no such file: {options.background}")
        background = pieces(Path(options.background), tokenizer, options)
    mixture = compose_experts(base, experts, top_k=top_k, none=none, background=background, tokenizer=tokenizer)
    with model_folder(out) as staging:
        mixture.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        keep_experts(mixture, staging)
    print(f"saved to {out}: {', '.join(mixture.config.mpoe_experts)} (tokens go to {top_k}; {NONE!r} adds nothing)")
    return mixture
