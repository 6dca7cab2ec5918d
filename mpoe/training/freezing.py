"""What trains: by `requires_grad` (`adapter`, `update_mpo_layer`, `tensor_learn`,
`train_AT_index`), and by the mask of gradients, which leaves only the auxiliary cores in some
optimizer steps.

Source of the mask: Gao et al., *Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained
Language Models* (arXiv 2203.01104), section "Optimization": each iteration draws P_m; if P_m < p_b
the step updates only the auxiliary cores. The central core receives gradients from every expert and
would otherwise be updated far more often than each expert's auxiliary cores.

"Masked" means *not updated at all*. A gradient of zeros would still move the core, through Adam's
momentum and through weight decay; therefore a masked core gets no gradient
(`central.grad is None`), which optimizers and gradient clipping skip, and the operations never
compute it.
"""

import contextlib
import numbers
from collections.abc import Iterator

import numpy as np
from torch import nn

from mpoe.config.checks import check_integer, check_number, check_type
from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.models.checkpoint import component_of, parse_components
from mpoe.models.walk import modules_of, mpo_modules


def parse_core_indices(text: str | None) -> tuple[int, ...]:
    """'1,2,3' -> (1, 2, 3); None means none. Raises ValueError on anything but non-negative
    integers."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(map(str.isdecimal, parts)):
        raise ValueError(
            "train_AT_index must be comma-separated core indices, counted from 0, such as '2' or "
            f"'1,2,3'; got {text!r}"
        )
    return tuple(sorted(set(map(int, parts))))


def freeze_all_but_experts(model: nn.Module) -> int:
    """Train experts and routers alone, in place: a mixture of any shape as an adapter of the model
    around it.

    Of hidden-side experts these are the blocks, of experts in MPO form all cores (`freeze_central`
    freezes the shared ones), of dense experts their weights.

    Returns:
        The number of parameters that train.

    Raises:
        TypeError, ValueError: what is no module; a model without experts.
    """
    check_type("model", model, nn.Module, "a module")
    layers = modules_of(model, RoutedFeedForward).values()
    if not layers:
        raise ValueError(
            f"model must have experts (see convert_to_mpoe); {type(model).__name__} has none"
        )
    model.requires_grad_(False)
    for layer in layers:
        layer.experts.requires_grad_(True)
        if layer.router is not None:
            layer.router.requires_grad_(True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def freeze_cores(
    model: nn.Module,
    *,
    update_mpo_layer: str | None = None,
    tensor_learn: bool = False,
    train_AT_index: str | None = None,
) -> dict[str, int]:
    """Freeze cores in place (`requires_grad_(False)`); everything else is left unchanged.

    Args:
        update_mpo_layer: components whose cores train; the cores of all other components are
            frozen.
        tensor_learn: freeze every central core.
        train_AT_index: indices along the chain whose cores are frozen (modules with shorter chains
            skip them).

    Returns:
        `{"frozen": tensors, "trained": tensors}` counted over all cores.

    Raises:
        ValueError: a name or index is invalid or matches no module of this model, or nothing would
            be trained.
    """
    components = parse_components(update_mpo_layer)
    indices = parse_core_indices(train_AT_index)
    modules = list(mpo_modules(model))
    is_selective = components is not None or tensor_learn or bool(indices)
    if is_selective and not modules:
        raise ValueError(
            "update_mpo_layer, tensor_learn and train_AT_index need a model with MPO cores; "
            f"{type(model).__name__} has none (shape='separable' has them; model.freeze_central() "
            "freezes what hidden-side experts and neurons share)"
        )
    present = {component_of(name) for name, _ in modules}
    if components is not None and not set(components) <= present:
        missing = ", ".join(sorted(set(components) - present))
        raise ValueError(
            f"update_mpo_layer names {missing}, but this model's MPO cores are in: "
            f"{', '.join(sorted(present))}"
        )
    longest = max((cores.shape.num_cores for _, cores in modules), default=0)
    if indices and indices[-1] >= longest:
        raise ValueError(
            f"train_AT_index must be below the number of cores (here at most {longest}); got "
            f"{train_AT_index!r}"
        )
    counts = {"frozen": 0, "trained": 0}
    for name, cores in modules:
        trained = components is None or component_of(name) in components
        for index, parameter in enumerate(cores.chain()):
            is_central = tensor_learn and index == cores.shape.central
            if not trained or index in indices or is_central:
                parameter.requires_grad_(False)
            counts["trained" if parameter.requires_grad else "frozen"] += 1
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "update_mpo_layer, tensor_learn and train_AT_index together leave nothing to train"
        )
    return counts


# Distinguishes this stream from any other that is keyed by the same seed ("mask" in ASCII).
_STREAM = 0x6D61736B
_WORD = (1 << 64) - 1


def mask_draw(seed: int, step: int) -> float:
    """P_m of one optimizer step: uniform in [0, 1), a pure function of `(seed, step)`.

    Counter-based (Philox 4x64), so every rank, and a run resumed at any step, sees the same number
    without saved state. Only raw words of the bit generator are used: numpy guarantees that those
    never change.

    Args:
        seed: any integer.
        step: number of optimizer steps already taken, >= 0.
    """
    check_integer("step", step, 0)
    # As uint64 arrays: numpy would convert a list with a large integer to floats and round it.
    key = np.array([seed & _WORD, _STREAM], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([0, 0, 0, step], dtype=np.uint64))
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


class GradientMask:
    """Draws the mask once per optimizer step and applies it to every `MPOCores` of a model and to
    the dense projections that hidden-side experts and neurons share (and to P and Q of a latent
    space).

    In a plain PyTorch loop::

        mask = GradientMask(model, probability=0.5, seed=0)
        for step, micro_batches in enumerate(loader):
            with mask.step(step):                      # before the step's first forward
                for batch in micro_batches:            # one draw for the whole accumulation
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Under the Hugging Face Trainer use `mpoe.training.callbacks.GradientMaskCallback` (`MPOETrainer`
    adds it).

    Args:
        model: any module that contains `MPOCores`; may be None and set later with `bind`.
        probability: p_b in [0, 1]; 0 never masks, 1 always does.
        seed: seed of the stream; must be the same on all ranks.

    Raises:
        TypeError, ValueError: `probability` or `seed` is not usable.
    """

    def __init__(self, model: nn.Module | None, probability: float, seed: int = 0) -> None:
        check_type("gradient_mask_seed", seed, numbers.Integral, "an integer")
        check_number("gradient_mask_prob", probability, 0, 1)
        self.probability: float = float(probability)
        self.seed: int = int(seed)
        self.active: bool = False  # whether the step in progress is masked
        self._cores: list[MPOCores | KeptFeedForward] = []
        if model is not None:
            self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Set the model whose central cores are masked, and release an earlier one.

        Raises:
            ValueError: the mask is on, but the model has no MPO cores to mask, or a dense
                projection that stays is not trained.
        """
        self.end_step()
        self._cores = []
        for name, module in model.named_modules():
            if self.probability > 0 and isinstance(module, KeptFeedForward):
                module.check_maskable(name)
            if isinstance(module, MPOCores | KeptFeedForward):
                self._cores.append(module)
        if self.probability > 0 and not self._cores:
            raise ValueError(
                f"gradient_mask_prob={self.probability} needs a model with MPO cores; "
                f"{type(model).__name__} has none (convert it with mpoe.convert_to_mpoe, or leave "
                "the mask off)"
            )

    def is_masked(self, step: int) -> bool:
        """Whether optimizer step `step` (the number of steps before it) skips the central cores:
        P_m < p_b."""
        return mask_draw(self.seed, step) < self.probability

    def begin_step(self, step: int) -> bool:
        """Draw the mask for optimizer step `step` and apply it until `end_step`. Call before the
        step's first forward."""
        self.active = self.is_masked(step)
        for cores in self._cores:
            cores.central_masked = self.active
            if self.active:
                # With a gradient left by zero_grad(set_to_none=False) the optimizer would move the
                # core.
                for weight in cores.central_parameters().values():
                    weight.grad = None
        return self.active

    def end_step(self) -> None:
        """Release every central core. Safe to call at any time."""
        self.active = False
        for cores in self._cores:
            cores.central_masked = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[bool]:
        """`begin_step` and, whatever happens, `end_step`; yields whether the step is masked."""
        try:
            yield self.begin_step(step)
        finally:
            self.end_step()
