"""Domain indicators: the numbers that describe a new domain, globally and per unit.

An indicator is a registered function of a :class:`Situation`. Global ones return ``(width,)``, those per unit
``(U, width)``; widths never depend on the number of units, domains or classes, so a policy fits any of them.
"""

from modmeta.adaptation.indicators import shift, task, unit  # noqa: F401  (they register themselves)
from modmeta.adaptation.indicators.base import INDICATORS, Indicator, Situation, register_indicator
from modmeta.adaptation.indicators.chosen import DEFAULT_INDICATORS, IndicatorSet
from modmeta.adaptation.indicators.shift import early_shift

__all__ = [
    "DEFAULT_INDICATORS",
    "INDICATORS",
    "Indicator",
    "IndicatorSet",
    "Situation",
    "early_shift",
    "register_indicator",
]
