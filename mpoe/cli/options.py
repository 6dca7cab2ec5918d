"""Options that several commands have, or that describe a model, as dataclasses, and the objects
built from them."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, get_type_hints

from mpoe.cli.command import comma_separated, option
from mpoe.cli.errors import CommandError
from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import check_choice, refusing
from mpoe.config.shapes import SEPARABLE

# the original's names of components -> target_modules
MPO_LAYERS = {"word_embed": "embedding", "mlp": "ffn", "attention": "attention", "pooler": "pooler"}
NO_MPO = "nompo"


DENSE = "dense"
WIDER = "wider"
SWITCH = "switch"
BASELINES = {DENSE: "dense", WIDER: "dense, wider", SWITCH: "dense experts"}


@dataclass
class RunOptions:
    """What a training run starts from, and what becomes of it."""

    model: str = option(
        "t5", "t5 or gpt2 (tiny stand-ins), a folder, or a hub name", "model_name_or_path"
    )
    baseline: str | None = option(
        None,
        "train what the mixture is compared with: dense (the model as it is), wider (dense, as "
        "large as the mixture), switch (dense experts)",
        choices=list(BASELINES),
    )
    expert: str | None = option(
        None, "train one expert of --neurons beside the frozen model; saved as NAME.expert too"
    )
    save_base: bool = option(
        False, "of --expert: save the base with it too, in output_dir and its checkpoints"
    )
    find_rate: bool = option(
        False, "search for the learning rate first: 30 steps with each of three to five"
    )
    overwrite: bool = option(False, "replace the run in output_dir")
    resume: bool = option(False, "continue the run in output_dir at its last checkpoint")
    load_experiment: str | None = option(
        None, "folder of an earlier run or a saved model, from which this run goes on"
    )
    load_layer: list[str] = option(
        [],
        "components (word_embed, mlp, attention, pooler) that are taken from load_experiment "
        "instead of being decomposed again; everything else comes from --model",
    )
    compute_time: bool = option(False, "report the time of a training step, and items per second")
    compute_memory: bool = option(
        False, "report the most memory used: of the GPU, or of the process"
    )
    print_num_parameters: bool = option(
        False, "print the number of parameters by kind before training"
    )

    def __post_init__(self) -> None:
        from mpoe.models.checkpoint import parse_components

        # the original's scripts load nothing so
        components = ",".join(value for value in self.load_layer if value != "noload")
        self.load_layer = list(parse_components(components or None, "load_layer") or ())
        if self.load_layer and self.load_experiment is None:
            raise ValueError(
                "load_layer needs load_experiment: the run or model whose cores are taken"
            )


# Configuration fields whose option has a different type: JSON or a list; or None for the default of
# the moe_type.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "shape": (str | None, None),
    "shape_pattern": (str | None, None),
    "target_modules": (list[str], []),
    "exclude_modules": (list[str], []),
    "layers_to_transform": (list[int], []),
}
_OPTIONAL = (
    "gauge",
    "light_p",
    "block_per_group",
    "expert_bias",
    "expert_output_bias",
    "min_capacity",
    "second_threshold",
    "scoring_func",
    "bias_update_rate",
)
_NO_OPTIONS = ("router", "rate_ratios", "tied_head")
# the original's names, and short ones
_ALIASES = {
    "num_experts": ("experts",),
    "max_bond": ("linear_trunc", "bond"),
    "attention_max_bond": ("attention_trunc",),
    "embedding_max_bond": ("emb_trunc",),
    "pooler_max_bond": ("pooler_trunc",),
    "expert_dropout": ("switch_dropout",),
}


def _described(config: type) -> dict[str, str]:
    """Field -> the first sentence about it in the configuration's docstring."""
    # nothing with python -OO
    _, _, text = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")
    parts = re.split(r"^    (\w+): ", text, flags=re.M)[1:]
    described = {}
    for name, words in zip(parts[::2], parts[1::2], strict=True):
        sentence, *_ = re.split(r"(?<!eq)(?<!al)\.\s", words.replace("`", ""))
        described[name] = " ".join(sentence.split()).removesuffix(".")
    return described


def _options_of(config: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, field) of every option that corresponds to a configuration field."""
    kinds = get_type_hints(config)
    about = _described(config)
    for field in fields(config):
        name = field.name
        if name in _NO_OPTIONS:
            continue
        declared = (kinds[name], field.default)
        if name in _OPTIONAL:
            declared = (kinds[name] | None, None)
        kind, default = _OPTIONS.get(name, declared)
        yield name, kind, option(default, about.get(name, ""), *_ALIASES.get(name, ()))


_Fields: Any = make_dataclass("_Fields", [*_options_of(MPOEConfig), *_options_of(RouterConfig)])


@dataclass
class ExpertOptions(_Fields):  # type: ignore[misc]
    """How the feed-forward layers become experts: the fields of `MPOEConfig` and `RouterConfig`,
    and `mpo_layers`.

    Options left at None take the defaults of the moe_type and the shape. ``shape`` may also be JSON
    (kind -> MPOShape), as ``shape_pattern``.
    """

    mpo_layers: list[str] = option(
        [],
        "components in MPO form, by the original's names: word_embed, mlp, attention, pooler, or "
        "nompo; without mlp the experts are dense",
    )

    def build(self) -> MPOEConfig | None:
        """The checked `MPOEConfig`, or None if everything stays dense.

        Raises:
            ValueError, TypeError: an invalid field, by name.
        """
        from mpoe_kernels import available_backends, backend_reasons

        targets, expert_type = self._targets()
        if not targets:
            return None
        if self.backend not in (None, "auto", *available_backends()):
            reasons = backend_reasons().get(str(self.backend))
            why = f": it cannot run here: {'; '.join(reasons)}" if reasons else ""
            raise CommandError(
                f"backend must be one of {', '.join(available_backends())}; got "
                f"{self.backend!r}{why}"
            )

        def given(config: type) -> dict[str, Any]:
            values = {field.name: getattr(self, field.name, None) for field in fields(config)}
            return {name: value for name, value in values.items() if value not in (None, [])}

        values = given(MPOEConfig)
        values["expert_type"] = expert_type
        values["target_modules"] = targets if len(targets) > 1 else targets[0]
        values["router"] = given(RouterConfig)
        if self.shape is not None and self.shape.lstrip().startswith("{"):
            values["shape"] = read_json_option("shape", self.shape)
        elif self.shape is None and self.mpo_layers:
            values["shape"] = SEPARABLE  # "in MPO form"
        if self.shape_pattern is not None:
            values["shape_pattern"] = read_json_option("shape_pattern", self.shape_pattern)
        if self.backend == "auto":
            values["backend"] = None
        return MPOEConfig(**values)

    def _targets(self) -> tuple[list[str], str]:
        """`MPOEConfig`'s target_modules and expert_type; no targets = the model is unchanged."""
        targets = self.target_modules or ["ffn"]
        expert_type = self.expert_type
        if self.mpo_layers:
            if self.target_modules or expert_type != "mpo":
                raise CommandError(
                    "mpo_layers sets target_modules and expert_type; give either it or them"
                )
            layers = comma_separated(self.mpo_layers)
            for name in layers:
                check_choice("mpo_layers", name, (*MPO_LAYERS, NO_MPO))
            if NO_MPO in layers and len(layers) > 1:
                raise CommandError(
                    f"mpo_layers must be {NO_MPO} alone or names of components; got "
                    f"{', '.join(layers)}"
                )
            expert_type = "mpo" if "mlp" in layers else "dense"
            targets = ["ffn", *(MPO_LAYERS[name] for name in layers if name not in (NO_MPO, "mlp"))]
        if self.moe_type == "none" and expert_type == "dense":
            # one dense expert is the existing network
            targets = [target for target in targets if target != "ffn"]
        return targets, expert_type


def expert_options_of(given: Iterable[str]) -> list[str]:
    """Those of the options that were set which describe a mixture."""
    return sorted({field.name for field in fields(ExpertOptions)} & set(given))


def read_json_option(name: str, text: str) -> Any:
    """The value of an option that is JSON; a ValueError names the option and the place of the
    error."""
    with refusing(f"{name}: bad JSON: ", (ValueError, RecursionError)):
        return json.loads(text)
