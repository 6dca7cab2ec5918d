"""`mpoe compose BASE EXPERT ... --output_dir OUT`: experts of one model that were trained apart become one mixture.

An EXPERT is a file of `mpoe train --expert`, composed without any texts, or the folder of a LoRA adapter of
feed-forward networks, fitted as `--neurons` on its text. `--add MIXTURE` starts with the experts of a mixture,
`--remove` leaves some out, `--merge` makes one dense network. Of fine-tunes (saved models, adapters) in place of
experts, every network becomes a dense expert; these need `--texts`."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mpoe.cli.command import Asked, CommandError, as_command, option
from mpoe.cli.models import check_output, model_folder

if TYPE_CHECKING:
    from mpoe.cli.models import Source

USAGE = "mpoe compose BASE EXPERT ... --output_dir OUT [--flag value ...]"
MOST = 1 + 128  # words: the base and its fine-tunes
TOP_K = 2  # of experts; of fine-tunes 1
AT_ONCE = 8  # pieces of a batch


@dataclasses.dataclass
class ComposeOptions:
    """Options of `compose`."""

    output_dir: str | None = option(None, "folder of the mixture")
    texts: list[str] = option(
        [], "a text file for every expert or fine-tune, of its domain, in order; experts' files do without", nargs="+"
    )
    router: str = option(
        "ridge", "ridge: closed form; train: then trained alone, on the texts", choices=["ridge", "train"]
    )
    top_k: int | None = option(None, "experts per token; default 2 or the mixture's, of fine-tunes 1")
    add: str | None = option(None, "a mixture composed of experts, which gets these more")
    remove: list[str] = option([], "names of experts of the mixture --add to leave out", nargs="+")
    background: str | None = option(None, "of experts: a text of no domain; default: documentation of Python")
    neurons: int | None = option(
        None, "of experts fitted to LoRA adapters; as many numbers as the adapter beside files"
    )
    merge: bool = option(False, "one dense network with all experts' neurons, equally weighted, and no router")
    max_texts: int = option(300, "pieces of each text file that are read")
    max_length: int = option(128, "tokens of a piece")
    steps: int = option(200, "steps of --router train, and of fitting an adapter")
    overwrite: bool = option(False, "replace a model in output_dir")

    LEAST: ClassVar[dict[str, int]] = {"max_texts": 2, "max_length": 2, "steps": 1}


@as_command(USAGE, ComposeOptions, words=(1, MOST))
def command(asked: Asked) -> None:
    """Compose the experts or fine-tunes of the base, and save the mixture or the merged network."""
    (options,), (base, *names) = asked.options, asked.words
    # About experts: it names files of some, or a mixture of them, or the neurons of adapters.
    of_experts = options.neurons is not None or any(name.endswith(".expert") for name in names)
    if options.add is not None and not of_experts:
        from mpoe.models.expert_mixture import EXPERTS_FOLDER

        of_experts = (Path(options.add) / EXPERTS_FOLDER).is_dir()
    (_check_experts if of_experts else _check_fine_tunes)(names, options)
    absent = [text for text in options.texts if not Path(text).is_file()]
    if absent:
        raise CommandError(f"texts: no such file: {absent[0]}")
    if options.output_dir is None:
        raise CommandError(f"compose needs --output_dir: {USAGE}")
    out = check_output("output_dir", Path(options.output_dir), options.overwrite)
    from mpoe.cli.models import find
    from mpoe.models.table import CAUSAL

    source = find(base)
    if of_experts and source.is_mpoe:
        raise CommandError(f"compose needs the dense model that the experts were trained beside; {base} is a mixture")
    if not of_experts and (source.is_mpoe or source.style != CAUSAL):
        raise CommandError(
            f"compose takes dense causal language models, whose texts it reads; {base} is a {source.model_type} "
            "(mpoe.compose in Python takes batches of any model)"
        )
    (compose_experts if of_experts else compose_fine_tunes)(source, names, options, out)


def load_fine_tune(name: str, base: Any) -> Any:
    """A saved dense model, or ``base`` with a LoRA adapter merged into it.

    Raises:
        CommandError: no model or adapter of that name; an adapter, but PEFT is not installed.
    """
    from mpoe.cli.models import find, load_model

    if not (Path(name) / "adapter_config.json").is_file():
        return load_model(find(name))
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CommandError('a LoRA adapter needs PEFT: pip install "mpoe[peft]"') from error
    try:
        adapted: Any = PeftModel.from_pretrained(copy.deepcopy(base), name)
        return adapted.merge_and_unload().eval()
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(f"fine-tune: the adapter {name} does not fit the base: {error}") from error


def pieces(text: str, tokenizer: Any, length: int, most: int, name: str) -> Any:
    """The start of a text as token ids [at most ``most``, length]; CommandError with ``name`` if it is too short."""
    import torch

    # A token has fewer than ten characters on average: this reads enough, without reading a large text completely.
    ids = tokenizer(text[: 10 * most * length])["input_ids"]
    count = min(len(ids) // length, most)
    if not count:
        raise CommandError(f"{name} must hold at least {length} tokens; it has {len(ids)}")
    return torch.tensor(ids[: count * length]).view(count, length)


def batches(rows: Any) -> list[dict[str, Any]]:
    """Token ids [pieces, tokens] as batches for a language model."""
    return [{"input_ids": part, "labels": part} for part in rows.split(AT_ONCE)]


def _batches_of(file: str, tokenizer: Any, options: ComposeOptions) -> list[dict[str, Any]]:
    from mpoe.data.mappings import read_utf8

    text = read_utf8("texts:", Path(file))
    return batches(pieces(text, tokenizer, options.max_length, options.max_texts, f"texts: {file}"))


# ---------------------------------------------------------------------------------- fine-tunes


def _check_fine_tunes(names: Sequence[str], options: ComposeOptions) -> None:
    if options.remove or options.merge or options.add is not None or options.background is not None:
        raise CommandError("add, remove, merge and background are for experts' files; got fine-tunes")
    if not names:
        raise CommandError(f"compose needs a base and at least one expert: {USAGE}")
    if len(options.texts) != len(names):
        raise CommandError(f"texts must name a file for each of {len(names)} fine-tunes; got {len(options.texts)}")


def compose_fine_tunes(source: Source, names: Sequence[str], options: ComposeOptions, out: Path) -> None:
    """Compose the fine-tunes ``names`` of the model ``source`` and save the mixture in ``out``."""
    from mpoe.cli.models import load_model, load_tokenizer
    from mpoe.config import RouterConfig
    from mpoe.models.composition import compose

    tokenizer, base = load_tokenizer(source), load_model(source)
    fine_tunes = [load_fine_tune(name, base) for name in names]
    examples = [_batches_of(text, tokenizer, options) for text in options.texts]
    routing = RouterConfig(top_k=options.top_k or 1)
    mixture = compose(base, fine_tunes, examples, routing, router=options.router, steps=options.steps)
    for name, error in zip(names, mixture.composition_report.values(), strict=True):
        print(f"{name}: outside the experts {error:.2f} of what it changed is lost in the mean")
    with model_folder(out, mixture, tokenizer):
        pass
    print(f"saved to {out}")


# ------------------------------------------------------- experts' files, and adapters fitted as such


def _check_experts(names: Sequence[str], options: ComposeOptions) -> None:
    from mpoe.models.expert_mixture import is_adapter

    adapters = [name for name in names if is_adapter(name)]
    missing = [name for name in names if not Path(name).is_file() and name not in adapters]
    if missing:
        raise CommandError(f"compose takes either fine-tunes or experts' files; {missing[0]} is no file")
    if options.remove and options.add is None:
        raise CommandError("remove needs --add MIXTURE, whose experts it leaves out")
    if options.texts and len(options.texts) != len(names):
        raise CommandError(
            f"texts must name a file for each of {len(names)} experts, or none; got {len(options.texts)}"
        )
    if options.background is not None and not Path(options.background).is_file():
        raise CommandError(f"background: no such file: {options.background}")
    if adapters and not options.texts:
        raise CommandError(f"the adapter {adapters[0]} is fitted on texts of its domain: give --texts")
    if options.router == "train" and (not options.texts or options.add is not None):
        raise CommandError("router train needs --texts for every expert of the mixture, and no --add")
    if options.neurons is not None and (options.neurons < 1 or not adapters):
        raise CommandError(f"neurons must be at least 1, of experts fitted to adapters; got {options.neurons}")


def _fitted(base: Any, name: str, texts: Any, tokenizer: Any, options: ComposeOptions) -> Any:
    """The expert for the adapter in a folder; says what was lost."""
    from mpoe.models.expert_mixture import check_adapter, fit_adapter

    as_large = check_adapter(base, name)
    fit = {"neurons": options.neurons or as_large, "steps": options.steps, "tokenizer": tokenizer}
    expert = fit_adapter(base, load_fine_tune(name, base), texts, Path(name).resolve().name, **fit)
    facts = expert.facts["training"]
    print(
        f"{expert.name}: {fit['neurons']} neurons keep {facts['kept']:.0%} of the adapter's gain (held-out nats per "
        f"token: base {facts['base']:.3f}, adapter {facts['adapter']:.3f}, neurons {facts['expert']:.3f})"
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


def compose_experts(source: Source, names: Sequence[str], options: ComposeOptions, out: Path) -> None:
    """Compose the experts ``names`` of the model ``source`` into a mixture, or merge them, in the folder ``out``."""
    from mpoe.cli.models import load_model, load_tokenizer
    from mpoe.models import expert_mixture
    from mpoe.models.domains import train_routers
    from mpoe.models.expert_files import load_expert, merge_expert
    from mpoe.models.expert_mixture import is_adapter

    experts, background, top_k = ([], None, TOP_K) if options.add is None else _kept(options)
    none = options.add is None or background is not None
    own: list[Any] = [None if is_adapter(name) else load_expert(name) for name in names]
    tokenizer, base = load_tokenizer(source), load_model(source)
    texts: dict[str, Any] = {}
    for place, (name, text) in enumerate(zip(names, options.texts, strict=False)):
        read = _batches_of(text, tokenizer, options)
        own[place] = own[place] or _fitted(base, name, read, tokenizer, options)
        texts[own[place].name] = read
    experts += own
    if options.merge:
        merged = merge_expert(base, experts, weight=1 / max(1, len(experts)))
        with model_folder(out, merged, tokenizer):
            pass
        print(f"saved to {out}: a dense {type(merged).__name__}, every expert at weight 1/{len(experts)}")
        return
    if options.background is not None:
        background = _batches_of(options.background, tokenizer, options)
    elif none and background is None:
        background = expert_mixture.documentation_batches(base, tokenizer)
    routed: dict[str, Any] = {"top_k": options.top_k or top_k, "none": none, "background": background, "texts": texts}
    mixture = expert_mixture.compose_experts(base, experts, tokenizer=tokenizer, **routed)
    if options.router == "train":
        train_routers(mixture, [*texts.values(), routed["background"]], options.steps)
    with model_folder(out, mixture, tokenizer) as staging:
        expert_mixture.keep_experts(mixture, staging)
    others = f"tokens go to {routed['top_k']}; {expert_mixture.NONE!r} adds 0"
    print(f"saved to {out}: {', '.join(mixture.config.mpoe_experts)} ({others})")
