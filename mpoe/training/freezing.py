"""What trains, by `requires_grad`: `adapter`, `update_mpo_layer`, `tensor_learn` and `train_AT_index`."""

from __future__ import annotations

from torch import nn

from mpoe.layers.feed_forward import RoutedFeedForward
from mpoe.models.checkpoint import component_of, parse_components
from mpoe.models.find import expert_modules, router_modules
from mpoe.models.report import mpo_modules


def parse_core_indices(text: str | None) -> tuple[int, ...]:
    """'1,2,3' -> (1, 2, 3); None means none. Raises ValueError on anything but non-negative integers."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(map(str.isdecimal, parts)):
        raise ValueError(
            f"train_AT_index must be comma-separated core indices, counted from 0, such as '2' or '1,2,3'; got {text!r}"
        )
    return tuple(sorted(set(map(int, parts))))


def freeze_all_but_experts(model: nn.Module) -> int:
    """Train experts and routers alone, in place: a mixture of any shape as an adapter of the model around it.

    Of hidden-side experts these are the blocks, of experts in MPO form all cores (`freeze_central` freezes the shared
    ones), of dense experts their weights; of a model that was a mixture before, also its own router.

    Returns:
        The number of parameters that train.

    Raises:
        TypeError, ValueError: what is no module; a model without experts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {type(model).__name__} {model!r}")
    parts = [part for m in model.modules() if isinstance(m, RoutedFeedForward) for part in (m.router, m.experts)]
    parts += [*(experts for _, experts in expert_modules(model)), *router_modules(model)]
    if not parts:
        raise ValueError(f"model must have experts (see convert_to_mpoe); {type(model).__name__} has none")
    model.requires_grad_(False)
    for part in parts:
        if isinstance(part, nn.Module):
            part.requires_grad_(True)
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
        update_mpo_layer: components whose cores train; the cores of all other components are frozen.
        tensor_learn: freeze every central core.
        train_AT_index: indices along the chain whose cores are frozen (modules with shorter chains skip them).

    Returns:
        `{"frozen": tensors, "trained": tensors}` counted over all cores.

    Raises:
        ValueError: a name or index is invalid or matches no module of this model, or nothing would be trained.
    """
    components = parse_components(update_mpo_layer)
    indices = parse_core_indices(train_AT_index)
    modules = list(mpo_modules(model))
    asked = components is not None or tensor_learn or bool(indices)
    if asked and not modules:
        raise ValueError(
            "update_mpo_layer, tensor_learn and train_AT_index need a model with MPO cores;"
            f" {type(model).__name__} has none (shape='separable' has them; model.freeze_central() freezes what"
            " hidden-side experts and neurons share)"
        )
    present = {component_of(name) for name, _ in modules}
    if components is not None and not set(components) <= present:
        missing = ", ".join(sorted(set(components) - present))
        raise ValueError(
            f"update_mpo_layer names {missing}, but this model's MPO cores are in: {', '.join(sorted(present))}"
        )
    longest = max((cores.shape.num_cores for _, cores in modules), default=0)
    if indices and indices[-1] >= longest:
        raise ValueError(
            f"train_AT_index must be below the number of cores (here at most {longest}); got {train_AT_index!r}"
        )
    counts = {"frozen": 0, "trained": 0}
    for name, cores in modules:
        trained = components is None or component_of(name) in components
        for index, parameter in enumerate(cores.chain()):
            frozen = not trained or index in indices or (tensor_learn and index == cores.shape.central)
            if frozen:
                parameter.requires_grad_(False)
            counts["trained" if parameter.requires_grad else "frozen"] += 1
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("update_mpo_layer, tensor_learn and train_AT_index together leave nothing to train")
    return counts
