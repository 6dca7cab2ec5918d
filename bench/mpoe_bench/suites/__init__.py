"""The suites: which sections `mpoe bench` measures."""

from mpoe_bench.suites.plan import SUITES, sections_of
from mpoe_bench.suites.scale import SCALES, Scale

__all__ = ["SCALES", "SUITES", "Scale", "sections_of"]
