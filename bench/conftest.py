"""`pytest bench` takes the options of `mpoe bench` that say what is measured."""

pytest_plugins = ["mpoe_bench.plugin"]
