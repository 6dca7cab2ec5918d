"""The dense modules of a model that become MPOE modules: their replacements and the initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.mpo_embedding import MPOEmbedding, SharedEmbedding, TiedHead
from mpoe.layers.mpo_linear import MPOLinear, linear_weight
from mpoe_kernels import Decomposition, SharedDecomposition

Report = dict[str, Decomposition | SharedDecomposition]


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@dataclass(frozen=True)
class FFNSite:
    """A dense feed-forward network, which becomes an `MPOEFeedForward`.

    Attributes:
        name: name of the `MPOEFeedForward`.
        stream: the stream whose token mask it reads.
        layer: index of its layer in the stream.
        dense: its dense projections by kind; ``prefixes`` has the prefixes of their parameter names.
        options: keyword arguments of `MPOEFeedForward`.
        columns: for projections that share one matrix ``[in, out]``, the columns of each kind.
        emptied: names of modules whose work the experts do.
        zeroed: attributes that are set to 0, as ``(name of a module, name of its attribute)``.
        sums: name of the module that ends the network and adds its input, if it is not one module (see `FFN`).
    """

    name: str
    stream: str
    layer: int
    dense: dict[str, nn.Module]
    prefixes: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, slice] = field(default_factory=dict)
    emptied: tuple[str, ...] = ()
    zeroed: tuple[tuple[str, str], ...] = ()
    sums: str = ""

    @property
    def replaced(self) -> list[nn.Module]:
        """Dense modules that are replaced."""
        return list(self.dense.values())

    def weight(self, kind: str) -> Tensor:
        """Dense weight ``[in, out]``."""
        return linear_weight(self.dense[kind])[:, self.columns.get(kind, slice(None))]

    def bias(self, kind: str) -> Tensor | None:
        """Dense bias ``[out]``, if there is one."""
        bias: Tensor | None = getattr(self.dense[kind], "bias", None)
        return None if bias is None else bias[self.columns.get(kind, slice(None))]

    def check(self, config: MPOEConfig) -> None:
        """Refuse mismatched shapes."""
        own = config.for_experts(self.name)
        for kind in self.dense if config.expert_type == "mpo" else ():
            try:
                own.shape_for(kind, *self.weight(kind).shape)
            except ValueError as error:
                raise ValueError(f"{self.prefixes[kind]}: {error}") from error

    def build(self, config: MPOEConfig) -> MPOEFeedForward:
        """An `MPOEFeedForward` of these sizes, device and dtype, whose weights the caller fills or initialises."""
        up = self.weight("up")
        rows, columns = up.shape
        options = {"stream": self.stream, "device": "meta", "dtype": up.dtype, **self.options}
        return MPOEFeedForward(rows, columns, config.for_experts(self.name), **options).to_empty(device=up.device)

    def load(self, module: MPOEFeedForward, config: MPOEConfig) -> Report:
        """Copy the dense weights into every expert, decomposing each matrix once, with a new router."""
        if module.router is not None:
            module.router.reset_parameters()
        report: Report = {}
        for kind, projection in module.experts.projections().items():
            if isinstance(projection, MPOCores):
                report[f"{self.name}.experts.{kind}"] = projection.load_weight_(self.weight(kind), config.gauge)
                if config.auxiliary_noise:
                    projection.add_noise_(config.auxiliary_noise)
            else:
                projection.load_weight_(self.weight(kind))
            bias = self.bias(kind)
            if projection.bias is not None and bias is not None:
                projection.bias.copy_(bias)
        return report

    def install(self, model: nn.Module, module: MPOEFeedForward, config: MPOEConfig) -> None:
        """Put ``module`` in place of the dense network."""
        module.train(model.training)
        set_module(model, self.name, module)
        for name in self.emptied:
            set_module(model, name, nn.Identity())
        self.zero(model)

    def zero(self, model: nn.Module) -> None:
        """Set the attributes in `zeroed` to 0."""
        for name, attribute in self.zeroed:
            setattr(model.get_submodule(name), attribute, 0)


@dataclass(frozen=True)
class LinearSite:
    """A dense projection of ``component`` attention or pooler, which becomes an `MPOLinear`."""

    component: str
    name: str
    layer: int | None
    dense: nn.Module

    @property
    def replaced(self) -> list[nn.Module]:
        return [self.dense]

    @property
    def sizes(self) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        rows, columns = linear_weight(self.dense).shape
        return rows, columns

    def check(self, config: MPOEConfig) -> None:
        config.linear_shape(self.component, self.name, *self.sizes)

    def build(self, config: MPOEConfig) -> MPOLinear:
        weight = linear_weight(self.dense)
        return MPOLinear(
            config.linear_shape(self.component, self.name, *self.sizes),
            bias=getattr(self.dense, "bias", None) is not None,
            backend=config.backend,
            init_std=float(weight.shape[0]) ** -0.5,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)

    def load(self, module: MPOLinear, config: MPOEConfig) -> Report:
        if module.cores.bias is not None:
            module.cores.bias.copy_(self.dense.bias)  # type: ignore[arg-type]
        return {f"{self.name}.cores": module.cores.load_weight_(linear_weight(self.dense), config.gauge)}

    def install(self, model: nn.Module, module: MPOLinear, config: MPOEConfig) -> None:
        module.train(model.training)
        set_module(model, self.name, module)


@dataclass(frozen=True)
class EmbeddingSite:
    """The vocabulary embedding, which becomes an `MPOEmbedding`, with all modules that share it.

    Attributes:
        name: of the table.
        dense: the `nn.Embedding`.
        views: names of further modules that look up the same table (T5's stacks).
        head: name of the language-model head, whether tied or not.
        init_std: for random weights.
    """

    name: str
    dense: nn.Embedding
    views: tuple[str, ...]
    head: str | None
    init_std: float
    layer: int | None = None

    @property
    def replaced(self) -> list[nn.Module]:
        return [self.dense]

    @property
    def sizes(self) -> tuple[int, int]:
        """``(vocabulary, model size)``."""
        return self.dense.num_embeddings, self.dense.embedding_dim

    def check(self, config: MPOEConfig) -> None:
        config.linear_shape("embedding", self.name, *self.sizes)

    def build(self, config: MPOEConfig) -> MPOEmbedding:
        weight = self.dense.weight
        shape = config.linear_shape("embedding", self.name, *self.sizes)
        options: dict[str, Any] = {"init_std": self.init_std, "device": "meta", "dtype": weight.dtype}
        return MPOEmbedding(shape, self.dense.padding_idx, config.backend, **options).to_empty(device=weight.device)

    def load(self, module: MPOEmbedding, config: MPOEConfig) -> Report:
        return {f"{self.name}.cores": module.cores.load_weight_(self.dense.weight, config.gauge)}

    def is_tied(self, model: nn.Module) -> bool:
        """Whether the head's weight is the table itself.

        Raises:
            ValueError: another module that should share this table has its own.
        """
        for view in self.views:
            if model.get_submodule(view).weight is not self.dense.weight:
                raise ValueError(f"{view} must share the table of {self.name} for an MPO embedding; it has its own")
        return self.head is None or model.get_submodule(self.head).weight is self.dense.weight

    def install(self, model: Any, module: MPOEmbedding, config: MPOEConfig) -> None:
        """Install ``module`` and the modules that share it; Transformers must no longer tie weights to the table."""
        module.train(model.training)
        set_module(model, self.name, module)
        for view in self.views:
            set_module(model, view, SharedEmbedding(module).train(model.training))
        if self.head is not None and config.tied_head:
            bias = model.get_submodule(self.head).bias
            set_module(model, self.head, TiedHead(module, bias).train(model.training))
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(model, name, None) or {}
            setattr(model, name, {target: source for target, source in ties.items() if source != f"{self.name}.weight"})


Site = FFNSite | LinearSite | EmbeddingSite


def install_empty(model: nn.Module, sites: Sequence[Any], config: MPOEConfig) -> None:
    """Replace the dense modules by MPOE modules; the caller fills or initialises their weights."""
    for site in sites:
        module: Any = site.build(config)
        site.install(model, module, config)
