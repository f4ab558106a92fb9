"""Liveness: a unit that changes nothing is an error, not a surprise after training."""

from __future__ import annotations

import copy

import torch

from modmeta.adapters.adapted import AdaptedBackbone
from modmeta.adapters.units import Unit
from modmeta.errors import ModmetaError


class DeadUnitError(ModmetaError):
    """A unit's tensors were changed and no feature moved."""


@torch.no_grad()
def dead_sites(model: AdaptedBackbone, unit: Unit) -> list[str]:
    """Return the sites of ``unit`` at which a change of the module reaches no feature.

    Two random images are run through the backbone with the module of one site at a time perturbed.
    """
    size = model.backbone.image_size
    device = next(model.backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=generator).to(device)
    start = model.backbone.cut_before([site.name for site in unit.sites])
    hidden = images if start is None else model.backbone.run(images, stop=start)
    fresh = {name: tensor.to(device) for name, tensor in model.fresh().items()}
    before = model(hidden, fresh, {unit.name: 1.0}, start=start)
    dead = []
    for site in unit.sites:
        prefix = f"{unit.name}|{site.name}|"
        moved = {
            name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator).to(device)
            for name, tensor in fresh.items()
            if name.startswith(prefix)
        }
        after = model(hidden, fresh | moved, {unit.name: 1.0}, start=start)
        if torch.equal(before, after):
            dead.append(site.name)
    return dead


def _awake(model: AdaptedBackbone) -> AdaptedBackbone:
    """Return the model with scales that random initialisation sets to (nearly) zero set to one.

    Residual branches start closed in many models. That is no reason why a change could never reach the features.
    """
    closed = [
        name
        for name, tensor in model.backbone.model.named_parameters()
        if tensor.ndim <= 1 and name.rpartition(".")[2] != "bias" and float(tensor.detach().abs().max()) < 1e-2
    ]
    if not closed:
        return model
    awake = copy.deepcopy(model)
    for name in closed:
        awake.backbone.model.get_parameter(name).data.fill_(1.0)
    return awake


def check_alive(model: AdaptedBackbone) -> None:
    """Probe every unit.

    Raises:
        DeadUnitError: naming the first unit with dead sites, and the sites.
    """
    awake = _awake(model)
    for unit in awake.units:
        dead = dead_sites(awake, unit)
        if dead:
            shown = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
            raise DeadUnitError(
                f"unit {unit.name!r} is dead: changing it at {shown} changes no feature of {model.backbone.name}; "
                f"leave these sites out with names, kinds or depth"
            )
