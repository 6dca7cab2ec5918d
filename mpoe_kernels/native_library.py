"""The compiled CPU kernels, `mpoe_kernels/_C.abi3.so`, loaded where they can be."""

from __future__ import annotations

from mpoe_kernels.compiled import FOLDER, load_library

LIBRARY = "_C.abi3.so"
# setup.py writes it where it does not build.
REASON_FILE = "_native_missing.txt"
# What the library tells of itself: what it was built from, and which instructions it uses here (``isa_compiled``:
# names, separated by spaces).
INFO_KEYS = {"version", "torch", "compiler", "isa_compiled", "isa_detected", "isa_used"}

NATIVE_LIBRARY = load_library(FOLDER / LIBRARY, "mpoe_native", REASON_FILE, INFO_KEYS)
