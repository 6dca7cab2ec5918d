"""The suites: what `mpoe bench` measures."""

from mpoe_bench.suites.plan import SUITES, comparisons_of, judged_of
from mpoe_bench.suites.scale import SCALES, Scale

__all__ = ["SCALES", "SUITES", "Scale", "comparisons_of", "judged_of"]
