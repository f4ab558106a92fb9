"""Which sites a module goes to, how they are grouped, and what is said about those that cannot be."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modmeta.adapters import (
    AdaptedBackbone,
    AdapterModule,
    DeadUnitError,
    UnitConfig,
    check_alive,
    register_module,
    resolve_units,
)
from modmeta.backbone import Site
from modmeta.errors import ModmetaError

Make = Callable[..., AdaptedBackbone]


@register_module("test_half_dead")
class HalfDead(AdapterModule):
    """Acts on the first norm only, whatever sites it is given."""

    kinds = frozenset({"norm"})

    def __init__(self, site: Site, only: str = "bn1") -> None:
        super().__init__(site)
        self.only = only
        self.delta = nn.Parameter(torch.zeros(site.shapes["weight"]))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factor = 1.0 if self.site.name == self.only else 0.0
        return {"weight": tensors["weight"] + factor * self.delta}


@register_module("test_needs_an_option")
class NeedsAnOption(AdapterModule):
    kinds = frozenset({"norm"})

    def __init__(self, site: Site, size: int) -> None:
        super().__init__(site)


@pytest.mark.parametrize("group", ["site", "block", "stage", "all"])
def test_groups_part_the_sites(group: Any, make: Make) -> None:
    model = make("test_efficientnet", UnitConfig("film", group=group))
    backbone = model.backbone
    norms = [site for site in backbone.sites if site.kind == "norm"]
    # Every norm is in exactly one unit, in order of execution.
    assert sorted((site for unit in model.units for site in unit.sites), key=lambda s: s.order) == norms
    key = {"site": lambda s: s.name, "block": lambda s: s.block, "stage": lambda s: s.stage, "all": lambda s: 0}[group]
    expected: dict[Any, list[Site]] = {}
    for site in norms:
        expected.setdefault(key(site), []).append(site)
    assert [list(unit.sites) for unit in model.units] == list(expected.values())
    assert len({unit.name for unit in model.units}) == len(model.units)
    for unit in model.units:
        assert unit.depth == min(site.depth for site in unit.sites)


def test_selectors_restrict(make: Make) -> None:
    backbone = make("test_efficientnet", UnitConfig("film")).backbone

    def sites(**options: Any) -> set[str]:
        units = resolve_units(backbone, [UnitConfig("lora", group="all", **options)])
        return {site.name for unit in units for site in unit.sites}

    every = {site.name: site for site in backbone.sites if site.kind in ("conv", "pwconv", "qkv", "proj", "mlp")}
    assert sites() == set(every)
    assert sites(kinds=["conv"]) == {name for name, site in every.items() if site.kind == "conv"}
    assert sites(stages=[1, 3]) == {name for name, site in every.items() if site.stage in (1, 3)}
    assert sites(depth=(0.5, 1.0)) == {name for name, site in every.items() if site.depth >= 0.5}
    assert sites(names=["*conv_pw*", "conv_stem"]) == {n for n in every if "conv_pw" in n or n == "conv_stem"}


def test_a_module_goes_only_where_it_has_a_meaning(make: Make) -> None:
    model = make("test_efficientnet", UnitConfig("norm_blend"))
    assert all("running_mean" in site.shapes for unit in model.units for site in unit.sites)
    for name in ("test_convnext", "test_vit", "test_efficientnet_gn"):
        with pytest.raises(ModmetaError, match=f"'norm_blend' acts on norm with .*running_mean.* but {name} has no"):
            make(name, UnitConfig("norm_blend"))


def test_equal_configurations_get_names_of_their_own(make: Make) -> None:
    model = make("test_vit", *[UnitConfig("film", group="all")] * 3)
    assert [unit.name for unit in model.units] == ["film@all", "film@all#2", "film@all#3"]


def test_cost_counts_the_tensors(make: Make) -> None:
    model = make(
        "test_efficientnet", UnitConfig("film"), UnitConfig("lora", {"rank": 2}), UnitConfig("projection", {"rank": 3})
    )
    fresh = model.fresh()
    for unit in model.units:
        own = [tensor for name, tensor in fresh.items() if name.startswith(f"{unit.name}|")]
        assert unit.cost.parameters == sum(tensor.numel() for tensor in own)
    width = model.backbone.feature_dim
    assert model.units[-1].cost.macs == 2 * 3 * width
    assert model.units[0].cost.macs == 0  # an overlay merges


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (UnitConfig("flim"), "unknown adapter module 'flim'; did you mean 'film'"),
        (UnitConfig("lora", {"rnak": 2}), "unknown option of adapter module 'lora': 'rnak'; did you mean 'rank'"),
        (UnitConfig("lora", {"rank": 0}), "rank must be 1 or more, got 0"),
        (UnitConfig("lora", {"alpha": 0.0}), "alpha must be above 0"),
        (UnitConfig("lora", {"alpha": math.nan}), "alpha must be above 0"),
        (UnitConfig("lora", {"alpha": math.inf}), "alpha must be above 0 and finite"),
        (UnitConfig("lora", {"rank": "4"}), "option 'rank' of module 'lora' is '4'; give int"),
        (UnitConfig("lora", {"rank": 2.5}), "option 'rank' of module 'lora' is 2.5; give int"),
        (UnitConfig("lora", {"rank": True}), "option 'rank' of module 'lora' is True; give int"),
        (UnitConfig("lora", {"rank": None}), "option 'rank' of module 'lora' is None; give int"),
        (UnitConfig("projection", {"rank": 1.0}), r"option 'rank' of module 'projection' is 1.0; give int \| None"),
        (UnitConfig("scale", {"per_tap": 1}), "option 'per_tap' of module 'scale' is 1; give bool"),
        (UnitConfig("bottleneck", {"reduction": 0}), "reduction must be 1 or more, got 0"),
        (UnitConfig("test_needs_an_option"), "module 'test_needs_an_option' needs the option 'size'"),
        (UnitConfig("prompt"), r"'prompt' acts on block, but .* has no such site .*; \d+ are of that kind"),
        (UnitConfig("projection", {"rank": 0}), "rank must be 1 or more"),
        (UnitConfig("projection", {"rank": -1}), "rank must be 1 or more"),
        (UnitConfig("film", kinds=["conv"]), "'film' acts on norm with weight"),
        (UnitConfig("film", kinds=["nrom"]), "unknown site kind 'nrom'; did you mean 'norm'"),
        (UnitConfig("film", stages=[9]), "no site matches .*stages"),
        (UnitConfig("film", names=["nothing*"]), "no site matches"),
    ],
)
def test_what_cannot_be_is_one_line(config: UnitConfig, expected: str, make: Make) -> None:
    with pytest.raises(ModmetaError, match=expected) as caught:
        make("test_efficientnet", config)
    assert "\n" not in str(caught.value)


def test_the_least_prompt_is_one_token(make: Make) -> None:
    with pytest.raises(ModmetaError, match="prompt: length must be 1 or more, got 0"):
        make("test_vit", UnitConfig("prompt", {"length": 0}))
    model = make("test_vit", UnitConfig("prompt", {"length": 1}), UnitConfig("lora", {"alpha": 2}))
    assert any(tensor.shape == (1, 64) for tensor in model.fresh().values())


def test_a_unit_builds_its_modules_together(make: Make) -> None:
    model = make("test_vit", UnitConfig("prompt", {"deep": False}, group="block"))
    assert len(model.units) == 6
    for group, firsts in (("block", 6), ("all", 1)):
        fresh = make("test_vit", UnitConfig("prompt", {"deep": False}, group=group)).fresh()
        assert sum(name.endswith("|tokens") for name in fresh) == firsts
        assert sum(name.endswith("|strength") for name in fresh) == 6


@pytest.mark.parametrize("options", [{"gate": -0.1}, {"gate": 1.1}, {"gate": math.nan}, {"rate": 0.0}, {"rate": -1.0}])
def test_gates_and_rates_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ModmetaError, match=f"{next(iter(options))} of 'film' must"):
        UnitConfig("film", **options)


def test_dead_sites_are_named_and_living_ones_are_not(make: Make) -> None:
    model = make("test_efficientnet", UnitConfig("test_half_dead", group="all"))
    with pytest.raises(DeadUnitError, match="unit 'test_half_dead@all' is dead") as caught:
        check_alive(model)
    assert "blocks.0.0.bn1" in str(caught.value)
    assert " at bn1" not in str(caught.value)
    check_alive(make("test_efficientnet", UnitConfig("test_half_dead", names=["bn1"])))


def test_branches_that_start_closed_are_not_dead() -> None:
    # timm closes residual branches of fresh resnets (gamma = 0) and convnexts (1e-6); training opens them.
    from modmeta.backbone import Backbone

    for name in ("test_resnet", "test_convnext"):
        backbone = Backbone(name, pretrained=False, image_size=32)
        before = backbone.fingerprint()
        check_alive(AdaptedBackbone(backbone, [UnitConfig("film"), UnitConfig("lora")]))
        assert backbone.fingerprint() == before
