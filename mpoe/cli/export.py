"""`mpoe export IN OUT --to CLASS`: exports a mixture to a class that other tools can serve: with full matrices to
mixtral or qwen3_moe; neurons beside a dense network, at their own size, to granitemoeshared or qwen2_moe.

The exported model is opened again with the stock class, and its logits are compared. `mpoe export NAME.expert USER/REPO
--to hub` uploads an expert's file, or those in a folder, with a card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mpoe.cli.command import Asked, CommandError, as_command, option
from mpoe.cli.models import check_output, model_folder


@dataclasses.dataclass
class ExportOptions:
    """Options of `export`."""

    to: str = option("mixtral", "class: mixtral or qwen3_moe; of neurons: granitemoeshared or qwen2_moe; or hub")
    private: bool = option(False, "of --to hub: a repository that others cannot see")
    max_shard_size: str = option("5GB", "largest file of weights")
    overwrite: bool = option(False, "replace a model in OUT")


@as_command("mpoe export IN OUT --to mixtral [--flag value ...]", ExportOptions, words=(2, 2))
def command(asked: Asked) -> None:
    """Export the model IN into the folder OUT, or an expert's file IN to the repository OUT of the hub."""
    (options,), (name, out) = asked.options, asked.words
    if options.to == "hub":
        from mpoe.models import push_expert

        print(f"uploaded to {push_expert(name, out, private=options.private or None)}")
    else:
        run(name, Path(out), options)


def run(name: str, out: Path, options: ExportOptions) -> float:
    """Export the model ``name`` into the folder ``out``; returns the relative difference of the logits."""
    from mpoe.cli.models import find, load_model, tokenizer_if_any

    source = find(name)
    if not source.is_mpoe:
        raise CommandError(f"IN must be a mixture; {name} is a dense {source.model_type} (mpoe convert makes one)")
    check_output("OUT", out, options.overwrite)
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
