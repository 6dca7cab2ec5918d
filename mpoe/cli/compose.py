"""`mpoe compose BASE EXPERT ... --output_dir OUT`: experts of one model that were trained apart
become one mixture.

An EXPERT is a file of `mpoe train --expert`, composed without any texts, or the folder of a LoRA
adapter, fitted as `--neurons` on its text, or on what the adapted model itself writes.
`mpoe compose RECIPE.yaml` has all of it in a file: `base`, `experts`, and options by name.
`--add MIXTURE` starts with the experts of a mixture, `--remove` leaves some out, `--merge` makes
one dense network. Of fine-tunes (saved models, adapters) in place of experts, every network becomes
a dense expert; these need `--texts`."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mpoe.cli import models
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError, check_files, close_matches
from mpoe.cli.outputs import Output, check_model_output, model_folder
from mpoe.cli.quiet import background_beside, show_composition
from mpoe.cli.short_help import COMMANDS
from mpoe.config import RouterConfig
from mpoe.config.checks import quoted, refusing
from mpoe.data.batches import read_batches
from mpoe.data.encode import Item
from mpoe.data.mappings import read_mapping, read_utf8
from mpoe.models import expert_mixture, lora_fit
from mpoe.models.background import background_batches, most_tokens, pooled_background
from mpoe.models.composition import NONE, ROUTER_STEPS, compose, train_routers
from mpoe.models.expert_files import Expert, experts_of, load_expert, merge_expert
from mpoe.models.expert_mixture import EXPERTS_FOLDER, default_top_k
from mpoe.models.lora_fit import FIT_STEPS, is_adapter
from mpoe.models.table import CAUSAL
from mpoe.models.weight_files import check_links
from mpoe.training.published import finish

USAGE = COMMANDS["compose"].usage
MOST = 1 + 128  # words: the base and its fine-tunes


@dataclasses.dataclass
class ComposeOptions:
    """Options of `compose`."""

    output_dir: str | None = option(None, "folder of the mixture")
    texts: list[str] = option(
        [],
        "a file of each one's domain, read as mpoe train does; experts do without",
        nargs="+",
    )
    router: str = option(
        "ridge", "in closed form; train: then trained alone, on texts", choices=["ridge", "train"]
    )
    top_k: int | None = option(None, "experts per token; default all, at most 8; of fine-tunes 1")
    add: str | None = option(None, "a mixture composed of experts, which gets these more")
    remove: list[str] = option([], "names of experts of the mixture --add to leave out", nargs="+")
    background: list[str] = option(
        [],
        "of experts: files of what must stay as it is, beside what the base itself says",
        nargs="+",
    )
    preference: float | None = option(
        None,
        "of 'none', in units of a logit (2 / experts): more is quieter, less keeps more of each "
        "expert",
    )
    request_weight: float | None = option(
        None,
        "of experts: share of the whole request's evidence in a token's routing, from 0 (default, "
        "each token by itself) to 1",
    )
    neurons: int | None = option(
        None, "of experts fitted to LoRA adapters; default: as large as the adapter"
    )
    merge: bool = option(
        False, "one dense network with all experts' neurons, equally weighted, and no router"
    )
    max_texts: int = option(300, "pieces of each text file that are read")
    max_length: int = option(128, "tokens of a piece; default: at most the base's positions")
    steps: int | None = option(
        None,
        f"steps of --router train (default {ROUTER_STEPS}), and of fitting an adapter "
        f"({FIT_STEPS})",
    )
    overwrite: bool = option(False, "replace a model in output_dir")

    LEAST = (("top_k", 1), ("max_texts", 2), ("max_length", 2), ("steps", 1))


def recipe_words(file: str) -> list[str]:
    """A recipe, a YAML mapping of ``base``, ``experts`` and options, as words of a command line.

    Raises:
        CommandError: an unknown key, one that is there twice, or a value that is no text, number or
            list of texts.
        ValueError: a file that cannot be read.
    """
    recipe = read_mapping(file, "recipe")
    if "base" not in recipe:
        raise CommandError(f"{file}: base must name the model of the experts; it is missing")
    kinds = {"base": str, "experts": list[str], **get_type_hints(ComposeOptions)}
    tree: Any = yaml.compose(read_utf8(file, Path(file)), yaml.SafeLoader)
    keys = [key.value for key, _ in tree.value]
    words: list[str] = []
    for key, value in recipe.items():
        if key not in kinds:
            raise CommandError(f"{file}: unknown key {key!r}{close_matches(key, kinds)}")
        if keys.count(key) > 1:  # of which the last would count
            raise CommandError(f"{file}: {key} must be there once; got it {keys.count(key)} times")
        wanted = "a text or a number"
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
        names = [str(value)] if key == "base" else []
        if kinds[key] == list[str]:
            wanted = "a list of texts"
            fits = isinstance(value, list) and {type(part) for part in value} == {str}
            names = value
        elif kinds[key] is bool:
            wanted = "true or false"
            fits = isinstance(value, bool)
        if not fits:
            raise CommandError(f"{file}: {key} must be {wanted}; got {quoted(value)}")
        for name in names:
            if name.startswith("-"):
                raise CommandError(f"{file}: names must not begin with '-'; got {quoted(name)}")
        if key in ("base", "experts"):
            continue
        words += [f"--{key}", *names] if names else [f"--{key}={value}"]
    return [str(recipe["base"]), *recipe.get("experts", []), *words]


def command(arguments: Sequence[str]) -> None:
    """Compose as words and options say, or as a recipe does; options win over the recipe's."""
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        if len(arguments) > 1 and not arguments[1].startswith("-"):
            raise CommandError(f"after a recipe come options alone; got {arguments[1]!r}")
        arguments = [*recipe_words(arguments[0]), *arguments[1:]]
    _compose(arguments)


@as_command(ComposeOptions, words=(1, MOST))
def _compose(request: Request) -> None:
    """Compose the experts or fine-tunes of the base, and save the mixture or the merged network."""
    (options,), (base, *names) = request.options, request.words
    # About experts: it names files of some, or a mixture of them, or adapters to be neurons.
    of_experts = (
        options.neurons is not None
        or any(name.endswith(".expert") for name in names)
        or (bool(names) and not options.texts and all(map(is_adapter, names)))
        or (options.add is not None and (Path(options.add) / EXPERTS_FOLDER).is_dir())
    )
    faults_of = _faults_of_experts if of_experts else _faults_of_fine_tunes
    for wrong, message in faults_of(names, options):
        if wrong:
            raise CommandError(message)
    check_files("texts", options.texts)
    check_files("background", options.background)
    if not options.output_dir:
        raise CommandError(f"compose needs --output_dir: {USAGE}")
    out = check_model_output("output_dir", options.output_dir, options.overwrite)
    source = models.find_to_copy(base)
    needs_causal = not of_experts or any(map(is_adapter, names))
    if source.is_mpoe or (needs_causal and source.style != CAUSAL):
        raise CommandError(
            "compose takes the dense model that the experts were trained beside, of others a "
            f"causal language model; {base} is a {source.model_type} (mpoe.compose in Python takes "
            "batches of any model)"
        )
    tokenizer = models.load_tokenizer(source)
    dense = models.load_model(source)
    most = most_tokens(dense, options.max_length)
    if options.max_length > most and "max_length" in request.given:
        raise CommandError(
            f"max_length must be at most {most}, the positions of {base}; got {options.max_length}"
        )
    options.max_length = most
    with refusing("texts: ", ValueError):
        texts = [read_texts(text, tokenizer, options) for text in options.texts]
    if of_experts:
        compose_files(dense, tokenizer, names, texts, options, out)
        return
    fine_tunes = [load_fine_tune(name, dense) for name in names]
    routing = RouterConfig(top_k=options.top_k or 1)
    steps = options.steps or ROUTER_STEPS
    mixture = compose(dense, fine_tunes, texts, routing, router=options.router, steps=steps)
    with model_folder(out, mixture, tokenizer):
        pass
    print(f"saved to {out.folder}")


def load_fine_tune(name: str, base: Any) -> Any:
    """A saved dense model, or ``base`` with a LoRA adapter merged into it.

    Raises:
        CommandError: no model or adapter of that name; an adapter, but PEFT is not installed.
    """
    if not is_adapter(name):
        return models.load_model(models.find_to_copy(name))
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CommandError('a LoRA adapter needs PEFT: pip install "mpoe[peft]"') from error
    check_links(Path(name))
    unfit = f"fine-tune: the adapter {name} does not fit the base: "
    with refusing(unfit, (ValueError, RuntimeError, OSError)):
        adapted: Any = PeftModel.from_pretrained(copy.deepcopy(base), name)
        return adapted.merge_and_unload().eval()


def read_texts(file: str, tokenizer: Any, options: ComposeOptions) -> list[Item]:
    """A text file as batches."""
    return read_batches(file, tokenizer, options.max_length, options.max_texts)


# ---------------------------------------------------------------------------------- fine-tunes


def _faults_of_fine_tunes(
    names: Sequence[str], options: ComposeOptions
) -> Iterator[tuple[object, str]]:
    """What must not be, and the message."""
    count = len(names)
    texts = len(options.texts)
    yield (
        options.add is not None
        or options.preference is not None
        or options.request_weight is not None
        or options.merge
        or options.remove
        or options.background,
        "add, remove, merge, background, preference and request_weight are for experts' files; got "
        "fine-tunes",
    )
    yield not names, f"compose needs a base and at least one expert: {USAGE}"
    yield texts != count, f"texts must name a file for each of {count} fine-tunes; got {texts}"


# ------------------------------------------------------- experts' files, and adapters fitted as
# such


def _faults_of_experts(
    names: Sequence[str], options: ComposeOptions
) -> Iterator[tuple[object, str]]:
    """What must not be, and the message."""
    count = len(names)
    texts = len(options.texts)
    adapters = [name for name in names if is_adapter(name)]
    missing = [name for name in names if not Path(name).is_file() and name not in adapters]
    yield (
        missing,
        f"compose takes either fine-tunes or experts' files; {', '.join(missing)}: no file",
    )
    yield (
        options.remove and options.add is None,
        "remove needs --add MIXTURE, whose experts it leaves out",
    )
    yield (
        texts not in (0, count),
        f"texts must name a file for each of {count} experts, or none; got {texts}",
    )
    yield (
        options.router == "train" and (not texts or options.add is not None),
        "router train needs --texts for every expert of the mixture, and no --add",
    )
    of_routers = (
        options.top_k is not None
        or options.background
        or options.router == "train"
        or options.preference is not None
        or options.request_weight is not None
    )
    yield (
        options.merge and (of_routers or (texts and not adapters)),
        "merge makes one network without routers: no top_k, router, background, preference, "
        "request_weight, or texts but of adapters",
    )
    neurons = options.neurons
    yield (
        neurons is not None and (neurons < 1 or not adapters),
        f"neurons must be at least 1, of experts fitted to adapters; got {neurons}",
    )


def _adapter_name(name: str) -> str:
    """Of the expert that is fitted to the adapter in a folder."""
    return Path(name).resolve().name


def _check_early(
    base: Any,
    tokenizer: Any,
    known: Sequence[Expert],
    names: Sequence[str],
    options: ComposeOptions,
) -> None:
    """Refuse what cannot be composed or merged, before adapters are fitted and the base is sampled
    for minutes; ``known`` are the experts that have files."""
    adapters = list(filter(is_adapter, names))
    for adapter in adapters:
        lora_fit.check_adapter(base, adapter)
    if options.merge:
        experts_of(base, known)
        return
    if known:
        there = {Path(name).stem for name in names} if options.texts else set()
        with_texts = [expert.name for expert in known if expert.name in there]
        expert_mixture.check_together(base, known, tokenizer, with_texts)
    expert_mixture.check_names([*(expert.name for expert in known), *map(_adapter_name, adapters)])


def _fitted(base: Any, name: str, texts: Any, tokenizer: Any, options: ComposeOptions) -> Any:
    """The expert for the adapter in a folder; says what was lost."""
    as_large = lora_fit.check_adapter(base, name)
    neurons = options.neurons or as_large
    adapted = load_fine_tune(name, base)
    if texts is None:
        print(
            f"{name}: sampling what the adapted model itself says, as --texts names no text of it "
            "...",
            flush=True,
        )
        texts, about = lora_fit.own_samples(base, adapted, tokenizer)
        print(f"{name}: fitted to {about}")
    expert = lora_fit.fit_adapter(
        base,
        adapted,
        texts,
        _adapter_name(name),
        neurons=neurons,
        steps=options.steps or FIT_STEPS,
        tokenizer=tokenizer,
    )
    facts = expert.facts["training"]
    print(
        f"{expert.name}: {neurons} neurons keep {facts['kept']:.0%} of the adapter's gain "
        f"(held-out nats per token: base {facts['base']:.3f}, adapter {facts['adapter']:.3f}, "
        f"neurons {facts['expert']:.3f})"
    )
    return expert


def compose_files(
    base: Any,
    tokenizer: Any,
    names: Sequence[str],
    texts: Sequence,
    options: ComposeOptions,
    out: Output,
) -> None:
    """Compose or merge the experts ``names`` of ``base``; ``texts`` has batches for each of them,
    or nothing."""
    experts: list = []
    background: Any = None
    top_k = options.top_k
    none = True
    routing: dict = {"preference": options.preference}
    request_weight = options.request_weight
    if options.add is not None:
        finish(Path(options.add))
        there, background = expert_mixture.experts_in(Path(options.add))
        known = [expert.name for expert in there]
        none = background is not None
        unknown = sorted(set(options.remove) - set(known))
        if unknown:
            raise CommandError(
                f"remove must name experts of the mixture, {', '.join(known)}; got {unknown[0]}"
            )
        experts = [expert for expert in there if expert.name not in options.remove]
        _, config, routing = expert_mixture.mixture_config(Path(options.add))
        if top_k is None and config.top_k != default_top_k(len(there) + none):
            top_k = config.top_k
        if options.preference is not None:
            routing["preference"] = options.preference
        if request_weight is None:
            request_weight = config.router.request_weight
    files = [None if is_adapter(name) else load_expert(name) for name in names]
    _check_early(base, tokenizer, [*experts, *filter(None, files)], names, options)
    by_name: dict = {}
    for place, expert in enumerate(files):
        read = texts[place] if texts else None
        if expert is None:
            expert = _fitted(base, names[place], read, tokenizer, options)
        experts.append(expert)
        if read is not None:
            by_name[expert.name] = read
    if options.merge:
        merged = merge_expert(base, experts, weight=1 / max(1, len(experts)))
        with model_folder(out, merged, tokenizer):
            pass
        print(
            f"saved to {out.folder}: a dense {type(merged).__name__}, every expert at weight "
            f"1/{len(experts)}"
        )
        return
    parts: list = []
    if none and background is None and not options.background and options.router != "train":
        background = background_beside(base, [Path(name).parent for name in names])
    if none and (background is None or options.background):
        print("background: sampling what the base itself says ...", flush=True)
        parts = background_batches(base, tokenizer)
        with refusing("background: ", ValueError):
            parts += [read_texts(file, tokenizer, options) for file in options.background]
        background = pooled_background(base, parts)
    mixture = expert_mixture.compose_experts(
        base,
        experts,
        tokenizer=tokenizer,
        texts=by_name,
        top_k=top_k,
        none=none,
        background=background,
        request_weight=request_weight or 0.0,
        **routing,
    )
    if options.router == "train":
        of_none = list(itertools.chain(*parts))
        train_routers(mixture, [*texts, of_none], options.steps or ROUTER_STEPS)
    with model_folder(out, mixture, tokenizer) as staging:
        expert_mixture.keep_experts(mixture, staging)
    others = f"tokens go to {mixture.mpoe_config.top_k}" + f"; {NONE!r} adds 0" * none
    print(f"saved to {out.folder}: {', '.join(mixture.config.mpoe_experts)} ({others})")
    show_composition(base, tokenizer, mixture, experts)
