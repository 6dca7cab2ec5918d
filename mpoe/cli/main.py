"""The command ``mpoe``. Every command is a module of this package and imports what it needs
itself."""

import importlib
import logging
import os
import sys
import traceback

from mpoe.cli.command import (
    CommandError,
    check_installed,
    close_matches,
    is_on_purpose,
    show_help,
)
from mpoe.cli.short_help import SHORT

COMMANDS = {
    "train": "Train: mpoe train [CONFIG.json|yaml] --flag value ... (flags win over the file).",
    "compare": "Put runs side by side: mpoe compare RUN_DIR RUN_DIR ... (parameters, settings, "
    "scores, curves, time).",
    "evaluate": "Evaluate a saved model: mpoe evaluate MODEL_DIR --data_dir DIR --split test.",
    "convert": "Convert a dense checkpoint: mpoe convert IN OUT [--num_experts 8 --shape separable "
    "...].",
    "export": "Export a mixture for other tools: mpoe export IN OUT --to "
    "mixtral|granitemoeshared|...",
    "compose": "Make one mixture of experts trained apart: mpoe compose BASE law.expert med.expert "
    "--output_dir OUT.",
    "plan": "Plan before converting: mpoe plan MODEL_OR_CONFIG --experts 8 --shape separable.",
    "inspect": 'Look inside: mpoe inspect MODEL_DIR [--text "..." --output_dir DIR]: routes, load, '
    "bonds.",
    "generate": "Generate text with a saved model.",
    "info": "Show versions, kernel backends (and why the others cannot run here) and devices; or "
    "experts' files.",
    "demo": "Train three experts apart and compose them, on texts that are here (--compare: dense, "
    "Switch, MPOE).",
    "bench": "Measure MPO experts against the dense layer and their peers on this machine.",
}
USER_ERROR = 2
INTERRUPTED = 130


def run(words: list[str]) -> None:
    """Run the command that ``words`` name.

    Raises:
        CommandError: there is no such command, or the command refuses.
    """
    if not words or words[0] in ("-h", "--help"):
        print("Usage: mpoe [--version] [--help] [--debug] COMMAND ...\n")
        print(
            "Turn a pretrained T5, GPT-2, Llama or BERT into a parameter-efficient mixture of "
            "experts.\n"
        )
        print("\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))
        print("\nmpoe COMMAND --help lists the options of a command.")
    elif words[0] == "--version":
        from mpoe_kernels.version import __version__

        print(f"mpoe {__version__}")
    elif words[0] in COMMANDS:
        if words[0] != "bench":
            # Waiting threads that spin for long cost minutes on shared cores; torch reads this when
            # it loads.
            os.environ.setdefault("GOMP_SPINCOUNT", "30000")
        asks_help = any(word in ("-h", "--help") for word in words[1:])
        if asks_help and "all" not in words:
            show_help(SHORT[words[0]].usage, COMMANDS[words[0]], (), SHORT[words[0]].options)
            return
        if not asks_help:
            check_installed(words[0])
        importlib.import_module(f"mpoe.cli.{words[0]}").command(words[1:])
    else:
        kind = "option" if words[0].startswith("-") else "command"
        raise CommandError(
            f"no such {kind} {words[0]!r}{close_matches(words[0], COMMANDS)} (see mpoe --help)"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on ``arguments`` (default: the process's) and exit.

    Exit codes: 0 success, 1 a bug (with traceback), 2 a refusal (one line on stderr), 130
    interrupted.
    """
    # torchao registers two Enums, of which torch would warn when a command imports Transformers.
    logging.getLogger("torch.utils._pytree").addFilter(
        lambda record: "is an Enum subclass" not in str(record.msg)
    )
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = arguments[:1] == ["--debug"]
    code = 0
    try:
        run(arguments[debug:])
    except KeyboardInterrupt as stop:
        print(": ".join(["mpoe: interrupted", *map(str, stop.args)]), file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        known = is_on_purpose(error)
        if debug or not known:
            traceback.print_exception(error)
        if known:
            print(
                f"mpoe: error: {' '.join(str(error).split()) or type(error).__name__}",
                file=sys.stderr,
            )
        code = USER_ERROR if known else 1
    sys.exit(code)


if __name__ == "__main__":
    main()
