"""`mpoe convert IN OUT [flags]`: converts a dense checkpoint to a mixture; shows errors and parameters.

With `--original_checkpoint` the weights come from a run of the original implementation instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError
from mpoe.cli.options import ExpertOptions
from mpoe.cli.parsing import option, read_command

USAGE = "mpoe convert IN OUT [--flag value ...]"


@dataclasses.dataclass
class ConvertOptions:
    """Options that only `convert` has."""

    _argument_group_name = "run"

    overwrite: bool = option(False, "replace a model in OUT")
    original_checkpoint: str | None = option(
        None, "pytorch_model.bin of the original implementation, or its folder; IN is the dense T5 it began with"
    )


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    asked = read_command(USAGE, __doc__, [ConvertOptions, ExpertOptions], arguments, words=2)
    if asked is None:
        return
    names, (options, experts), given = asked
    if len(names) < 2:
        raise CommandError(f"convert needs two arguments: {USAGE}")
    chosen = sorted({f.name for f in dataclasses.fields(ExpertOptions)} & given)
    if options.original_checkpoint is not None and chosen:
        raise CommandError(f"original_checkpoint says how its experts are; {', '.join(chosen)} cannot be given with it")
    run(names[0], Path(names[1]), experts, options.overwrite, options.original_checkpoint)


def run(
    name: str, out: Path, experts: ExpertOptions, overwrite: bool = False, original_checkpoint: str | None = None
) -> dict[str, int]:
    """Convert the model ``name`` into the folder ``out``; returns the parameter report."""
    from mpoe.cli.files import check_model_folder, model_folder
    from mpoe.cli.pretrained import find, load_model, tokenizer_if_any

    config = experts.build()
    if config is None:
        raise CommandError("there is nothing to convert: moe_type none with dense experts is the model as it is")
    source = find(name)
    if source.is_mpoe:
        raise CommandError(f"IN is converted already ({source.model_type}); give a dense checkpoint")
    if out.exists() and Path(source.path).is_dir() and out.samefile(source.path):
        raise CommandError(f"OUT must be another folder than IN; got {out} for both")
    check_model_folder("OUT", out, overwrite)
    tokenizer = tokenizer_if_any(source)
    from mpoe.models import convert_to_mpoe, import_original

    if original_checkpoint is not None:
        model = import_original(original_checkpoint, load_model(source))
    else:
        model = convert_to_mpoe(load_model(source), config)
        show_errors(model)
    report = model.parameter_report()
    show_parameters(report)
    with model_folder(out, model, tokenizer):
        pass
    print(f"saved to {out}")
    return report


def show_errors(model: Any) -> None:
    """Print the decomposition error of every converted matrix; equal rows are merged."""
    from mpoe.cli.report import Table
    from mpoe.models import mpo_modules

    shapes = {name: str(cores.shape) for name, cores in mpo_modules(model)}
    groups: dict[str, list[str]] = {}
    for name in model.conversion_report:
        groups.setdefault(shapes[name], []).append(name)
    rows = []
    for shape, names in groups.items():
        errors = [model.conversion_report[name]["relative_error_bound"] for name in names]
        rows.append((f"{len(names)}: {names[0]} ...", shape, f"{min(errors):.2e} .. {max(errors):.2e}"))
    if rows:  # dense experts are copies, without error
        Table(("matrices", "cores", "relative error at most"), rows, "Decomposition").show()


def show_parameters(report: dict[str, int]) -> None:
    """Print a model's `parameter_report` as a table."""
    from mpoe.cli.report import Table

    rows = [(key.replace("_", " "), f"{value:,}") for key, value in report.items() if value]
    Table(("parameters", "number"), rows, "Parameters").show()
