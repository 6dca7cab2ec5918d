"""The experts' shape in a run for which none was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.arm import DENSE, SWITCH
from mpoe.config import MPOEConfig
from mpoe.config.shapes import SEPARABLE

_OF_CORES = {"tensor_learn", "train_AT_index", "update_mpo_layer"}  # training options that only MPO cores have

if TYPE_CHECKING:
    from mpoe.cli.pretrained import Source
    from mpoe.cli.train import Plan


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that the run in ``folder`` was started with; None if there is no readable record."""
    from mpoe.training.output_dir import RUN_FILE

    try:
        saved = json.loads((folder / RUN_FILE).read_text())["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # runs that cannot be resumed are refused when the folder is checked
    return saved if isinstance(saved, dict) else None


def settle_experts(plan: Plan, source: Source) -> MPOEConfig | None:
    """The `MPOEConfig` of the run, or None if everything stays dense; prints one line about a shape that no option
    named.

    A resumed run keeps the shape that it was started with. A configuration file without a shape gets separable experts,
    one per token, as it always has. All others get `MPOEConfig`'s default if the model supports it. Afterwards
    ``plan.experts`` holds the choice, like the record of the run.
    """
    from mpoe.models.families import family_of

    experts, defaults = plan.experts, {"gauge": MPOEConfig.gauge, "light_p": MPOEConfig.light_p}
    record = saved_config(Path(str(plan.arguments.output_dir))) if plan.run.resume else None
    kept = (record or {}).get("experts")
    as_saved = plan.from_file or isinstance(kept, dict)
    if isinstance(kept, dict):
        for name in {"shape", "top_k"} - plan.given:
            setattr(experts, name, kept.get(name))
    if plan.arm.baseline == DENSE:
        return None
    if plan.arm.baseline == SWITCH:
        experts.expert_type = "dense"
    if experts.shape is None and plan.given & _OF_CORES:
        experts.shape = SEPARABLE
    config = experts.build(as_saved)
    if source.is_mpoe:
        config = None if config is None else MPOEConfig.from_dict({})  # the model's own counts
    elif config is not None and not family_of(source.model_type).takes_blocks:
        config = config.with_cores()
    if experts.shape is None and not isinstance(kept, dict):
        experts.shape = SEPARABLE if config is None else str(config.shape)
        has_shape = config is not None and config.expert_type == "mpo" and not source.is_mpoe
        if config is not None and has_shape and plan.arguments.process_index == 0:
            why = "as the file names none" if plan.from_file else "what gained most in our trials"
            why = why if config.is_hidden or plan.from_file else "what the model or other options need"
            print(f"shape {experts.shape}, {config.top_k} of {config.num_experts} experts per token: {why} (--shape)")
    if config is not None and config.keeps_network and not as_saved:
        experts.top_k = config.top_k
    for name, value in defaults.items():
        setattr(experts, name, getattr(experts, name) or value)
    return config
