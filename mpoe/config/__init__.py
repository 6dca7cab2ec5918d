"""`MPOEConfig` and `RouterConfig`: what decides how a converted model looks, checked at construction."""

from mpoe.config.mixture import MPOEConfig
from mpoe.config.router import RouterConfig
from mpoe.config.shapes import NAMED_SHAPES

__all__ = ["NAMED_SHAPES", "MPOEConfig", "RouterConfig"]
