"""What a server needs to know of its mixture, without vLLM: `ServedMixture` in the workers,
`ExpertSet` in the process that answers requests.

Both read ``mpoe`` of vLLM's option ``--additional-config``: ``slots``, ``neurons`` and ``folder``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_integer, check_type
from mpoe.models.composition import NONE, Statistics, solve_routers
from mpoe.models.expert_files import Expert, layer_sizes, load_expert
from mpoe.models.expert_mixture import (
    check_alike,
    default_top_k,
    experts_in,
    mixture_config,
)
from mpoe.models.weight_files import tensors_hash

OPTIONS = ("slots", "neurons", "folder")


class Refused(ValueError):
    """A request that changes nothing; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def options_of(additional: Any) -> dict[str, Any]:
    """``mpoe`` of ``--additional-config``.

    Raises:
        TypeError, ValueError: no mapping, an option of another name, slots or neurons below 1.
    """
    options = additional.get("mpoe", {}) if isinstance(additional, Mapping) else {}
    check_type("mpoe in additional_config", options, Mapping, f"a mapping of {', '.join(OPTIONS)}")
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"mpoe in additional_config may hold {', '.join(OPTIONS)}; got {unknown[0]!r}"
        )
    for name in ("slots", "neurons"):
        check_integer(name, options.get(name), 1, optional=True)
    check_type("folder", options.get("folder"), (str, type(None)), "a folder's path")
    return dict(options)


@dataclass(frozen=True)
class ServedMixture:
    """The sizes that a server allocates.

    Attributes:
        experts: names of those in the composed folder, without *none*.
        has_none: whether the mixture has *none*, the last row of routers.
        slots: S, experts that there is room for.
        neurons: m, of an expert at most.
        top_k: experts of a token, *none* among them.
    """

    experts: tuple[str, ...]
    has_none: bool
    slots: int
    neurons: int
    top_k: int

    @classmethod
    def of(cls, values: Mapping[str, Any], additional: Any) -> "ServedMixture":
        """Of a model's configuration and vLLM's ``additional_config``.

        Raises:
            TypeError, ValueError: a model that `compose_experts` did not make; options as
                `options_of`, or less room than the folder's experts need.
        """
        options = options_of(additional)
        names = values.get("mpoe_experts")
        config = MPOEConfig.from_dict(values["mpoe"])
        if not names or not config.is_neurons or config.latent is not None:
            raise ValueError(
                "model must be a mixture of experts' files (mpoe compose MODEL FILE ...); "
                f"this has {config.num_experts} experts of shape {config.shape!r}"
            )
        experts = tuple(name for name in names if name != NONE)
        least = {"slots": len(experts), "neurons": config.neurons}
        sizes: dict[str, Any] = {}
        for name, needed in least.items():
            sizes[name] = options.get(name) or needed
            if sizes[name] < needed:
                raise ValueError(f"{name} must be at least the model's {needed}; got {sizes[name]}")
        top_k = config.top_k
        if top_k == default_top_k(len(names)):
            top_k = default_top_k(sizes["slots"] + 1)
        return cls(experts, NONE in names, top_k=top_k, **sizes)

    def rows(self) -> list[int]:
        """The rows of routers that the folder's experts have, in their order there."""
        return [*range(len(self.experts))] + [self.slots] * self.has_none


class ExpertSet:
    """The experts that a server has now, and what its workers must copy for another set.

    Args:
        model: a composed folder.
        values: its configuration.
        additional: vLLM's ``additional_config``; ``folder`` in it holds the files to add.

    Raises:
        TypeError, ValueError: as `experts_in` and `ServedMixture.of`; no ``folder``, or one that
            is not there.
    """

    def __init__(self, model: Path, values: Mapping[str, Any], additional: Any) -> None:
        self.sizes = ServedMixture.of(values, additional)
        folder = options_of(additional).get("folder")
        if folder is None or not Path(folder).is_dir():
            raise ValueError(
                "folder of mpoe in additional_config must be the folder with experts' files to "
                f"add; got {folder!r}"
            )
        self.folder = Path(folder).resolve()
        experts, self.background = experts_in(model)
        _, _, self.routing = mixture_config(model)
        self.first = experts[0]
        self.by_slot: dict[int, Expert] = dict(enumerate(experts))

    def shown(self) -> dict[str, Any]:
        """The answer to ``GET``."""
        return {
            "slots": self.sizes.slots,
            "neurons": self.sizes.neurons,
            "experts": [
                {
                    "name": expert.name,
                    "slot": slot,
                    "neurons": expert.neurons,
                    "sha256": tensors_hash(expert.weights),
                }
                for slot, expert in self.by_slot.items()
            ],
        }

    def with_file(self, path: str) -> dict[int, Expert]:
        """The experts after the one in a file, relative to the folder, joined them.

        Raises:
            Refused: 403 outside the folder, 404 no such file, 400 damaged, of another base,
                tokenizer or size, without statistics, 409 there already, or no slot is left.
        """
        file = (self.folder / path).resolve()
        if not file.is_relative_to(self.folder):
            raise Refused(403, f"path must be of a file in the server's folder; got {path!r}")
        if not file.is_file():
            raise Refused(404, f"path must be of a file in the server's folder; no {path!r} there")
        free = [slot for slot in range(self.sizes.slots) if slot not in self.by_slot]
        try:
            expert = load_expert(file)
        except (TypeError, ValueError) as error:
            raise Refused(400, str(error)) from error
        there = list(self.by_slot.values())
        digest = tensors_hash(expert.weights)
        for other in there:
            if other.name == expert.name or tensors_hash(other.weights) == digest:
                raise Refused(409, f"expert {expert.name!r} is there already, as {other.name!r}")
        if not free:
            raise Refused(
                409, f"all {self.sizes.slots} slots are taken; remove an expert, or start with more"
            )
        try:
            self._check_fits(expert)
            check_alike([*there, expert], {self.first.facts["tokenizer"]: "the model"})
        except ValueError as error:
            raise Refused(400, str(error)) from error
        return {**self.by_slot, free[0]: expert}

    def _check_fits(self, expert: Expert) -> None:
        name = expert.name
        if expert.facts["base"] != self.first.facts["base"]:
            raise ValueError(
                f"expert {name!r} must be of this server's base; it was trained beside a "
                f"{expert.facts['model']} ({expert.facts['base_name'] or 'local'}) of other weights"
            )
        if expert.neurons > self.sizes.neurons:
            raise ValueError(
                f"expert {name!r} must have at most {self.sizes.neurons} neurons (start with "
                f"more); it has {expert.neurons}"
            )
        wanted = {
            part: (expert.neurons, *value.shape[1:]) for part, value in self.first.weights.items()
        }
        shapes = {part: tuple(value.shape) for part, value in expert.weights.items()}
        for part in sorted({*shapes, *wanted}):
            if shapes.get(part) != wanted.get(part):
                raise ValueError(
                    f"expert {name!r} must have {part} {wanted.get(part)}; it has "
                    f"{shapes.get(part)}"
                )

    def without(self, name: str) -> dict[int, Expert]:
        """The experts without one of them.

        Raises:
            Refused: 404 none of that name.
        """
        left = {slot: expert for slot, expert in self.by_slot.items() if expert.name != name}
        if len(left) == len(self.by_slot):
            raise Refused(404, f"no expert {name!r} is there")
        return left

    def changes(self, after: Mapping[int, Expert]) -> bytes:
        """What workers copy for another set of experts, as safetensors: ``occupied`` (bool
        ``[S + 1]``), ``slots`` that get another expert, and by layer ``LAYER.router`` (float32
        ``[S + 1, I]``), solved again from the statistics of all, and ``LAYER.PART.SLOT``."""
        classes: list[Statistics] = [expert.statistics for expert in after.values()]
        rows = list(after)
        if self.background is not None:
            classes.append(self.background)
            rows.append(self.sizes.slots)
        layers = layer_sizes(self.first.weights)
        occupied = torch.zeros(self.sizes.slots + 1, dtype=torch.bool)
        occupied[rows] = True
        new = [slot for slot, expert in after.items() if self.by_slot.get(slot) is not expert]
        tensors = {"occupied": occupied, "slots": torch.tensor(new, dtype=torch.int64)}
        routers = {}
        if after:
            none = self.background is not None
            routers = solve_routers(classes, layers, none=none, **self.routing)
        for layer, size in layers.items():
            router = torch.zeros(self.sizes.slots + 1, size)
            if layer in routers:
                router[rows] = routers[layer].float()
            tensors[f"{layer}.router"] = router
        for slot in new:
            for name, value in after[slot].weights.items():
                tensors[f"{name}.{slot}"] = value
        return safetensors.torch.save(tensors)
