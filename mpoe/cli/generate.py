"""`mpoe generate MODEL_DIR`: text from a saved model (or t5 / gpt2, the stand-ins), one line per
prompt."""

from dataclasses import dataclass
from pathlib import Path

from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError, check_files
from mpoe.config.checks import check_number, check_seed


@dataclass
class GenerateOptions:
    """What to generate, and how."""

    prompt: list[str] = option([], "text to continue; may be repeated", action="append")
    file: Path | None = option(None, "text file with one prompt per line")
    max_new_tokens: int = option(32, "tokens to write at most")
    num_beams: int = option(1, "beams of the search")
    do_sample: bool = option(False, "draw tokens at random instead of taking the likeliest")
    no_do_sample: bool = option(False, "take the likeliest tokens; the default")
    temperature: float = option(1.0, "of sampling")
    seed: int = option(0, "of sampling")

    LEAST = (("max_new_tokens", 1), ("num_beams", 1))

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0, open_low=True)
        check_seed("seed", self.seed)


@as_command(GenerateOptions, words=(1, 1))
def command(request: Request) -> None:
    """Print the model's text for every prompt; that of a language model begins with it."""
    (options,), (name,) = request.options, request.words
    from mpoe.cli.models import find, load_model, load_tokenizer
    from mpoe.data.mappings import read_utf8
    from mpoe.models.table import ENCODER

    prompts: list[str] = options.prompt  # then those of the file, one per non-empty line
    if any(not prompt.strip() for prompt in prompts):
        raise CommandError("--prompt must hold some text; got an empty one")
    if options.file is not None:
        check_files("--file", [options.file])
        lines = read_utf8("--file", options.file).splitlines()
        prompts = prompts + [line for line in lines if line.strip()]
    if not prompts:
        raise CommandError(
            "generate needs a prompt: --prompt TEXT (may be repeated) or --file FILE"
        )
    source = find(name)
    if source.style == ENCODER:
        raise CommandError(f"{name} is an encoder ({source.model_type}): it cannot generate text")
    tokenizer = load_tokenizer(source)
    import torch

    model = load_model(source)
    torch.manual_seed(options.seed)
    how = {
        "num_beams": options.num_beams,
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.do_sample and not options.no_do_sample,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if how["do_sample"]:
        how["temperature"] = options.temperature
    for prompt in prompts:
        batch = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            out = model.generate(**batch.to(model.device), **how)
        print(tokenizer.decode(out[0], skip_special_tokens=True).strip())
