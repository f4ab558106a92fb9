"""One adapter module on one backbone: everything a user relies on, as figures."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from modmeta.adapters import MODULES, AdaptedBackbone, UnitConfig, conformance
from modmeta.adapters.liveness import dead_sites
from modmeta.adapters.units import Unit
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

MERGE_LIMIT = 1e-4


@dataclass(frozen=True)
class Cell:
    """What was found for one module on one backbone.

    Attributes:
        backbone: name of the timm model.
        module: registered name of the adapter module.
        units: units at the default grouping, one per stage.
        sites: places at which the module acts, each of which was probed by itself.
        live: those of them at which a change of the module reaches the features.
        identity: largest change of a feature by fresh modules; 0 means not one bit.
        merge: error of features after writing the overlay into a copy of the timm model, relative to the largest
            feature where that exceeds 1; None for modules that add computation.
        failures: one line per check that failed.
    """

    backbone: str
    module: str
    units: int
    sites: int
    live: int
    identity: float
    merge: float | None
    failures: tuple[str, ...]


def fitting(backbone: Backbone) -> list[str]:
    """Return the names of the registered modules that have a meaning somewhere in ``backbone``."""
    return [name for name in MODULES.names() if any(MODULES.get(name).fits(site) for site in backbone.sites)]


def measure(backbone: Backbone, name: str) -> Cell:
    """Measure the module ``name`` with its default options at all sites that it fits."""
    before = backbone.fingerprint()
    failures = []
    case = conformance._case(backbone, MODULES.get(name), {})
    for check in ("gradients", "functional call equals attached call"):
        try:
            conformance._CHECKS[check](case)
        except AssertionError as error:
            failures.append(f"{check}: {error}")
    with torch.no_grad():
        plain, fresh = backbone(case.images), case.features(case.model.fresh())
    if not bool(torch.isfinite(plain).all()):
        raise ModmetaError(f"features of the random {backbone.name} are not finite; nothing can be said of modules")
    identity = float((fresh - plain).abs().max())
    merge = merge_error(backbone, name)
    units, dead = probe(backbone, name)
    if not torch.equal(fresh, plain):
        failures.append(f"identity when fresh: features change by {identity:.1e}")
    if merge is not None and not merge < MERGE_LIMIT:
        failures.append(f"merge: features are off by {merge:.1e}")
    if dead:
        failures.append(f"liveness: nothing happens at {', '.join(dead[:3])}{' ...' if len(dead) > 3 else ''}")
    if backbone.fingerprint() != before:
        failures.append("host: the backbone was changed")
    sites = len(case.unit.sites)
    return Cell(backbone.name, name, len(units), sites, sites - len(dead), identity, merge, tuple(failures))


def probe(backbone: Backbone, name: str) -> tuple[tuple[Unit, ...], list[str]]:
    """Return the units of the module ``name``, one per stage, and the sites at which it is dead."""
    model = AdaptedBackbone(backbone, [UnitConfig(name)])
    return model.units, [site for unit in model.units for site in dead_sites(model, unit)]


@torch.no_grad()
def merge_error(backbone: Backbone, name: str) -> float | None:
    """Return the error of features, relative where they exceed 1, after writing the overlay into the timm model.

    None for modules that add computation.
    """
    case = conformance._case(backbone, MODULES.get(name), {})
    if case.unit.module.is_slot():
        return None
    merged = copy.deepcopy(case.model.backbone.model)
    merged.load_state_dict(case.model.overlay(case.moved, case.gates), strict=False)
    found, expected = merged(case.model.backbone.prepare(case.images)), case.features(case.moved)
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
