"""The command ``mpoe``. Only typer is imported at the start; every command imports what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="mpoe",
    help="Turn a pretrained T5, GPT-2, Llama or BERT into a parameter-efficient mixture of experts; train and use it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130
# these commands read their own options (a config file and every Trainer argument), their --help included
_OWN_OPTIONS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    "add_help_option": False,
}


def _show_version(asked: bool) -> None:
    if asked:
        from mpoe_kernels.version import __version__

        print(f"mpoe {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What goes before a command."""


@app.command(**_OWN_OPTIONS)
def train(context: typer.Context) -> None:
    """Train: mpoe train [CONFIG.json|yaml] --flag value ... (flags win over the file)."""
    from mpoe.cli.train import command

    command(context.args)


@app.command(**_OWN_OPTIONS)
def evaluate(context: typer.Context) -> None:
    """Evaluate a saved model: mpoe evaluate MODEL_DIR --data_dir DIR --split test."""
    from mpoe.cli.evaluate import command

    command(context.args)


@app.command(**_OWN_OPTIONS)
def convert(context: typer.Context) -> None:
    """Convert a dense checkpoint: mpoe convert IN OUT [--num_experts 8 --shape separable ...]."""
    from mpoe.cli.convert import command

    command(context.args)


@app.command(**_OWN_OPTIONS)
def plan(context: typer.Context) -> None:
    """Plan before converting: mpoe plan MODEL_OR_CONFIG --experts 8 --shape separable --device h100."""
    from mpoe.cli.plan import command

    command(context.args)


@app.command(**_OWN_OPTIONS)
def inspect(context: typer.Context) -> None:
    """Look inside: mpoe inspect MODEL_DIR [--text "..." --output_dir mpoe_inspect]: routes, load, bonds, curves."""
    from mpoe.cli.inspect import command

    command(context.args)


@app.command()
def generate(
    model_dir: Annotated[str, typer.Argument(help="Folder of a saved model, or t5 / gpt2 for the stand-ins.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Text file with one prompt per line.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", "--max-new-tokens")] = 32,
    num_beams: Annotated[int, typer.Option("--num_beams", "--num-beams")] = 1,
    do_sample: Annotated[bool, typer.Option("--do_sample/--no_do_sample", "--do-sample/--no-do-sample")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
) -> None:
    """Generate text with a saved model."""
    from mpoe.cli.generate import command

    command(model_dir, list(prompt or []), file, max_new_tokens, num_beams, do_sample, temperature, seed)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions, kernel backends (and why the others cannot run here), devices and cores."""
    import json

    from mpoe.cli import info as module

    facts = module.collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        module.show(facts)


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Folder for report.html, results.json and the model.")
    ] = Path("mpoe_demo"),
    model: Annotated[
        str, typer.Option("--model", help="t5 (documentation tasks) or gpt2 (language modelling).")
    ] = "t5",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps per arm; default: the tuned budget.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of data order, routers and dropout.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the demo in the output folder.")] = False,
) -> None:
    """Convert, train and compare dense / Switch / MPOE on data every Python carries; needs no download."""
    import os

    # Threads that spin while they wait for each other cost minutes when the cores are shared; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from mpoe.cli.demo import command

    command(output_dir, model, steps, seed, overwrite)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Option("--suite", help="quick (minutes), full (hours), planner (its cases), targets, gpu.")
    ] = "quick",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="auto, all, or names with commas; default: auto and eager."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for report.md, results.json and plots.")] = Path(
        "bench_results"
    ),
    threads: Annotated[
        int | None, typer.Option("--threads", help="Torch threads, pinned; default: every usable processor.")
    ] = None,
    clock: Annotated[
        str, typer.Option("--clock", help="wall, or cpu: CPU time of one thread, for machines that others use too.")
    ] = "wall",
    scale: Annotated[
        str, typer.Option("--scale", help="real, or tiny: everything once on sizes of a test, in seconds.")
    ] = "real",
    wide: Annotated[bool, typer.Option("--wide", help="All columns, however narrow the terminal.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in the output folder.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Begin nothing new after so long; default: none, of gpu eight.")
    ] = None,
) -> None:
    """Measure MPO experts against the dense layer and their peers on this machine."""
    from mpoe.cli.bench import BenchOptions, command

    command(BenchOptions(suite, device, backend, out, threads, clock, scale, wide, overwrite, minutes))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on ``arguments`` (default: the process's) and exit.

    Exit codes: 0 done, 1 a defect (with traceback), 2 a refusal (one line on stderr), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments[:1]
    words = arguments[1:] if debug else arguments
    try:
        # Not standalone: typer's own refusals are shown as all others are.
        code = app(args=words or ["--help"], prog_name="mpoe", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        from mpoe.cli.errors import show

        code = show(error, debug)
    if code == INTERRUPTED:
        print("mpoe: interrupted", file=sys.stderr)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
