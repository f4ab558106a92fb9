"""Units: what the policy decides about. One kind of adapter module on one group of neighbouring sites."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from modmeta.adapters.module import MODULES, AdapterModule, Cost
from modmeta.backbone import Backbone, Selector, Site
from modmeta.errors import ModmetaError, unknown
from modmeta.registry import suits


@dataclass(frozen=True)
class UnitConfig:
    """Which module goes to which sites, and how the sites are grouped into units.

    Attributes:
        module: registered name of the adapter module.
        options: the module's own options, such as ``{"rank": 8}``.
        kinds: site kinds; None takes every kind that the module acts on.
        stages: stages of the backbone; None takes all.
        depth: share of the way through the backbone, from 0 (images) to 1 (features).
        names: glob patterns of site names; None takes all.
        group: sites that are decided about together.
        gate: how much of the module an untrained policy lets count, in 0..1; where its learning starts.
        rate: learning rate that an untrained policy gives, as root mean square change per step, above 0.
    """

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    kinds: list[str] | None = None
    stages: list[int] | None = None
    depth: tuple[float, float] = (0.0, 1.0)
    names: list[str] | None = None
    group: Literal["site", "block", "stage", "all"] = "stage"
    gate: float = 0.8
    rate: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 <= self.gate <= 1.0:
            raise ModmetaError(f"units: gate of {self.module!r} must lie in 0..1, got {self.gate}")
        if not 0.0 < self.rate < math.inf:
            raise ModmetaError(f"units: rate of {self.module!r} must be finite and above 0, got {self.rate}")


@dataclass(frozen=True)
class Unit:
    """One module kind on one group of sites.

    Attributes:
        name: ``module@group``, unique among the units of a model.
        module: the adapter module's class.
        sites: the sites, in execution order.
        options: the module's options.
        cost: what the unit adds, summed over its sites.
        learns: whether gradient steps move it.
        reads: whether it reads something off the support images, which needs neither labels nor gradients.
        gate: gate of an untrained policy.
        rate: learning rate of an untrained policy.
    """

    name: str
    module: type[AdapterModule]
    sites: tuple[Site, ...]
    options: dict[str, Any]
    cost: Cost
    learns: bool
    reads: bool
    gate: float
    rate: float

    @property
    def depth(self) -> float:
        """Where the unit begins, from 0 (images) to 1 (features)."""
        return self.sites[0].depth

    def build(self) -> dict[str, AdapterModule]:
        """Make fresh modules, by site name."""
        return self.module.build(self.sites, **self.options)


def resolve_units(backbone: Backbone, configs: Sequence[UnitConfig]) -> tuple[Unit, ...]:
    """Find the sites of every configuration and group them, in the order of the configurations.

    Raises:
        ModmetaError: for an unknown module or option, or when no site fits (with what there is).
    """
    units: list[Unit] = []
    for config in configs:
        module = MODULES.get(config.module)
        _check_options(module, config)
        chosen = _select(backbone, module, config)
        groups: dict[str, list[Site]] = {}
        for site in chosen:
            groups.setdefault(_group_key(site, config.group), []).append(site)
        for key, sites in groups.items():
            name = _free_name(f"{module.name}@{key}", units)
            built = module.build(sites, **config.options)
            costs = [built[site.name].cost(site) for site in sites]
            total = Cost(sum(cost.parameters for cost in costs), sum(cost.macs for cost in costs))
            learns = any(True for each in built.values() for _ in each.parameters())
            reads = module.overrides("observe")
            units.append(
                Unit(
                    name,
                    module,
                    tuple(sites),
                    dict(config.options),
                    total,
                    learns,
                    reads,
                    config.gate,
                    config.rate,
                )
            )
    return tuple(units)


def _select(backbone: Backbone, module: type[AdapterModule], config: UnitConfig) -> list[Site]:
    selector = Selector(
        kinds=tuple(config.kinds or module.kinds),
        stages=None if config.stages is None else tuple(config.stages),
        depth=config.depth,
        names=None if config.names is None else tuple(config.names),
    )
    selected = selector.select(backbone.sites)
    sites = [site for site in selected if module.fits(site)]
    if not sites:
        wanted = f" with {', '.join(sorted(module.requires))}" if module.requires else ""
        refused = sum(site.kind in module.kinds for site in selected)
        raise ModmetaError(
            f"units: module {config.module!r} acts on {', '.join(sorted(module.kinds))}{wanted}, but {backbone.name} "
            f"has no such site among those selected"
            + (f"; {refused} are of that kind, but {module.__name__}.fits refuses them" if refused else "")
        )
    return sites


def _group_key(site: Site, group: str) -> str:
    match group:
        case "site":
            return site.name.replace(".", "/")
        case "block":
            return f"b{site.block}"
        case "stage":
            return "features" if site.kind == "features" else f"s{site.stage}"
        case _:
            return "all"


def _free_name(name: str, units: Sequence[Unit]) -> str:
    taken = {unit.name for unit in units}
    copies = (name, *(f"{name}#{number}" for number in range(2, len(units) + 3)))
    return next(copy for copy in copies if copy not in taken)


def required_options(module: type[AdapterModule]) -> list[str]:
    """Return the options of a module that have no default."""
    return [
        name
        for name, option in _options(module).items()
        if option.default is option.empty and option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY)
    ]


def _options(module: type[AdapterModule]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(module.__init__).parameters
    return {name: parameter for name, parameter in signature.items() if name not in ("self", "site")}


def _check_options(module: type[AdapterModule], config: UnitConfig) -> None:
    known = _options(module)
    hints = dict.fromkeys(known, Any) | get_type_hints(module.__init__)
    for option, value in config.options.items():
        if option not in known:
            raise unknown(f"option of adapter module {config.module!r}:", option, known)
        hint = hints[option]
        if not suits(value, hint):
            wanted = getattr(hint, "__name__", hint)
            raise ModmetaError(f"units: option {option!r} of module {config.module!r} is {value!r}; give {wanted}")
    for option in required_options(module):
        if option not in config.options:
            raise ModmetaError(f"units: module {config.module!r} needs the option {option!r}")
