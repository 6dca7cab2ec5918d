"""Collected only with TRITON_INTERPRET=1; see tests/triton/test_in_interpreter.py."""

from . import interpreter_repair

interpreter_repair.repair()
