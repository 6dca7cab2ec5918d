"""LoRA adapters as experts: neurons are fitted to what an adapter does, on texts.

An adapter changes attention, or a network inside its nonlinearity, which no few neurons beside the
networks can do exactly. So they learn the adapted model's predictions (distillation, Hinton et al.
2015, arXiv 1503.02531), for which the adapter's place does not matter, and what was lost is
measured on texts that the fit did not see. Without texts, the adapted model's own samples say what
it has learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe.data.encode import IGNORED_LABEL
from mpoe.data.mappings import read_mapping
from mpoe.data.predict import token_losses
from mpoe.models.background import labelled_batches, own_chats, own_texts
from mpoe.models.composition import collect_statistics
from mpoe.models.expert_files import (
    Expert,
    check_name,
    made_expert,
    places_for_neurons,
    start_expert,
)
from mpoe.models.weight_files import Tensors, declared_shapes

LEAST_KEPT = 0.8  # of the adapter's gain over the base on texts that the fit did not see
HELD_OUT = 5  # one in so many batches is not fitted
LEARNING_RATE = 1e-2
FIT_STEPS = 60
SAMPLED = 64  # texts, or chats, that an adapted model writes
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
    numbers: dict[str, int] = {}
    for name, shape in declared_shapes([file]).items():
        module, is_lora, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if not is_lora or kind != "LORA":
            raise ValueError(f"adapter must be a plain LoRA; {folder} is {kind} and holds {name}")
        numbers[module] = numbers.get(module, 0) + torch.Size(shape).numel()
    return numbers


def check_adapter(base: Any, folder: str | Path) -> int:
    """Refuse an adapter that is not LoRA of the base's modules, in whatever place (ValueError);
    returns its neurons' number, as many as have the adapter's size."""
    networks = places_for_neurons(base)
    adapted = _adapted_modules(Path(folder))
    others = sorted(adapted.keys() - dict(base.named_modules()))
    if others:
        raise ValueError(
            f"adapter must be of this base; {folder} adapts {others[0]}, which the base does not "
            "have"
        )
    per_neuron = sum(
        site.weight(kind).shape[kind == "down"] for site in networks for kind in site.dense
    )
    return max(1, round(sum(adapted.values()) / per_neuron))


def own_samples(base: Any, adapted: Any, tokenizer: Any) -> tuple[list[Tensors], str]:
    """What an adapted model has learnt, in its own words: `SAMPLED` texts that it writes from its
    start token, or as many chats from its template, whichever differ more from what the base would
    write.

    Returns:
        Batches for `fit_adapter`; a sentence about them.

    Raises:
        ValueError: a tokenizer without a start or an end token.
    """
    written = {
        "texts": own_texts(adapted, tokenizer, samples=SAMPLED),
        "chats": own_chats(adapted, tokenizer, samples=SAMPLED),
    }
    batches: dict[str, list[Tensors]] = {}
    difference: dict[str, float] = {}
    for kind, ids in written.items():
        if ids is None:
            continue
        # A copy, as tensors that were made for inference cannot take part in training.
        batches[kind] = labelled_batches(ids.clone())
        losses = [token_losses(model, batches[kind]).mean() for model in (base, adapted)]
        difference[kind] = float(losses[0] - losses[1])
    most = max(difference, key=lambda kind: difference[kind])
    about = (
        f"{SAMPLED} {most} that the adapted model itself writes, {difference[most]:.3f} nats "
        "per token off the base's"
    )
    return batches[most], about


def fit_adapter(
    base: Any,
    adapted: Any,
    batches: Batches,
    name: str,
    *,
    neurons: int,
    steps: int = FIT_STEPS,
    tokenizer: Any = None,
) -> Expert:
    """An expert of ``base`` that predicts what ``adapted`` does.

    Args:
        base: a dense causal language model; it is not changed.
        adapted: the base with the adapter merged into it.
        batches: ``input_ids`` and ``labels``, which name the tokens that the fit counts
            (`mpoe.data.batches`, `own_samples`); every fifth one is held out, so at least two.
        name: the expert's.
        neurons: m, see `check_adapter`.
        steps: of Adam at 1e-2, on a batch each.
        tokenizer: see `save_expert`.

    Returns:
        The expert, with statistics from the batches; its ``training`` facts hold the held-out
        losses of ``base``, ``adapter`` and ``expert`` in nats per token, and ``kept``, the share of
        the adapter's gain.

    Raises:
        ValueError: a name that no file can have, fewer than two batches, an adapter that gains
            nothing on them, or neurons that keep less than 80% of its gain.
    """
    check_name(name)
    if len(batches) < 2:
        raise ValueError(
            f"batches must be at least two, of which one is held out; got {len(batches)}"
        )
    held_out = batches[::HELD_OUT]
    fitted = [batch for place, batch in enumerate(batches) if place % HELD_OUT]
    losses = {
        "base": float(token_losses(base, held_out).mean()),
        "adapter": float(token_losses(adapted, held_out).mean()),
    }
    gain = losses["base"] - losses["adapter"]
    if not gain > 0:
        raise ValueError(
            f"adapter {name!r} must be better than the base on its texts to be fitted; it has "
            f"{losses['adapter']:.3f} nats per token, the base {losses['base']:.3f}"
        )
    model = start_expert(base, neurons)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = dict(fitted[step % len(fitted)])
        counted = batch.pop("labels")[:, 1:] != IGNORED_LABEL
        with torch.no_grad():
            target = adapted(**batch).logits[:, :-1][counted].float().log_softmax(-1)
        prediction = model(**batch).logits[:, :-1][counted].float().log_softmax(-1)
        F.kl_div(prediction, target, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    losses["expert"] = float(token_losses(model, held_out).mean())
    kept = (losses["base"] - losses["expert"]) / gain
    if not kept >= LEAST_KEPT:
        raise ValueError(
            f"adapter {name!r} must keep {LEAST_KEPT:.0%} of its gain as {neurons} neurons; it "
            f"keeps {kept:.0%}: base {losses['base']:.3f}, adapter {losses['adapter']:.3f}, "
            f"neurons {losses['expert']:.3f} nats per token (more neurons, steps or texts may do)"
        )
    facts = {"fitted": "LoRA", "steps": steps, "kept": kept, **losses}
    read = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    statistics = collect_statistics(model, read)
    return made_expert(model, name, statistics, tokenizer, facts)
