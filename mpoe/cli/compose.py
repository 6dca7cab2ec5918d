"""`mpoe compose BASE EXPERT ... --output_dir OUT`: experts of one model that were trained apart become one mixture.

An EXPERT is a file of `mpoe train --expert`, composed without any texts, or the folder of a LoRA adapter of
feed-forward networks, fitted as `--neurons` on its text. `--add MIXTURE` starts with the experts of a mixture,
`--remove` leaves some out, `--merge` makes one dense network. Of fine-tunes (saved models, adapters) in place of
experts, every network becomes a dense expert; these need `--texts`."""

from __future__ import annotations

import dataclasses
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
    router: str = option("ridge", "ridge: closed form; train: then trained alone, on the texts")
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
    from mpoe.cli import compose_experts

    if compose_experts.is_meant(names, options):
        compose_experts.run(names, options)
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
    from mpoe.training.output_dir import check_folder

    if options.output_dir is None:
        raise CommandError(f"compose needs --output_dir: {USAGE}")
    for name in ("max_texts", "max_length"):
        if getattr(options, name) < 2:
            raise CommandError(f"{name} must be at least 2; got {getattr(options, name)}")
    out = Path(options.output_dir)
    check_folder("output_dir", out)
    if ((out / "config.json").exists() or any(out.glob("*.safetensors"))) and not options.overwrite:
        raise CommandError(f"output_dir {out} holds a model; give --overwrite to replace it, or another folder")
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

    with model_folder(out) as staging:
        mixture.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
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
