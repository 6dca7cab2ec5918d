"""Rows of a table kept as an MPO: its op and the kernels of every backend."""
