"""`mpoe convert IN OUT [flags]`: converts a dense checkpoint to a mixture; shows errors and
parameters.

With `--original_checkpoint` the weights come from a run of the original implementation instead."""

import dataclasses
from pathlib import Path

from mpoe.cli import models
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.options import ExpertOptions, expert_options_of
from mpoe.cli.outputs import check_model_output, model_folder
from mpoe.models import convert_to_mpoe, import_original


@dataclasses.dataclass
class ConvertOptions:
    """Options that only `convert` has."""

    overwrite: bool = option(False, "replace a model in OUT")
    original_checkpoint: str | None = option(
        None, "pytorch_model.bin of the original, or its folder; IN is its base"
    )


@as_command(ConvertOptions, ExpertOptions, words=(2, 2))
def command(request: Request) -> None:
    """Convert the model IN into the folder OUT."""
    (options, experts), (name, out) = request.options, request.words
    chosen = expert_options_of(request.given)
    original = options.original_checkpoint
    if original is not None and chosen:
        raise CommandError(
            f"original_checkpoint says how its experts are; {', '.join(chosen)} cannot be given "
            "with it"
        )
    config = experts.build()
    if config is None:
        raise CommandError(
            "there is nothing to convert: moe_type none with dense experts is the model as it is"
        )
    source = models.find_to_copy(name)
    if source.is_mpoe:
        raise CommandError(
            f"IN is converted already ({source.model_type}); give a dense checkpoint"
        )
    if source.is_in(Path(out)):
        raise CommandError(f"OUT must be another folder than IN; got {out} for both")
    output = check_model_output("OUT", out, options.overwrite)
    tokenizer = models.tokenizer_if_any(source)
    model = models.load_model(source)
    model = convert_to_mpoe(model, config) if original is None else import_original(original, model)
    (model.mpoe_summary if config.expert_type == "mpo" else model.print_trainable_parameters)()
    with model_folder(output, model, tokenizer):
        pass
    print(f"saved to {out}")
