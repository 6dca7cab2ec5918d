"""`mpoe export IN OUT --to CLASS`: exports a mixture to a class that other tools can serve: with full matrices to
mixtral, qwen3_moe or olmoe; neurons beside a dense network, at their own size, to granitemoeshared or qwen2_moe.

The exported model is opened again with the stock class, and its logits are compared. `mpoe export NAME.expert USER/REPO
--to hub` uploads an expert's file, or those in a folder, with a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import option, read_command

USAGE = "mpoe export IN OUT --to mixtral [--flag value ...]"


@dataclasses.dataclass
class ExportOptions:
    """Options of `export`."""

    _argument_group_name = "run"

    to: str = option("mixtral", "class: mixtral, qwen3_moe or olmoe; of neurons: granitemoeshared or qwen2_moe; or hub")
    private: bool = option(False, "of --to hub: a repository that others cannot see")
    max_shard_size: str = option("5GB", "largest file of weights")
    overwrite: bool = option(False, "replace a model in OUT")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    asked = read_command(USAGE, __doc__, [ExportOptions], arguments, words=2)
    if asked is None:
        return
    names, (options,), _ = asked
    if len(names) < 2:
        raise CommandError(f"export needs two arguments: {USAGE}")
    if options.to == "hub":
        from mpoe.models import push_expert

        print(f"uploaded to {push_expert(names[0], names[1], private=options.private or None)}")
    else:
        run(names[0], Path(names[1]), options)


def run(name: str, out: Path, options: ExportOptions) -> float:
    """Export the model ``name`` into the folder ``out``; returns the relative difference of the logits."""
    from mpoe.cli.files import check_model_folder, model_folder
    from mpoe.cli.pretrained import find, load_model, tokenizer_if_any

    source = find(name)
    if not source.is_mpoe:
        raise CommandError(f"IN must be a mixture; {name} is a dense {source.model_type} (mpoe convert makes one)")
    check_model_folder("OUT", out, options.overwrite)
    tokenizer = tokenizer_if_any(source)
    from mpoe.models import merge_experts
    from mpoe.models.export import check_export, server_notes

    model = load_model(source)
    stock = merge_experts(model, as_=options.to)
    with model_folder(out, tokenizer) as staging:
        stock.save_pretrained(staging, max_shard_size=options.max_shard_size)
        difference = check_export(model, Path(staging), options.to)
    print(f"saved to {out}: a {type(stock).__name__} whose logits differ by {difference:.1e} of the largest")
    for note in server_notes(options.to, stock.config):
        print(f"note: {note}; Transformers computes the same")
    return difference
