"""The dense modules of a model that become MPOE modules: their replacements and the initial
weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.config.checks import refusing
from mpoe.config.shapes import HIDDEN, NEURONS
from mpoe.layers.cores import MPOCores
from mpoe.layers.drop_in import MPOEmbedding, MPOLinear, SharedEmbedding, TiedHead, linear_weight
from mpoe.layers.feed_forward import KeptFeedForward, MPOEFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.layers.neurons import START_NOISE, NeuronFeedForward
from mpoe_kernels import Decomposition, MPOShape

Report = dict[str, Decomposition]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called ``name``; the new one has the model's training mode."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))


@dataclass(frozen=True)
class FFNSite:
    """A dense feed-forward network, which becomes an `MPOEFeedForward`, or a `KeptFeedForward`
    around its projections.

    Attributes:
        name: name of the `MPOEFeedForward`.
        stream: the stream whose token mask it reads.
        layer: index of its layer in the stream.
        dense: its dense projections by kind; ``prefixes`` has the prefixes of their parameter
            names.
        options: keyword arguments of `MPOEFeedForward`.
        columns: for projections that share one matrix ``[in, out]``, the columns of each kind.
        emptied: names of modules whose work the experts do.
        zeroed: attributes that are set to 0, as ``(name of a module, name of its attribute)``.
        sums: name of the module that ends the network and adds its input, if it is not one module
            (see `FFN`).
        keeps: the shape of its experts, ``"hidden"`` or ``"neurons"``, if the projections stay.
    """

    name: str
    stream: str
    layer: int
    dense: dict[str, nn.Module]
    prefixes: dict[str, str]
    options: dict = field(default_factory=dict)
    columns: dict[str, slice] = field(default_factory=dict)
    emptied: tuple[str, ...] = ()
    zeroed: tuple[tuple[str, str], ...] = ()
    sums: str = ""
    keeps: str = ""

    @property
    def replaced(self) -> list[nn.Module]:
        """Dense modules that are replaced."""
        return [] if self.keeps else list(self.dense.values())

    @property
    def place(self) -> str:
        """Name of the module that is replaced, or that becomes another."""
        return self.sums or self.name if self.keeps == NEURONS else self.name

    @property
    def inside(self) -> dict[str, str]:
        """Attribute name of each projection inside that module."""
        start = f"{self.place}."
        return {
            kind: prefix.removeprefix(start)
            for kind, prefix in self.prefixes.items()
            if prefix.startswith(start)
        }

    @property
    def obstacle(self) -> str | None:
        """What a conversion that keeps the projections lacks, if it is impossible."""
        if self.keeps == NEURONS:
            needed = ["down"] if self.sums else list(self.dense)
        else:
            needed = [kind for kind in self.dense if kind != "down"]
        missing = [kind for kind in needed if "." in self.inside.get(kind, ".")]
        return f"its {missing[0]} projection inside the module" if missing else None

    def weight(self, kind: str) -> Tensor:
        """Dense weight ``[in, out]``."""
        return linear_weight(self.dense[kind])[:, self.columns.get(kind, slice(None))]

    def bias(self, kind: str) -> Tensor | None:
        """Dense bias ``[out]``, if there is one."""
        bias: Tensor | None = getattr(self.dense[kind], "bias", None)
        return None if bias is None else bias[self.columns.get(kind, slice(None))]

    def check(self, config: MPOEConfig) -> None:
        """Refuse projections of another structure, and mismatched shapes."""
        if self.keeps and self.obstacle is not None:
            raise ValueError(
                f"{self.name}: shape {self.keeps!r} needs {self.obstacle} (shape='separable' "
                "supports it)"
            )
        if config.expert_type != "mpo":
            return
        settings = config.for_experts(self.name)
        rows, columns = self.weight("up").shape
        for kind in self.dense:
            sizes = list(self.weight(kind).shape)
            wanted = [columns, rows] if kind == "down" else [rows, columns]
            if self.keeps and sizes != wanted:
                raise ValueError(
                    f"{self.prefixes[kind]} must be for a weight {wanted}; got {sizes}"
                )
            with refusing(f"{self.prefixes[kind]}: ", ValueError):
                if self.keeps == HIDDEN:
                    settings.hidden_block(columns)
                elif not self.keeps:
                    settings.shape_for(kind, *sizes)

    def build(self, config: MPOEConfig) -> RoutedFeedForward:
        """The layer, of these sizes, device and dtype, whose weights the caller fills or
        initialises."""
        up = self.weight("up")
        options = {**self.options, "stream": self.stream, "device": "meta", "dtype": up.dtype}
        kind: Any = MPOEFeedForward
        if self.keeps:
            kind = HiddenFeedForward
            options |= {"names": self.inside, "columns": self.columns}
        if self.keeps == NEURONS:
            kind = NeuronFeedForward
            options["adds_input"] = bool(self.sums)
        return kind(*up.shape, config.for_experts(self.name), **options).to_empty(device=up.device)

    def load(self, module: Any, config: MPOEConfig) -> Report:
        """Give ``module`` a new router and experts that compute what the dense network does.

        Dense weights are copied into every expert, each decomposed once; nothing is decomposed for
        experts between the projections or beside them: identities, or neurons that contribute
        nothing yet.
        """
        if module.router is not None:
            module.router.reset_parameters()
        experts = module.experts
        if self.keeps == HIDDEN:
            experts.reset_parameters()
        elif self.keeps:
            weights = {kind: self.weight(kind) for kind in self.dense if kind != "down"}
            experts.init_std = float(weights["up"].float().std())
            experts.reset_parameters()
            if experts.latent is None:
                experts.copy_neurons_(weights, self.bias("up"), START_NOISE)
        report: Report = {}
        if self.keeps:
            return report
        for kind, projection in experts.projections().items():
            weight = self.weight(kind)
            if isinstance(projection, MPOCores):
                result = projection.load_weight_(weight, config.gauge)
                report[f"{self.name}.experts.{kind}"] = result
            else:
                projection.load_weight_(weight)
            bias = self.bias(kind)
            if projection.bias is not None:  # built without values
                projection.bias.copy_(torch.zeros(()) if bias is None else bias)
        return report

    def install(self, model: nn.Module, module: RoutedFeedForward, config: MPOEConfig) -> None:
        """Put ``module`` in place of the dense network, or around it."""
        if isinstance(module, NeuronFeedForward):
            dense = model.get_submodule(self.place)
            if self.sums:
                module.output_dropout = getattr(getattr(dense, "dropout", None), "p", 0.0)
            module.train(model.training)
            module.around(dense, self.dense)
        elif isinstance(module, KeptFeedForward):
            module.adopt(self.dense)
        set_module(model, self.place, module)
        if not self.keeps:
            for name in self.emptied:
                set_module(model, name, nn.Identity())
        for name, attribute in self.zeroed:
            setattr(model.get_submodule(name), attribute, 0)


@dataclass(frozen=True)
class MatrixSite:
    """A dense module of one matrix, which another one takes the place of.

    Attributes:
        name: of the module ``dense``.
        layer: index of its layer, if it is in one.
        component: attention, pooler or embedding.
    """

    name: str
    layer: int | None
    dense: Any
    component: str

    @property
    def replaced(self) -> list[nn.Module]:
        """Modules that are replaced."""
        return [self.dense]

    def install(self, model: nn.Module, module: Any, config: MPOEConfig) -> None:
        """Put ``module`` in place of the dense one."""
        set_module(model, self.name, module)

    @property
    def weight(self) -> Tensor:
        """``[in_features, out_features]``; a table is ``[vocabulary, model size]``."""
        is_table = isinstance(self.dense, nn.Embedding)
        return self.dense.weight if is_table else linear_weight(self.dense)

    def shape(self, config: MPOEConfig) -> MPOShape:
        """Its shape in MPO form; ValueError for one of other sizes."""
        return config.linear_shape(self.component, self.name, *self.weight.shape)

    def check(self, config: MPOEConfig) -> None:
        """Refuse shapes of other sizes."""
        self.shape(config)

    def load(self, module: Any, config: MPOEConfig) -> Report:
        """Give ``module`` the decomposed weight, and the bias if there is one."""
        if module.cores.bias is not None:
            module.cores.bias.copy_(self.dense.bias)
        return {f"{self.name}.cores": module.cores.load_weight_(self.weight, config.gauge)}


class LinearSite(MatrixSite):
    """A dense projection, which becomes an `MPOLinear`."""

    def build(self, config: MPOEConfig) -> MPOLinear:
        weight = self.weight
        return MPOLinear(
            self.shape(config),
            bias=getattr(self.dense, "bias", None) is not None,
            backend=config.backend,
            init_std=float(weight.shape[0]) ** -0.5,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)


@dataclass(frozen=True)
class EmbeddingSite(MatrixSite):
    """The vocabulary embedding, which becomes an `MPOEmbedding`, with all modules that share it.

    Attributes:
        views: names of further modules that look up the same table (T5's stacks).
        head: name of the language-model head, whether tied or not.
        init_std: for random weights.
    """

    views: tuple[str, ...]
    head: str | None
    init_std: float

    def build(self, config: MPOEConfig) -> MPOEmbedding:
        return MPOEmbedding(
            self.shape(config),
            self.dense.padding_idx,
            config.backend,
            self.init_std,
            device="meta",
            dtype=self.weight.dtype,
        ).to_empty(device=self.weight.device)

    def is_tied(self, model: nn.Module) -> bool:
        """Whether the head's weight is the table itself.

        Raises:
            ValueError: another module that should share this table has its own.
        """
        for view in self.views:
            if model.get_submodule(view).weight is not self.dense.weight:
                raise ValueError(
                    f"{view} must share the table of {self.name} for an MPO embedding; it has its "
                    "own"
                )
        return self.head is None or model.get_submodule(self.head).weight is self.dense.weight

    def install(self, model: Any, module: Any, config: MPOEConfig) -> None:
        """Install ``module`` and the modules that share it; Transformers must no longer tie weights
        to the table."""
        set_module(model, self.name, module)
        for view in self.views:
            set_module(model, view, SharedEmbedding(module))
        if self.head is not None and config.tied_head:
            set_module(model, self.head, TiedHead(module, model.get_submodule(self.head).bias))
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = (getattr(model, name, None) or {}).items()
            kept = {target: source for target, source in ties if source != f"{self.name}.weight"}
            setattr(model, name, kept)


def install_empty(model: nn.Module, sites: Sequence, config: MPOEConfig) -> None:
    """Replace the dense modules by MPOE modules; the caller fills or initialises their weights."""
    for site in sites:
        module: Any = site.build(config)
        site.install(model, module, config)
