"""The command line; `mpoe.cli.main` is its entry point. Heavy imports happen inside the commands
that need them."""
