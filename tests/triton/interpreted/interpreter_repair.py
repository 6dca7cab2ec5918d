"""Repairs of Triton's interpreter, for tests only: its bfloat16, and half of its time. Import
before any kernel.

Triton's interpreter stores bfloat16 numbers as 16-bit patterns; `tl.dot` then multiplies the
patterns as integers, and conversion from float32 cuts off the low bits. Both are changed to what a
GPU does: products of the numbers, accumulated in float32, and rounding to nearest even.

Half of the time goes into asserting that no integer sum overflows (now done only in the slow tests)
and into patching `triton.language` again for every function call inside a kernel, although the
launch has already patched it.
"""

import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from . import interpreter_memory

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def to_float(bits):
    """Bit patterns of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(values):
    """float32 -> bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class _Scope:
    """A scope of patches, undone by `restore`, which the interpreter calls after a launch."""

    def __init__(self, restore):
        self.restore = restore


def _patched_once(patch):
    """Runs ``patch`` once per launch, and within it only for functions that see a language module
    not yet patched."""
    patched = set()

    def patch_lang(function):
        seen = {
            id(value) for value in function.__globals__.values() if value is tl or value is tl.core
        }
        if patched and seen <= patched:
            return _Scope(lambda: None)
        is_launch = not patched
        scope = patch(function)
        patched.update(seen)

        def restore():
            scope.restore()
            if is_launch:
                patched.clear()

        return _Scope(restore)

    return patch_lang


def repair():
    """Patch this process's interpreter; a second call changes nothing."""
    if getattr(_Builder, "_mpoe_repaired", False):
        return
    if not os.environ.get("MPOE_INTERPRETER_CHECKS_OVERFLOW"):
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
            sanitize_overflow=False
        )
    interpreter_memory.keep()
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    dot, cast, convert = _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp

    def widened(handle):
        return (
            _Handle(to_float(handle.data), tl.float32)
            if handle.dtype.scalar == tl.bfloat16
            else handle
        )

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return _Handle(to_bits(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return _Handle(to_float(source.data), tl.float32)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, mode):
        if {source.dtype.scalar, target.scalar} == {tl.float32, tl.bfloat16}:
            return cast_impl(self, source, target)
        return convert(self, source, target, mode)

    _Builder.create_dot, _Builder.cast_impl, _Builder.create_fp_to_fp = (
        create_dot,
        cast_impl,
        create_fp_to_fp,
    )
    if not hasattr(
        _Builder, "get_bf16"
    ):  # Triton 3.6: a Python number combined with a bfloat16 tensor
        _Builder.get_bf16 = lambda self, value: _Handle(
            to_bits(np.array([value], np.float32)), tl.bfloat16
        )
    _Builder._mpoe_repaired = True
