"""`mpoe compose BASE EXPERT ... --output_dir OUT`: experts of one model that were trained apart become one mixture.

An EXPERT is a file of `mpoe train --expert`, composed without any texts, or the folder of a LoRA adapter of
feed-forward networks, fitted as `--neurons` on its text. `--add MIXTURE` starts with the experts of a mixture,
`--remove` leaves some out, `--merge` makes one dense network. Of fine-tunes (saved models, adapters) in place of
experts, every network becomes a dense expert; these need `--texts`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import option, read_command

USAGE = "mpoe compose BASE EXPERT ... --output_dir OUT [--flag value ...]"
STATISTICS = "router_statistics.safetensors"
MOST = 1 + 128  # words: the base and its fine-tunes


@dataclasses.dataclass
class ComposeOptions:
    """Options of `compose`."""

    _argument_group_name = "run"

    output_dir: str | None = option(None, "folder of the mixture")
    texts: list[str] = option(
        [], "a text file for every expert or fine-tune, of its domain, in order; experts' files do without", nargs="+"
    )
    router: str = option(
        "ridge", "ridge: closed form; train: then trained alone, on the texts", choices=["ridge", "train"]
    )
    top_k: int | None = option(None, "experts per token; default 2 or the mixture's, of fine-tunes 1")
    add: str | None = option(None, "a composed mixture, which gets these experts more (of fine-tunes one)")
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


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    asked = read_command(USAGE, __doc__, [ComposeOptions], arguments, words=MOST)
    if asked is None:
        return
    names, (options,), _ = asked
    if _of_experts(names, options):
        run_experts(names, options)
        return
    if options.remove or options.merge or options.background is not None:
        raise CommandError("remove, merge and background are for experts' files; got fine-tunes")
    if len(names) < 2:
        raise CommandError(f"compose needs a base and at least one expert: {USAGE}")
    run(names[0], names[1:], options)


def _check(names: Sequence[str], options: ComposeOptions) -> Path:
    """Refuse invalid options; returns the output folder."""
    out = check_common(options)
    if options.add is not None and len(names) != 1:
        raise CommandError(f"add takes one fine-tune at a time; got {len(names)}")
    if len(options.texts) != len(names):
        raise CommandError(f"texts must name a file for each of {len(names)} fine-tunes; got {len(options.texts)}")
    missing = [text for text in options.texts if not Path(text).is_file()]
    if missing:
        raise CommandError(f"texts: no such file: {missing[0]}")
    return out


def check_common(options: ComposeOptions) -> Path:
    """Refuse invalid sizes and a folder that holds a model; returns the output folder."""
    from mpoe.cli.files import check_model_folder

    if options.output_dir is None:
        raise CommandError(f"compose needs --output_dir: {USAGE}")
    for name in ("max_texts", "max_length"):
        if getattr(options, name) < 2:
            raise CommandError(f"{name} must be at least 2; got {getattr(options, name)}")
    out = Path(options.output_dir)
    check_model_folder("output_dir", out, options.overwrite)
    return out


def load_fine_tune(name: str, base: Any) -> Any:
    """A saved dense model, or ``base`` with a LoRA adapter merged into it.

    Raises:
        CommandError: no model or adapter of that name; an adapter, but PEFT is not installed.
    """
    import copy

    from mpoe.cli.pretrained import find, load_model

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


def pieces(file: Path, tokenizer: Any, options: ComposeOptions) -> list[dict[str, Any]]:
    """The start of a text as batches of 8 pieces of ``max_length`` tokens, ``input_ids`` and ``labels``."""
    import torch

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"texts: {file} is not UTF-8: {error}") from error
    # A token has fewer than ten characters on average: this reads enough, without reading a large file completely.
    ids = tokenizer(text[: 10 * options.max_texts * options.max_length])["input_ids"]
    count = min(len(ids) // options.max_length, options.max_texts)
    if not count:
        raise CommandError(f"texts: {file} must hold at least {options.max_length} tokens; it has {len(ids)}")
    rows = torch.tensor(ids[: count * options.max_length]).view(count, options.max_length)
    return [{"input_ids": part, "labels": part} for part in rows.split(8)]


def run(base_name: str, names: Sequence[str], options: ComposeOptions) -> Any:
    """Compose the fine-tunes ``names`` of the model ``base_name`` and save the mixture; returns it."""
    from mpoe.cli.files import model_folder
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.models.table import CAUSAL

    out = _check(names, options)
    source = find(base_name)
    if source.is_mpoe or source.style != CAUSAL:
        raise CommandError(
            f"compose takes dense causal language models, whose texts it reads; {base_name} is a {source.model_type} "
            "(mpoe.compose in Python takes batches of any model)"
        )
    tokenizer = load_tokenizer(source)
    base = load_model(source)
    fine_tunes = [load_fine_tune(name, base) for name in names]
    examples = [pieces(Path(text), tokenizer, options) for text in options.texts]
    mixture = _composed(base, fine_tunes, examples, options)
    for name, error in zip(names, mixture.composition_report.values(), strict=True):
        print(f"{name}: outside the experts {error:.2f} of what it changed is lost in the mean")
    from safetensors.torch import save_file

    with model_folder(out, mixture, tokenizer) as staging:
        save_file({key: value.contiguous() for key, value in mixture.router_statistics.items()}, staging / STATISTICS)
    print(f"saved to {out}")
    return mixture


def _composed(base: Any, fine_tunes: list[Any], examples: Any, options: ComposeOptions) -> Any:
    from mpoe.config import RouterConfig
    from mpoe.models.composition import add_expert, compose

    if options.add is None:
        routing = RouterConfig(top_k=options.top_k or 1)
        return compose(base, fine_tunes, examples, routing, router=options.router, steps=options.steps)
    from safetensors.torch import load_file

    from mpoe.models import load_mpoe

    folder = Path(options.add)
    if not (folder / STATISTICS).is_file():
        raise CommandError(f"add must be a mixture made by mpoe compose; {folder} has no {STATISTICS}")
    mixture = load_mpoe(folder).eval()
    mixture.router_statistics = load_file(folder / STATISTICS)
    return add_expert(mixture, base, fine_tunes[0], examples[0], router=options.router, steps=options.steps)


# ------------------------------------------------------- experts' files, and adapters fitted as such

TOP_K = 2


def _of_experts(names: Sequence[str], options: ComposeOptions) -> bool:
    """Whether a command is about experts: it names files of some, or a mixture of them, or the neurons of adapters."""
    if any(name.endswith(".expert") for name in names[1:]) or options.neurons is not None:
        return True
    from mpoe.models.expert_mixture import EXPERTS_FOLDER

    return options.add is not None and (Path(options.add) / EXPERTS_FOLDER).is_dir()


def _check_experts(names: Sequence[str], options: ComposeOptions) -> None:
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
    if options.neurons is not None and (options.neurons < 1 or not adapters):
        raise CommandError(f"neurons must be at least 1, of experts fitted to adapters; got {options.neurons}")
    if options.steps < 1:
        raise CommandError(f"steps must be at least 1; got {options.steps}")


def _fitted(base: Any, name: str, batches: Any, tokenizer: Any, options: ComposeOptions) -> Any:
    """The expert for the adapter in a folder; says what was lost."""
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


def run_experts(names: Sequence[str], options: ComposeOptions) -> Any:
    """Compose the experts ``names[1:]`` of the model ``names[0]`` and save the mixture, or merge them; returns it."""
    from mpoe.cli.files import model_folder
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.models.expert_adapters import is_adapter
    from mpoe.models.expert_files import load_expert, merge_expert
    from mpoe.models.expert_mixture import NONE, compose_experts, documentation_batches, keep_experts

    _check_experts(names, options)
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
        with model_folder(out, merged, tokenizer):
            pass
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
    with model_folder(out, mixture, tokenizer) as staging:
        keep_experts(mixture, staging)
    print(f"saved to {out}: {', '.join(mixture.config.mpoe_experts)} (tokens go to {routed['top_k']}; {NONE!r} adds 0)")
    return mixture
