"""The command line; `mpoe.cli.main` is its entry. Heavy imports happen inside the commands that need them."""
