"""Quality of mixtures of experts: arms, fields, seeds; tables that say what is significant and what is not.

`python -m mpoe_bench.quality --help`; see bench/README.md.
"""
