"""A frozen backbone with its units: features under any state of the adapter modules."""

from __future__ import annotations

import copy
import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modmeta.adapters.module import AdapterModule, Layer
from modmeta.adapters.units import Unit, UnitConfig, resolve_units
from modmeta.backbone import Backbone, Rerun, Site
from modmeta.backbone.shell import Slot

M = TypeVar("M", bound=nn.Module)

_AT_ONCE = 1_500_000
"""Numbers of input that a CPU takes at once: thirty images of 128 pixels."""

State = dict[str, Tensor]
"""Every tensor of every adapter module by its full name; what an adaptation produces."""

Gates = Mapping[str, Tensor | float]
"""How much of each unit counts, by unit name: 0 is absent, 1 is all of it; a missing unit is absent."""


class AdaptedBackbone(nn.Module):
    """Computes features of a frozen backbone under a state of its adapter modules.

    Nothing here holds a domain: the state and the gates come with every call, so that one object serves
    all domains, and a state is plain data to swap, blend, save and differentiate through.

    Args:
        backbone: the shared backbone, never changed.
        units: which modules act where.
    """

    def __init__(self, backbone: Backbone, units: Sequence[UnitConfig]) -> None:
        super().__init__()
        self.backbone = backbone
        self.units: tuple[Unit, ...] = resolve_units(backbone, units)
        # Outside the module tree: these are templates for functional calls, not state of their own.
        self._modules_of: dict[str, dict[str, AdapterModule]] = {u.name: u.build() for u in self.units}
        self._tensor_names = {
            f"{unit}|{site}|": [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
            for unit, modules in self._modules_of.items()
            for site, module in modules.items()
        }

    def fresh(self) -> State:
        """Return the state of fresh modules, under which every unit is the identity."""
        return {
            f"{unit}|{site}|{name}": tensor.detach().clone()
            for unit, modules in self._modules_of.items()
            for site, module in modules.items()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }

    def learned_names(self, unit: Unit) -> list[str]:
        """Return the names of the state's tensors that gradient steps on ``unit`` move."""
        modules = self._modules_of[unit.name]
        return [f"{unit.name}|{s}|{name}" for s, module in modules.items() for name, _ in module.named_parameters()]

    def forward(
        self, x: Tensor, state: State, gates: Gates, *, start: str | None = None, stop: str | None = None
    ) -> Tensor:
        """Return features ``(B, D)``, or the hidden activations at ``stop``.

        Args:
            x: images ``(B, 3, H, W)``, or what an earlier call returned at the cut ``start``.
            state: the adapter modules' tensors.
            gates: the units that count, and how much.
            start: a cut that lies before every unit with an open gate.
            stop: a cut to stop at.
        """
        active = self.active(gates)
        overlay = self.overlay(state, gates, active)
        # Slots may carry something from site to site, so those of each pass are its own.
        passes = [
            self.backbone.run(part, overlay, start=start, stop=stop, slots=self.slots(state, gates, active))
            for part in self._parts(x)
        ]
        return passes[0] if len(passes) == 1 else torch.cat(passes)

    def active(self, gates: Gates) -> list[Unit]:
        """Return the units whose gate is open."""
        return [unit for unit in self.units if _open(gates.get(unit.name, 0.0))]

    def cut_before(self, units: Iterable[Unit]) -> str | None:
        """Return the last cut before all of ``units``; with no unit, the features themselves."""
        names = [site.name for unit in units for site in unit.sites]
        return self.backbone.cut_before(names) if names else "features"

    def overlay(self, state: State, gates: Gates, units: Sequence[Unit] | None = None) -> dict[str, Tensor]:
        """Return the backbone tensors as ``units`` (by default the active ones) change them."""
        tensors = self.backbone.tensors()
        changed: dict[str, Tensor] = {}
        for unit in self.active(gates) if units is None else units:
            if unit.module.overrides("overlay"):
                for site in unit.sites:
                    changed |= self._overlay_at(unit, site, state, gates, ChainMap(changed, tensors))
        return changed

    def slots(self, state: State, gates: Gates, units: Sequence[Unit] | None = None) -> dict[str, Slot]:
        """Return, by site, what ``units`` (by default the active ones) compute there; for one forward pass."""
        slots: dict[str, list[Slot]] = {}
        for unit in self.active(gates) if units is None else units:
            if not unit.module.is_slot():
                continue
            carried: dict[str, Tensor] = {}
            for site in unit.sites:
                call = partial(_slot, self._bound(unit, site, state), gates.get(unit.name, 0.0), carried)
                slots.setdefault(site.name, []).append(call)
        return {name: partial(_chain, calls) for name, calls in slots.items()}

    def observe(
        self, x: Tensor, state: State, gates: Gates, *, start: str | None = None, stop: str | None = None
    ) -> tuple[Tensor, State]:
        """Let the units that read the support do so, in one pass from the first layer to the last.

        Each layer is observed under the changes of the layers before it, as it will be used.

        Returns:
            what :meth:`forward` would return, and the state with the observed tensors.
        """
        active = self.active(gates)
        readers = [unit for unit in active if unit.reads]
        rest = [unit for unit in active if not unit.reads]
        tensors = self.backbone.tensors()
        overlay = self.overlay(state, gates, rest)
        observed = dict(state)
        changes: dict[str, dict[str, Tensor]] = {}

        def read(unit: Unit, site: Site, x: Tensor) -> dict[str, Tensor]:
            if site.name in changes:  # a slot runs its layer again, on an input of its own
                return changes[site.name]
            local = _local(site, ChainMap(overlay, tensors))
            for name, tensor in self._modules_of[unit.name][site.name].observe(x, local).items():
                observed[f"{unit.name}|{site.name}|{name}"] = tensor
            change = self._overlay_at(unit, site, observed, gates, ChainMap(overlay, tensors))
            changes[site.name] = {name.removeprefix(f"{site.name}."): tensor for name, tensor in change.items()}
            return changes[site.name]

        observers = {site.name: partial(read, unit, site) for unit in readers for site in unit.sites}
        # An observer replaces its site's tensors itself, so the overlay must leave those to it.
        own = {f"{site.name}.{name}" for unit in readers for site in unit.sites for name in site.shapes}
        slots = self.slots(state, gates, rest)
        outside = {name: tensor for name, tensor in overlay.items() if name not in own}
        y = self.backbone.run(x, outside, start=start, stop=stop, slots=slots, observers=observers)
        return y, observed

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        """Split a large batch on a CPU, which takes twice as long where the activations do not fit its caches."""
        at_once = max(1, _AT_ONCE // max(1, math.prod(x.shape[1:])))
        small = len(x) <= at_once  # asked first: the last question walks through all modules
        if small or x.device.type != "cpu" or torch.is_grad_enabled() or self.backbone.batch_dependent:
            return [x]
        return x.split(at_once)

    def _overlay_at(
        self, unit: Unit, site: Site, state: State, gates: Gates, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        local = _local(site, tensors)
        gate = gates.get(unit.name, 0.0)
        new = self._bound(unit, site, state).overlay(local)
        return {
            f"{site.name}.{name}": _laid_out(_blend(local[name], tensor, gate), local[name])
            for name, tensor in new.items()
        }

    def _bound(self, unit: Unit, site: Site, state: State) -> AdapterModule:
        prefix = f"{unit.name}|{site.name}|"
        names = self._tensor_names[prefix]
        return bind(self._modules_of[unit.name][site.name], {name: state[prefix + name] for name in names})


def bind(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Return a view of ``module`` that reads ``tensors`` as its own parameters and buffers.

    It does what ``torch.func.functional_call`` does, for any method and at a small part of its cost, which counts
    where a step calls dozens of tiny modules; and it changes nothing that another thread could see.

    Args:
        module: the module, left as it is.
        tensors: replacements by name within the module; names of submodules are dotted.
    """
    view = copy.copy(module)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    parameters: dict[str, Any] = {name: own.get(name, tensor) for name, tensor in module._parameters.items()}
    view._parameters = parameters
    view._buffers = {name: own.get(name, tensor) for name, tensor in module._buffers.items()}
    view._modules = {
        child: bind(submodule, {n[len(child) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{child}.")})
        for child, submodule in module._modules.items()
        if submodule is not None
    }
    return view


def _slot(
    module: AdapterModule, gate: Tensor | float, carried: dict[str, Tensor], x: Tensor, y: Tensor, run: Rerun
) -> Tensor:
    return _blend(y, module.rerun(x, y, Layer(run, carried)), gate)


def _chain(slots: Sequence[Slot], x: Tensor, y: Tensor, run: Rerun) -> Tensor:
    for slot in slots:
        y, run = slot(x, y, run), partial(_with_slot, slot, run)
    return y


def _with_slot(slot: Slot, run: Rerun, x: Tensor) -> Tensor:
    return slot(x, run(x), run)


def _blend(old: Tensor, new: Tensor, gate: Tensor | float) -> Tensor:
    if not isinstance(gate, Tensor) and gate == 1.0:
        return new
    return old + gate * (new - old)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a kernel in the memory format of ``like``: convolutions choose by it how they add up, to the last bit.

    The strides of a 1x1 kernel may name two formats at once, so arithmetic loses which one was meant.
    """
    if like.ndim != 4 or tensor.stride() == like.stride() or not like.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.permute(0, 2, 3, 1).flatten(1).unflatten(1, (*like.shape[2:], like.shape[1])).permute(0, 3, 1, 2)


def _open(gate: Tensor | float) -> bool:
    return (float(gate.detach()) if isinstance(gate, Tensor) else gate) > 0.0


def _local(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[f"{site.name}.{name}"] for name in site.shapes}
