"""The command ``mpoe``. Every command is a module of this package and imports what it needs
itself."""

import importlib
import logging
import os
import sys
import traceback

from mpoe.cli.command import HELP
from mpoe.cli.errors import CommandError, check_installed, close_matches, is_on_purpose
from mpoe.cli.short_help import COMMANDS, show_short_help

USER_ERROR = 2
INTERRUPTED = 130


def run(words: list[str]) -> None:
    """Run the command that ``words`` name.

    Raises:
        CommandError: there is no such command, or the command refuses.
    """
    if not words or words[0] in HELP:
        print("Usage: mpoe [--version] [--help] [--debug] COMMAND ...\n")
        print(
            "Turn a pretrained T5, GPT-2, Llama or BERT into a parameter-efficient mixture of "
            "experts.\n"
        )
        print("\n".join(f"  {name:10}{command.about}" for name, command in COMMANDS.items()))
        print("\nmpoe COMMAND --help lists the options of a command.")
    elif words[0] == "--version":
        from mpoe_kernels.version import __version__

        print(f"mpoe {__version__}")
    elif words[0] in COMMANDS:
        if words[0] != "bench":
            # Waiting threads that spin for long cost minutes on shared cores; torch reads this when
            # it loads.
            os.environ.setdefault("GOMP_SPINCOUNT", "30000")
        asks_help = HELP & set(words)
        if asks_help and "all" not in words:
            show_short_help(words[0])
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
