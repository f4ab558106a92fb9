"""The conformance kit: what every adapter module must do, as one call for its author's own tests."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.func import functional_call

from modmeta.adapters.adapted import AdaptedBackbone, Gates, State, bind
from modmeta.adapters.liveness import check_alive
from modmeta.adapters.module import MODULES, AdapterModule, Layer
from modmeta.adapters.units import Unit, UnitConfig
from modmeta.backbone import Backbone, Rerun, Site, second_order_safe

BACKBONES = ("test_resnet", "test_efficientnet", "test_efficientnet_gn", "test_vit", "test_convnext")
"""Tiny timm models with batch, group and layer normalisation, plain and depthwise convolutions, and attention."""

_MERGE_ERROR = 1e-4


@dataclass(frozen=True)
class _Case:
    """One module on one backbone, and a state under which every one of its tensors is off the identity."""

    model: AdaptedBackbone
    unit: Unit
    images: Tensor
    moved: State

    @property
    def gates(self) -> Gates:
        return {self.unit.name: 1.0}

    def features(self, state: State, gates: Gates | None = None) -> Tensor:
        return self.model(self.images, state, self.gates if gates is None else gates)

    def local(self, site: Site) -> dict[str, Tensor]:
        tensors = self.model.backbone.tensors()
        return {name: tensors[f"{site.name}.{name}"] for name in site.shapes}

    def tensors_of(self, site: Site, state: State) -> dict[str, Tensor]:
        prefix = f"{self.unit.name}|{site.name}|"
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def check_module(cls: type[AdapterModule], *, backbones: Sequence[str] = BACKBONES, **options: Any) -> None:
    """Check an adapter module against the whole contract, on every backbone on which it has a meaning.

    One line in a test is enough: ``check_module(MyModule)`` or ``check_module(MyModule, rank=2)``.

    Args:
        cls: the module's class, registered with :func:`~modmeta.adapters.register_module`.
        backbones: names of timm models to try it on; small ones keep it fast.
        **options: the module's own options.

    Raises:
        AssertionError: naming the check, the backbone and what went wrong.
    """
    with _checking(cls, "contract"):
        _check_contract(cls)
    tried = [name for name in backbones if any(cls.fits(site) for site in _host(name).sites)]
    kinds = ", ".join(sorted(cls.kinds))
    assert tried, f"{cls.__name__}: contract: none of {', '.join(backbones)} has a site that it fits (kinds: {kinds})"
    for name in tried:
        backbone = copy.deepcopy(_host(name))
        for check, function in _CHECKS.items():
            with _checking(cls, check, name), _untouched(backbone):
                function(_case(backbone, cls, options))


@contextmanager
def _untouched(backbone: Backbone) -> Iterator[None]:
    before = backbone.fingerprint()
    try:
        yield
    finally:
        # Whatever else went wrong is likely to follow from this.
        assert backbone.fingerprint() == before, "the backbone was changed"


@contextmanager
def _checking(cls: type[AdapterModule], check: str, backbone: str | None = None) -> Iterator[None]:
    where = f"{cls.__name__}{'' if backbone is None else f' on {backbone}'}: {check}"
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


@cache
def _host(name: str) -> Backbone:
    """Return a backbone in which every weight has an effect; fresh timm models close their residual branches."""
    backbone = Backbone(name, pretrained=False, image_size=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if float(parameter.abs().max()) < 1e-2:
                parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
        for tensor_name, buffer in backbone.named_buffers():
            if tensor_name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return backbone


def _case(backbone: Backbone, cls: type[AdapterModule], options: dict[str, Any]) -> _Case:
    generator = torch.Generator().manual_seed(1)
    model = AdaptedBackbone(backbone, [UnitConfig(cls.name, dict(options), group="all")])
    moved = {
        name: tensor + (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor)
        for name, tensor in model.fresh().items()
    }
    size = backbone.image_size
    return _Case(model, model.units[0], torch.rand(3, 3, size, size, generator=generator), moved)


# ---------------------------------------------------------------------- the checks


def _check_contract(cls: type[AdapterModule]) -> None:
    name = getattr(cls, "name", None)
    assert name is not None, "the class has no name; decorate it with @register_module"
    assert name in MODULES, f"the name {name!r} is not registered"
    assert MODULES.get(name) is cls, f"the name {name!r} is registered for another class"
    assert cls.overrides("overlay") or cls.is_slot(), "neither overlay nor forward nor rerun is implemented"


@torch.no_grad()
def _check_identity(case: _Case) -> None:
    plain = case.model.backbone(case.images)
    fresh = case.features(case.model.fresh())
    assert torch.equal(fresh, plain), f"fresh, it changes features by up to {_gap(fresh, plain):.2e}; not one bit may"
    half = case.features(case.model.fresh(), {case.unit.name: torch.tensor(0.3)})
    assert torch.equal(half, plain), "fresh, it changes features at gate 0.3"


@torch.no_grad()
def _check_closed(case: _Case) -> None:
    plain = case.model.backbone(case.images)
    for gates in ({case.unit.name: 0.0}, {case.unit.name: torch.tensor(0.0)}):
        assert torch.equal(case.features(case.moved, gates), plain), "at gate 0 it still changes features"


def _check_alive(case: _Case) -> None:
    check_alive(case.model)


@torch.no_grad()
def _check_pure(case: _Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.moved.items()}
    once, again = case.features(case.moved), case.features(case.moved)
    assert torch.equal(once, again), "two calls with the same state differ"
    changed = [name for name, tensor in case.moved.items() if not torch.equal(tensor, before[name])]
    assert not changed, f"a forward pass changed its own state {changed[0]!r}"


def _check_gradients(case: _Case) -> None:
    names = case.model.learned_names(case.unit)
    if not names:
        return
    leaves = {name: case.moved[name].clone().requires_grad_() for name in names}
    with torch.enable_grad(), second_order_safe():
        features = case.features(case.moved | leaves)
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad((features * weight).sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        assert gradient is not None, f"no gradient reaches {name!r}"
        assert bool(torch.isfinite(gradient).all()), f"the gradient of {name!r} is not finite"
        assert bool(gradient.any()), f"the gradient of {name!r} is zero everywhere"


@torch.no_grad()
def _check_functional(case: _Case) -> None:
    attached, plain = case.unit.build(), case.unit.build()
    for site in case.unit.sites:
        tensors = case.tensors_of(site, case.moved)
        for name, tensor in [*attached[site.name].named_parameters(), *attached[site.name].named_buffers()]:
            tensor.copy_(tensors[name])
        if case.unit.module.overrides("forward"):
            x, y = _activations(case, site)
            found, expected = functional_call(plain[site.name], tensors, (x, y)), attached[site.name](x, y)
            assert torch.equal(found, expected), f"at {site.name}: torch.func.functional_call gives another output"
    message = "it does not read all of its tensors from its parameters and buffers"
    _assert_same(_act(_bound(plain, case), case), _act(attached, case), message)


@torch.no_grad()
def _check_copies(case: _Case) -> None:
    built = case.unit.build()
    expected = _act(_bound(built, case), case)
    own = {tensor.data_ptr() for module in built.values() for tensor in _tensors(module)}
    for how, copied in (
        ("deepcopy", {name: copy.deepcopy(module) for name, module in built.items()}),
        ("pickle", {name: pickle.loads(pickle.dumps(module)) for name, module in built.items()}),
    ):
        _assert_same(_act(_bound(copied, case), case), expected, f"a {how} acts differently")
        shared = [tensor for module in copied.values() for tensor in _tensors(module) if tensor.data_ptr() in own]
        assert not shared, f"a {how} shares tensors with the original"


@torch.no_grad()
def _check_file(case: _Case) -> None:
    again = load(save({name: tensor.contiguous() for name, tensor in case.moved.items()}))
    assert again.keys() == case.moved.keys(), "a safetensors file does not bring back every tensor"
    assert torch.equal(case.features(again), case.features(case.moved)), "features differ after a safetensors file"


@torch.no_grad()
def _check_merge(case: _Case) -> None:
    if case.unit.module.is_slot():
        return
    merged = copy.deepcopy(case.model.backbone.model)
    merged.load_state_dict(case.model.overlay(case.moved, case.gates), strict=False)
    found, expected = merged(case.model.backbone.prepare(case.images)), case.features(case.moved)
    error = _gap(found, expected) / max(1.0, float(expected.abs().max()))
    assert error < _MERGE_ERROR, f"written into the timm model, features are off by {error:.2e}"


@torch.no_grad()
def _check_vmap(case: _Case) -> None:
    fresh = case.model.fresh()
    states = [{n: fresh[n] + k * (t - fresh[n]) for n, t in case.moved.items()} for k in (0.5, 1.0)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in fresh}
    for gate in (1.0, 0.4):
        gates = {case.unit.name: gate}
        with second_order_safe():  # the attention that vmap knows how to batch
            together = torch.func.vmap(lambda state, gates=gates: case.features(state, gates))(stacked)
            alone = torch.stack([case.features(state, gates) for state in states])
        error = _gap(together, alone) / max(1.0, float(alone.abs().max()))
        assert error < 1e-3, f"under vmap features are off by {error:.2e} at gate {gate}"


@torch.no_grad()
def _check_bf16(case: _Case) -> None:
    half = AdaptedBackbone(
        copy.deepcopy(case.model.backbone).to(torch.bfloat16),
        [UnitConfig(case.unit.module.name, case.unit.options, group="all")],
    )
    moved = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in case.moved.items()}
    features = half(case.images, moved, case.gates)
    assert features.dtype == torch.bfloat16, f"in bfloat16 features come out as {features.dtype}"
    assert bool(torch.isfinite(features).all()), "in bfloat16 features are not finite"


@torch.no_grad()
def _check_observe(case: _Case) -> None:
    if not case.unit.reads:
        return
    fresh = case.model.fresh()
    _, observed = case.model.observe(case.images, fresh, case.gates)
    learned = case.model.learned_names(case.unit)
    for name, tensor in observed.items():
        assert name in fresh, f"observe returns {name!r}, which is no buffer of the module"
        assert name not in learned or tensor is fresh[name], f"observe returns {name!r}, which is a parameter"
        assert tensor.shape == fresh[name].shape, f"observe changes the shape of {name!r}"
        assert bool(torch.isfinite(tensor).all()), f"observe gives {name!r} numbers that are not finite"
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in observed.items()), "observe reads nothing"
    assert bool(torch.isfinite(case.features(observed)).all()), "features after observe are not finite"


_CHECKS: dict[str, Callable[[_Case], None]] = {
    "identity when fresh": _check_identity,
    "gate 0 equals absent": _check_closed,
    "liveness": _check_alive,
    "pure function of the state": _check_pure,
    "gradients": _check_gradients,
    "functional call equals attached call": _check_functional,
    "deepcopy and pickle": _check_copies,
    "file round trip": _check_file,
    "merge": _check_merge,
    "vmap": _check_vmap,
    "bfloat16": _check_bf16,
    "observe": _check_observe,
}


# ---------------------------------------------------------------------- parts


def _tensors(module: AdapterModule) -> list[Tensor]:
    return [tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.numel()]


def _bound(modules: Mapping[str, AdapterModule], case: _Case) -> dict[str, AdapterModule]:
    return {site.name: bind(modules[site.name], case.tensors_of(site, case.moved)) for site in case.unit.sites}


def _act(modules: Mapping[str, AdapterModule], case: _Case) -> dict[str, Tensor]:
    """Return what the unit's modules do at their sites, as overlays and on the activations of the plain backbone."""
    done = {
        f"{name} of {site.name}": tensor
        for site in case.unit.sites
        for name, tensor in modules[site.name].overlay(case.local(site)).items()
    }
    carried: dict[str, Tensor] = {}

    def record(name: str, x: Tensor, y: Tensor, run: Rerun) -> Tensor:
        done[f"output of {name}"] = modules[name].rerun(x, y, Layer(run, carried)).clone()
        return y

    if case.unit.module.is_slot():
        slots = {site.name: partial(record, site.name) for site in case.unit.sites}
        case.model.backbone.run(case.images, slots=slots)
    return done


def _activations(case: _Case, site: Site) -> tuple[Tensor, Tensor]:
    """Return what goes into the site and what comes out of it on the case's images."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(x: Tensor, y: Tensor, _run: Rerun) -> Tensor:
        seen.append((x.clone(), y.clone()))
        return y

    case.model.backbone.run(case.images, slots={site.name: record})
    assert seen, f"the model never calls {site.name}, so a slot there cannot act; leave such sites out in fits"
    return seen[0]


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], message: str) -> None:
    assert found.keys() == expected.keys(), message
    for what, tensor in found.items():
        assert torch.equal(tensor, expected[what]), f"{message}: {what}"


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
