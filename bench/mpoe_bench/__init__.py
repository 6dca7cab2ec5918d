"""Benchmarks of mpoe: MPO experts and their peers, measured in one process, checked before they are timed."""

from mpoe_bench.run import check_options, run_suite

__all__ = ["check_options", "run_suite"]
