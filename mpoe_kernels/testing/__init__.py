"""Launches that are recorded instead of made, for tests and tools."""
