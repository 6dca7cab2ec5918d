"""Benchmarks of mpoe: MPO experts and their peers, measured in one process, checked before they are timed."""

from mpoe_bench.run import check_options, expected_time, run_suite

__all__ = ["check_options", "expected_time", "run_suite"]
