"""``modules`` on a backbone: its sites, and where modules or configured units act and what they cost."""

from __future__ import annotations

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from modmeta.adapters import MODULES, Cost, Unit, UnitConfig, resolve_units
from modmeta.adapters.units import required_options
from modmeta.backbone import KINDS, Backbone, Site
from modmeta.commands.arguments import read_yaml
from modmeta.commands.explain import explain_interpolation
from modmeta.commands.interpolation import without_environment
from modmeta.commands.plugins import import_files, resolve_file
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError, unknown
from modmeta.evaluation.terminal import console

_UNIT_KEYS = tuple(UnitConfig.__dataclass_fields__)


def run(options: argparse.Namespace) -> int:
    """Print the tables that the options ask for."""
    import_files([resolve_file(name) for name in options.modules])
    units, described = _read_units(Path(options.units)) if options.units else ([], {})
    name = options.backbone or described.get("name")
    if name is None:
        raise ModmetaError(f"--units {options.units} names no backbone; add --backbone NAME")
    backbone = Backbone(name, False, options.image_size or described.get("image_size"))
    print(
        f"{name} with random weights, {backbone.image_size} pixels: {backbone.macs() / 1e6:.1f} million "
        f"MACs, {sum(p.numel() for p in backbone.parameters()):,} parameters, {backbone.feature_dim} features"
    )
    if options.units:
        console().print(units_table(backbone, resolve_units(backbone, units)))
    else:
        console().print(sites_table(backbone))
        console().print(modules_table(backbone))
    return 0


def sites_table(backbone: Backbone) -> Table:
    """Return the number of sites per kind and stage."""
    stages = sorted({site.stage for site in backbone.sites})
    counts = Counter((site.kind, site.stage) for site in backbone.sites)
    table = Table(title="sites")
    table.add_column("kind")
    for stage in stages:
        table.add_column(f"stage {stage}", justify="right")
    for kind in KINDS:
        if any(counts[kind, stage] for stage in stages):
            table.add_row(kind, *(str(counts[kind, stage] or "") for stage in stages))
    return table


def modules_table(backbone: Backbone) -> Table:
    """Return where each registered module fits, with its default options, and what it costs."""
    table = Table(title="modules with their default options, on every site that they fit")
    for heading in ("module", "sites", "parameters", "added MACs"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for name in MODULES.names():
        module = MODULES.get(name)
        count = sum(module.fits(site) for site in backbone.sites)
        needed = required_options(module)
        if count and needed:
            table.add_row(name, str(count), f"needs {', '.join(needed)}", "-")
        elif count:
            (unit,) = resolve_units(backbone, [UnitConfig(name, group="all")])
            table.add_row(name, str(len(unit.sites)), f"{unit.cost.parameters:,}", f"{unit.cost.macs:,}")
        else:
            table.add_row(name, "0", "-", "-", style="dim")
    return table


def units_table(backbone: Backbone, units: tuple[Unit, ...]) -> Table:
    """Return one row per unit and one per site of it.

    The gradient of a step runs through the backbone behind the last cut before the unit or site, and through what
    that adds itself.
    """
    caption = "forward: added to a prediction; backward: what the gradient of a step runs through; per image"
    table = Table(title=f"{len(units)} units, and their sites", caption=caption)
    table.add_column("unit, site", overflow="fold")
    table.add_column("kind")
    for heading in ("depth", "shape", "parameters", "forward MACs", "backward MACs"):
        table.add_column(heading, justify="right")
    for unit in units:
        kinds = ", ".join(sorted({site.kind for site in unit.sites}))
        depth, sites = f"{unit.depth:.2f}", f"{len(unit.sites)} site{'s' if len(unit.sites) > 1 else ''}"
        table.add_row(unit.name, kinds, depth, sites, *_counts(backbone, unit, unit.sites, unit.cost), style="bold")
        modules = unit.build()
        for site in unit.sites:
            counts = _counts(backbone, unit, (site,), modules[site.name].cost(site))
            table.add_row(f"  {site.name}", site.kind, f"{site.depth:.2f}", _shape(site), *counts)
        table.add_section()
    return table


def _counts(backbone: Backbone, unit: Unit, sites: Sequence[Site], cost: Cost) -> tuple[str, str, str]:
    backward = backbone.macs(backbone.cut_before([site.name for site in sites])) + cost.macs if unit.learns else 0
    return f"{cost.parameters:,}", f"{cost.macs:,}", f"{backward:,}"


def _shape(site: Site) -> str:
    """Return the shape of a layer's weight, or else of what comes out of the site per image."""
    return "x".join(map(str, site.shapes.get("weight", (site.positions, site.channels))))


def _read_units(path: Path) -> tuple[list[UnitConfig], dict[str, Any]]:
    """Return the units of a configuration or of a plain list, and the configuration's backbone."""
    content = read_yaml(path)
    learner = {"units": content}
    if isinstance(content, dict):
        learner = _resolve(content).get("model", {}).get("init_args", {})
    units = learner.get("units")
    if not isinstance(units, list) or not all(isinstance(unit, dict) and "module" in unit for unit in units):
        raise ModmetaError(f"--units {path}: expected a fit configuration, or a list of units with `module`")
    for unit in units:
        for key in unit:
            if key not in _UNIT_KEYS:
                raise unknown("key of a unit", key, _UNIT_KEYS, str(path))
    return [UnitConfig(**unit) for unit in units], learner.get("backbone", {})


def _resolve(content: dict[str, Any]) -> dict[str, Any]:
    """Fill in interpolations, which may name keys that only have a default."""
    parameters = inspect.signature(DomainDataModule).parameters.values()
    defaults = {"data": {parameter.name: parameter.default for parameter in parameters}}
    try:
        with without_environment():
            resolved = OmegaConf.to_container(OmegaConf.merge(defaults, content), resolve=True)
    except OmegaConfBaseException as error:
        raise explain_interpolation(error.full_key, str(error), ()) from error
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]
