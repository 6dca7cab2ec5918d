"""The study of experts that are trained apart and composed: `python -m mpoe_bench.composed`."""
