"""Kernels run in Triton's interpreter in a process of their own: the flag must be set before Triton is imported."""

from mpoe_kernels.backends.triton.architecture import in_interpreter

collect_ignore_glob = [] if in_interpreter() else ["interpreted/*"]
