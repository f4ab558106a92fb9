"""The page of the modules says what the registry says."""

import inspect

import modules_page
import pytest
from matrix.tables import between

from modmeta.adapters import MODULES

PAGE = modules_page.PAGE.read_text(encoding="utf-8")
SECTIONS = {name: body for name, _, body in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}


@pytest.mark.parametrize("name", modules_page.built_in())
def test_every_module_has_its_section(name: str) -> None:
    module, section = MODULES.get(name), SECTIONS[name]
    for kind in module.kinds:
        assert f"`{kind}`" in section
    assert ("**Form:** slot" in section) == module.is_slot()
    assert ("**Form:** overlay" in section) == (not module.is_slot())
    options = [p for p in inspect.signature(module.__init__).parameters.values() if p.name not in ("self", "site")]
    assert ("**Options:** none." in section) == (not options)
    for option in options:
        assert f"| `{option.name}` | `{option.default}` |" in section


def test_costs_are_those_of_the_registry() -> None:
    now = between(PAGE, "costs", modules_page.costs(modules_page.BACKBONES))
    assert now == PAGE, "the costs have changed; run python benchmarks/modules_page.py"
