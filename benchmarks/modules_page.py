"""Writes the costs of the built-in adapter modules into docs/modules.md, from the registry and three backbones.

    python benchmarks/modules_page.py

The rest of the page is written by hand; tests/test_docs_modules.py holds both to what the registry says.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from matrix.tables import between, markdown

from modmeta.adapters import MODULES, UnitConfig
from modmeta.adapters.units import resolve_units
from modmeta.backbone import Backbone
from modmeta.files import write_atomically

PAGE = Path(__file__).resolve().parent.parent / "docs" / "modules.md"
BACKBONES = ("resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224")


def main() -> None:
    write_atomically(PAGE, between(PAGE.read_text(encoding="utf-8"), "costs", costs(BACKBONES)).encode())


def built_in() -> list[str]:
    """Return the names of the modules that ship with modmeta."""
    points = entry_points(group="modmeta.modules")
    return sorted(point.name for point in points if point.value.startswith("modmeta_modules."))


def costs(backbones: Sequence[str]) -> str:
    """Return a Markdown table: per module with default options, at all sites that it fits, what it adds."""
    columns = [column(name) for name in backbones]
    rows = [[f"`{name}`", *(cells[name] for cells in columns)] for name in built_in()]
    return markdown(["module", *backbones], rows)


def column(name: str) -> dict[str, str]:
    """Return, by module, sites, parameters (and share of the backbone's) and additional MACs on one backbone."""
    backbone = Backbone(name, pretrained=False)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    cells = {}
    for module in built_in():
        if not any(MODULES.get(module).fits(site) for site in backbone.sites):
            cells[module] = "no site"
            continue
        (unit,) = resolve_units(backbone, [UnitConfig(module, group="all")])
        stored, macs = unit.cost.parameters, unit.cost.macs
        added = f", +{millions(macs)} M MACs ({percent(macs, backbone.macs())} %)" if macs else ""
        sites = "1 site" if len(unit.sites) == 1 else f"{len(unit.sites)} sites"
        cells[module] = f"{sites}, {thousands(stored)} ({percent(stored, total)} %){added}"
    return cells


def thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f}" if share >= 10 else f"{share:.2g}"


def millions(count: int) -> str:
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.2g}"


if __name__ == "__main__":
    main()
