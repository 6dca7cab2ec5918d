"""Quality of mixtures of experts: arms, fields, seeds; tables that say which differences are significant.

`python -m mpoe_bench.quality --help`; see bench/README.md.
"""
