"""Benchmarks of mpoe: MPO experts and their peers, measured in one process, checked before they are
timed."""
