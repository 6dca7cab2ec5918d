"""Named cases, calibrated assertions and poisoned memory, for tests and benchmarks alone."""
