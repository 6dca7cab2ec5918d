"""`compose_experts`: experts that were trained apart become one mixture, without texts of theirs or joint training; and
LoRA adapters of feed-forward networks as such experts: neurons are fitted to what an adapter does, on texts.

An adapter changes a network inside its nonlinearity, which no few neurons beside it can do exactly. So they learn the
adapted model's predictions (distillation, Hinton et al. 2015, arXiv 1503.02531), and what was lost is measured on texts
that the fit did not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.data.embedded import load_documentation
from mpoe.data.mappings import read_mapping
from mpoe.data.predict import token_losses
from mpoe.models.composition import RANK, Statistics, check_statistics, collect_statistics, router_weight
from mpoe.models.convert import convert_to_mpoe
from mpoe.models.expert_files import (
    Expert,
    experts_of,
    load_expert,
    made_expert,
    places_for_neurons,
    start_expert,
    vocabulary_identity,
    write_expert,
)
from mpoe.models.report import neuron_modules
from mpoe.models.weight_files import declared_shapes, read_tensors, tensors_hash

NONE = "none"  # name of the expert that adds nothing
# In the folder of a mixture, next to the model: what it was composed of.
EXPERTS_FOLDER, BACKGROUND_FILE = "experts", "background.safetensors"
PIECES, LENGTH, AT_ONCE = 128, 128, 8  # of the packaged text: pieces, tokens of each, pieces of a batch


def pieces(text: str, tokenizer: Any, length: int, most: int, name: str) -> Tensor:
    """The start of a text as token ids [at most ``most``, length].

    Raises:
        ValueError: a text, called ``name``, that is shorter than one piece.
    """
    # A token has fewer than ten characters on average: this reads enough, without reading a large text completely.
    ids = tokenizer(text[: 10 * most * length], verbose=False)["input_ids"]
    count = min(len(ids) // length, most)
    if not count:
        raise ValueError(f"{name} must hold at least {length} tokens; it has {len(ids)}")
    return torch.tensor(ids[: count * length]).view(count, length)


def batches(rows: Tensor) -> list[dict[str, Tensor]]:
    """Token ids [pieces, tokens] as batches for a language model."""
    return [{"input_ids": part, "labels": part} for part in rows.split(AT_ONCE)]


def documentation_batches(model: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    """The start of the packaged text, documentation of Python, for `collect_statistics`.

    Raises:
        ValueError: a tokenizer that makes fewer tokens of it than one piece has, or other tokens than the model's.
    """
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    text = "\n\n".join(record.text for record in load_documentation("train")[::20])
    rows = pieces(text, tokenizer, length, PIECES, "the packaged text, in tokens of the base,")
    if int(rows.max()) >= model.get_input_embeddings().num_embeddings:
        raise ValueError("tokenizer must be the base's; it does not make the model's tokens of the packaged text")
    # Heads of encoders have other labels.
    names = ("input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, part) for part in rows.split(AT_ONCE)]


def _checked(base: Any, experts: Any, tokenizer: Any, texts: Mapping[str, Any]) -> list[Expert]:
    """The experts, with statistics from ``texts`` where there are some."""
    if isinstance(experts, (str, bytes)) or not isinstance(experts, Sequence) or not experts:
        raise ValueError(f"experts must be a list of at least one expert; got {experts!r}")
    found = experts_of(base, experts)
    known: set[str] = set()
    names = {NONE}
    vocabularies = {} if tokenizer is None else {vocabulary_identity(tokenizer): "the tokenizer"}
    for expert in found:
        own = tensors_hash(expert.weights)
        if own in known:
            raise ValueError(f"experts must differ; {expert.name!r} is there twice")
        if expert.name in names:
            raise ValueError(
                f"experts must have names of their own, not {NONE!r}; got {expert.name!r} (rename its file)"
            )
        if not expert.statistics and expert.name not in texts:
            raise ValueError(f"expert {expert.name!r} must hold statistics (see collect_statistics); it has none")
        known.add(own)
        names.add(expert.name)
        if expert.facts["tokenizer"] is not None:
            vocabularies.setdefault(expert.facts["tokenizer"], f"expert {expert.name!r}")
    if len(vocabularies) > 1:
        odd = " and ".join(vocabularies.values())
        raise ValueError(f"experts must be of one tokenizer; the vocabularies of {odd} differ")
    unknown = sorted(set(texts) - names | set(texts) & {NONE})
    if unknown:
        raise ValueError(f"texts must be by names of experts, {', '.join(e.name for e in found)}; got {unknown[0]!r}")
    for place, expert in enumerate(found):
        if expert.name in texts:
            statistics = collect_statistics(start_expert(base, expert=expert), texts[expert.name], RANK)
            found[place] = dataclasses.replace(expert, statistics=statistics)
    return found


@torch.no_grad()
def compose_experts(
    base: Any,
    experts: Sequence[Any],
    *,
    top_k: int = 2,
    none: bool = True,
    background: Iterable[Mapping[str, Tensor]] | Statistics | None = None,
    tokenizer: Any = None,
    texts: Mapping[str, Iterable[Mapping[str, Tensor]]] | None = None,
) -> Any:
    """Combine experts of one base into a mixture whose routers are solved from the statistics in their files.

    A router's logits are a linear discriminant (`mpoe.models.composition.router_weight`), its gates sum to 1. The
    last expert is *none*, which adds nothing: tokens that are more like the background than like any domain stay as in
    the base. The result depends on ``base``, the experts in their order, ``background`` and the options alone, so a
    mixture with one expert more or fewer is composed in the same way, with the ``background_statistics`` of this one.

    Args:
        base: the dense model that all were trained beside; it is not changed.
        experts: `Expert`s or their files; smaller ones are padded with neurons that are 0.
        top_k: experts of a token, *none* among them.
        none: have the expert *none*.
        background: batches of a text of no domain (keyword arguments of the model), or statistics; ``None`` = the
            documentation of Python, for which ``tokenizer`` is needed. Not used without *none*.
        tokenizer: of the base.
        texts: batches by expert's name, some thousand tokens each: the expert's statistics are then taken from them,
            with a covariance of up to 512 eigenvectors, in place of the sketch in its file.

    Returns:
        The mixture (``shape="neurons"``), in eval mode, with ``background_statistics``, its experts as ``composed_of``,
        and their names in its config as ``mpoe_experts``.

    Raises:
        TypeError, ValueError: as `load_expert`; no experts, one that is there twice, two of one name, one of another
            base or tokenizer or without statistics; no background and no tokenizer; ``top_k`` larger than the number of
            experts; texts of an expert that is not there.
    """
    found = _checked(base, experts, tokenizer, texts or {})
    number = len(found) + bool(none)
    routing = RouterConfig(top_k=top_k, routed_scaling_factor=1.0, balance_loss_weight=0.0)
    neurons = max(expert.neurons for expert in found)
    config = MPOEConfig(num_experts=number, shape="neurons", neurons=neurons, router=routing)
    if none and not isinstance(background, Mapping):
        if background is None and tokenizer is None:
            raise ValueError("background must be batches or statistics, or tokenizer the base's; got neither")
        batches = documentation_batches(base, tokenizer) if background is None else background
        background = collect_statistics(start_expert(base, 1), batches, RANK)
    mixture = convert_to_mpoe(base, config).eval()
    layers = neuron_modules(mixture)
    sizes = {name: layer.in_features for name, layer in layers.items()}
    for expert in found:
        check_statistics(expert.statistics, sizes, f"the statistics of expert {expert.name!r}")
    classes: list[Statistics] = [expert.statistics for expert in found]
    mixture.background_statistics = None
    if none:
        assert isinstance(background, Mapping)
        check_statistics(background, sizes, "background")
        mixture.background_statistics = dict(background)
        classes.append(background)
    for name, layer in layers.items():
        for part, parameter in layer.experts.named_parameters():
            parameter.zero_()
            for place, expert in enumerate(found):
                parameter[place, : expert.neurons] = expert.weights[f"{name}.{part}"].to(parameter)
        router: Any = layer.router
        router.weight.copy_(router_weight(classes, name))
    mixture.config.mpoe_experts = [expert.name for expert in found] + [NONE] * bool(none)
    mixture.composed_of = found
    return mixture


def keep_experts(mixture: Any, folder: Path) -> None:
    """Write what `compose_experts` composed next to the saved mixture, for `experts_in`."""
    (folder / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for expert in mixture.composed_of:
        write_expert(expert, folder / EXPERTS_FOLDER / f"{expert.name}.expert")
    if mixture.background_statistics is not None:
        save_file(mixture.background_statistics, folder / BACKGROUND_FILE)


def experts_in(folder: Path) -> tuple[list[Expert], dict[str, Tensor] | None]:
    """The experts of a mixture in their order, without *none*, and its background's statistics if it has *none*.

    Raises:
        ValueError: a folder without a composed mixture, or with damaged files.
    """
    file = folder / "config.json"
    names = read_mapping(file, "configuration").get("mpoe_experts") if file.is_file() else None
    if not isinstance(names, list) or not (folder / EXPERTS_FOLDER).is_dir():
        raise ValueError(f"{folder} must hold a mixture that was composed of experts; it does not")
    experts = [load_expert(folder / EXPERTS_FOLDER / f"{name}.expert") for name in names if name != NONE]
    return experts, read_tensors([folder / BACKGROUND_FILE]) if NONE in names else None


LEAST_KEPT = 0.8  # of the adapter's gain over the base on texts that the fit did not see
HELD_OUT = 5  # one in so many batches is not fitted
LEARNING_RATE = 3e-3
Batches = Sequence[Mapping[str, Tensor]]


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder with an adapter of PEFT."""
    return (Path(folder) / "adapter_config.json").is_file()


def _adapted_modules(folder: Path) -> dict[str, int]:
    """Numbers that the adapter adds to every module of the base.

    Raises:
        ValueError: a folder without an adapter, or one that is not LoRA.
    """
    file = folder / "adapter_model.safetensors"
    if not is_adapter(folder) or not file.is_file():
        raise ValueError(f"adapter must be a folder of PEFT's with safetensors; {folder} is not")
    kind = read_mapping(folder / "adapter_config.json", "adapter's configuration").get("peft_type")
    found: dict[str, int] = {}
    for name, shape in declared_shapes([file]).items():
        module, is_lora, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if not is_lora or kind != "LORA":
            raise ValueError(f"adapter must be a plain LoRA; {folder} is {kind} and holds {name}")
        found[module] = found.get(module, 0) + torch.Size(shape).numel()
    return found


def check_adapter(base: Any, folder: str | Path) -> int:
    """Refuse an adapter of anything but feed-forward networks (ValueError); returns its neurons' number, as many as
    have the adapter's size."""
    networks = places_for_neurons(base)
    own = {name for site in networks for name in site.prefixes.values()}
    adapted = _adapted_modules(Path(folder))
    others = sorted(set(adapted) - own)
    if others:
        raise ValueError(
            f"adapter must be of feed-forward networks to become neurons; {folder} also adapts {others[0]} "
            "(attention cannot: compose merged fine-tunes, or train an expert with mpoe train --expert)"
        )
    each = sum(site.weight(kind).shape[kind == "down"] for site in networks for kind in site.dense)
    return max(1, round(sum(adapted.values()) / each))


def fit_adapter(
    base: Any,
    adapted: Any,
    batches: Batches,
    name: str,
    *,
    neurons: int,
    steps: int = 200,
    tokenizer: Any = None,
) -> Expert:
    """An expert of ``base`` that predicts what ``adapted`` does.

    Args:
        base: a dense causal language model; it is not changed.
        adapted: the base with the adapter merged into it.
        batches: ``input_ids`` and ``labels``; every fifth one is held out, so at least two.
        name: the expert's.
        neurons: m, see `check_adapter`.
        steps: of Adam at 3e-3, on a batch each.
        tokenizer: see `save_expert`.

    Returns:
        The expert, with statistics from the batches; its ``training`` facts hold the held-out losses of ``base``,
        ``adapter`` and ``expert`` in nats per token, and ``kept``, the share of the adapter's gain.

    Raises:
        ValueError: fewer than two batches, an adapter that gains nothing on them, or neurons that keep less than 80% of
            its gain.
    """
    if len(batches) < 2:
        raise ValueError(f"batches must be at least two, of which one is held out; got {len(batches)}")
    held_out = batches[::HELD_OUT]
    fitted = [batch for place, batch in enumerate(batches) if place % HELD_OUT]
    losses = {
        "base": float(token_losses(base, held_out).mean()),
        "adapter": float(token_losses(adapted, held_out).mean()),
    }
    gain = losses["base"] - losses["adapter"]
    if not gain > 0:
        raise ValueError(
            f"adapter {name!r} must be better than the base on its texts to be fitted; it has {losses['adapter']:.3f} "
            f"nats per token, the base {losses['base']:.3f}"
        )
    model = start_expert(base, neurons)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        ids = fitted[step % len(fitted)]["input_ids"]
        with torch.no_grad():
            wanted = adapted(input_ids=ids).logits.float().log_softmax(-1)
        told = model(input_ids=ids).logits.float().log_softmax(-1)
        F.kl_div(told.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    losses["expert"] = float(token_losses(model, held_out).mean())
    kept = (losses["base"] - losses["expert"]) / gain
    if not kept >= LEAST_KEPT:
        raise ValueError(
            f"adapter {name!r} must keep {LEAST_KEPT:.0%} of its gain as {neurons} neurons; it keeps {kept:.0%}: base "
            f"{losses['base']:.3f}, adapter {losses['adapter']:.3f}, neurons {losses['expert']:.3f} nats per token "
            "(more neurons, steps or texts may do)"
        )
    facts = {"fitted": "LoRA", "steps": steps, "kept": kept, **losses}
    statistics = collect_statistics(model, [{"input_ids": each["input_ids"]} for each in batches])
    return made_expert(model, name, statistics, tokenizer, facts)
