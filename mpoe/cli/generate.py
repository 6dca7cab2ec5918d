"""`mpoe generate MODEL_DIR`: text from a saved model (or t5 / gpt2, the stand-ins), one line per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import Asked, option, read_command


@dataclass
class GenerateOptions:
    """What to generate, and how."""

    _argument_group_name = "generation"

    prompt: list[str] = option([], "text to continue; may be repeated", action="append")
    file: Path | None = option(None, "text file with one prompt per line")
    max_new_tokens: int = option(32, "tokens to write at most")
    num_beams: int = option(1, "beams of the search")
    do_sample: bool = option(False, "draw tokens at random instead of taking the likeliest")
    no_do_sample: bool = option(False, "take the likeliest tokens; the default")
    temperature: float = option(1.0, "of sampling")
    seed: int = option(0, "of sampling")


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Prompts given on the command line, then those of the file (one per non-empty line).

    Raises:
        ValueError: no prompts, an empty prompt, no such file, or a file that is not UTF-8.
    """
    from mpoe.data.mappings import read_utf8

    if any(not prompt.strip() for prompt in prompts):
        raise CommandError("--prompt must hold some text; got an empty one")
    if file is not None:
        if not file.is_file():
            raise CommandError(f"--file: no such file: {file}")
        prompts = [*prompts, *(line for line in read_utf8("--file", file).splitlines() if line.strip())]
    if not prompts:
        raise CommandError("generate needs a prompt: --prompt TEXT (may be repeated) or --file FILE")
    return prompts


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe generate MODEL_DIR --prompt TEXT [--flag value ...]"
    asked = read_command(usage, __doc__, [GenerateOptions], arguments, words=1) if arguments else Asked([], (), set())
    if asked is None:
        return
    if not asked.words:
        raise CommandError(f"generate needs a model first: {usage} (see mpoe generate --help)")
    name, options = asked.words[0], asked.options[0]
    prompts = read_prompts(options.prompt, options.file)
    for option_name in ("max_new_tokens", "num_beams"):
        if getattr(options, option_name) < 1:
            raise CommandError(f"{option_name} must be at least 1; got {getattr(options, option_name)}")
    if options.temperature <= 0:
        raise CommandError(f"temperature must be greater than 0; got {options.temperature}")
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.config.checks import check_seed
    from mpoe.models.table import ENCODER

    check_seed("seed", options.seed)

    source = find(name)
    if source.style == ENCODER:
        raise CommandError(f"{name} is an encoder ({source.model_type}): it cannot generate text")
    tokenizer = load_tokenizer(source)
    import torch

    model = load_model(source)
    torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    sampling["do_sample"] = options.do_sample and not options.no_do_sample
    if sampling["do_sample"]:
        sampling["temperature"] = options.temperature
    for prompt in prompts:
        print(generate_one(model, tokenizer, prompt, **sampling))


def generate_one(model: Any, tokenizer: Any, prompt: str, **generation: Any) -> str:
    """The model's output for one prompt (a language model's output includes the prompt)."""
    import torch

    batch = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        out = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, **generation)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()
