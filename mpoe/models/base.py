"""`MPOEModelMixin`: the mixture-of-experts part of a Hugging Face model class. No modelling code is
copied: subclasses call their dense parent's forward inside a routing context and add the auxiliary
loss."""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_integer
from mpoe.config.shapes import HIDDEN
from mpoe.layers.context import (
    Entered,
    RouterRecord,
    RoutingContext,
    checkpoint_arguments,
    current_routing,
    sum_over_ranks,
)
from mpoe.layers.cores import FromInitialValues, MPOCores
from mpoe.layers.drop_in import MPOEmbedding, MPOLinear, SharedEmbedding, TiedHead
from mpoe.layers.experts import MPOExperts
from mpoe.layers.feed_forward import KeptFeedForward
from mpoe.layers.losses import count_choices, load_balancing_loss, router_z_loss
from mpoe.models import card, report
from mpoe.models.find import find_sites
from mpoe.models.kept_weights import full_weights_kept
from mpoe.models.request_cache import cache_in, evidence_before, keep_evidence
from mpoe.models.sites import install_empty
from mpoe.models.walk import (
    kept_modules,
    modules_of,
    mpo_modules,
    names_in_checkpoints,
    rate_ratios_of,
)
from mpoe.models.weight_files import BASE_FILE, ONLY_FILE
from mpoe_kernels.version import __version__

# of every model's output, see `mpoe.models.classes.RoutingFields`
ROUTING_FIELDS = ("task_loss", "aux_loss", "router_logits", "expert_load")
REMOTE_FILE = "modeling_mpoe.py"
REMOTE_CODE = '''"""Opens this model in programs without mpoe (``trust_remote_code=True``)."""

try:
    from mpoe.models import {names}
except ImportError as error:
    raise ImportError('this model needs the package mpoe: pip install "mpoe>={version}"') from error
'''


def last_tokens(mask: Any, kwargs: Mapping[str, Any], ids: str, embeds: str) -> Tensor | None:
    """Token mask ``[B, S]`` of the S tokens of this call from an attention mask ``[B, past + S]``.

    Masks with other numbers of axes (prepared 4-D ones) describe attention, not padding: ``None``.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    tokens = kwargs.get(ids) if kwargs.get(ids) is not None else kwargs.get(embeds)
    return mask.bool() if tokens is None else mask[:, -tokens.shape[1] :].bool()


def auxiliary_loss(records: list[RouterRecord], balance_weight: float, z_weight: float) -> Tensor:
    """``sum over layers of balance_weight * balancing loss + z_weight * z-loss``, float32 scalar.

    Layers of one stream share tokens and mask and are computed together, but independently. In a
    `global_batch` the average over the ranks is the loss over the tokens of all ranks.
    """
    experts = records[0].logits.shape[-1]
    streams: dict[str, list[RouterRecord]] = {}
    for record in records:
        streams.setdefault(record.stream, []).append(record)
    parts = []
    for layers in streams.values():
        logits = torch.stack([layer.logits for layer in layers])
        index = torch.stack([layer.top_k_index for layer in layers])
        mask = layers[0].token_mask
        parts.append((logits, index, mask, count_choices(index, experts, mask)))
    summed, ranks = sum_over_ranks(torch.cat([choices for *_, choices in parts]))
    total = records[0].logits.new_zeros(())
    of_batch = summed.split([len(choices) for *_, choices in parts])
    for (logits, index, mask, choices), batch_choices in zip(parts, of_batch, strict=True):
        # Means over this rank's tokens, weighted by its tokens relative to those of an average
        # rank: 1 for one rank.
        weight = choices.sum(-1) * ranks / batch_choices.sum(-1).clamp_min(1)
        if balance_weight:
            balancing = load_balancing_loss(logits, index, mask, batch_choices)
            total = total + balance_weight * (weight * balancing).sum()
        if z_weight:
            total = total + z_weight * (weight * router_z_loss(logits, mask)).sum()
    return total


# For the type checker the mixin is a model; at run time it is a plain class before the dense class
# in the bases.
if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


class MPOEModelMixin(_Model):
    """Mixture-of-experts part of a model; put it before the dense class in the bases."""

    # Set for every class by `mpoe.models.classes`.
    dense_class: ClassVar[type[PreTrainedModel]]
    mpoe_family: ClassVar[str]
    mpoe_output: ClassVar[type]
    auto_classes: dict[str, str]  # Auto class -> name of the converted class
    # T5's and BERT's losses ignore `num_items_in_batch`; the Trainer must know, or accumulation
    # scales them wrongly.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - declared so by Transformers
    _forward_names: ClassVar[tuple[str, ...]] = ()
    _expert_cache_bytes: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "forward"):  # a mixin below this one has none yet
            cls._forward_names = tuple(inspect.signature(cls.forward).parameters)[1:]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # Constructors that get their base from `AutoModel` must get the dense one, so they see a
        # dense configuration.
        plain = copy.copy(config)
        plain.__class__ = self.dense_class.config_class
        super().__init__(plain, *args, **kwargs)
        config.__dict__.update(plain.__dict__)
        for module in self.modules():
            module_config = getattr(module, "config", None)
            if module_config is plain:
                module.config = config
            elif type(module_config) is type(plain):
                module_config.__class__ = type(config)  # T5's stacks have copies
        if self.accepts_loss_kwargs:
            # Transformers finds a model's loss by its class name; a causal model gets the causal
            # loss.
            self.loss_type = "ForCausalLM"
        self.install_experts()

    # ------------------------------------------------------------ structure

    @property
    def mpoe_config(self) -> MPOEConfig:
        """The `MPOEConfig` that this model was built from (a new object)."""
        return MPOEConfig.from_dict(self.config.mpoe)

    def install_experts(self) -> None:
        """Replace the dense modules that ``config.mpoe`` selects by MPOE modules with random
        weights."""
        config = self.mpoe_config
        if config.router.request_weight and (
            self.config.is_encoder_decoder or not self.can_generate()
        ):
            raise ValueError(
                "request_weight needs a causal language model, whose tokens see those before them; "
                f"got {config.router.request_weight} for {type(self).__name__}"
            )
        install_empty(self, find_sites(self, config), config)
        for name, cores in mpo_modules(self):
            for known in names_in_checkpoints(self, name):
                if known in config.rate_ratios:
                    cores.rate_ratios = tuple(config.rate_ratios[known])
        self.forget_dense_names()
        self.init_weights()

    def forget_dense_names(self) -> None:
        """Remove converted modules from Transformers' lists of names: parallel plans, float32
        modules.

        Modules that are not in the tensor-parallel plan, including experts and MPO projections, are
        replicated on every rank. The projections of one block are either all sharded or none, as
        experts between them need whole rows.
        """
        names = {re.sub(r"\d+", "*", name) for name, _ in self.named_parameters()}
        whole = set()
        for module_name, module in self.named_modules():
            name = re.sub(r"\d+", "*", module_name)
            if not isinstance(module, (MPOEmbedding, SharedEmbedding, TiedHead)):
                names.add(name)
            if isinstance(module, MPOLinear):
                whole.add(name.rpartition(".")[0])
            if getattr(module, "shape", None) == HIDDEN:
                whole.add(name)
        for attribute in ("_tp_plan", "_ep_plan"):
            plan = (getattr(self, attribute, None) or {}).items()
            fits = {key for key in names if key.rpartition(".")[0] not in whole}
            setattr(self, attribute, {key: how for key, how in plan if key in fits})
        parts = {part for name in names for part in name.split(".")}
        self._keep_in_fp32_modules = parts & set(self._keep_in_fp32_modules or ())

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise MPOE parameters that no checkpoint filled, then everything else.

        This must come first, because nested stacks dispatch to their own ``_init_weights``, which
        does not know our modules.
        """

        def is_filled(part: Any) -> bool:
            return getattr(part, "_is_hf_initialized", False)

        for module in modules_of(self, FromInitialValues).values():
            parameters = module.named_tensors()
            absent = [p for p in parameters.values() if not is_filled(p) and not p.is_meta]
            if absent and not is_filled(module):
                for name, value in module.initial_values().items():
                    if not is_filled(parameters[name]):
                        parameters[name].copy_(value)
            module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()

    # -------------------------------------------------------------- forward

    def token_masks(self, kwargs: dict) -> dict[str, Tensor | None]:
        """Token masks ``[B, S]`` by stream for a forward with these arguments: ``attention_mask``.

        Labels are not used here: a causal model's prompt has labels of -100 but is not padding.
        """
        return {
            "main": last_tokens(kwargs.get("attention_mask"), kwargs, "input_ids", "inputs_embeds")
        }

    def generation_masks(self, args: tuple, kwargs: dict) -> dict[str, Tensor | None]:
        """Token masks ``[B, S]`` by stream of what `generate` runs apart from the model's
        forward."""
        return {}

    def _routed_forward(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """The dense parent's ``forward`` inside a routing context, with the auxiliary loss
        added."""
        kwargs = {**dict(zip(self._forward_names, args, strict=False)), **kwargs}
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        shown = kwargs.pop("output_router_logits", None)
        shown = getattr(self.config, "output_router_logits", None) if shown is None else shown
        outer = current_routing()
        is_generating = outer is not None and outer.is_generating
        masks = self.token_masks(kwargs)
        if is_generating and not torch.compiler.is_compiling():
            # A prompt may have padding, the tokens after it have none. Only on the CPU, as a GPU
            # would have to be waited for.
            for stream, mask in masks.items():
                if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
                    masks[stream] = None
        evidence = None
        if self.config.mpoe["router"].get("request_weight"):
            evidence = evidence_before(cache_in(kwargs))
        context = RoutingContext(masks, None if is_generating else [], evidence=evidence)
        with Entered(context):
            output = forward(**kwargs, return_dict=True)
        if evidence is not None:
            keep_evidence(evidence, cache_in(output))
        output = self._with_routing(output, context.records or [], kwargs)
        if shown is False:
            plain = {name: output[name] for name in output if name not in ROUTING_FIELDS}
            output = self.mpoe_output(**plain)
        return output if return_dict else output.to_tuple()

    def _with_routing(self, output: Any, records: list[RouterRecord], kwargs: dict) -> Any:
        fields = dict(output.items())
        if records:
            router = self.config.mpoe["router"]
            fields["aux_loss"] = auxiliary_loss(
                records, router["balance_loss_weight"], router["z_loss_weight"]
            )
            fields["router_logits"] = tuple(record.logits for record in records)
            fields["expert_load"] = (
                torch.stack([record.expert_load for record in records]).long().detach()
            )
        if fields.get("loss") is not None:
            fields["task_loss"] = fields["loss"]
            if records:
                share = self._accumulation_share(kwargs)
                auxiliary = fields["aux_loss"] if share is None else fields["aux_loss"] * share
                fields["loss"] = fields["loss"] + auxiliary.to(fields["loss"].device)
        return self.mpoe_output(**fields)

    def _accumulation_share(self, kwargs: dict) -> Tensor | None:
        """Weight of this call's auxiliary loss when the Trainer accumulates gradients.

        A model that accepts loss arguments divides its task loss by the items of all micro-batches;
        the auxiliary loss gets the weight of its micro-batch among them, so that their sum is a
        mean.
        """
        items = kwargs.get("num_items_in_batch")
        labels = kwargs.get("labels")
        if not self.accepts_loss_kwargs or items is None or labels is None:
            return None
        return labels[..., 1:].ne(-100).sum() / items

    def cache_experts(self, max_bytes: int | None) -> None:
        """Set how much memory `generate` may take, while it runs, for folded blocks of experts.

        Nothing is kept between calls (`weights_kept` does that). Hidden-side experts and neurons
        have nothing to fold.

        Args:
            max_bytes: bound for the whole model; 0: keep nothing; ``None``, as in a new model: on a
                CPU the size of the dense layers, on a GPU nothing.

        Raises:
            TypeError, ValueError: ``max_bytes`` is not an integer, or is negative; a model without
                MPO experts.
        """
        self._check_cache("cache_experts", max_bytes)
        self._expert_cache_bytes = max_bytes

    def _check_cache(self, method: str, max_bytes: int | None) -> None:
        if not modules_of(self, MPOExperts) and not kept_modules(self):
            raise ValueError(
                f"{method} needs a model with MPO experts; {type(self).__name__} has none"
            )
        check_integer("max_bytes", max_bytes, 0, optional=True)

    @contextmanager
    def weights_kept(self, max_bytes: int | None = None) -> Iterator[None]:
        """Say that no weight changes inside a ``with`` block: MPO experts keep folded blocks there
        and, where few tokens make rebuilding dearer than reading, full weights.

        All passes of this thread on a CPU use them, those of `generate` too, from the first on,
        which builds them; outputs stay the same up to rounding. A layer keeps full weights for all
        its experts or for none. Compiled graphs use the cores. A pass that could be trained on, and
        one after an expert's weight was written in place or loaded, is refused; what is written
        through ``parameter.data``, by fused optimizers, or to weights that were made in inference
        mode, is not seen. Blocks of several models may be in each other. Hidden-side experts and
        neurons have nothing to rebuild, so nothing is kept of them.

        Args:
            max_bytes: bound for the whole model; ``None``: none, at most what the experts would
                take as dense networks.

        Raises:
            TypeError, ValueError: ``max_bytes`` is not an integer, or is negative; a model without
                MPO experts, or in training mode.
            RuntimeError: in the block, a pass with gradients or after a weight changed.
        """
        self._check_cache("weights_kept", max_bytes)
        if self.training:
            raise ValueError("weights_kept needs a model in evaluation: call model.eval() first")
        with full_weights_kept(self, max_bytes):
            yield

    # -------------------------------------------------------- checkpointing

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in Transformers, always non-reentrant: recomputed layers must see the call's token
        masks again.

        ``use_reentrant=True`` is replaced, with a warning; the gradients are the same.
        """
        given = functools.partial(gradient_checkpointing_func)
        checked = functools.partial(given.func, *given.args, **checkpoint_arguments(given.keywords))
        super()._set_gradient_checkpointing(enable, checked, *args, **kwargs)

    # ---------------------------------------------------------------- files

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: `save_pretrained` writes the remote code itself, not a copy of a module of
        mpoe."""

    def complete_config(self) -> None:
        """Put every core's rate ratio into the config, and take a base's path on this machine out
        of it."""
        self.config.mpoe = {**self.config.mpoe, "rate_ratios": rate_ratios_of(self)}
        self.config.mpoe_base = card.base_name(self)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the config also carries every core's rate ratio and an ``auto_map``,
        and a model card and the file that ``auto_map`` names are written.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        self.complete_config()
        names = {"AutoConfig": type(self.config).__name__, **self.auto_classes}
        self.config.auto_map = {
            auto: f"{Path(REMOTE_FILE).stem}.{name}" for auto, name in names.items()
        }
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"weights could not be written to {save_directory}: {error}") from error
        for name in (ONLY_FILE, BASE_FILE):
            # Otherwise an earlier MPOE-only save in this folder would be loaded instead.
            (Path(save_directory) / name).unlink(missing_ok=True)
        if kwargs.get("is_main_process", True):
            code = REMOTE_CODE.format(
                names=", ".join(sorted(set(names.values()))), version=__version__
            )
            (Path(save_directory) / REMOTE_FILE).write_text(code, encoding="utf-8")
            card.write_card(self, save_directory)
        return result

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, with our card in place of the one that it creates for a repository
        without any."""
        file = Path(working_dir) / card.CARD_FILE
        if file.is_file() and card.TEMPLATE in file.read_text(encoding="utf-8"):
            file.unlink()
            card.write_card(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    # ------------------------------------------------------------ reporting

    def parameter_report(self) -> dict[str, int]:
        """Counts by kind, see `mpoe.models.report.parameter_report`."""
        return report.parameter_report(self)

    def print_trainable_parameters(self) -> None:
        """Print trainable and total counts, their split, and the comparison with dense and Switch
        models."""
        print(report.format_report(self.parameter_report()))

    def mpoe_summary(self, num_tokens: int = 2048) -> None:
        """Print a table with a row for every MPO weight: factors, bonds, parameters, conversion
        error, plan.

        Args:
            num_tokens: tokens of the forward pass that the plans are made for.

        Raises:
            TypeError, ValueError: ``num_tokens`` is not a count; a model without MPO weights.
        """
        check_integer("num_tokens", num_tokens, 0)
        rows = report.summarize(self, num_tokens, self.mpoe_config.top_k)
        if not rows:
            raise ValueError(
                f"mpoe_summary needs a model with MPO weights; {type(self).__name__} has none"
            )
        report.print_summary(rows, num_tokens)
        self.print_trainable_parameters()

    # -------------------------------------------------------------- freezing

    def freeze_central(self) -> None:
        """Stop training what all experts share: central cores, or the dense projections that stay
        (and P and Q).

        Raises:
            ValueError: a model without MPO weights.
        """
        self._train_central(False)

    def unfreeze_central(self) -> None:
        """Train the central cores again; raises the errors of `freeze_central`."""
        self._train_central(True)

    def _train_central(self, trained: bool) -> None:
        central: list[Tensor] = []
        for module in self.modules():
            if isinstance(module, (MPOCores, KeptFeedForward)):
                central += module.central_parameters().values()
        if not central:
            raise ValueError(
                f"there are no central cores to freeze: {type(self).__name__} has none"
            )
        for parameter in central:
            parameter.requires_grad_(trained)
