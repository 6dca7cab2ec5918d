"""`compose`: several fine-tunes of one model become the experts of one mixture; and routers in
closed form, from statistics of domains, optionally followed by training, which `compose_experts`
uses too.

Feed-forward networks become experts, one per fine-tune; all other parameters are the mean over the
fine-tunes (Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv 2403.07816).

A domain's statistics are, for every layer, those of its router's input over the tokens of the
domain, while all of them go to the domain's own expert: the mean, and the covariance as a sketch,
``sum_i values_i vectors_i vectors_i' + diag(rest)``: its largest eigenvalues, and what its diagonal
has beyond them. As tensors by name, of a layer NAME:

- ``NAME.mean``, ``NAME.rest``: float32 ``[I]``,
- ``NAME.vectors``: float16 ``[r, I]``, of length 1,
- ``NAME.values``: float32 ``[r]``.

A router is a linear discriminant of the domains, the ridge regression of the domain on its input.
That needs nothing but these statistics, so domains can be added and removed later without the
others' texts.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import check_choice, check_integer, check_type
from mpoe.data.predict import Batch, evaluation_mode
from mpoe.layers.router import TopKRouter
from mpoe.models.base import MPOEModelMixin
from mpoe.models.convert import check_finite, convert_to_mpoe, converted_class
from mpoe.models.find import dense_networks
from mpoe.models.walk import neuron_modules, routed_layers
from mpoe.models.weight_files import Tensors

Statistics = Mapping[str, Tensor]
NONE = "none"  # name of the expert that adds nothing
PARTS = ("mean", "rest", "vectors", "values")
STATISTICS_SHARE = 0.1  # of an expert's bytes is what its statistics may have
SKETCH_RANK = 512  # eigenvectors, at most, of statistics from texts at hand
RIDGE = 1e-3  # relative to the mean square of a number of the router's input
# Of composed experts' routers: chosen on validation texts, judged in bench/studies/quiet.md.
# the scale of logits is LOGIT_SCALE / sqrt(E), from six classes on LOGIT_SCALE_OF_MANY / E: softer
# keeps more of many experts; up to five it is less quiet, among eleven it is quieter too
LOGIT_SCALE = 2.8
LOGIT_SCALE_OF_MANY = 6.3
# *none* is preferred by PREFERENCE / E logits: among many experts, each text has its own one
PREFERENCE = 2.0
LEARNING_RATE = 1e-3
ROUTER_STEPS = 200
LARGEST_STATISTIC = 1e12  # number in statistics; a router's inputs come from a normalisation


@contextlib.contextmanager
def _routed_to(
    mixture: nn.Module, known: list[int], rows: Statistics, config: RouterConfig
) -> Iterator[None]:
    """Tokens go to the experts ``known`` alone, by routers ``rows [len(known), I]`` of every layer
    (default: 0), which have a bias for that."""
    config = dataclasses.replace(config, bias_update_rate=1.0)
    routers: dict = {name: layer.router for name, layer in routed_layers(mixture)}
    try:
        for name, router in routers.items():
            like = {"device": router.weight.device, "dtype": router.weight.dtype}
            made: Any = TopKRouter(router.in_features, router.num_experts, config, **like)
            made.weight.data.zero_()
            if name in rows:
                made.weight.data[known] = rows[name].to(made.weight)
            made.e_score_correction_bias.fill_(-torch.inf)
            made.e_score_correction_bias[known] = 0.0
            mixture.get_submodule(name).router = made.eval()
        yield
    finally:
        for name, router in routers.items():
            mixture.get_submodule(name).router = router


def forced(mixture: nn.Module, expert: int) -> contextlib.AbstractContextManager[None]:
    """Every token goes to one expert of every layer, with gate 1, regardless of capacity."""
    return _routed_to(mixture, [expert], {}, RouterConfig(top_k=1))


def without(
    mixture: Any, expert: int, weights: Statistics
) -> contextlib.AbstractContextManager[None]:
    """No token goes to one expert; ``weights [E - 1, I]`` by layer are the routers of the
    others."""
    config = mixture.mpoe_config
    known = [number for number in range(config.num_experts) if number != expert]
    router = dataclasses.replace(config.router, top_k=min(config.top_k, len(known)))
    return _routed_to(mixture, known, weights, router)


def _sketch(outer: Tensor, total: Tensor, tokens: int, rank: int) -> Tensors:
    mean = total / tokens
    covariance = outer / tokens - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    first = len(mean) - rank
    values = values[first:].clamp_min(0).float()
    vectors = vectors[:, first:].mT.half()
    explained = (values[:, None].double() * vectors.double().square()).sum(0)
    rest = (covariance.diagonal() - explained).clamp_min(0)
    parts = (mean.float(), rest.float(), vectors, values)
    return {name: part.contiguous().cpu() for name, part in zip(PARTS, parts, strict=True)}


def _statistics(model: Any, layers: Mapping, batches: Iterable[Batch], rank: int | None) -> Tensors:
    # Sums over tokens of the outer products [I, I] of a router's inputs and of these, [I], float64;
    # and their number.
    sums: dict[str, tuple[Any, Any, int]] = dict.fromkeys(layers, (0.0, 0.0, 0))

    def hook(name: str) -> Any:
        def add(experts: Any, given: Any) -> None:
            """Adds the tokens that a layer's experts see; padding reads as zeros."""
            rows = given[0][given[0].ne(0).any(-1)].float()
            outer, total, tokens = sums[name]
            sums[name] = (
                outer + (rows.mT @ rows).double(),
                total + rows.double().sum(0),
                tokens + len(rows),
            )

        return add

    with contextlib.ExitStack() as until_then:
        until_then.enter_context(evaluation_mode(model))
        for name, layer in layers.items():
            until_then.callback(layer.experts.register_forward_pre_hook(hook(name)).remove)
        for batch in batches:
            is_mapping = isinstance(batch, Mapping)
            if not (is_mapping and all(isinstance(value, Tensor) for value in batch.values())):
                raise TypeError(
                    "batches must hold tensors by argument of the model; got "
                    f"{type(batch).__name__}"
                )
            model(**{name: value.to(model.device) for name, value in batch.items()})
    statistics: Tensors = {}
    for name, layer in layers.items():
        outer, total, tokens = sums[name]
        if not tokens:
            raise ValueError(f"batches must hold tokens; {name} got none")
        if not bool(torch.isfinite(outer).all()):
            raise ValueError(
                f"batches must give finite inputs to every router; those of {name} hold NaN or Inf"
            )
        size = layer.in_features
        # as many as fit into a tenth of the expert; a mean and a diagonal are always there
        left = STATISTICS_SHARE * sum(part.nbytes for part in layer.experts.parameters()) - 8 * size
        fitting = max(0, int(left / (2 * size + 4)))
        sketch = _sketch(outer, total, tokens, min(size, fitting if rank is None else rank))
        statistics |= {f"{name}.{part}": value for part, value in sketch.items()}
    return statistics


@torch.no_grad()
def collect_statistics(model: Any, batches: Iterable[Batch], rank: int | None = None) -> Tensors:
    """The statistics of a domain for the routers of a later mixture, from one pass over texts of
    it.

    Args:
        model: with an expert, see `start_expert`; it is not changed.
        batches: keyword arguments of the model, some thousand tokens or more; what
            ``attention_mask`` leaves out is not counted.
        rank: eigenvectors of each layer's sketch, as many as there are at most; ``None`` = as many
            as make the statistics at most a tenth of the expert's bytes. Mean and diagonal alone
            are more than that with fewer than 10 neurons (7 gated ones; in 16 bits 20 and 14).

    Returns:
        Tensors by name, see `mpoe.models.composition`.

    Raises:
        TypeError: ``model`` is not an MPOE model, ``batches`` are not iterable, a batch holds no
            tensors by name, a ``rank`` that is no integer.
        ValueError: a model without neurons, no tokens, a negative ``rank``, inputs that are not
            finite.
    """
    check_type("model", model, MPOEModelMixin, "a model with an expert (see start_expert)")
    layers = neuron_modules(model)
    if not layers:
        raise ValueError(
            "model must have experts of the shape 'neurons' (see start_expert); "
            f"{type(model).__name__}"
        )
    check_finite(model)
    check_type("batches", batches, Iterable, "an iterable of arguments of the model")
    check_integer("rank", rank, 0, optional=True)
    return _statistics(model, layers, batches, rank)


def check_statistics(statistics: Statistics, sizes: Mapping[str, int], whose: str) -> None:
    """Refuse statistics that are not those of layers of these sizes, by name (TypeError,
    ValueError)."""
    check_type(whose, statistics, Mapping, "a mapping (see collect_statistics)")
    wanted = {f"{layer}.{part}" for layer in sizes for part in PARTS}
    if wanted != set(statistics):
        odd = sorted(map(str, wanted.symmetric_difference(statistics)))[0]
        raise ValueError(
            f"{whose} must hold mean, rest, vectors and values of every layer and nothing else; "
            f"see {odd}"
        )
    for layer, size in sizes.items():
        rank = statistics[f"{layer}.values"].numel()
        shapes = {"mean": (size,), "rest": (size,), "vectors": (rank, size), "values": (rank,)}
        for part, shape in shapes.items():
            value = statistics[f"{layer}.{part}"]
            least = 0.0 if part in ("rest", "values") else -LARGEST_STATISTIC  # those are variances
            is_fine = tuple(value.shape) == shape and value.is_floating_point()
            # In half precision, the bound itself would be infinite.
            within = (value.double() >= least) & (value.double() <= LARGEST_STATISTIC)
            if not is_fine or not bool(within.all()):
                raise ValueError(
                    f"{whose} must hold finite numbers {list(shape)} from {least:g} to "
                    f"{LARGEST_STATISTIC:g} as {layer}.{part}; it holds others, {value.dtype} "
                    f"{list(value.shape)}"
                )


def _second_moment(statistics: Statistics, layer: str) -> Tensor:
    mean, rest, vectors, values = (statistics[f"{layer}.{part}"].double() for part in PARTS)
    return torch.outer(mean, mean) + torch.diag(rest) + vectors.mT @ (values[:, None] * vectors)


def pooled_statistics(texts: Sequence[Statistics]) -> Tensors:
    """The statistics of several texts as one class: the mean of their means, and of their second
    moments.

    Every text has the same weight, however many tokens it had.
    """
    pooled: Tensors = {}
    for layer in [key.removesuffix(".mean") for key in texts[0] if key.endswith(".mean")]:
        means = torch.stack([statistics[f"{layer}.mean"].double() for statistics in texts])
        moment = torch.stack([_second_moment(statistics, layer) for statistics in texts]).mean(0)
        sketch = _sketch(moment, means.mean(0), 1, min(SKETCH_RANK, len(moment)))
        pooled |= {f"{layer}.{name}": value for name, value in sketch.items()}
    return pooled


def router_weight(
    classes: Sequence[Statistics], layer: str, sharpness: float, preference: float = 0.0
) -> Tensor:
    """The router of ``layer`` for these classes, float64 ``[E, I]``: a linear discriminant without
    a constant.

    It is the ridge regression of the class on the input, all classes with equal weight, from their
    second moments: ``W = s E (S + r)^-1 (means - their mean)``. There is no constant term, because
    routers have none: targets are centred, since a softmax ignores a common offset. The
    regression's outputs are probabilities minus 1/E, so with ``sharpness`` s = 1/E the softmax
    agrees with them to first order.

    ``preference`` is what the last class gets on top, in units of a logit: ``b (S + r)^-1 mean`` of
    that class, since an input x of the class has ``x (S + r)^-1 mean`` about 1.
    """
    means = torch.stack([statistics[f"{layer}.mean"].double() for statistics in classes])
    pooled = torch.stack([_second_moment(statistics, layer) for statistics in classes]).mean(0)
    pooled.diagonal().add_(RIDGE * pooled.diagonal().mean())
    weight = sharpness * len(classes) * torch.linalg.solve(pooled, (means - means.mean(0)).mT).mT
    if preference:
        weight[-1] += preference * torch.linalg.solve(pooled, means[-1])
    return weight


def solve_routers(
    classes: Sequence[Statistics],
    layers: Iterable[str],
    *,
    none: bool,
    sharpness: float | None = None,
    preference: float | None = None,
) -> Tensors:
    """The routers of several layers, see `router_weight`.

    Args:
        classes: statistics of the experts in order.
        layers: names.
        none: whether the last class is the background, which the expert *none* has.
        sharpness: ``None`` = the smaller of `LOGIT_SCALE` / E^1.5 and `LOGIT_SCALE_OF_MANY` / E^2.
        preference: of *none*; ``None`` = `PREFERENCE` / E.

    Raises:
        ValueError: one of them is not finite.
    """
    if sharpness is None:
        experts = len(classes)
        sharpness = min(LOGIT_SCALE / experts**1.5, LOGIT_SCALE_OF_MANY / experts**2)
    if preference is None or not none:
        preference = PREFERENCE / len(classes) if none else 0.0
    for name, value in (("sharpness", sharpness), ("preference", preference)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value}")
    return {layer: router_weight(classes, layer, sharpness, preference) for layer in layers}


def train_routers(mixture: Any, examples: Sequence[Iterable[Batch]], steps: int) -> list[float]:
    """Train only the routers (AdamW, 1e-3) on the cross-entropy of the domain at every router, plus
    the model's own loss if batches have labels. Everything else stays bit-identical.

    Returns:
        The loss of every step; a step uses one batch of each domain.
    """
    layers: Any = routed_layers(mixture)
    weights = [layer.router.weight for _, layer in layers]
    was = [(p, p.requires_grad) for p in mixture.parameters()]
    mixture.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    domains = [itertools.cycle(list(batches)) for batches in examples]
    losses = []
    try:
        for _ in range(steps):
            with torch.enable_grad():
                by_domain = [
                    _domain_loss(mixture, next(texts), domain)
                    for domain, texts in enumerate(domains)
                ]
                total = torch.stack(by_domain).sum()
                total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total.detach()))
    finally:
        for p, needed in was:
            p.requires_grad_(needed)
    return losses


def _domain_loss(mixture: Any, batch: Batch, domain: int) -> Tensor:
    batch = {name: value.to(mixture.device) for name, value in batch.items()}
    out = mixture(**batch, return_dict=True, output_router_logits=True)
    masks = mixture.token_masks(dict(batch))
    losses = []
    for logits, (_, layer) in zip(out.router_logits, routed_layers(mixture), strict=True):
        target = logits.new_full((len(logits),), domain, dtype=torch.int64)
        mask = masks[layer.stream]
        if mask is not None:
            target = target.masked_fill(~mask.reshape(-1), -100)
        losses.append(F.cross_entropy(logits, target))
    loss: Tensor = torch.stack(losses).mean()
    task = getattr(out, "task_loss", None)
    return loss if task is None else loss + task


# ------------------------------------------------------------------ fine-tunes as experts


def _check_fine_tunes(base: Any, fine_tunes: Sequence) -> None:
    if not fine_tunes:
        raise ValueError("fine_tunes must hold at least one model; got none")
    converted_class(base)

    def facts_of(model: nn.Module) -> dict[str, Any]:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return {"class": type(model).__name__, **shapes}

    wanted = facts_of(base)
    for place, model in enumerate(fine_tunes):
        check_type(f"fine_tunes[{place}]", model, nn.Module, "a dense model")
        facts = facts_of(model)
        for name in {**wanted, **facts}:
            if wanted.get(name) != facts.get(name):
                raise ValueError(
                    "fine_tunes must be of the class of base and have its parameters; number "
                    f"{place} differs in {name}: {facts.get(name)} for {wanted.get(name)}"
                )


def _check_examples(examples: Sequence | None, number: int, router: str, steps: int) -> None:
    check_choice("router", router, ("ridge", "train"))
    check_integer("steps", steps, 1)
    if router == "train" and examples is None:
        raise ValueError("router 'train' needs examples; got None")
    if examples is not None and len(examples) != number:
        raise ValueError(
            f"examples must hold batches for each of {number} fine-tunes; got {len(examples)}"
        )


def _mean_of(base: Any, fine_tunes: Sequence) -> Any:
    """A copy of ``base`` whose parameters are the means over the fine-tunes."""
    mean = copy.deepcopy(base)
    for name, parameter in mean.named_parameters():
        # in float64, in which the mean of equal weights is these
        alike = [model.get_parameter(name).double() for model in fine_tunes]
        parameter.copy_(torch.stack(alike).mean(0))
    return mean


def _set_experts(mixture: nn.Module, fine_tunes: Sequence, config: MPOEConfig) -> None:
    """Give every expert the feed-forward networks of its fine-tune."""
    for number, model in enumerate(fine_tunes):
        for site in dense_networks(model, config):
            experts: Any = mixture.get_submodule(site.name).experts
            for kind, weights in experts.projections().items():
                weights.weight[number] = site.weight(kind)
                bias = site.bias(kind)
                if bias is not None:
                    weights.bias[number] = bias


def _solve_from(mixture: Any, examples: Sequence[Sequence[Batch]]) -> None:
    """Set the routers in closed form, from batches of every expert's domain."""
    layers: dict = dict(routed_layers(mixture))
    classes = []
    for number, batches in enumerate(examples):
        with forced(mixture, number):
            classes.append(_statistics(mixture, layers, batches, SKETCH_RANK))
    for name, layer in layers.items():
        layer.router.weight.copy_(router_weight(classes, name, sharpness=1 / len(classes)))


@torch.no_grad()
def compose(
    base: Any,
    fine_tunes: Sequence,
    examples: Sequence[Iterable[Batch]] | None = None,
    routing: RouterConfig | None = None,
    *,
    router: str = "ridge",
    steps: int = ROUTER_STEPS,
) -> Any:
    """Combine several fine-tunes of one model into a mixture with one expert each.

    Args:
        base: the dense model that they started from, of a family in `mpoe.models.table`. It is not
            changed.
        fine_tunes: dense models of the class of ``base``; those trained with LoRA after
            ``merge_and_unload``.
        examples: for every fine-tune, batches of its domain as keyword arguments of the model
            (``input_ids``, ``attention_mask``, ``labels``); a few hundred texts each are enough.
            ``None`` leaves the routers random: set them later, or train the mixture.
        routing: experts per token, capacity and so on; default: one expert per token.
        router: ``"ridge"``: closed form, see `router_weight`; ``"train"``: additionally trained,
            with everything else frozen.
        steps: optimizer steps of ``"train"``.

    Returns:
        The mixture, in eval mode; its experts are exact, all other parameters the mean.

    Raises:
        TypeError: ``routing`` of another type, fine-tunes that are no models.
        ValueError: no fine-tunes, models that differ in more than values, a number of examples
            other than one per fine-tune, examples without tokens, ``"train"`` without examples, a
            mixture as ``base``.
    """
    _check_fine_tunes(base, fine_tunes)
    _check_examples(examples, len(fine_tunes), router, steps)
    config = MPOEConfig(
        num_experts=len(fine_tunes), expert_type="dense", router=routing or RouterConfig(top_k=1)
    )
    sites = dense_networks(base, config)
    # Every expert has biases of its own.
    config.expert_bias = any(site.bias("up") is not None for site in sites)
    config.expert_output_bias = any(site.bias("down") is not None for site in sites)
    mixture = convert_to_mpoe(_mean_of(base, fine_tunes), config, inplace=True).eval()
    _set_experts(mixture, fine_tunes, config)
    if examples is not None:
        texts = [list(batches) for batches in examples]  # read twice by "train"
        _solve_from(mixture, texts)
        if router == "train":
            train_routers(mixture, texts, steps)
    return mixture
