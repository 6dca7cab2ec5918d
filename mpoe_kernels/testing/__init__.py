"""Named cases, calibrated assertions and poisoned memory, only for tests and benchmarks."""
