"""Every module that ships, on tiny models of many timm families: the whole contract."""

from importlib.metadata import entry_points

import pytest

from modmeta.adapters import MODULES, check_module
from modmeta.adapters.conformance import _host

# One model per family that the kit's own tests do not use: these families lay out their layers differently.
FAMILIES = {
    "byobnet": "test_byobnet",
    "convnext": "test_convnext2",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "nfnet": "test_nfnet",
    "resnet": "test_resnet",
    "vision_transformer": "test_vit2",
}
BUILT_IN = sorted(entry.name for entry in entry_points(group="modmeta.modules") if "modmeta_modules" in entry.value)


@pytest.mark.parametrize("backbone", FAMILIES.values(), ids=FAMILIES)
def test_every_module_that_fits_conforms(backbone: str) -> None:
    sites = _host(backbone).sites
    fitting = [name for name in BUILT_IN if any(MODULES.get(name).fits(site) for site in sites)]
    assert {"bottleneck", "full", "lora", "projection"} <= set(fitting)
    for name in fitting:
        check_module(MODULES.get(name), backbones=(backbone,))


def test_every_module_fits_some_family() -> None:
    sites = [site for backbone in FAMILIES.values() for site in _host(backbone).sites]
    assert [name for name in BUILT_IN if not any(MODULES.get(name).fits(site) for site in sites)] == []
