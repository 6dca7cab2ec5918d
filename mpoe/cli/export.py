"""`mpoe export IN OUT --to CLASS`: exports a mixture to a class that other tools can serve: with
full matrices to mixtral or qwen3_moe; neurons beside a dense network, at their own size, to
granitemoeshared or qwen2_moe.

The exported model is opened again with the stock class, and its logits are compared.
`mpoe export NAME.expert USER/REPO --to hub` uploads an expert's file, or those in a folder, with a
card that says what it keeps and changes; with `--local`, OUT is a folder to upload later."""

import dataclasses
import tempfile
from pathlib import Path

from mpoe.cli import models
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.outputs import check_model_output, model_folder
from mpoe.models import merge_experts, push_expert
from mpoe.models.expert_files import expert_repository
from mpoe.models.export import TARGETS, check_export, server_notes


@dataclasses.dataclass
class ExportOptions:
    """Options of `export`."""

    to: str = option(
        "mixtral",
        "class, of neurons granitemoeshared or qwen2_moe; or hub",
        choices=["hub", *TARGETS],
    )
    private: bool = option(False, "of --to hub: a repository that others cannot see")
    local: bool = option(False, "of --to hub: write OUT as a folder, ready to upload")
    overwrite: bool = option(False, "replace a model in OUT")


@as_command(ExportOptions, words=(2, 2))
def command(request: Request) -> None:
    """Export the model IN into the folder OUT, or an expert's file IN to the repository OUT of the
    hub."""
    (options,), (name, out) = request.options, request.words
    if options.local:
        if options.to != "hub":
            raise CommandError(f"local is of --to hub; got --to {options.to}")
        if options.overwrite:
            raise CommandError("overwrite is for models; --local writes a new folder")
        if options.private:
            raise CommandError("private is for a repository of the hub; --local writes a folder")
        write_repository(name, out)
        print(f"{out} is ready: hf upload USER/REPO {out}")
        return
    if options.to == "hub":
        print(f"uploaded to {push_expert(name, out, private=options.private or None)}")
        return
    source = models.find_to_copy(name)
    if not source.is_mpoe:
        raise CommandError(
            f"IN must be a mixture; {name} is a dense {source.model_type} (mpoe convert makes one)"
        )
    output = check_model_output("OUT", out, options.overwrite)
    tokenizer = models.tokenizer_if_any(source)
    model = models.load_model(source)
    stock = merge_experts(model, as_=options.to)
    with model_folder(output, stock, tokenizer) as staging:
        difference = check_export(model, staging, options.to)
    print(
        f"saved to {output.folder}: a {type(stock).__name__} whose logits differ by "
        f"{difference:.1e} of the largest"
    )
    for note in server_notes(options.to, stock.config):
        print(f"note: {note}; Transformers computes the same")


def write_repository(name: str, out: str) -> None:
    """Write what would be uploaded of an expert's file, or of those in a folder, as the new folder
    ``out``, which is there as a whole or not at all."""
    contents = expert_repository(name)
    folder = Path(out)
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CommandError(f"OUT must be new, or an empty folder; {out} is there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        staging = Path(scratch) / folder.name
        staging.mkdir()
        for file, content in contents.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (staging / file).write_bytes(data)
        staging.replace(folder)
