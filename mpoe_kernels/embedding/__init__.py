"""Lookup of rows in a table stored as an MPO: the op and the kernels of every backend."""
