"""The suites: which sections `mpoe bench` measures."""

from mpoe_bench.suites.plan import SCALES, SUITES, Scale, sections_of

__all__ = ["SCALES", "SUITES", "Scale", "sections_of"]
