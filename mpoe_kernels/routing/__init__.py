"""Routing, dispatch and combine: their ops, their reference, and the kernels of every backend."""
