"""Adapter modules: their contract, their units on a backbone, and their states."""

from modmeta.adapters.adapted import AdaptedBackbone, Gates, State
from modmeta.adapters.bank import Bank
from modmeta.adapters.conformance import check_module
from modmeta.adapters.liveness import DeadUnitError, check_alive
from modmeta.adapters.module import MODULES, AdapterModule, Cost, Layer, register_module
from modmeta.adapters.units import Unit, UnitConfig, resolve_units

__all__ = [
    "MODULES",
    "AdaptedBackbone",
    "AdapterModule",
    "Bank",
    "Cost",
    "DeadUnitError",
    "Gates",
    "Layer",
    "State",
    "Unit",
    "UnitConfig",
    "check_alive",
    "check_module",
    "register_module",
    "resolve_units",
]
