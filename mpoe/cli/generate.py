"""`mpoe generate MODEL_DIR`: text from a saved model, one line per prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Prompts given on the command line, then those of the file (one per non-empty line).

    Raises:
        ValueError: no prompt at all, an empty one, no such file, or one that is not UTF-8.
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


def command(
    name: str,
    prompts: list[str],
    file: Path | None,
    max_new_tokens: int,
    num_beams: int,
    do_sample: bool,
    temperature: float,
    seed: int,
) -> None:
    """Run the command."""
    prompts = read_prompts(prompts, file)
    for option, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise CommandError(f"{option} must be at least 1; got {value}")
    if temperature <= 0:
        raise CommandError(f"temperature must be greater than 0; got {temperature}")
    from mpoe.cli.pretrained import ENCODER, find, load_model, load_tokenizer
    from mpoe.config.checks import check_seed

    check_seed("seed", seed)

    source = find(name)
    if source.style == ENCODER:
        raise CommandError(f"{name} is an encoder ({source.model_type}): it cannot generate text")
    tokenizer = load_tokenizer(source)
    import torch

    model = load_model(source)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": do_sample, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if do_sample:
        sampling["temperature"] = temperature
    for prompt in prompts:
        print(generate_one(model, tokenizer, prompt, **sampling))


def generate_one(model: Any, tokenizer: Any, prompt: str, **generation: Any) -> str:
    """What the model writes for one prompt (a language model's answer includes the prompt)."""
    import torch

    batch = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        out = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, **generation)
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()
