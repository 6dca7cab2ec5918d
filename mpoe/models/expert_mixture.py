"""`compose_experts`: experts that were trained apart become one mixture, without texts of theirs or
joint training."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import check_number, check_type, is_file_name, quoted, shortened
from mpoe.data.mappings import read_mapping
from mpoe.data.predict import Batch
from mpoe.models.background import background_batches, pooled_background, save_background
from mpoe.models.checkpoint import parsed_mpoe
from mpoe.models.composition import (
    LARGEST_STATISTIC,
    NONE,
    SKETCH_RANK,
    Statistics,
    check_statistics,
    collect_statistics,
    solve_routers,
)
from mpoe.models.convert import convert_to_mpoe
from mpoe.models.expert_files import (
    Expert,
    experts_of,
    layer_sizes,
    load_expert,
    start_expert,
    vocabulary_identity,
    write_expert,
)
from mpoe.models.walk import neuron_modules
from mpoe.models.weight_files import Tensors, check_links, read_tensors, tensors_hash

# In the folder of a mixture, next to the model: what it was composed of.
EXPERTS_FOLDER = "experts"
BACKGROUND_FILE = "background.safetensors"
MOST_PER_TOKEN = 8  # experts of a token where nobody says how many


def default_top_k(experts: int) -> int:
    """Experts of a token in a mixture of so many, *none* among them."""
    return min(experts, MOST_PER_TOKEN)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that experts of one mixture cannot have (ValueError)."""
    known = {NONE}
    for name in names:
        if name in known:
            raise ValueError(
                f"experts must have names of their own, not {NONE!r}; got {name!r} (rename its "
                "file)"
            )
        known.add(name)


def check_together(
    base: Any, experts: Any, tokenizer: Any, with_texts: Iterable[str]
) -> list[Expert]:
    """The experts, or those in files, if `compose_experts` can make one mixture of them; raises as
    it does.

    ``with_texts``: names of those whose statistics need not be in their files.
    """
    if isinstance(experts, (str, bytes)) or not isinstance(experts, Sequence) or not experts:
        raise ValueError(f"experts must be a list of at least one expert; got {experts!r}")
    loaded = experts_of(base, experts)
    vocabularies = {} if tokenizer is None else {vocabulary_identity(tokenizer): "the tokenizer"}
    check_alike(loaded, vocabularies, with_texts)
    names = [expert.name for expert in loaded]
    unknown = sorted(set(with_texts).difference(names))
    if unknown:
        raise ValueError(
            f"texts must be by names of experts, {', '.join(names)}; got {unknown[0]!r}"
        )
    return loaded


def check_alike(
    experts: Sequence[Expert],
    vocabularies: Mapping[Any, str],
    with_texts: Iterable[str] = (),
) -> None:
    """Refuse experts of one base of which no mixture can be made (ValueError): one that is there
    twice, of a reserved name, without statistics, or of another tokenizer.

    ``vocabularies``: identities that are known, and whose they are.
    """
    known: set[str] = set()
    owners = dict(vocabularies)
    for expert in experts:
        digest = tensors_hash(expert.weights)
        if digest in known:
            raise ValueError(f"experts must differ; {expert.name!r} is there twice")
        if not expert.statistics and expert.name not in with_texts:
            raise ValueError(
                f"expert {expert.name!r} must hold statistics (see collect_statistics); it has none"
            )
        known.add(digest)
        owners.setdefault(expert.facts["tokenizer"], f"expert {expert.name!r}")
    owners.pop(None, None)  # not noted
    check_names(expert.name for expert in experts)
    if len(owners) > 1:
        odd = " and ".join(owners.values())
        raise ValueError(f"experts must be of one tokenizer; the vocabularies of {odd} differ")


@torch.no_grad()
def compose_experts(
    base: Any,
    experts: Sequence,
    *,
    top_k: int | None = None,
    none: bool = True,
    background: Iterable[Batch] | Statistics | None = None,
    tokenizer: Any = None,
    texts: Mapping[str, Iterable[Batch]] | None = None,
    sharpness: float | None = None,
    preference: float | None = None,
    request_weight: float = 0.0,
) -> Any:
    """Combine experts of one base into a mixture whose routers are solved from the statistics in
    their files.

    A router's logits are a linear discriminant (`mpoe.models.composition.router_weight`), its gates
    sum to 1. The last expert is *none*, which adds nothing: tokens that are more like the
    background than like any domain stay as in the base. The result depends on ``base``, the experts
    in their order, ``background`` and the options alone, so a mixture with one expert more or fewer
    is composed in the same way, with the ``background_statistics`` of this one.

    Args:
        base: the dense model that all were trained beside; it is not changed.
        experts: `Expert`s or their files; smaller ones are padded with neurons that are 0.
        top_k: experts of a token, *none* among them; ``None`` = all, at most 8.
        none: have the expert *none*.
        background: batches of a text of no domain (keyword arguments of the model), or statistics;
            ``None`` = see `background_batches`, for which ``tokenizer`` is needed. Not used without
            *none*.
        tokenizer: of the base.
        texts: batches by expert's name, some thousand tokens each: the expert's statistics are then
            taken from them, with a covariance of up to 512 eigenvectors, in place of the sketch in
            its file.
        sharpness, preference: how decided the routers are, and how much they prefer *none*: the
            dial between what experts keep of their gains and what else stays as it is; see
            `solve_routers`.
        request_weight: share of the request's evidence in the logits of a token, see
            `RouterConfig`; half of it is quieter. Of causal models.

    Returns:
        The mixture (``shape="neurons"``), in eval mode, with ``background_statistics``, its experts
        as ``composed_of``, and their names in its config as ``mpoe_experts``.

    Raises:
        TypeError, ValueError: as `load_expert`; no experts, one that is there twice, two of one
            name, one of another base or tokenizer or without statistics; no background and no
            tokenizer; ``top_k`` larger than the number of experts; texts of an expert that is not
            there.
    """
    texts = texts or {}
    loaded = check_together(base, experts, tokenizer, texts)
    for place, expert in enumerate(loaded):
        if expert.name in texts:
            started = start_expert(base, expert=expert)
            statistics = collect_statistics(started, texts[expert.name], SKETCH_RANK)
            loaded[place] = dataclasses.replace(expert, statistics=statistics)
    number = len(loaded) + bool(none)
    routing = RouterConfig(
        top_k=default_top_k(number) if top_k is None else top_k,
        routed_scaling_factor=1.0,
        balance_loss_weight=0.0,
        request_weight=request_weight,
    )
    neurons = max(expert.neurons for expert in loaded)
    config = MPOEConfig(num_experts=number, shape="neurons", neurons=neurons, router=routing)
    if none and not isinstance(background, Mapping):
        if background is None and tokenizer is None:
            raise ValueError(
                "background must be batches or statistics, or tokenizer the base's; got neither"
            )
        if background is None:
            background = pooled_background(base, background_batches(base, tokenizer))
        else:
            background = collect_statistics(start_expert(base, 1), background, SKETCH_RANK)
    mixture = convert_to_mpoe(base, config).eval()
    layers = neuron_modules(mixture)
    sizes = {name: layer.in_features for name, layer in layers.items()}
    for expert in loaded:
        check_statistics(expert.statistics, sizes, f"the statistics of expert {expert.name!r}")
    classes: list[Statistics] = [expert.statistics for expert in loaded]
    mixture.background_statistics = None
    if none:
        assert isinstance(background, Mapping)
        check_statistics(background, sizes, "background")
        mixture.background_statistics = dict(background)
        classes.append(background)
    routers = solve_routers(classes, layers, none=none, sharpness=sharpness, preference=preference)
    for name, layer in layers.items():
        for part, parameter in layer.experts.named_parameters():
            parameter.zero_()
            for place, expert in enumerate(loaded):
                parameter[place, : expert.neurons] = expert.weights[f"{name}.{part}"].to(parameter)
        router: Any = layer.router
        router.weight.copy_(routers[name])
    mixture.config.mpoe_routing = {"sharpness": sharpness, "preference": preference}
    mixture.config.mpoe_experts = [expert.name for expert in loaded] + [NONE] * bool(none)
    mixture.composed_of = loaded
    return mixture


def keep_experts(mixture: Any, folder: Path) -> None:
    """Write what `compose_experts` composed next to the saved mixture, for `experts_in`."""
    (folder / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for expert in mixture.composed_of:
        write_expert(expert, folder / EXPERTS_FOLDER / f"{expert.name}.expert")
    if mixture.background_statistics is not None:
        save_background(mixture.background_statistics, mixture, folder / BACKGROUND_FILE)


def mixture_config(folder: Path) -> tuple[list[str], MPOEConfig, dict[str, Any]]:
    """Names of a composed mixture's experts in their order, its configuration, and the
    ``sharpness`` and ``preference`` of its routers.

    Raises:
        TypeError, ValueError: a folder without a composed mixture, or with links that lead out of
            it; names that are no names of files, or not as many as experts; settings of routers
            that are no numbers.
    """
    file = folder / "config.json"
    values = read_mapping(file, "configuration") if file.is_file() else {}
    names = values.get("mpoe_experts")
    if not isinstance(names, list) or not (folder / EXPERTS_FOLDER).is_dir():
        raise ValueError(f"{folder} must hold a mixture that was composed of experts; it does not")
    check_links(folder)
    are_names = all(is_file_name(name) for name in names) and len(set(names)) == len(names)
    if not names or not are_names or NONE in (names[0], *names[:-1]):
        wanted = f"different names of experts, and {NONE!r} last if at all"
        raise ValueError(f"mpoe_experts in {file} must be {wanted}; got {quoted(names)}")
    config = parsed_mpoe(values, folder)
    if not config.is_neurons or config.num_experts != len(names):
        has = f"{quoted(config.num_experts)} of shape {quoted(config.shape)}"
        raise ValueError(
            f"mpoe in {file} must describe {len(names)} experts of shape 'neurons'; it has {has}"
        )
    routing = values.get("mpoe_routing") or {}
    check_type(f"mpoe_routing in {file}", routing, dict, "a mapping")
    for name, value in routing.items():
        if value is not None:
            check_number(
                f"{shortened(name)} of mpoe_routing in {file}",
                value,
                -LARGEST_STATISTIC,
                LARGEST_STATISTIC,
            )
    return names, config, {name: routing.get(name) for name in ("sharpness", "preference")}


def experts_in(folder: Path) -> tuple[list[Expert], Tensors | None]:
    """The experts of a mixture in their order, without *none*, and its background's statistics if
    it has *none*.

    Raises:
        TypeError, ValueError: as `mixture_config`, or damaged files.
    """
    names, _, _ = mixture_config(folder)
    experts = [
        load_expert(folder / EXPERTS_FOLDER / f"{name}.expert") for name in names if name != NONE
    ]
    if NONE not in names:
        return experts, None
    background = read_tensors([folder / BACKGROUND_FILE])
    check_statistics(background, layer_sizes(experts[0].weights), f"{folder / BACKGROUND_FILE}")
    return experts, background
