"""`mpoe compose BASE NAME.expert ... --output_dir OUT`: experts that were trained apart become one mixture, or, with
`--merge`, one dense network. LoRA adapters of feed-forward networks are fitted as experts first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError

if TYPE_CHECKING:
    from mpoe.cli.compose import ComposeOptions

TOP_K = 2


def is_meant(names: Sequence[str], options: ComposeOptions) -> bool:
    """Whether a command is about experts: it names files of some, or a mixture of them, or the neurons of adapters."""
    if any(name.endswith(".expert") for name in names[1:]) or options.neurons is not None:
        return True
    from mpoe.models.expert_mixture import EXPERTS_FOLDER

    return options.add is not None and (Path(options.add) / EXPERTS_FOLDER).is_dir()


def _check(names: Sequence[str], options: ComposeOptions) -> None:
    from mpoe.models.expert_adapters import is_adapter

    adapters = [name for name in names[1:] if is_adapter(name)]
    missing = [name for name in names[1:] if not Path(name).is_file() and name not in adapters]
    if missing:
        raise CommandError(f"compose takes either fine-tunes or experts' files; {missing[0]} is no file")
    if options.remove and options.add is None:
        raise CommandError("remove needs --add MIXTURE, whose experts it leaves out")
    if options.texts and len(options.texts) != len(names) - 1:
        wanted = f"a file for each of {len(names) - 1} experts, or none"
        raise CommandError(f"texts must name {wanted}; got {len(options.texts)}")
    absent = [text for text in [*options.texts, options.background] if text is not None and not Path(text).is_file()]
    if absent:
        raise CommandError(f"{'texts' if absent[0] in options.texts else 'background'}: no such file: {absent[0]}")
    if adapters and not options.texts:
        raise CommandError(f"the adapter {adapters[0]} is fitted on texts of its domain: give --texts")
    if options.router == "train" and (not options.texts or options.add is not None):
        raise CommandError("router train needs --texts for every expert of the mixture, and no --add")
    if options.router not in ("ridge", "train"):
        raise CommandError(f"router must be ridge or train; got {options.router!r}")
    if options.neurons is not None and (options.neurons < 1 or not adapters):
        raise CommandError(f"neurons must be at least 1, of experts fitted to adapters; got {options.neurons}")
    if options.steps < 1:
        raise CommandError(f"steps must be at least 1; got {options.steps}")


def _fitted(base: Any, name: str, batches: Any, tokenizer: Any, options: ComposeOptions) -> Any:
    """The expert for the adapter in a folder; says what was lost."""
    from mpoe.cli.compose import load_fine_tune
    from mpoe.models.expert_adapters import check_adapter, fit_adapter

    as_large = check_adapter(base, name)
    neurons = options.neurons or as_large
    adapted = load_fine_tune(name, base)
    fit = {"neurons": neurons, "steps": options.steps, "tokenizer": tokenizer}
    expert = fit_adapter(base, adapted, batches, Path(name).resolve().name, **fit)
    facts = expert.facts["training"]
    print(
        f"{expert.name}: {neurons} neurons keep {facts['kept']:.0%} of the adapter's gain (held-out nats per token: "
        f"base {facts['base']:.3f}, adapter {facts['adapter']:.3f}, neurons {facts['expert']:.3f})"
    )
    return expert


def _kept(options: ComposeOptions) -> tuple[list[Any], Any, int]:
    """Experts of the mixture ``--add`` without those of ``--remove``, its background and its top-k."""
    from mpoe.models.expert_mixture import kept_experts

    folder = Path(str(options.add))
    experts, background = kept_experts(folder)
    unknown = sorted(set(options.remove) - {expert.name for expert in experts})
    if unknown:
        known = ", ".join(expert.name for expert in experts)
        raise CommandError(f"remove must name experts of the mixture, {known}; got {unknown[0]}")
    top_k = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mpoe"]["router"]["top_k"]
    return [expert for expert in experts if expert.name not in options.remove], background, top_k


def run(names: Sequence[str], options: ComposeOptions) -> Any:
    """Compose the experts ``names[1:]`` of the model ``names[0]`` and save the mixture, or merge them; returns it."""
    from mpoe.cli.compose import check_common, pieces
    from mpoe.cli.files import model_folder
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.models.expert_adapters import is_adapter
    from mpoe.models.expert_files import load_expert, merge_expert
    from mpoe.models.expert_mixture import NONE, compose_experts, documentation_batches, keep_experts

    _check(names, options)
    out, source = check_common(options), find(names[0])
    if source.is_mpoe:
        raise CommandError(
            f"compose needs the dense model that the experts were trained beside; {names[0]} is a mixture"
        )
    experts: list[Any] = []
    background: Any = None
    top_k, none = TOP_K, True
    if options.add is not None:
        experts, background, top_k = _kept(options)
        none = background is not None
    experts += [None if is_adapter(name) else load_expert(name) for name in names[1:]]
    tokenizer, base = load_tokenizer(source), load_model(source)
    first = len(experts) - len(names) + 1
    texts = {}
    for place, (name, text) in enumerate(zip(names[1:], options.texts, strict=False), first):
        batches = pieces(Path(text), tokenizer, options)
        experts[place] = experts[place] or _fitted(base, name, batches, tokenizer, options)
        texts[experts[place].name] = batches
    if options.merge:
        merged = merge_expert(base, experts, weight=1 / max(1, len(experts)))
        with model_folder(out) as staging:
            merged.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        print(f"saved to {out}: a dense {type(merged).__name__}, every expert at weight 1/{len(experts)}")
        return merged
    if options.background is not None:
        background = pieces(Path(options.background), tokenizer, options)
    elif none and background is None:
        background = documentation_batches(base, tokenizer)
    routed = {"top_k": options.top_k or top_k, "none": none, "background": background, "texts": texts}
    mixture = compose_experts(base, experts, tokenizer=tokenizer, **routed)
    if options.router == "train":
        from mpoe.models.domains import train_routers

        train_routers(mixture, [*texts.values(), background], 0, options.steps)
    with model_folder(out) as staging:
        mixture.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        keep_experts(mixture, staging)
    print(f"saved to {out}: {', '.join(mixture.config.mpoe_experts)} (tokens go to {routed['top_k']}; {NONE!r} adds 0)")
    return mixture
