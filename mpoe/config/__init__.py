"""`MPOEConfig` and `RouterConfig`: all settings of a converted model, checked at construction."""

from mpoe.config.mixture import MPOEConfig
from mpoe.config.router import RouterConfig
from mpoe.config.shapes import NAMED_SHAPES

__all__ = ["NAMED_SHAPES", "MPOEConfig", "RouterConfig"]
