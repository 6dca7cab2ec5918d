"""``python -m mpoe``: the command line, where the ``mpoe`` script is not on the path."""

from mpoe.cli.main import main

if __name__ == "__main__":
    main()
