"""Looking into an MPOE model: routes of its tokens, spectra of its bonds; and what each expert of a
composed mixture is worth on texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe.data.predict import token_losses
from mpoe.layers.cores import MPOCores
from mpoe.models.composition import NONE, Statistics, forced, solve_routers, without
from mpoe.models.walk import routed_layers

Batches = Sequence[Mapping[str, Tensor]]

# ------------------------------------------------------------- which expert took which token


@dataclass(frozen=True)
class Route:
    """The tokens of one stream (a T5's encoder or decoder) of one text.

    Attributes:
        stream: ``"encoder"``, ``"decoder"`` or ``"main"``.
        tokens: as text, T of them.
        layers: names of the MPOE layers that the tokens pass, in order.
        experts: the chosen experts, best first, ``[layers][T][K]``.
        probabilities: the router's probabilities of those experts, ``[layers][T][K]``.
    """

    stream: str
    tokens: list[str]
    layers: list[str]
    experts: list[list[list[int]]]
    probabilities: list[list[list[float]]]


@torch.inference_mode()
def route_text(model: Any, tokenizer: Any, text: str, max_new_tokens: int = 24) -> list[Route]:
    """Routes of a text's tokens; an encoder-decoder first generates an answer, whose tokens are
    routed too.

    Args:
        model: an MPOE model in eval mode.
        tokenizer: its tokenizer.
        text: any text; parts that the tokenizer truncates are not shown.
        max_new_tokens: length of an answer.

    Raises:
        ValueError: a text without tokens.
    """
    batch = tokenizer([text], return_tensors="pt", truncation=True, return_token_type_ids=False).to(
        model.device
    )
    if not batch["input_ids"].shape[1]:
        raise ValueError(f"text must hold at least one token; got {text!r}")
    ids = {"main": batch["input_ids"][0]}
    if model.config.is_encoder_decoder:
        answer = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)[:, :-1]
        batch["decoder_input_ids"] = answer
        ids = {"encoder": batch["input_ids"][0], "decoder": answer[0]}
    layers: Any = routed_layers(model)
    routes = []
    logits = model(**batch).router_logits or ()
    for stream, stream_ids in ids.items():
        stream_layers = [k for k, (_, layer) in enumerate(layers) if layer.stream == stream]
        if not stream_layers:
            continue
        chosen = [_chosen(layers[k][1].router, logits[k].float()) for k in stream_layers]
        routes.append(
            Route(
                stream,
                [_as_text(tokenizer, token) for token in stream_ids.tolist()],
                [layers[k][0] for k in stream_layers],
                [index.tolist() for index, _ in chosen],
                [probabilities.tolist() for _, probabilities in chosen],
            )
        )
    return routes


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of every token, best first, and their probabilities, ``[T, K]``."""
    index = router.scores(logits)[1].topk(router.top_k).indices
    return index, torch.softmax(logits, -1).gather(-1, index)


def _as_text(tokenizer: Any, token: int) -> str:
    """A token as its tokenizer decodes it, with spaces."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return piece.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\\n")


# ------------------------------------------------------------- how much each bond carries


@dataclass(frozen=True)
class BondSpectrum:
    """One bond of every expert's matrix.

    Attributes:
        singular_values: descending, float64 ``[E, d]``.
    """

    singular_values: Tensor

    @property
    def dimension(self) -> int:
        return self.singular_values.shape[1]

    @property
    def entropy(self) -> Tensor:
        """Entanglement entropy ``-sum p ln p`` of ``p = s^2 / sum s^2``, in nats, ``[E]``; at most
        ``ln d``."""
        squared = self.singular_values.square()
        p = squared / squared.sum(-1, keepdim=True).clamp_min(torch.finfo(squared.dtype).tiny)
        return -torch.xlogy(p, p).sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """``exp(entropy)``, ``[E]``: how many of the d directions carry weight; d if all carry the
        same."""
        return self.entropy.exp()

    @property
    def used(self) -> float:
        """Effective rank as a fraction of the bond dimension, mean over experts: ``1/d`` to 1."""
        return float(self.effective_rank.mean()) / self.dimension


@torch.no_grad()
def bond_spectra(cores: MPOCores) -> list[BondSpectrum]:
    """Spectra at the inner bonds of a weight, in chain order (none for a chain of one core).

    Args:
        cores: of E experts.
    """
    per_expert = []
    for expert in range(cores.num_experts):
        chain = (core[expert] if core.dim() == 5 else core for core in cores.cores())
        per_expert.append(_chain_spectra([core.double().flatten(1, 2) for core in chain]))
    return [BondSpectrum(torch.stack(values)) for values in zip(*per_expert, strict=True)]


def _chain_spectra(chain: list[Tensor]) -> list[Tensor]:
    """Singular values at every inner bond, descending, of cores ``[d, i j, d']``: QR decompositions
    from the left make all cores but the last orthogonal, then every SVD from the right has a bond's
    values. The whole matrix is never built."""
    carried = chain[0].new_ones(1, 1)
    orthogonal = []
    for core in chain:
        core = torch.tensordot(carried, core, 1)
        q, carried = torch.linalg.qr(core.flatten(0, 1))
        orthogonal.append(q.unflatten(0, core.shape[:2]))
    spectra = []
    for core in reversed(orthogonal[1:]):
        u, values, _ = torch.linalg.svd(
            torch.tensordot(core, carried, 1).flatten(1), full_matrices=False
        )
        spectra.append(values)
        carried = u * values
    return spectra[::-1]


# ------------------------------------------------------------- what composed experts are worth


@dataclass(frozen=True)
class Worth:
    """Losses in nats per token.

    Attributes:
        names: of the experts.
        tokens: that were predicted.
        loss: of the mixture.
        oracle: if every token had the expert that predicts it best, in all layers alike.
        share: of the gates, over all tokens and layers, by expert.
        load: tokens per expert, ``[layers][E]``.
        alone: the loss if every token goes to this expert; *none* is the base.
        removed: the loss of the mixture composed without this expert.
    """

    names: list[str]
    tokens: int
    loss: float
    oracle: float
    share: list[float]
    load: list[list[int]]
    alone: list[float]
    removed: list[float]


def composed_worth(
    mixture: Any, classes: Sequence[Statistics], texts: Mapping[str, Batches]
) -> dict[str, Worth]:
    """Compare a composed mixture with each of its experts alone and with the mixtures that lack
    one.

    Args:
        mixture: see `mpoe.compose_experts`; in eval mode.
        classes: the statistics of its experts in order, then those of the background if it has
            *none*.
        texts: batches by a name, keyword arguments of the model, with ``labels``.

    Returns:
        By the texts' names.

    Raises:
        ValueError: a model that was not composed, fewer than two experts, statistics of another
            number of them, batches without labels.
    """
    names = list(getattr(mixture.config, "mpoe_experts", None) or [])
    if len(names) < 2 or len(classes) != len(names):
        raise ValueError(
            "mixture must be composed of at least two experts with *none*, each with statistics; "
            f"it has {names}, statistics are of {len(classes)}"
        )
    composed = {name: _counted_losses(mixture, batches) for name, batches in texts.items()}
    alone: dict[str, list[Tensor]] = {name: [] for name in texts}
    removed: dict[str, list[float]] = {name: [] for name in texts}
    layers = [layer for layer, _ in routed_layers(mixture)]
    routing = getattr(mixture.config, "mpoe_routing", None) or {}
    for number in range(len(names)):
        others = [statistics for place, statistics in enumerate(classes) if place != number]
        has_none = NONE in names and names[number] != NONE
        routers = solve_routers(others, layers, none=has_none, **routing)
        for name, batches in texts.items():
            with forced(mixture, number):
                alone[name].append(token_losses(mixture, batches))
            with without(mixture, number, routers):
                removed[name].append(float(token_losses(mixture, batches).mean()))
    worths = {}
    for name, (losses, load, shares) in composed.items():
        worths[name] = Worth(
            names,
            len(losses),
            float(losses.mean()),
            float(torch.stack(alone[name]).amin(0).mean()),
            shares.tolist(),
            load.tolist(),
            [float(expert_losses.mean()) for expert_losses in alone[name]],
            removed[name],
        )
    return worths


def _counted_losses(mixture: Any, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of every token, tokens per expert ``[layers, E]``, and the experts' shares of the
    gates ``[E]``."""
    loads: list[Tensor] = []
    gates: list[Tensor] = []
    routers = [layer.router for _, layer in routed_layers(mixture)]

    def count(module: Any, args: Any, given: Mapping[str, Tensor], output: Any) -> None:
        loads.append(output.expert_load)
        mask = given.get("attention_mask")
        for router, logits in zip(routers, output.router_logits, strict=True):
            index, probabilities = _chosen(router, logits.float())
            # of the chosen experts, adding up to 1
            rows = torch.zeros_like(logits).scatter(-1, index, probabilities)
            rows = rows / rows.sum(-1, keepdim=True)
            if mask is not None and mask.numel() == len(rows):  # not in a decoder with an encoder
                rows = rows[mask.flatten().bool()]
            gates.append(rows)

    counting = mixture.register_forward_hook(count, with_kwargs=True)
    try:
        losses = token_losses(mixture, batches)
    finally:
        counting.remove()
    return losses, torch.stack(loads).sum(0), torch.cat(gates).mean(0)
